"""The command `rank`: the best k of N candidates by every policy, beside full depth and static depths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from project.arrays import F64, I8
from project.data.requests import Workload, catalogue_requests, concatenate, labelled_requests
from project.engine.engine import score_every_head
from project.engine.predict import load_weights
from project.engine.requests import prepare_requests
from project.errors import ConfigError, NotFittedError
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.result import labelled_scores
from project.exits.calibration import Calibration
from project.exits.certificate import CertificateSettings, certify_losses, user_means
from project.exits.cost import request_cost
from project.exits.criteria import (
    Consistency,
    Criterion,
    HeadOutputs,
    Ratio,
    RatioConsistency,
    confidence_table,
    name,
)
from project.exits.plan import admit, plans_of, raw_outputs
from project.exits.policy import leave
from project.exits.top_k import TopK, fit_margins, overlap_at_k, precision_at_k
from project.metrics import user_aucs
from project.report.tables import render, shown
from project.run import exit_layers_of, read_result, result_head, write_json, write_table
from project.run_folder import tag_of

if TYPE_CHECKING:
    import lightning.pytorch as L

    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

REPORTED = ("tune", "test")  # parts that policies are chosen and reported on
LEVELS = (
    1.0, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0,
)  # fmt: skip
"""Values of the one parameter of a policy, from slowest to fastest: quantiles."""
DRAWS = 1000  # resamples of users behind an interval
LISTS = (5, 10)  # lengths k of the list that is wanted; the field reports at 5 and 10
LEAST_LABELLED = 2 * max(LISTS)  # rated items of a labelled request; of fewer any order lists most


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
        """Refuse values that cannot work; needs no data."""
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
                raise ConfigError(f"ranking.{key} is {share}; expected a number above 0 and {most}.")


@dataclass(frozen=True, eq=False)
class ScoredRequests:
    """r requests with n candidates in all, scored at every head.

    `request` (n,) is each candidate's number of its request, 0..r-1, `user` (r,) each request's user. `target_tokens`
    (n,) are the candidate's own, `stream_tokens` (n,) its history's; `label` (n,) is -1 where unknown.
    """

    request: Tensor
    user: NDArray[Any]
    outputs: HeadOutputs
    target_tokens: Tensor
    stream_tokens: Tensor
    label: I8

    @classmethod
    def of(cls, scores: pl.DataFrame, calibration: Calibration | None = None) -> ScoredRequests:
        """From a score table of candidates, those of a request in order; without a calibration by raw logits."""
        exit_0 = calibration is None or 0 in calibration.layers
        raw = raw_outputs(scores, np.zeros((len(scores), 0)), exit_layers_of(scores), exit_0)
        logits = calibration.apply(raw.logits) if calibration else raw.logits
        number = scores["request_id"].rle_id().to_numpy().astype(np.int64)
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        return cls(
            torch.from_numpy(number),
            scores["user"].to_numpy()[starts],
            HeadOutputs(raw.layers, logits, raw.retrieved),
            scores["target_tokens"].to_torch(),
            scores["stream_tokens"].to_torch(),
            scores["label"].fill_null(-1).to_numpy().astype(np.int8),
        )


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a policy made of requests: the head at which each candidate left, (n,), and what it is sorted by, (n,)."""

    exits: Tensor
    keys: Tensor


@dataclass(frozen=True)
class RankPolicy:
    """A fitted policy: `top_k`, a criterion, `full_depth` or `fixed_depth_<layer>`, and its one parameter, if any."""

    name: str
    parameter: float | None
    decide: Callable[[ScoredRequests], Ranking]


def fixed_depth(layers: Sequence[int], index: int) -> RankPolicy:
    """Everyone leaves at one head, that is a static model of that depth."""
    label = "full_depth" if index == len(layers) - 1 else f"fixed_depth_{layers[index]}"
    return RankPolicy(label, None, lambda scored: _emitted(scored, torch.full_like(scored.request, index)))


def by_row(criterion: Criterion, threshold: float) -> RankPolicy:
    """Each candidate leaves by itself, at the first head where the criterion's confidence reaches one threshold."""

    def decide(scored: ScoredRequests) -> Ranking:
        thresholds = torch.full((scored.outputs.heads,), threshold, dtype=torch.float64)
        return _emitted(scored, leave(confidence_table(criterion, scored.outputs), thresholds))

    return RankPolicy(name(criterion), threshold, decide)


