"""Writes a run as a Hugging Face folder (backbone, heads, exit plan, feature baseline, model card) and reads it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]  # as in project.run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from project.bundle import ITEM_VECTORS
from project.data.download import SOURCES
from project.data.prompt import shows_items, shows_numbers
from project.engine.predict import load_run
from project.errors import DataError
from project.exits.plan import ExitPlan, Plans
from project.exits.ranking import Lists
from project.features import FEATURES, FeatureBaseline, Term
from project.model.attention import SEGMENTS
from project.model.backbone import Backbone
from project.model.heads import ExitHead
from project.model.module import ExitRecommender, LoraSettings
from project.report.report import Run, read_run
from project.report.tables import render
from project.run import SCHEMA_VERSION, own_version, read_config, write_json

USAGE = "python -m project export RUN_FOLDER NEW_FOLDER"
NEEDED = ("config.yaml", "bundle/bundle.json", "bundle/tokenizer", "checkpoints/last.ckpt")
POLICY, HEADS, NUMBERS = "exit_policy.json", "heads.safetensors", "numbers.safetensors"
EVENTS = "events.json"  # of a refitted run: what its log has of a store's events
_AUTO: Any = AutoModel  # its constructors are not typed

CARD = """\
---
library_name: exitrec
{hub}tags: [recommendation, early-exit, {family}]
---

# {name}

The first {layers} layers of {base}, fine-tuned to predict from an interaction history and retrieved features whether \
a user likes a candidate ({yes}) or not ({no}), with prediction heads after layers {exits} and a calibrated exit \
policy (`{criterion}`). Written by exitrec {version}, which has the prompts, the retrieval and the early-exit \
engine.{numbers}

## Load it

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(folder)  # the backbone; its last norm is the base model's, the heads have their own
tokenizer = AutoTokenizer.from_pretrained(folder)

from project.export import load_exported  # of exitrec, which must be installed

