"""Lightning's Trainer with the verbs that need no training loop, and options on those that score.

Unusual here: a verb is a method, as in Lightning; its `Args:` text is its help on the command line. What it runs is
imported when it is called, so that no verb waits for another's modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer

from project.callbacks.exit_calibration import exit_calibration_of
from project.callbacks.run_folder import point_latest, run_folder
from project.datamodule import InteractionData
from project.model.module import ExitRecommender
from project.ranking.settings import RankSettings

DEFAULT_RANKING = RankSettings()
DEFAULT_SIZES = [1, 8, 64, 256]


class ProjectTrainer(Trainer):
    """Lightning's Trainer with the verbs that need no training loop."""

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Save, and let `latest` name this run: it has a checkpoint now."""
        super().save_checkpoint(filepath, weights_only, storage_options)
        point_latest(self)

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
            settings, device = exit_calibration_of(self), self.strategy.root_device
            run_engine(model, datamodule, ckpt_path, folder, settings, device, seconds, sizes)
        elif only == "retrieval":
            run_retrieval(datamodule, folder, seconds)
        else:
            run_packing(model, datamodule, folder, seconds, self.strategy.root_device)

    def predict(  # type: ignore[override]  # Lightning's, with a choice of engine
        self,
        model: ExitRecommender | None = None,
        dataloaders: Any = None,
        datamodule: InteractionData | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        engine: Literal["packed", "early_exit"] = "packed",
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
        """
        if engine == "packed":
            return super().predict(
                model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only=weights_only
            )
        from project.engine.verb import run_early_exit

        assert model is not None
        assert datamodule is not None
        run_early_exit(self, model, datamodule, ckpt_path)
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
