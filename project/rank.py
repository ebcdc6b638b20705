"""The command `rank`: the best k of N candidates by every policy, beside full depth and static exits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from project.data.requests import (
    Workload,
    catalogue_requests,
    concatenate,
    labelled_requests,
)
from project.engine.engine import score_every_head
from project.engine.predict import load_weights
from project.engine.requests import prepare_requests
from project.errors import ConfigError, NotFittedError
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.result import labelled_scores
from project.exits.certificate import CertificateSettings, certify_losses, user_means
from project.exits.plan import admit, plans_of
from project.exits.ranking import (
    LISTS,
    RankPolicy,
    ScoredRequests,
    costs,
    overlaps,
    policies,
)
from project.exits.top_k import precision_at_k
from project.metrics import user_aucs
from project.model.heads import heads_digest
from project.report.tables import render, shown
from project.run import read_checkpoint, read_result, result_head, write_json, write_table
from project.run_folder import tag_of

if TYPE_CHECKING:
    import lightning.pytorch as L

    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

REPORTED = ("tune", "test")  # parts that policies are chosen and reported on
DRAWS = 1000  # resamples of users behind an interval
# rated items of a labelled request; of fewer any order lists most
LEAST_LABELLED = 2 * max(LISTS)


@dataclass
class RankSettings:
    """How ranking requests are made and compared.

    Args:
        requests: Catalogue requests of the tune fold, and as many of test.
        candidates: Candidates of a request.
        certify: Catalogue requests of the certify fold for the certificate, which counts their users; 0 makes no
            certificate.
        overlap: Least mean overlap@k with full depth on `tune` of the policies that are chosen.
        epsilon: Certificate: largest loss of overlap, as a mean over users, each counting once.
        delta: Certificate: chance that any of its promises, one for each k, is broken.
    """

    requests: int = 100
    candidates: int = 64
    certify: int = 100
    overlap: float = 0.97
    epsilon: float = 0.05
    delta: float = 0.1

    def check(self) -> None:
        """Raise an error for values that cannot work; needs no data."""
        for key, least in (("candidates", max(LISTS) + 1), ("requests", 1), ("certify", 0)):
            if getattr(self, key) < least:
                raise ConfigError(
                    f"ranking.{key} is {getattr(self, key)}; expected at least {least} for lists of {LISTS}."
                )
        for key, most, within in (
            ("overlap", "at most 1", self.overlap <= 1),
            ("epsilon", "below 1", self.epsilon < 1),
            ("delta", "at most 0.5", self.delta <= 0.5),
        ):
            share = getattr(self, key)
            if not (share > 0 and within):
                raise ConfigError(
                    f"ranking.{key} is {share}; expected a number above 0 and {most}."
                )


def policy_row(
    policy: RankPolicy,
    full: RankPolicy,
    catalogue: ScoredRequests,
    labelled: ScoredRequests | None,
    k: int,
) -> dict[str, Any]:
    """One policy's row of `requests` in results/rank.json, for lists of k.

    Overlap, depth and cost, as shares of full depth's, are of catalogue requests, which need no labels; `candidates`
    are the fewest and the most of a request, as a small catalogue cannot fill them all. Precision and GAUC (mean AUC
    inside a request, weighted by its candidates) are of the labelled requests, None where there are none.
    """
    # 1. catalogue requests: overlap, depth and cost
    ranking = policy.decide(catalogue)
    whole = full.decide(catalogue)
    counts = torch.bincount(catalogue.request)  # (r,) candidates
    overlap = overlaps(catalogue, ranking, whole, k)
    interval = UserBootstrap(catalogue.user, DRAWS).ratio_interval(
        overlap, np.ones_like(overlap)
    )["interval"]
    depth = float(torch.tensor(catalogue.outputs.layers)[ranking.exits].double().mean())
    cost = {}
    for cached in (False, True):
        spent = (
            costs(catalogue, ranking, cached).sum() / costs(catalogue, whole, cached).sum()
        )
        cost[cached] = float(spent)
    # 2. labelled requests: precision and GAUC
    precision = None
    gauc = None
    if labelled is not None:
        keys = policy.decide(labelled).keys
        shares = precision_at_k(labelled.request, keys, torch.from_numpy(labelled.label), k)
        precision = float(shares.double().mean())
        gauc = user_aucs(keys.numpy(), labelled.label, labelled.request.numpy())[
            "gauc_impressions"
        ]["value"]
    return {
        "policy": policy.name,
        "parameter": policy.parameter,
        "k": k,
        "candidates": [int(counts.min()), int(counts.max())],
        "overlap": float(overlap.mean()),
        "overlap_interval": interval,
        "mean_depth": depth,
        "depth_share": depth / catalogue.outputs.layers[-1],
        "cost": cost[False],
        "cost_cached": cost[True],
        "precision": precision,
        "gauc": gauc,
        "n_requests": len(catalogue.user),
        "n_labelled": 0 if labelled is None else len(labelled.user),
    }


def rank_rows(parts: dict[str, ScoredRequests], settings: RankSettings) -> dict[str, Any]:
    """`requests` and `certificate` of results/rank.json, from requests by part: fitted on tune, shown on tune and test.

    Delta is shared out among the lists, so that all promises hold together.
    """
    rows = []
    certificates = []
    promise = CertificateSettings(
        "overlap_loss", settings.epsilon, settings.delta / len(LISTS)
    )
    for k in LISTS:
        full, top_k, *others = policies(parts["catalogue/tune"], k, settings.overlap)
        for part in REPORTED:
            about = (
                {"split": "test"} if part == "test" else {"split": "valid", "fold": part}
            )
            for policy in (full, top_k, *others):
                row = policy_row(
                    policy,
                    full,
                    parts[f"catalogue/{part}"],
                    parts.get(f"labelled/{part}"),
                    k,
                )
                rows.append(about | row)
        if settings.certify:
            fold = parts["catalogue/certify"]
            kept = overlaps(fold, top_k.decide(fold), full.decide(fold), k)
            losses = user_means(np.stack([np.zeros_like(kept), 1.0 - kept]), fold.user)
            certificates.append(
                {"k": k, "policy": "top_k"} | certify_losses(losses, promise).to_dict()
            )
    return {"requests": rows, "certificate": certificates}


def run_rank(
    trainer: L.Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    folder: Path,
    settings: RankSettings,
) -> None:
    """Score ranking requests with a trained run; write results/rank.json and scores/rank.parquet, print the table."""
    settings.check()
    if checkpoint is None:
        raise NotFittedError(
            "rank scores requests with a trained run, but no --ckpt_path was given; for example "
            "`--ckpt_path runs/quickstart/latest/checkpoints/last.ckpt`. `fit` writes one."
        )
    # 1. requests by part
    split = data.split
    seed = data.seed
    workloads = dict[str, Workload]()
    for part in REPORTED:
        drawn = catalogue_requests(
            split, part, settings.requests, settings.candidates, seed
        )
        workloads[f"catalogue/{part}"] = drawn
        if rated := labelled_requests(split, part, settings.candidates, LEAST_LABELLED):
            workloads[f"labelled/{part}"] = rated
    if settings.certify:
        drawn = catalogue_requests(
            split, "certify", settings.certify, settings.candidates, seed
        )
        workloads["catalogue/certify"] = drawn
    # 2. the ledger, before anything is scored: other requests, candidates or another seed
    # are a second try, too
    files = sorted((folder / "results").glob("rank*.json"))
    ledger = [entry for file in files for entry in read_result(file).get("ledger", [])]
    if settings.certify:
        heads = heads_digest(read_checkpoint(checkpoint)["state_dict"])
        tested = {f"ranking.{k}": v for k, v in asdict(settings).items()} | {
            "ranking.lists": list(LISTS)
        }
        try:
            ledger = admit(
                ledger, tested | {"seed_everything": seed, "checkpoint": heads}, split.hash
            )
        except ConfigError as error:
            raise ConfigError(
                f"{error}; or set ranking.certify to 0, which makes no certificate."
            ) from error
    # 3. scores of all heads
    data.prepare_data()
    plans = plans_of(load_weights(model, data.tokenizer, checkpoint, data))
    calibration = None if plans is None else plans.plan.calibration
    model.to(trainer.strategy.root_device)
    both = concatenate(list(workloads.values()))
    with data.clock.stage("score"):
        prepared = prepare_requests(model, data, both.requests)
        scored = score_every_head(model, prepared, candidates=both.requests.table())
    if not trainer.is_global_zero:
        return
    # 4. policies, and what is written
    scores = labelled_scores(scored, both.table)
    parts = dict[str, ScoredRequests]()
    start = 0
    for part, workload in workloads.items():
        count = len(workload.table)
        parts[part] = ScoredRequests.of(scores[start : start + count], calibration)
        start += count
    result = result_head("rank", split.manifest, str(folder / "config.yaml"), seed) | {
        "settings": asdict(settings),
        "layers": list(parts["catalogue/test"].outputs.layers),
        "calibrated": calibration is not None,
        **rank_rows(parts, settings),
        "ledger": ledger,
        "stage_seconds": {
            stage: round(spent, 1) for stage, spent in data.clock.seconds.items()
        },
    }
    tag = tag_of(trainer)
    table = write_table(folder / "scores" / f"rank{tag}.parquet", scores)
    path = write_json(folder / "results" / f"rank{tag}.json", result)
    Console(width=130).print(shown(render(result)), f"written: {path}, {table}")