def by_margin(policy: TopK, level: float) -> RankPolicy:
    """Candidates leave when they can no longer reach the list; those that stay longer are listed above them."""

    def decide(scored: ScoredRequests) -> Ranking:
        exits = policy.exits(scored.request, scored.outputs)
        reach = 1.0 + float(scored.outputs.logits.max() - scored.outputs.logits.min())
        return Ranking(exits, _emitted(scored, exits).keys + reach * exits)

    return RankPolicy("top_k", level, decide)


def _emitted(scored: ScoredRequests, exits: Tensor) -> Ranking:
    return Ranking(exits, scored.outputs.logits.gather(1, exits[:, None]).squeeze(1).double())


def policies(tune: ScoredRequests, k: int, overlap: float) -> list[RankPolicy]:
    """Full depth, `top_k`, row policies and every static depth for lists of k.

    Of policies with a parameter these are the fastest that keep this mean overlap@k with full depth on tune.
    """
    layers = tune.outputs.layers
    full = fixed_depth(layers, len(layers) - 1)
    margins = [by_margin(TopK(k, fit_margins(tune.request, tune.outputs, q)), q) for q in LEVELS]
    found = [full, fastest(margins, full, tune, k, overlap)]
    criteria: list[Criterion] = [Consistency(), Ratio(), RatioConsistency()]
    for criterion in criteria:
        criterion.fit(tune.outputs)
        confidence = confidence_table(criterion, tune.outputs)[:, :-1]
        spread = confidence[confidence.isfinite()].double()
        if spread.numel():
            thresholds = torch.quantile(spread, torch.tensor(LEVELS, dtype=torch.float64)).tolist()
            found.append(fastest([by_row(criterion, t) for t in thresholds], full, tune, k, overlap))
    return [*found, *(fixed_depth(layers, index) for index in reversed(range(len(layers) - 1)))]


def fastest(
    path: Sequence[RankPolicy], full: RankPolicy, tune: ScoredRequests, k: int, overlap: float
) -> RankPolicy:
    """The cheapest policy, prefix cached, with enough mean overlap@k; full depth under its name where none is."""
    whole = full.decide(tune)
    best, least = RankPolicy(path[0].name, None, full.decide), float(costs(tune, whole, True).sum())
    for policy in path:
        ranking = policy.decide(tune)
        spent = float(costs(tune, ranking, True).sum())
        if spent < least and overlaps(tune, ranking, whole, k).mean() >= overlap:
            best, least = policy, spent
    return best


def overlaps(scored: ScoredRequests, ranking: Ranking, full: Ranking, k: int) -> F64:
    """Share of full depth's best k that are in the ranking's best k, (r,)."""
    found: F64 = overlap_at_k(scored.request, ranking.keys, full.keys, k).numpy()
    return found


def costs(scored: ScoredRequests, ranking: Ranking, prefix_cached: bool) -> Tensor:
    """Token-layers of each request, (r,)."""
    layer = torch.tensor(scored.outputs.layers)[ranking.exits]
    return request_cost(scored.request, layer, scored.target_tokens, scored.stream_tokens, prefix_cached)


