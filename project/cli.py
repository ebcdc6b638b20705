"""Command line: Lightning's CLI with fixed model and data classes and more commands (project.trainer).

Lightning would let a checkpoint's hyper-parameters override the command line. Here the module refuses a checkpoint that
does not fit the configuration.
"""

from __future__ import annotations

import inspect
import re
import sys
import zipfile
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import yaml  # type: ignore[import-untyped]  # as in project.export
from jsonargparse import dict_to_namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from project.callbacks import (
    ExitCalibration,
    ResultFiles,
    RunLogger,
    SaveConfig,
    WholeCheckpoints,
)
from project.data.prompt import shows_items, shows_numbers
from project.datamodule import InteractionData
from project.errors import CheckpointError, ConfigError, ProjectError
from project.model.module import ExitRecommender
from project.run import run_of_checkpoint
from project.tracking import WandbArtifacts
from project.trainer import ProjectTrainer

LARGEST_SEED = 2**32 - 1  # numpy's
RUN_LOGGER = f"{RunLogger.__module__}.{RunLogger.__name__}"
UNKNOWN = re.compile(
    r"(?:[oO]ption|[kK]ey) '([^']+)' is not|accept (?:option|nested key) '([^']+)'|: --([^\s=]+)"
)
MISSING = re.compile(r"No module named|module '([\w.]+)' has no attribute '(\w+)'")
NO_REASON = re.compile(
    r"Parser key|Problem with given class_path|Expected a path but|Does not validate|Subtypes:|Errors:|Given value|"
    r"Subclass types|a class path|a dict |Expected a <class 'NoneType'>$|$"
)


class SectionHelp(LightningArgumentParser):
    """`fit --help` names the sections of the configuration, `fit --help data` shows one, `fit --help all` shows all."""

    def format_help(self, formatter: Any = None) -> str:
        """Lightning's, cut to the section that --help names."""
        topic = next(
            (word for flag, word in zip(sys.argv, sys.argv[1:], strict=False) if flag in ("-h", "--help")), ""
        )
        if not self.callback_keys or topic == "all":  # the parser of all commands has no sections
            return str(super().format_help(formatter))
        whole, sections = self._action_groups, dict[str, str]()
        self._action_groups, self.usage = [], f"{self.prog} --config FILE [--key value]"
        for group in whole:
            part = copy(group)
            dotted = [a for a in group._group_actions if "." in a.dest]
            for action in dotted:
                sections.setdefault(action.dest.partition(".")[0], str(group.title))
            rest = [a for a in group._group_actions if a not in dotted and a.dest not in sections]
            part._group_actions = [a for a in dotted if a.dest.startswith(f"{topic}.")] if topic else rest
            self._action_groups.append(part)
        try:
            text = str(super().format_help(formatter))
        finally:
            self._action_groups = whole
        named = [f"  {name:12}{title.split(':')[0].split('. ')[0]}" for name, title in sections.items()]
        return (
            text if topic else "\n".join([text, "sections, each with --help SECTION (or all):", *named, ""])
        )


