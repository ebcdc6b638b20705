"""Command line: Lightning's CLI with fixed model and data classes and more commands (project.trainer).

Lightning would let a checkpoint's hyper-parameters override the command line. Here the module refuses a checkpoint that
does not fit the configuration.
"""

from __future__ import annotations

import tempfile
import zipfile
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from jsonargparse import dict_to_namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from project.callbacks import ExitCalibration, ResultFiles, SaveConfig
from project.config import (
    MISSING,
    link_model_and_data,
    one_line,
    project_error_in,
    with_presets,
)
from project.datamodule import InteractionData
from project.errors import CheckpointError, ConfigError, did_you_mean
from project.exits.plan import ExitSettings
from project.model.initial import TRUSTED
from project.model.module import ExitRecommender
from project.run import read_yaml, run_of_checkpoint
from project.run_folder import RunLogger, WholeCheckpoints
from project.trainer import CHECKPOINTS, DEFAULTS, ProjectTrainer

LARGEST_SEED = 2**32 - 1  # numpy's
RUN_LOGGER = f"{RunLogger.__module__}.{RunLogger.__name__}"


class ProjectCLI(LightningCLI):
    """`python -m project COMMAND --config FILE [--config OVERLAY] [--key value]`.

    Args:
        arguments: The command and what follows it.
        others: Commands that need no configuration, and what each does; the help names them.
    """

    def __init__(self, arguments: Sequence[str], others: Mapping[str, str]) -> None:
        self._arguments = with_presets(arguments)
        self._others = others
        super().__init__(
            ExitRecommender,
            InteractionData,
            trainer_class=ProjectTrainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults=DEFAULTS,
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
        # arguments that Lightning gives, so that they are no options
        ours = {"model", "datamodule"}
        return LightningCLI.subcommands() | dict.fromkeys(
            ("calibrate", "baselines", "benchmark"), ours
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that are always there, each under its own key, and keys whose value another key sets."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {f"checkpoint.{name}": value for name, value in CHECKPOINTS.items()}
        )
        parser.add_class_arguments(
            ExitSettings, "exits", fail_untyped=False, sub_configs=True
        )
        parser.add_lightning_class_args(ResultFiles, "results")
        link_model_and_data(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; what is wrong is raised as one ConfigError."""
        # 1. the command and its files, before Lightning's parser takes them
        given = self._arguments
        following = [*given[1:], ""]
        check_command(given, [*self.subcommands(), *self._others])
        for name, value in zip(given, following, strict=True):
            if name in ("--config", "-c") or name.startswith("--config="):
                read_yaml(Path(name.partition("=")[2] or value))
        try:
            # 2. parse; jsonargparse's errors become one line of ours
            self.config = parser.parse_args(given)
        except ArgumentError as error:
            command = next(
                (name for name in given if name in self._subcommand_parsers), "fit"
            )
            keys = self._subcommand_parsers[command].get_defaults().keys()
            raise project_error_in(error) or one_line(str(error), keys) from None
        # of model.head, which is a class itself
        except (AttributeError, ImportError) as error:
            if not MISSING.search(str(error)):
                raise
            raise one_line(str(error), []) from None
        # 3. numpy takes no other seeds, and would only say so in training
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

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Lightning's, with exits calibrated, and with checkpoints that are written whole or not at all."""
        trainer = super().instantiate_trainer(**kwargs)
        # first of all: ResultFiles reports the plan of the same validation
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, ExitCalibration(self._get(self.config_init, "exits")))
        trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; first come the errors that need no features, at the end its loggers are finalised.

        Lightning does the latter for its own commands only.
        """
        config = self.config[subcommand]
        try:
            if subcommand not in ("baselines", "benchmark") and self.trainer.is_global_zero:
                self.model.check(
                    self.datamodule,
                    config.get("ckpt_path"),
                    subcommand,
                )
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
        # without a logger its files would lie where it is started
        if config.trainer.fast_dev_run:
            config.trainer.default_root_dir = tempfile.mkdtemp(prefix="exitrec-")
        # 1. a CSV logger comes first, in runs/NAME where none is configured
        given = config.trainer.logger
        if given is not False:
            loggers = (
                given
                if isinstance(given, list)
                else []
                if given in (None, True)
                else [given]
            )
            # the user's own CSV logger decides where the run's files go
            csv = [
                x for x in loggers if x.class_path.endswith((".CSVLogger", ".RunLogger"))
            ]
            for logger in csv:
                logger.class_path = RUN_LOGGER
            # the first file names the runs: runs/quickstart
            name = Path(str(config.config[0])).stem if config.config else "run"
            where = {"save_dir": "runs", "name": name}
            default = dict_to_namespace({"class_path": RUN_LOGGER, "init_args": where})
            config.trainer.logger = [
                *(csv or [default]),
                *(x for x in loggers if x not in csv),
            ]
        # 2. `latest` will be this run when it is read again
        if initial := config.model.initial:
            trusted = TRUSTED if initial.startswith(TRUSTED) else ""
            run = Path(initial.removeprefix(TRUSTED)).resolve()
            config.model.initial = f"{trusted}{run}"
        # 3. with a checkpoint every command but fit writes into the checkpoint's run
        if not config.get("ckpt_path"):
            return
        _check_file(Path(config.ckpt_path))
        # `latest` may name another run by then
        config.ckpt_path = str(Path(config.ckpt_path).resolve())
        if self.subcommand == "fit":
            return
        if given is not False:
            config.trainer.logger = [
                x for x in config.trainer.logger if x.class_path != RUN_LOGGER
            ]
        # checkpoints and bundle are read from the run, and new ones would lie beside the old
        run = run_of_checkpoint(config.ckpt_path)
        config.checkpoint.dirpath = str(run / "checkpoints")
        config.data.bundle = str(run / "bundle")


def _check_file(checkpoint: Path) -> None:
    """Refuse a path that is no checkpoint file."""
    if checkpoint.is_file() and zipfile.is_zipfile(checkpoint):
        return
    # a run's folder is often given instead: name the file in it
    last = checkpoint / "checkpoints" / "last.ckpt"
    example = last if last.exists() else "runs/quickstart/latest/checkpoints/last.ckpt"
    if checkpoint.is_dir():
        found = "is a folder"
    else:
        found = (
            "is not a checkpoint, or not a whole one"
            if checkpoint.exists()
            else "does not exist"
        )
    raise CheckpointError(
        f"ckpt_path is {checkpoint}, which {found}; expected a checkpoint that `fit` wrote, for example {example}."
    )


def check_command(arguments: Sequence[str], commands: Sequence[str]) -> None:
    """Refuse a first word that is no command; the error names all commands and the nearest."""
    if not arguments:
        raise ConfigError(
            f"python -m project needs a command; expected one of {', '.join(commands)}. Or try --help."
        )
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        near = did_you_mean(arguments[0], commands)
        raise ConfigError(
            f"{arguments[0]} is no command{near}; expected one of {', '.join(commands)}."
        )