def policy_row(
    policy: RankPolicy, full: RankPolicy, catalogue: ScoredRequests, labelled: ScoredRequests | None, k: int
) -> dict[str, Any]:
    """One policy's row of `requests` in results/rank.json, for lists of k.

    Overlap, depth and cost, as shares of full depth's, are of catalogue requests, which need no labels; `candidates`
    are the fewest and the most of a request, as a small catalogue cannot fill them all. Precision and GAUC (mean AUC
    inside a request, weighted by its candidates) are of the labelled requests, None where there are none.
    """
    ranking, whole = policy.decide(catalogue), full.decide(catalogue)
    overlap, counts = overlaps(catalogue, ranking, whole, k), torch.bincount(catalogue.request)
    interval = UserBootstrap(catalogue.user, DRAWS).ratio_interval(overlap, np.ones_like(overlap))["interval"]
    depth = float(torch.tensor(catalogue.outputs.layers)[ranking.exits].double().mean())
    cost, cost_cached = (
        float(costs(catalogue, ranking, cached).sum() / costs(catalogue, whole, cached).sum())
        for cached in (False, True)
    )
    precision = gauc = None
    if labelled is not None:
        keys = policy.decide(labelled).keys
        shares = precision_at_k(labelled.request, keys, torch.from_numpy(labelled.label), k)
        precision = float(shares.double().mean())
        gauc = user_aucs(keys.numpy(), labelled.label, labelled.request.numpy())["gauc_impressions"]["value"]
    return {
        "policy": policy.name,
        "parameter": policy.parameter,
        "k": k,
        "candidates": [int(counts.min()), int(counts.max())],
        "overlap": float(overlap.mean()),
        "overlap_interval": interval,
        "mean_depth": depth,
        "depth_share": depth / catalogue.outputs.layers[-1],
        "cost": cost,
        "cost_cached": cost_cached,
        "precision": precision,
        "gauc": gauc,
        "n_requests": len(catalogue.user),
        "n_labelled": 0 if labelled is None else len(labelled.user),
    }


def rank_rows(parts: dict[str, ScoredRequests], settings: RankSettings) -> dict[str, Any]:
    """`requests` and `certificate` of results/rank.json, from requests by part: fitted on tune, shown on tune and test.

    Delta is shared out among the lists, so that all promises hold together.
    """
    rows, certificates = [], []
    promise = CertificateSettings("overlap_loss", settings.epsilon, settings.delta / len(LISTS))
    for k in LISTS:
        full, top_k, *others = policies(parts["catalogue/tune"], k, settings.overlap)
        for part in REPORTED:
            about = {"split": "test"} if part == "test" else {"split": "valid", "fold": part}
            for policy in (full, top_k, *others):
                row = policy_row(policy, full, parts[f"catalogue/{part}"], parts.get(f"labelled/{part}"), k)
                rows.append(about | row)
        if settings.certify:
            fold = parts["catalogue/certify"]
            kept = overlaps(fold, top_k.decide(fold), full.decide(fold), k)
            losses = user_means(np.stack([np.zeros_like(kept), 1.0 - kept]), fold.user)
            certificates.append({"k": k, "policy": "top_k"} | certify_losses(losses, promise).to_dict())
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
    split, seed = data.split, data.seed
    workloads = dict[str, Workload]()
    for part in REPORTED:
        drawn = catalogue_requests(split, part, settings.requests, settings.candidates, seed)
        workloads[f"catalogue/{part}"] = drawn
        if rated := labelled_requests(split, part, settings.candidates, LEAST_LABELLED):
            workloads[f"labelled/{part}"] = rated
    if settings.certify:
        drawn = catalogue_requests(split, "certify", settings.certify, settings.candidates, seed)
        workloads["catalogue/certify"] = drawn
    # 2. the ledger, before anything is scored: other requests, candidates or another seed are a second try, too
    files = sorted((folder / "results").glob("rank*.json"))
    ledger = [entry for file in files for entry in read_result(file).get("ledger", [])]
    if settings.certify:
        tested = {f"ranking.{k}": v for k, v in asdict(settings).items()} | {"ranking.lists": list(LISTS)}
        try:
            ledger = admit(ledger, tested | {"seed_everything": seed}, split.hash)
        except ConfigError as error:
            raise ConfigError(f"{error}; or set ranking.certify to 0, which makes no certificate.") from error
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
    parts, end = dict[str, ScoredRequests](), 0
    for part, workload in workloads.items():
        start, end = end, end + len(workload.table)
        parts[part] = ScoredRequests.of(scores[start:end], calibration)
    result = result_head("rank", split.manifest, str(folder / "config.yaml"), seed) | {
        "settings": asdict(settings),
        "layers": list(parts["catalogue/test"].outputs.layers),
        "calibrated": calibration is not None,
        **rank_rows(parts, settings),
        "ledger": ledger,
        "stage_seconds": {stage: round(spent, 1) for stage, spent in data.clock.seconds.items()},
    }
    tag = tag_of(trainer)
    table = write_table(folder / "scores" / f"rank{tag}.parquet", scores)
    path = write_json(folder / "results" / f"rank{tag}.json", result)
    Console(width=130).print(shown(render(result)), f"written: {path}, {table}")
