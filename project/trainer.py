"""The trainer with this project's own commands: predict, calibrate, benchmark, baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import polars as pl
from rich.console import Console
from rich.markdown import Markdown

from project.callbacks import exit_calibration_of
from project.datamodule import InteractionData
from project.engine.predict import load_weights
from project.errors import ConfigError
from project.evaluation.baselines import (
    baseline_rows,
    best_baseline,
    fit_baselines,
    targets_of,
)
from project.evaluation.networks import (
    LEFT_OUT,
    kept_networks,
    networks_installed,
    trained_networks,
)
from project.evaluation.result import (
    add_comparisons,
    fold_of,
    scored_result,
    slice_rows,
)
from project.exits.ranking import lists_in_words
from project.model.heads import heads_digest
from project.model.module import ExitRecommender
from project.report.tables import render
from project.results import ScoredResult, ScoredRows, Slice
from project.run import (
    read_checkpoint,
    result_head,
    run_of_checkpoint,
    table_about,
    write_json,
)
from project.run_folder import point_latest, run_folder

# of Lightning's Trainer and ModelCheckpoint, where nothing else is said
DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 5,
}
CHECKPOINTS: dict[str, Any] = {
    "monitor": "select/auc/deepest",
    "mode": "max",
    "filename": "epoch_{epoch}-step_{step}",
    "auto_insert_metric_name": False,
    "save_last": True,
    "save_on_exception": True,
    "enable_version_counter": False,
}
SIZES = (1, 8, 64, 100, 256)  # candidates of the engine's requests


def run_baselines(
    data: InteractionData, folder: Path, networks: bool = False
) -> ScoredResult:
    """Score all baselines on validation and test, and write results/baselines.json into a run's folder."""
    split = data.split
    log = split.interactions
    with data.clock.stage("baselines"):
        baselines = fit_baselines(
            split.rows, data.retrieved, kinds=log.columns, own_scores=log.own_scores
        )
    if networks and networks_installed():
        with data.clock.stage("networks"):
            baselines += trained_networks(data)
    else:
        if networks:
            print(LEFT_OUT)
        baselines += kept_networks(data)
    with data.clock.stage("slices"):
        best = best_baseline(baselines, split.rows)
        slices = list[Slice]()
        for part in ("valid", "test"):
            targets = targets_of(split.rows, part, fold_of(part))
            scores = {f"baseline {b.name}": b.logits(targets["row_id"]) for b in baselines}
            slices += slice_rows(targets, split.rows, data.retrieved[part], scores, part)
    head = result_head("baselines", split.manifest, str(folder / "config.yaml"), data.seed)
    found: ScoredRows = {
        "exits": [],
        "chosen_exit": None,
        "baselines": baseline_rows(baselines, split.rows),
        "best_baseline": best.name if best else None,
        "baseline_difference": None,
        "adaptive": None,
        "certificate": None,
        "with_exit_0": None,
        "slices": slices,
        "own_metric": None,
    }
    # of test, the last part
    add_comparisons(found, split, baselines, targets, scores)
    result = scored_result(head, found, data, None)
    path = write_json(folder / "results" / "baselines.json", result)
    Console(width=120).print(Markdown(render(result)), f"written: {path}")
    return result


