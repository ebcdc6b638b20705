"""Command line: Lightning's CLI with fixed model and data classes and more verbs (project.trainer).

Unusual here: the configuration is the truth. Lightning would let a checkpoint's hyper-parameters override the command
line; here a checkpoint that does not fit the configuration is refused by the module instead.
"""

from __future__ import annotations

import sys
import zipfile
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from project.artefacts import run_of_checkpoint
from project.callbacks.exit_calibration import ExitCalibration
from project.callbacks.exit_plots import ExitPlots
from project.callbacks.results import ResultFiles
from project.callbacks.run_bundle import RunBundle
from project.callbacks.save_config import SaveConfig
from project.callbacks.wandb_artifacts import WandbArtifacts
from project.cli_errors import check_verb, one_line, project_error_in
from project.data.datamodule import InteractionData
from project.data.template import tells_numbers
from project.errors import CheckpointError
from project.model.module import ExitRecommender
from project.trainer import ProjectTrainer


class ProjectCLI(LightningCLI):
    """`python -m project VERB --config FILE [--config OVERLAY] [--key value]`.

    Args:
        others: Verbs that need no configuration, and what each does; the help names them.
    """

    def __init__(self, others: Mapping[str, str] = MappingProxyType({})) -> None:
        self._others = others
        super().__init__(
            ExitRecommender,
            InteractionData,
            trainer_class=ProjectTrainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},
            parser_kwargs={
                "prog": "python -m project",
                "allow_abbrev": False,  # else `--trainer.max_epoch` would pass silently
                "exit_on_error": False,  # else the usage, of 140 lines, hides what is wrong
                "epilog": "Verbs without a configuration: "
                + "; ".join(f"{name} ({what})" for name, what in others.items()),
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs, and ours."""
        ours = {"model", "datamodule"}
        return {
            **LightningCLI.subcommands(),
            "calibrate": ours,
            "floors": ours,
            "benchmark": ours,
            "rank": ours,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Forced callbacks, each under its own key, and values that are said once."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/auc/deepest",
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
        parser.add_lightning_class_args(ExitPlots, "report")
        parser.add_lightning_class_args(RunBundle, "bundle")
        parser.add_lightning_class_args(WandbArtifacts, "artifacts")
        parser.link_arguments("model.backbone", "data.tokenizer")
        parser.link_arguments("data.prompt.answers", "model.answers")
        parser.link_arguments("data.prompt.segment", "model.numbers", compute_fn=tells_numbers)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What is wrong is one error of ours."""
        check_verb(sys.argv[1:], [*self.subcommands(), *self._others])
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            verb = next((name for name in sys.argv[1:] if name in self._subcommand_parsers), "fit")
            keys = self._subcommand_parsers[verb].get_defaults().keys()
            raise project_error_in(error) or one_line(str(error), sys.argv[1:], keys) from None

    def instantiate_classes(self) -> None:
        """An error of ours stays one where its type is one of several, as in `Taste | None`."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            ours = project_error_in(error)
            if ours is None:
                raise
            raise ours from None

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint change the configuration; the module checks that they agree."""

    def before_instantiate_classes(self) -> None:
        """A verb that is given a checkpoint writes into that checkpoint's run: no new folder for it."""
        config = self.config[self.subcommand]
        if "verbose" in config:
            config.verbose = False  # the result table says it all
        checkpoint = config.get("ckpt_path")
        if not checkpoint:
            return
        _check_file(Path(checkpoint))
        if self.subcommand == "fit":
            return
        if isinstance(config.trainer.logger, list):
            config.trainer.logger = [
                x for x in config.trainer.logger if CSVLogger.__name__ not in x.class_path
            ]
        run = run_of_checkpoint(checkpoint)
        config.checkpoint.dirpath = str(run / "checkpoints")
        config.data.bundle = str(run / "bundle")


def _check_file(checkpoint: Path) -> None:
    """Refuse what is no checkpoint at all, in the words of a person who names a file."""
    if checkpoint.is_file() and zipfile.is_zipfile(checkpoint):
        return
    last = checkpoint / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        found, hint = "does not exist", "runs/quickstart/latest/checkpoints/last.ckpt. `fit` writes one."
    elif checkpoint.is_dir():
        found = "is a folder"
        hint = f"{last if last.exists() else 'RUN/checkpoints/last.ckpt'}."
    else:
        found, hint = (
            "is not a checkpoint, or not a whole one",
            "runs/quickstart/latest/checkpoints/last.ckpt.",
        )
    raise CheckpointError(
        f"ckpt_path is {checkpoint}, which {found}; expected a checkpoint file of a run, for example {hint}"
    )
