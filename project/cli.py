"""Command line: Lightning's CLI with fixed model and data classes and more verbs.

Unusual here: the configuration is the truth. Lightning would let a checkpoint's hyper-parameters override the command
line; here a checkpoint that does not fit the configuration is refused by the module instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from project.artefacts import run_of_checkpoint
from project.callbacks.exit_calibration import ExitCalibration, exit_calibration_of
from project.callbacks.exit_plots import ExitPlots
from project.callbacks.results import ResultFiles
from project.callbacks.run_bundle import RunBundle
from project.callbacks.run_folder import run_folder
from project.callbacks.trunk_weights import TrunkWeights
from project.callbacks.wandb_artifacts import WandbArtifacts
from project.data.datamodule import InteractionData
from project.data.template import tells_numbers
from project.engine.trunk_weights import Weights
from project.errors import CheckpointError, ConfigError
from project.model.module import ExitRecommender
from project.ranking.settings import RankSettings

DEFAULT_RANKING = RankSettings()
DEFAULT_SIZES = [1, 8, 64, 256]


class ProjectTrainer(Trainer):
    """Lightning's Trainer with the verbs that need no training loop."""

    def calibrate(
        self,
        model: ExitRecommender,
        datamodule: InteractionData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        rescore: bool = False,
    ) -> None:
        """Calibrate the exits of a trained checkpoint, without training, and write the plan into it.

        Args:
            model: The run's model.
            datamodule: Logs whose validation is used.
            ckpt_path: The run's checkpoint.
            weights_only: Not used.
            rescore: Score validation anew even where the run's score table fits.
        """
        from project.verbs import run_calibrate

        run_calibrate(self, model, datamodule, ckpt_path, rescore)

    def floors(
        self,
        model: ExitRecommender,
        datamodule: InteractionData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        peers: bool = False,
    ) -> None:
        """Score the counting baselines on validation and test; reads the data part of the configuration.

        Args:
            model: Not used: the same YAML serves every verb.
            datamodule: Logs, protocol and evidence.
            ckpt_path: A run's checkpoint, to write the result beside its other results.
            weights_only: Not used.
            peers: Also train and score DeepFM, DCN-v2 and DIN; needs the extra `peers`.
        """
        from project.verbs import run_floors

        run_floors(datamodule, run_folder(self, ckpt_path), peers)

    def benchmark(
        self,
        model: ExitRecommender,
        datamodule: InteractionData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        only: Literal["packing", "engine", "retrieval"] = "packing",
        seconds: float = 60.0,
        sizes: list[int] = DEFAULT_SIZES,
    ) -> None:
        """Measure speed as ratios, side by side in one run.

        Args:
            model: Its trunk is measured.
            datamodule: Real prompts.
            ckpt_path: A run's checkpoint, to write the result beside its other results; engine needs a calibrated one.
            weights_only: Not used.
            only: What to measure. packing: training targets a second, packed against one prompt per candidate; engine:
                requests a second by transformers, at full depth, static depths and early exit; retrieval: what finding
                similar users costs, by graph, by text encoder and by LLM.
            seconds: About how long to measure.
            sizes: Candidates of the engine's requests.
        """
        from project.benchmark.packing import run_packing
        from project.benchmark.requests import run_engine
        from project.benchmark.retrieval import run_retrieval

        folder = run_folder(self, ckpt_path)
        if only == "engine":
            model.to(self.strategy.root_device)
            settings = exit_calibration_of(self)
            run_engine(model, datamodule, ckpt_path, folder, settings, seconds, sizes)
        elif only == "retrieval":
            run_retrieval(datamodule, folder, seconds)
        else:
            run_packing(model, datamodule, folder, seconds)

    def test(  # type: ignore[override]  # Lightning's, with a choice of weights
        self,
        model: ExitRecommender | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: InteractionData | None = None,
        weights_only: bool | None = None,
        weights: Weights | None = None,
    ) -> Any:
        """Score the test split, every head and the exit plan, beside the floors.

        Args:
            model: The run's model.
            dataloaders: Not used.
            ckpt_path: The run's checkpoint.
            verbose: Not used: the table says it all.
            datamodule: Logs and protocol.
            weights_only: Not used.
            weights: Convert the trunk's weights to this type first (int8 on a CPU only), whatever trainer.precision is;
                results get it as their tag where they have none. Default: score with the run's own.
        """
        if weights is not None:
            callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
            results = next(c for c in callbacks if isinstance(c, ResultFiles))
            results.tag = results.tag or weights
            callbacks.append(TrunkWeights(weights))
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only=weights_only)

    def predict(  # type: ignore[override]  # Lightning's, with a choice of engine
        self,
        model: ExitRecommender | None = None,
        dataloaders: Any = None,
        datamodule: InteractionData | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        engine: Literal["packed", "early_exit"] = "packed",
        weights: Weights | None = None,
    ) -> Any:
        """Score the requests of data.requests.

        Args:
            model: The run's model.
            dataloaders: Not used.
            datamodule: Logs and requests.
            return_predictions: Not used.
            ckpt_path: The run's checkpoint.
            weights_only: Not used.
            engine: packed runs every candidate through all layers and writes every head's score; early_exit lets
                candidates leave where the run's exit plan says so and writes the score they left with.
            weights: Convert the trunk's weights to this type first (int8 on a CPU only); for engine early_exit.
                Default: score with the run's own.
        """
        if engine == "packed":
            if weights is not None:
                raise ConfigError(
                    f"predict --weights {weights} was asked of --engine packed; add --engine early_exit."
                )
            return super().predict(
                model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only=weights_only
            )
        from project.engine.verb import run_early_exit

        assert model is not None
        assert datamodule is not None
        run_early_exit(self, model, datamodule, ckpt_path, weights)
        return None

    def rank(
        self,
        model: ExitRecommender,
        datamodule: InteractionData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        ranking: RankSettings = DEFAULT_RANKING,
    ) -> None:
        """Judge ways to the best k of N candidates: overlap with full depth, depth, cost, precision.

        Args:
            model: The run's model.
            datamodule: Logs, protocol and evidence that requests are made of.
            ckpt_path: The run's checkpoint.
            weights_only: Not used.
            ranking: Requests, lists and promise.
        """
        from project.ranking.verb import run_rank

        run_rank(self, model, datamodule, ckpt_path, run_folder(self, ckpt_path), ranking)


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml in the run folder, points `latest` at the run, and sends the configuration to W&B."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save for fit only: other verbs write into the run of their checkpoint."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called once, on rank 0."""
        del pl_module, stage
        run = run_folder(trainer)
        link = run.parent / "latest"
        part = link.with_name(f".latest.{os.getpid()}")
        part.unlink(missing_ok=True)
        part.symlink_to(run.name, target_is_directory=True)
        os.replace(part, link)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(_plain(self.config.as_dict()), allow_val_change=True)


def _plain(value: Any) -> Any:
    """Containers as they are, everything else that is not a number, text or truth value as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