class ProjectCLI(LightningCLI):
    """`python -m project COMMAND --config FILE [--config OVERLAY] [--key value]`.

    Args:
        others: Commands that need no configuration, and what each does; the help names them.
    """

    def __init__(self, others: Mapping[str, str] = MappingProxyType({})) -> None:
        self._others = others
        super().__init__(
            ExitRecommender,
            InteractionData,
            trainer_class=ProjectTrainer,
            parser_class=SectionHelp,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,
                "max_epochs": 1,
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 5,
            },
            parser_kwargs={
                "prog": "python -m project",
                "allow_abbrev": False,  # else `--trainer.max_epoch` would pass silently
                "exit_on_error": False,  # else the usage, of 140 lines, hides what is wrong
                "epilog": "Commands without a configuration: "
                + "; ".join(f"{name} ({what})" for name, what in others.items()),
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands, and ours."""
        ours = {"model", "datamodule"}
        return LightningCLI.subcommands() | dict.fromkeys(
            ("calibrate", "baselines", "benchmark", "rank"), ours
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that are always there, each under its own key, and keys whose value another key sets."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "select/auc/deepest",
                "checkpoint.mode": "max",
                "checkpoint.filename": "epoch_{epoch}-step_{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "checkpoint.save_on_exception": True,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(ExitCalibration, "exits")
        parser.add_lightning_class_args(ResultFiles, "results")
        parser.add_lightning_class_args(WandbArtifacts, "artifacts")
        link_model_and_data(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is wrong is raised as one ConfigError."""
        given = sys.argv[1:]
        check_command(given, [*self.subcommands(), *self._others])
        for name, value in zip(given, [*given[1:], ""], strict=True):
            if name in ("--config", "-c") or name.startswith("--config="):
                check_yaml(Path(name.partition("=")[2] or value))
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            command = next((name for name in given if name in self._subcommand_parsers), "fit")
            keys = self._subcommand_parsers[command].get_defaults().keys()
            raise project_error_in(error) or one_line(str(error), keys) from None
        except (AttributeError, ImportError) as error:  # of model.head, which is a class itself
            if not MISSING.search(str(error)):
                raise
            raise one_line(str(error), []) from None
        seed = self.config[self.config.subcommand].seed_everything
        if not 0 <= seed <= LARGEST_SEED:
            raise ConfigError(f"seed_everything is {seed}; expected 0 to {LARGEST_SEED}.")

    def instantiate_classes(self) -> None:
        """Raise a ProjectError as itself where jsonargparse wraps it, as in `MatrixFactorisation | None`."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            ours = project_error_in(error)
            if ours is None:
                raise
            raise ours from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's, with checkpoints that are written whole or not at all."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Finalise the loggers of a command that failed, as Lightning does for its own commands."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            for logger in self.trainer.loggers:
                logger.finalize("failed")
            raise

    def _parse_ckpt_path(self) -> None:
        """Do nothing: a checkpoint must not change the configuration; the module checks that they agree."""

    def before_instantiate_classes(self) -> None:
        """Put the run's folder first among the loggers; with a checkpoint it is the checkpoint's run."""
        config = self.config[self.subcommand]
        if "verbose" in config:
            config.verbose = False  # the result table has these numbers
        # 1. a CSV logger comes first, in runs/NAME where none is configured
        given = config.trainer.logger
        if given is not False:
            loggers = given if isinstance(given, list) else [] if given in (None, True) else [given]
            csv = [x for x in loggers if x.class_path.rpartition(".")[2] in ("CSVLogger", "RunLogger")]
            for logger in csv:
                logger.class_path = RUN_LOGGER
            name = Path(str(config.config[0])).stem if config.config else "run"
            where = {"save_dir": "runs", "name": name}
            default = dict_to_namespace({"class_path": RUN_LOGGER, "init_args": where})
            config.trainer.logger = [*(csv or [default]), *(x for x in loggers if x not in csv)]
        # 2. with a checkpoint every command but fit writes into the checkpoint's run
        if not config.get("ckpt_path"):
            return
        _check_file(Path(config.ckpt_path))
        config.ckpt_path = str(Path(config.ckpt_path).resolve())  # `latest` may name another run by then
        if self.subcommand == "fit":
            return
        if given is not False:
            config.trainer.logger = [x for x in config.trainer.logger if x.class_path != RUN_LOGGER]
        run = run_of_checkpoint(config.ckpt_path)
        config.checkpoint.dirpath = str(run / "checkpoints")
        config.data.bundle = str(run / "bundle")


def link_model_and_data(parser: LightningArgumentParser) -> None:
    """Keys of the model and the data whose value another key sets."""
    parser.link_arguments("model.backbone", "data.tokenizer")
    parser.link_arguments("data.prompt.answers", "model.answers")
    parser.link_arguments("data.prompt.segment", "model.numbers", compute_fn=shows_numbers)
    parser.link_arguments("data.prompt.segment", "model.items", compute_fn=shows_items)
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)


def open_run(run: Path) -> tuple[ExitRecommender, InteractionData]:
    """Model, without weights, and data as config.yaml of a run's folder has them; features come from its bundle."""
    file = run / "config.yaml"
    check_yaml(file)
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", default=0)
    parser.add_lightning_class_args(ExitRecommender, "model")
    parser.add_lightning_class_args(InteractionData, "data")
    link_model_and_data(parser)
    try:
        found = parser.parse_object(
            {k: config[k] for k in ("seed_everything", "model", "data") if k in config}
        )
    except ArgumentError as error:
        raise project_error_in(error) or one_line(str(error), parser.get_defaults().keys()) from None
    found.data.bundle = str(run / "bundle")
    made = parser.instantiate_classes(found)
    return made.model, made.data


def _check_file(checkpoint: Path) -> None:
    """Refuse a path that is no checkpoint file."""
    if checkpoint.is_file() and zipfile.is_zipfile(checkpoint):
        return
    last = checkpoint / "checkpoints" / "last.ckpt"
    example = last if last.exists() else "runs/quickstart/latest/checkpoints/last.ckpt"
    if checkpoint.is_dir():
        found = "is a folder"
    else:
        found = "is not a checkpoint, or not a whole one" if checkpoint.exists() else "does not exist"
    raise CheckpointError(
        f"ckpt_path is {checkpoint}, which {found}; expected a checkpoint that `fit` wrote, for example {example}."
    )


class _EachKeyOnce(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that stands twice in a mapping, as YAML does; PyYAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def check_yaml(file: Path) -> None:
    """Refuse a configuration that is no YAML, holds no keys and values, or has a key twice: file, line, column."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _EachKeyOnce)
    except FileNotFoundError:
        raise ConfigError(f"--config {file} does not exist; expected a YAML file.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{file}{where}: {error.problem}; expected YAML.") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {type(content).__name__}; expected keys and values.")


def check_command(arguments: Sequence[str], commands: Sequence[str]) -> None:
    """Refuse a first word that is no command; the error names all commands and the nearest."""
    if not arguments:
        raise ConfigError(
            f"python -m project needs a command; expected one of {', '.join(commands)}. Or try --help."
        )
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        near = _near(arguments[0], commands)
        raise ConfigError(f"{arguments[0]} is no command{near}; expected one of {', '.join(commands)}.")


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
        near = _near(name, list(inspect.signature(_imported(inside[1])).parameters) if inside else list(keys))
        return ConfigError(f"{f'{key}.' if key else ''}{name} is no key of the configuration{near}.")
    lines = [line.strip().lstrip("- ") for line in message.splitlines()]
    reason = "; ".join(line for line in lines if not NO_REASON.match(line)) or " ".join(lines)
    if "is abstract" in reason:
        path = (re.findall(r"but (\S+) is abstract", reason) or re.findall(r"Given value: (\S+)", message))[0]
        reason = f"{path} has no method {' and no method '.join(sorted(_imported(path).__abstractmethods__))}"
    if (found := MISSING.search(reason)) and found[1]:
        kinds = (
            n for n, kind in vars(import_module(found[1])).items() if isinstance(kind, type | ModuleType)
        )
        reason += _near(found[2], [kind for kind in kinds if not kind.startswith("_")])
    if reason.endswith("Got value: None"):
        reason += ". Is --config FILE missing, such as configs/quickstart.yaml?"
    return ConfigError(f"{key}: {reason}" if key else reason)


def _near(word: str, words: Sequence[str]) -> str:
    found = get_close_matches(word, words, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