backbone, heads, plan = load_exported(folder)
```

`python -m project serve --run FOLDER` serves it where the log's files are, by the names in config.yaml.

## What it measured

{measured}

## Data

Retrieved features by `{retriever}`. Logs, which are not included:

{files}

## Limits

Scores are of one log and its protocol; other users, items or times were not measured. The policy holds for the \
prompts and the retriever that it was calibrated with. What a log prefers, a model that is fitted to it prefers too. \
Not made for decisions about people.

## Licence

The weights are derived from the base model's, whose licence applies. {licence} The logs have their own.
"""
WITH_NUMBERS = (
    " Retrieved features in prompts, and items where their text is one token, are learned tokens with ids below zero. "
    "`load_exported` knows them, items as far as the log has them; the model alone does not."
)
NOT_TESTED = (
    "\n\nTest was not read; the numbers are of the rows that calibration was fitted on."
)


def render_card(run: Run, bundle: Mapping[str, Any], family: str, criterion: str) -> str:
    """README.md of an exported folder, from a run's results, its bundle.json and the backbone's model_type."""
    base_model = bundle["base_model"]
    path = Path(base_model).expanduser()
    on_hub = base_model not in SOURCES and base_model.count("/") == 1 and not path.exists()
    # no path of this machine
    base = path.name if path.is_absolute() or path.is_dir() else base_model
    no, yes = (repr(answer.strip()) for answer in bundle["answers"])
    files = (
        f"* `{Path(name).name}`, SHA-256 {digest}"
        for name, digest in bundle["interactions"].items()
    )
    return CARD.format(
        hub=f"base_model: {base_model}\n" if on_hub else "",
        family=family,
        name=run.name,
        layers=bundle["num_layers"],
        base=base,
        yes=yes,
        no=no,
        exits=", ".join(map(str, bundle["exit_layers"])),
        criterion=criterion,
        version=own_version(),
        numbers=WITH_NUMBERS if shows_numbers(bundle["prompt"]["segment"]) else "",
        measured=render(run.reported) + (NOT_TESTED if run.split != "test" else ""),
        retriever=bundle["retriever"]["class_path"],
        files="\n".join(files),
        licence=SOURCES[base_model].licence
        if base_model in SOURCES
        else f"See the licence of {base}.",
    )


def run_export(arguments: Sequence[str]) -> Path:
    """The command: export a run folder into a folder that does not exist yet or is empty; print its path."""
    parser = argparse.ArgumentParser(
        "python -m project export", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of a calibrated run")
    parser.add_argument(
        "folder", type=Path, help="folder that does not exist yet or is empty"
    )
    given = parser.parse_args(arguments)
    folder = export(given.run, given.folder)
    print(f"written: {folder}")
    return folder


def export(run: Path, folder: Path) -> Path:
    """Write a calibrated run's last checkpoint as a Hugging Face folder; whole or not at all."""
    # 1. refuse what is not a run, and a folder that is in use
    missing = [name for name in NEEDED if not (run / name).exists()]
    if missing:
        raise DataError(
            f"{run} lacks {', '.join(missing)}; expected the folder of a run that `fit` wrote, such as "
            "runs/quickstart/latest."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} already holds something; expected a new or an empty folder. Choose another name."
        )
    # 2. the run: its model, exit plan and results
    bundle = json.loads((run / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    results = read_run(run)
    module, plans = _load(run, bundle)
    baseline, backbone = module.feature_baseline(), module.backbone
    assert backbone is not None
    policy = {
        "schema_version": SCHEMA_VERSION,
        "version": own_version(),
        **{key: bundle[key] for key in ("exit_layers", "answers", "prompt", "protocol")},
        "feature_baseline": {
            "base": baseline.base,
            "offset": baseline.offset,
            "weights": dict(zip(baseline.names, baseline.weights.tolist(), strict=True)),
            "terms": baseline.terms,
        },
        "plan": to_json(plans.plan.state()),
        "lists": to_json(plans.lists.state()),
        "certificate": plans.certificate,
    }
    # 3. all files under a temporary name, then one renaming
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent
    ) as scratch:
        part = Path(scratch) / folder.name
        shutil.copytree(run / "bundle" / "tokenizer", part)
        _save_backbone(backbone, part)
        save_file(
            {k: v.contiguous() for k, v in module.heads.state_dict().items()}, part / HEADS
        )
        if module.numbers or module.items:
            learned = {
                name: backbone.state_dict()[f"embed_tokens.{name}"]
                for name in _learned(module.items)
            }
            items = load_file(run / "bundle" / ITEM_VECTORS) if module.items else {}
            save_file(learned | items, part / NUMBERS)
        write_json(part / POLICY, policy)
        (part / "config.yaml").write_text(_served(run, bundle), encoding="utf-8")
        if (run / EVENTS).exists():
            shutil.copy(run / EVENTS, part)
        card = render_card(
            results, bundle, backbone.config.model_type, plans.plan.criterion
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        os.replace(part, folder)
    return folder


def _served(run: Path, bundle: Mapping[str, Any]) -> str:
    """What `serve` needs of config.yaml; of absolute paths to logs and models the name is left."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(part) for key, part in value.items()}
        return (
            Path(value).name
            if isinstance(value, str) and Path(value).is_absolute()
            else value
        )

    config = read_config(run)
    data = config["data"] | {"requests": None, "bundle": None}
    data |= {key: named(data[key]) for key in ("logs", "retriever") if key in data}
    model = {"backbone": named(bundle["base_model"]), "exit_layers": bundle["exit_layers"]}
    kept = {
        "seed_everything": config.get("seed_everything", 0),
        "model": model,
        "data": data,
    }
    if "exits" in config:  # names the criterion's class
        kept["exits"] = config["exits"]
    return str(yaml.safe_dump(kept, sort_keys=False))


def _load(run: Path, bundle: Mapping[str, Any]) -> tuple[ExitRecommender, Plans]:
    """The run's module with the weights of its last checkpoint, and its plans."""
    settings = read_config(run)["model"]
    lora = settings.get("lora")
    module = ExitRecommender(
        bundle["base_model"],
        bundle["exit_layers"],
        lora=LoraSettings(**lora) if lora else None,
        freeze_embeddings=settings.get("freeze_embeddings", True),
        answers=bundle["answers"],
        numbers=shows_numbers(bundle["prompt"]["segment"]),
        items=shows_items(bundle["prompt"]["segment"]),
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "bundle" / "tokenizer")
    return module.eval(), load_run(module, tokenizer, run / "checkpoints" / "last.ckpt")


def _learned(items: bool) -> tuple[str, ...]:
    """What a backbone's embedding has beside the words, by its name in the state."""
    return ("numbers", "projection", "moments") if items else ("numbers",)


def _save_backbone(backbone: Backbone, folder: Path) -> None:
    """config.json and model.safetensors of a headless model, its adapters merged in place."""
    for layer in list(backbone.modules()):
        if hasattr(layer, "base_layer"):
            layer.merge()  # type: ignore[operator]  # peft's
    state = {
        name.replace(".base_layer.", ".").replace("final_norm.", "norm."): weights
        for name, weights in backbone.state_dict().items()
        if ".lora_" not in name and name.removeprefix("embed_tokens.") not in _learned(True)
    }
    with torch.device("meta"):  # only its names: the weights are the backbone's
        model = _AUTO.from_config(deepcopy(backbone.config), attn_implementation="sdpa")
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)


class Exported(NamedTuple):
    """Backbone, heads and exit plan of an exported folder, on the CPU, in eval mode.

    `heads` are `ExitHead` by layer, keys as text. Where `plan.exit_0`, head 0 is `exported_baseline(folder)`.
    """

    backbone: Backbone
    heads: nn.ModuleDict
    plan: ExitPlan


def load_exported(folder: str | Path) -> Exported:
    """Backbone, heads and exit plan of a folder that `export` wrote."""
    # 1. the backbone's layers
    folder = Path(folder)
    policy = _read_policy(folder)
    model, info = _AUTO.from_pretrained(
        folder, attn_implementation=SEGMENTS, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} weights of the backbone, among them {missing[:3]}; the copy is not "
            "complete. Copy or export it again."
        )
    # 2. the backbone; its LM head is empty, because the exit heads are loaded and not made
    # from it
    headless = SimpleNamespace(weight=torch.empty(0))
    backbone = Backbone(SimpleNamespace(config=model.config, model=model, lm_head=headless))
    backbone.release_lm_head()
    segment = policy["prompt"]["segment"]
    if shows_numbers(segment) or shows_items(segment):
        learned = load_file(folder / NUMBERS)
        if shows_items(segment):
            backbone.learn_items()
            backbone.embed_tokens.know(learned.pop("items"))
        else:
            backbone.learn_numbers()
        state = {f"embed_tokens.{name}": values for name, values in learned.items()}
        backbone.load_state_dict(state, strict=False)
    # 3. the heads
    direction = torch.zeros(model.config.hidden_size)
    heads = nn.ModuleDict(
        {str(k): ExitHead(backbone.final_norm, direction) for k in policy["exit_layers"]}
    )
    heads.load_state_dict(load_file(folder / HEADS))
    return Exported(
        backbone.eval(), heads.eval(), ExitPlan.from_state(from_json(policy["plan"]))
    )


def give_exported(module: ExitRecommender, folder: Path) -> tuple[ExitPlan, Lists, Any]:
    """Give a module without weights those of a folder that `export` wrote; its plan, lists, and certificate or None."""
    module.backbone, module.heads, plan = load_exported(folder)
    baseline = exported_baseline(folder)
    module.know_exit_0({"exit_0_terms": baseline.terms})
    module.exit_0.copy_(torch.from_numpy(baseline.to_array()))
    policy = _read_policy(folder)
    lists = Lists.from_state(from_json(policy["lists"]))
    return plan, lists, policy["certificate"]


def exported_baseline(folder: str | Path) -> FeatureBaseline:
    """Exit 0 of a folder that `export` wrote: logits from features, before the backbone runs."""
    known = _read_policy(Path(folder))["feature_baseline"]
    if tuple(known["weights"])[: len(FEATURES)] != FEATURES:
        raise DataError(
            f"{Path(folder) / POLICY}: exit 0 weighs the features {list(known['weights'])}; this version counts "
            f"{list(FEATURES)}. Use the version that wrote it, or export the run again."
        )
    return FeatureBaseline(
        known["base"],
        known["offset"],
        np.array(list(known["weights"].values())),
        tuple(Term(*term) for term in known["terms"]),
    )


def _read_policy(folder: Path) -> dict[str, Any]:
    path = folder / POLICY
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a folder that `{USAGE}` wrote.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema_version {content.get('schema_version')}; this version reads {SCHEMA_VERSION}. "
            "Export the run again."
        )
    return content


def to_json(value: Any) -> Any:
    """A plan's state (tensors, numbers, text, lists, dictionaries) as plain JSON; floats come back bit by bit."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return {
            "tensor": kind,
            "shape": list(value.shape),
            "values": to_json(value.flatten().tolist()),
        }
    if isinstance(value, Mapping):
        return {key: to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return {"number": str(value)}
    return value


def from_json(value: Any) -> Any:
    """What `to_json` was given, tuples as lists."""
    if isinstance(value, list):
        return [from_json(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"number"}:
        return float(value["number"])
    if value.keys() == {"tensor", "shape", "values"}:
        values, kind = from_json(value["values"]), getattr(torch, value["tensor"])
        return torch.tensor(values, dtype=kind).reshape(value["shape"])
    return {key: from_json(part) for key, part in value.items()}
