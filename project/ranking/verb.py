"""Verb `rank`: the best k of N. Scores ranking requests at every depth, fits margins on `tune`, reports on test.

Unusual here: overlap with full depth's list needs no label, so its requests are filled up from the catalogue; precision
and GAUC need labels, so they come from requests over what a user rated anyway. Both are scored by the engine at full
depth, on one process, whose attention reads a request's stream once for all its candidates.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from project.artefacts import read_result, result_head, write_json, write_table
from project.callbacks.results import ResultFiles
from project.data.workloads import Workload, concatenate
from project.engine.every_head import score_every_head
from project.engine.loading import load_weights, plans_of
from project.engine.prepared import prepare_requests
from project.errors import ConfigError, NotFittedError
from project.evaluation.scores import labelled_scores
from project.exits.calibration import Calibration
from project.exits.certificate import certify_losses, user_means
from project.exits.ledger import admit
from project.ranking.judge import ScoredRequests, overlaps, policies, policy_row
from project.ranking.settings import REPORTED, RankSettings
from project.report.tables import render, shown

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender


def run_rank(
    trainer: Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    folder: Path,
    settings: RankSettings,
) -> None:
    """Score ranking requests with a trained run; write results/rank.json and scores/rank.parquet, print the table.

    Args:
        trainer: Says where to run, and the tag of result files.
        model: The run's module; its calibration is used where it has one.
        data: Logs, protocol and evidence.
        checkpoint: The run's checkpoint.
        folder: The run's folder.
        settings: Requests, lists and promise.

    Raises:
        NotFittedError: No checkpoint.
        ConfigError: A setting that cannot work, or a second certificate with other settings.
    """
    settings.check()
    if checkpoint is None:
        raise NotFittedError(
            "rank scores requests with a trained run, but no --ckpt_path was given; for example "
            "`--ckpt_path runs/quickstart/latest/checkpoints/last.ckpt`. `fit` writes one."
        )
    workloads = settings.workloads(data)
    ledger = _ledger(settings, data, folder / "results")
    data.prepare_data()
    content = load_weights(model, data.tokenizer, checkpoint, data)
    plans = plans_of(content)
    model.to(trainer.strategy.root_device)
    both = concatenate(list(workloads.values()))
    with data.clock.stage("score"):
        prepared = prepare_requests(model, data, both.requests)
        scored = score_every_head(model, prepared, candidates=both.requests.table())
    scores = labelled_scores(scored, both.table)
    tags = [c.tag for c in trainer.callbacks if isinstance(c, ResultFiles) and c.tag]  # type: ignore[attr-defined]
    tag = "".join(f"-{tag}" for tag in tags[:1])
    _report(
        scores,
        workloads,
        None if plans is None else plans.plan.calibration,
        ledger,
        data,
        folder,
        settings,
        tag,
    )


def rank_rows(parts: dict[str, ScoredRequests], settings: RankSettings) -> dict[str, Any]:
    """`requests` and `certificate` of results/rank.json: fitted on tune, shown on tune and test.

    Args:
        parts: Scored requests by part, as `RankSettings.workloads` names them.
        settings: Lists and promise.
    """
    rows, certificates = [], []
    for k in settings.lists:
        full, top_k, *others = policies(parts["catalogue/tune"], k, settings.overlap)
        for part in REPORTED:
            about = {"split": "test"} if part == "test" else {"split": "valid", "fold": part}
            for policy in (full, top_k, *others):
                row = policy_row(policy, full, parts[f"catalogue/{part}"], parts[f"labelled/{part}"], k)
                rows.append(about | row)
        if settings.certify:
            asked = parts["catalogue/certify"]
            kept = overlaps(asked, top_k.decide(asked), full.decide(asked), k)
            losses = user_means(np.stack([np.zeros_like(kept), 1.0 - kept]), asked.user)
            found = certify_losses(losses, settings.certificate())
            certificates.append({"k": k, "policy": "top_k"} | found.to_dict())
    return {"requests": rows, "certificate": certificates}


def _ledger(settings: RankSettings, data: InteractionData, results: Path) -> list[dict[str, Any]]:
    """The ledger of certificates with this one, read before anything is scored; a second try is refused.

    More requests or other candidates are a second try too, and so is another seed, which draws others.
    """
    issued = [e for path in sorted(results.glob("rank*.json")) for e in read_result(path).get("ledger", [])]
    if not settings.certify:
        return issued
    asked = {f"ranking.{key}": value for key, value in asdict(settings).items() if key != "labelled_minimum"}
    try:
        return admit(issued, asked | {"seed_everything": data.seed}, data.split.hash)
    except ConfigError as error:
        raise ConfigError(f"{error}; or set ranking.certify to 0, which makes no certificate.") from error


@rank_zero_only
def _report(
    scores: pl.DataFrame,
    workloads: dict[str, Workload],
    calibration: Calibration | None,
    ledger: list[dict[str, Any]],
    data: InteractionData,
    folder: Path,
    settings: RankSettings,
    tag: str,
) -> None:
    ends = np.cumsum([len(w.table) for w in workloads.values()])
    parts = {
        name: ScoredRequests.of(scores[int(end) - len(w.table) : int(end)], calibration)
        for (name, w), end in zip(workloads.items(), ends, strict=True)
    }
    result = result_head("rank", data.split.manifest, str(folder / "config.yaml"), data.seed)
    result |= {
        "settings": asdict(settings),
        "layers": list(parts["catalogue/test"].outputs.layers),
        "calibrated": calibration is not None,
        **rank_rows(parts, settings),
        "ledger": ledger,
        "stage_seconds": {k: round(v, 1) for k, v in data.clock.seconds.items()},
    }
    table = write_table(folder / "scores" / f"rank{tag}.parquet", scores)
    path = write_json(folder / "results" / f"rank{tag}.json", result)
    Console(width=130).print(shown(render(result)), f"written: {path}, {table}")
