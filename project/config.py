"""Reads configurations: YAML, a run's own one, and the errors of both in one line."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from project import retrieval
from project.data import logs
from project.data.prompt import shows_items, shows_numbers
from project.datamodule import InteractionData
from project.errors import ConfigError, ProjectError, did_you_mean
from project.exits.plan import ExitSettings
from project.model.module import ExitRecommender
from project.model.optim import OptimSettings
from project.run import read_config

UNKNOWN = re.compile(
    r"(?:[oO]ption|[kK]ey) '([^']+)' is not|accept (?:option|nested key) '([^']+)'|: --([^\s=]+)"
)
NO_PATH = re.compile(r"dot import path string: (\w+)")
MISSING = re.compile(r"No module named|module '([\w.]+)' has no attribute '(\w+)'")
NO_REASON = re.compile(
    r"Parser key|Problem with given class_path|Expected a path but|Does not validate|Subtypes:|Errors:|Given value|"
    r"Subclass types|a class path|a dict |Expected a <class 'NoneType'>$|$"
)

PRESET = "exitrec:"
WARM_SHARE = 0.25  # of a cold fit's optimizer steps
WARM_RATE = 1 / 3  # of its learning rate; at the full one a few steps harm


def with_presets(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the file of a preset in place of its name: `exitrec:quickstart`, `exitrec:overlays/bf16`."""
    # in a wheel presets lie inside the package, in a checkout beside it
    package = Path(__file__).parent
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    # by name; what lies deeper than these folders is no configuration
    presets = {
        path.relative_to(folder).with_suffix("").as_posix(): str(path)
        for below in ("", "overlays", "retrievers")
        for path in sorted((folder / below).glob("*.yaml"))
    }
    found = list[str]()
    for word in arguments:
        # `exitrec:quickstart` alone, or the value of `--config=exitrec:quickstart`
        before, mark, name = word.partition(PRESET)
        if mark and before[-1:] in ("", "="):
            if name not in presets:
                raise ConfigError(
                    f"{mark}{name} is no preset{did_you_mean(name, [*presets])}; expected {mark}NAME with one of "
                    f"{', '.join(presets)}. A file of your own is given by its path."
                )
            word = before + presets[name]
        found.append(word)
    return found


def warm_start(config: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """What a fit from a run's weights has over its configuration: WARM_SHARE of the steps, at a lower rate.

    Each epoch has fewer batches, so that validation still ends the fit.
    """
    trainer = config.get("trainer") or {}
    limits = dict[str, float]()
    for key, default in (("limit_train_batches", 1.0), ("max_steps", -1)):
        limit = trainer.get(key) or default
        if limit > 0:
            part = WARM_SHARE * limit
            limits[key] = part if isinstance(limit, float) else ceil(part)
    optim = (config.get("model") or {}).get("optim") or {}
    rate = WARM_RATE * optim.get("learning_rate", OptimSettings.learning_rate)
    model = {"initial": str(run), "optim": {"learning_rate": rate}}
    return {"model": model, "trainer": limits}


def link_model_and_data(parser: LightningArgumentParser) -> None:
    """Keys of the model and the data whose value another key sets, and the default retriever."""
    # by its class path: config.yaml of a run cannot hold the object that is the Python
    # default
    retriever = {
        "class_path": "project.retrieval.LightGCN",
        "init_args": {"item_neighbours": 30},
    }
    parser.set_defaults({"data.retriever": retriever})
    parser.link_arguments("model.backbone", "data.tokenizer")
    parser.link_arguments("data.prompt.answers", "model.answers")
    parser.link_arguments("data.prompt.segment", "model.numbers", compute_fn=shows_numbers)
    parser.link_arguments("data.prompt.segment", "model.items", compute_fn=shows_items)
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)


def open_run(run: Path) -> tuple[ExitRecommender, InteractionData]:
    """Model, without weights, and data as config.yaml of a run's folder has them; features come from its bundle."""
    config = read_config(run)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", default=0)
    parser.add_lightning_class_args(ExitRecommender, "model")
    parser.add_lightning_class_args(InteractionData, "data")
    # its criteria are imported by this; those that only a checkpoint names are not
    parser.add_class_arguments(ExitSettings, "exits", fail_untyped=False, sub_configs=True)
    link_model_and_data(parser)
    sections = ("seed_everything", "model", "data", "exits")
    try:
        found = parser.parse_object({key: config[key] for key in sections if key in config})
    except ArgumentError as error:
        raise project_error_in(error) or one_line(
            str(error), parser.get_defaults().keys()
        ) from None
    found.data.bundle = str(run / "bundle")
    made = parser.instantiate_classes(found)
    made.model.compute_in(config.get("trainer", {}).get("precision"))
    return made.model, made.data


def project_error_in(error: BaseException) -> ProjectError | None:
    """The error of this package that another one was raised from; jsonargparse wraps those of unions of types."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ProjectError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def one_line(message: str, keys: Iterable[str]) -> ConfigError:
    """The key and the reason, out of jsonargparse's many lines; `keys` are those of the configuration."""
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    if found := UNKNOWN.search(message):
        name = next(filter(None, found.groups()))
        inside = re.search(r"class_path '([^']+)'", message)
        known = inspect.signature(_imported(inside[1])).parameters if inside else keys
        near = did_you_mean(name, [*known])
        return ConfigError(
            f"{f'{key}.' if key else ''}{name} is no key of the configuration{near}."
        )
    lines = [line.strip().lstrip("- ") for line in message.splitlines()]
    reason = "; ".join(line for line in lines if not NO_REASON.match(line)) or " ".join(
        lines
    )
    if "is abstract" in reason:
        path = (
            re.findall(r"but (\S+) is abstract", reason)
            or re.findall(r"Given value: (\S+)", message)
        )[0]
        missing = " and no method ".join(sorted(_imported(path).__abstractmethods__))
        reason = f"{path} has no method {missing}; expected a class_path of a class that has them"
    if (found := MISSING.search(reason)) and found[1]:
        kinds = [
            name
            for name, kind in vars(import_module(found[1])).items()
            if isinstance(kind, type | ModuleType) and not name.startswith("_")
        ]
        reason += did_you_mean(found[2], kinds)
    if found := NO_PATH.search(reason):
        reason += did_you_mean(found[1], [*vars(retrieval), *vars(logs)])
    if reason.endswith("Got value: None") or "arguments are required" in reason:
        reason += ". Is --config FILE missing, such as exitrec:quickstart?"
    return ConfigError(f"{key}: {reason}" if key else reason)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