class ProjectCLI(LightningCLI):
    """`python -m project VERB --config FILE [--config OVERLAY] [--key value]`."""

    def __init__(self) -> None:
        super().__init__(
            ExitRecommender,
            InteractionData,
            trainer_class=ProjectTrainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},
            # without allow_abbrev=False `--trainer.max_epoch` would pass silently
            parser_kwargs={"prog": "python -m project", "allow_abbrev": False},
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

    def _parse_ckpt_path(self) -> None:
        """Do not let a checkpoint change the configuration; the module checks that they agree."""

    def before_instantiate_classes(self) -> None:
        """A verb that is given a checkpoint writes into that checkpoint's run: no new folder for it."""
        config = self.config[self.subcommand]
        if "verbose" in config:
            config.verbose = False  # the result table says it all
        checkpoint = config.get("ckpt_path")
        if checkpoint and not Path(checkpoint).exists():
            raise CheckpointError(
                f"ckpt_path is {checkpoint}, which does not exist; expected a checkpoint file of a run, "
                "for example runs/quickstart/latest/checkpoints/last.ckpt. `fit` writes one."
            )
        if self.subcommand == "fit" or not checkpoint:
            return
        if isinstance(config.trainer.logger, list):
            config.trainer.logger = [
                x for x in config.trainer.logger if CSVLogger.__name__ not in x.class_path
            ]
        run = run_of_checkpoint(checkpoint)
        config.checkpoint.dirpath = str(run / "checkpoints")
        config.data.bundle = str(run / "bundle")