class ProjectTrainer(L.Trainer):
    """Lightning's Trainer with the commands that need no training loop."""

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any | None = None,
    ) -> None:
        """Save, and let `latest` name this run, which now has a checkpoint."""
        super().save_checkpoint(filepath, weights_only, storage_options)
        point_latest(self)

    def calibrate(
        self,
        model: ExitRecommender,
        datamodule: InteractionData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Calibrate the exits of a trained checkpoint, without training, and write the plan into it.

        Args:
            model: The run's model.
            datamodule: Logs whose validation is used.
            ckpt_path: The run's checkpoint.
            weights_only: Not used.
        """
        if ckpt_path is None:
            raise ConfigError(
                "calibrate needs --ckpt_path, a trained run's checkpoint; `fit` writes one."
            )
        # the run's folder, and the weights that made its scores
        folder = run_of_checkpoint(ckpt_path)
        checkpoint = read_checkpoint(ckpt_path)
        # 1. The score table of validation, where it is this checkpoint's under this
        # protocol; else score anew.
        table = folder / "scores" / "valid.parquet"
        wanted = {
            "heads": heads_digest(checkpoint["state_dict"]),
            "protocol": datamodule.split.hash,
        }
        if not table.exists() or not wanted.items() <= table_about(table).items():
            self.validate(
                model,
                datamodule=datamodule,
                ckpt_path=ckpt_path,
                verbose=False,
                weights_only=True,
            )
            scores = model.scores
        else:
            load_weights(model, datamodule.tokenizer, ckpt_path, datamodule)
            model.to(self.strategy.root_device)
            scores = pl.read_parquet(table, glob=False)
        assert scores is not None
        # 2. The plan, into result file and checkpoint.
        callback = exit_calibration_of(self)
        result = callback.calibrate(
            self, model, datamodule, scores, folder, wanted["heads"]
        )
        if self.is_global_zero:
            callback.write_into(Path(ckpt_path))
            said = [result["budget_words"], result["certificate_words"]]
            said += lists_in_words(result["lists"])
            Console(width=120).print(*filter(None, said), f"written: {ckpt_path}", sep="\n")

    def baselines(
        self,
        model: ExitRecommender,
        datamodule: InteractionData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        networks: bool = False,
    ) -> None:
        """Score the baselines on validation and test; reads the data part of the configuration.

        Args:
            model: Not used: the same YAML serves every command.
            datamodule: Logs, protocol and retrieved features.
            ckpt_path: A run's checkpoint, to write the result beside its other results.
            weights_only: Not used.
            networks: Also train and score DeepFM, DCN-v2 and DIN; needs the extra `networks`. Fit, validate and test
                find them afterwards.
        """
        run_baselines(datamodule, run_folder(self, ckpt_path), networks)

    def benchmark(
        self,
        model: ExitRecommender,
        datamodule: InteractionData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        only: Literal["engine", "serve"] = "engine",
        seconds: float = 60.0,
    ) -> None:
        """Measure speed as ratios within one run.

        Args:
            model: The run's model.
            datamodule: Logs that requests are made of.
            ckpt_path: A calibrated run's checkpoint.
            weights_only: Not used.
            only: What to measure. engine: requests a second at full depth, at static exits, by the plan and by lists of
                the best k; serve: requests a second and latency of a server on loopback, plan
                and full depth; needs the extra `serve` and locust.
            seconds: About how long to measure.
        """
        folder = run_folder(self, ckpt_path)
        model.compute_in(self.precision)
        # imported where they are called: both need extras
        if only == "serve":
            from project.benchmark.serve import run_load  # the core has no extra

            run_load(folder, seconds)
        else:
            from project.benchmark.engine import run_engine

            run_engine(
                model,
                datamodule,
                ckpt_path,
                folder,
                self.strategy.root_device,
                seconds,
                SIZES,
            )

    def predict(  # type: ignore[override]  # Lightning's, with a choice of engine
        self,
        model: ExitRecommender | None = None,
        dataloaders: Any = None,
        datamodule: InteractionData | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        engine: Literal["packed", "early_exit", "ray"] = "packed",
        recommend: int | None = None,
    ) -> Any:
        """Score the requests of data.requests, or recommend.

        Args:
            model: The run's model.
            dataloaders: Not used.
            datamodule: Logs and requests.
            return_predictions: Not used.
            ckpt_path: The run's checkpoint.
            weights_only: Not used.
            engine: packed runs every candidate through all layers and writes every head's score; early_exit lets
                candidates leave where the run's exit plan says so and writes the score they left with; ray is
                early_exit by actors, as many as the trainer has devices, a file for each part of the users; it needs
                the extra `ray`.
            recommend: Write the best so many items for every user of the log, as the server lists them, to
                scores/recommendations.parquet, instead of scoring requests; needs the extra `serve`.
        """
        if recommend is None and engine == "packed":
            return super().predict(
                model,
                dataloaders,
                datamodule,
                return_predictions,
                ckpt_path,
                weights_only=weights_only,
            )
        assert model is not None
        assert datamodule is not None
        if recommend is not None:
            # imported here: it needs an extra
            from project.serve.recommend import write_recommendations

            write_recommendations(self, model, datamodule, ckpt_path, recommend)
            return None
        model.compute_in(self.precision)
        if engine == "ray":
            from project.engine.actors import run_actors

            run_actors(self, model, datamodule, ckpt_path)
        else:
            from project.engine.predict import run_early_exit

            run_early_exit(self, model, datamodule, ckpt_path)
        return None
