"""Ranking requests: the best k of N candidates, by every policy, beside full depth and static depths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from project.callbacks import ResultFiles
from project.data.requests import Workload, catalogue_requests, concatenate, labelled_requests
from project.engine.engine import score_every_head
from project.engine.predict import load_weights, plans_of
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
from project.exits.plan import admit, raw_outputs
from project.exits.policy import leave
from project.exits.top_k import TopK, fit_margins, overlap_at_k, precision_at_k
from project.metrics import user_aucs
from project.report.tables import render, shown
from project.run import exit_layers_of, read_result, result_head, write_json, write_table

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

REPORTED = ("tune", "test")
"""Parts that policies are chosen and reported on."""


@dataclass
class RankSettings:
    """How ranking requests are made and judged.

    Args:
        requests: Catalogue requests of the tune fold, and as many of test.
        candidates: Candidates of a request.
        certify: Catalogue requests of the certify fold behind the certificate, whose users are counted, not the
            requests: those of one user are alike; 0 makes none.
        lists: Lengths k of the list that is wanted.
        overlap: Least mean overlap@k with full depth on `tune` of the policies that are chosen.
        epsilon: Certificate: largest loss of overlap, as a mean over users, each counting once.
        delta: Certificate: chance that any of its promises, one for each k, may be broken.
        labelled_minimum: Users with so many rated items in a part are asked about these, for precision and GAUC.
    """

    requests: int = 100
    candidates: int = 64
    certify: int = 100
    lists: list[int] = field(default_factory=lambda: [5, 10])
    overlap: float = 0.97
    epsilon: float = 0.05
    delta: float = 0.1
    labelled_minimum: int = 20

    def check(self) -> None:
        """Raise `ConfigError` for a value that cannot work; needs no data."""
        if not self.lists or min(self.lists) < 1 or len(set(self.lists)) < len(self.lists):
            raise ConfigError(f"ranking.lists is {self.lists}; expected lengths of 1 or more, each once.")
        longest = max(self.lists)
        for key, value, least in (
            ("candidates", self.candidates, longest + 1),
            ("labelled_minimum", self.labelled_minimum, longest + 1),
            ("requests", self.requests, 1),
            ("certify", self.certify, 0),
        ):
            if value < least:
                raise ConfigError(
                    f"ranking.{key} is {value}; expected at least {least} for lists of {self.lists}."
                )
        for key, share, most, within in (
            ("overlap", self.overlap, "at most 1", self.overlap <= 1),
            ("epsilon", self.epsilon, "below 1", self.epsilon < 1),
            ("delta", self.delta, "at most 0.5", self.delta <= 0.5),
        ):
            if not (share > 0 and within):
                raise ConfigError(f"ranking.{key} is {share}; expected a number above 0 and {most}.")

    def certificate(self) -> CertificateSettings:
        """What is promised of each list: delta is shared out among them, so that all promises hold together."""
        return CertificateSettings(
            risk="overlap_loss", epsilon=self.epsilon, delta=self.delta / len(self.lists)
        )

    def workloads(self, data: InteractionData) -> dict[str, Workload]:
        """Requests by part: catalogue/tune, labelled/test and so on."""
        split, seed = data.split, data.seed
        found = {}
        for part in REPORTED:
            found[f"catalogue/{part}"] = catalogue_requests(split, part, self.requests, self.candidates, seed)
            found[f"labelled/{part}"] = labelled_requests(split, part, self.candidates, self.labelled_minimum)
        if self.certify:
            drawn = catalogue_requests(split, "certify", self.certify, self.candidates, seed)
            found["catalogue/certify"] = drawn
        return found


Floats = NDArray[np.float64]

LEVELS = (
    1.0,
    0.998,
    0.995,
    0.99,
    0.98,
    0.97,
    0.95,
    0.925,
    0.9,
    0.85,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.2,
    0.1,
    0.0,
)
"""Values of the one parameter of a policy, from safest to fastest: quantiles."""
DRAWS = 1000  # resamples of users behind an interval


@dataclass(frozen=True, eq=False)
class ScoredRequests:
    """r requests with n candidates in all, and what every head said about them.

    Attributes:
        request: (n,) number of the request, 0..r-1.
        user: (r,) user of each request.
        outputs: n rows, K heads.
        target_tokens: (n,) each candidate's own tokens.
        stream_tokens: (n,) tokens of the request's history.
        label: (n,) 0, 1, or -1 where unknown.
    """

    request: Tensor
    user: NDArray[Any]
    outputs: HeadOutputs
    target_tokens: Tensor
    stream_tokens: Tensor
    label: NDArray[np.int8]

    @classmethod
    def of(cls, scores: pl.DataFrame, calibration: Calibration | None = None) -> ScoredRequests:
        """From a score table of candidates.

        Args:
            scores: Columns request_id, user, label (null where unknown), tokens and logits; the candidates of
                a request in order.
            calibration: The run's; None: raw logits, and exit 0 is the first head.
        """
        exit_0 = calibration is None or 0 in calibration.layers
        raw = raw_outputs(scores, np.zeros((len(scores), 0)), exit_layers_of(scores), exit_0)
        logits = calibration.apply(raw.logits) if calibration else raw.logits
        number = scores["request_id"].rle_id().to_numpy().astype(np.int64)
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        target, stream = (
            torch.from_numpy(scores[f"{x}_tokens"].to_numpy().copy()) for x in ("target", "stream")
        )
        return cls(
            torch.from_numpy(number),
            scores["user"].to_numpy()[starts],
            HeadOutputs(raw.layers, logits, raw.retrieved),
            target,
            stream,
            scores["label"].fill_null(-1).to_numpy().astype(np.int8),
        )


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a policy made of requests: the head at which each candidate left, (n,), and what it is sorted by, (n,)."""

    exits: Tensor
    keys: Tensor


@dataclass(frozen=True)
class RankPolicy:
    """A fitted policy for ranking requests.

    Attributes:
        name: In tables: top_k, a criterion, full_depth, fixed_depth_<layer>.
        parameter: Its one parameter, null where it has none.
        decide: Ranks requests.
    """

    name: str
    parameter: float | None
    decide: Callable[[ScoredRequests], Ranking]


def fixed_depth(layers: Sequence[int], index: int) -> RankPolicy:
    """Everyone leaves at one head, that is a static model of that depth."""
    label = "full_depth" if index == len(layers) - 1 else f"fixed_depth_{layers[index]}"

    def decide(asked: ScoredRequests) -> Ranking:
        return _emitted(asked, torch.full_like(asked.request, index))

    return RankPolicy(label, None, decide)


def by_row(criterion: Criterion, threshold: float) -> RankPolicy:
    """Each candidate leaves by itself, at the first head where the criterion's confidence reaches one threshold."""

    def decide(asked: ScoredRequests) -> Ranking:
        thresholds = torch.full((asked.outputs.heads,), threshold, dtype=torch.float64)
        return _emitted(asked, leave(confidence_table(criterion, asked.outputs), thresholds))

    return RankPolicy(name(criterion), threshold, decide)


def by_margin(policy: TopK, level: float) -> RankPolicy:
    """Candidates leave when they can no longer reach the list; who stays longer stands above who left."""

    def decide(asked: ScoredRequests) -> Ranking:
        exits = policy.exits(asked.request, asked.outputs)
        kept = _emitted(asked, exits)
        reach = 1.0 + float(asked.outputs.logits.max() - asked.outputs.logits.min())
        return Ranking(exits, kept.keys + reach * exits)

    return RankPolicy("top_k", level, decide)


def policies(tune: ScoredRequests, k: int, overlap: float) -> list[RankPolicy]:
    """Full depth, every static depth, `top_k` and row policies, each the fastest that keeps the overlap on `tune`.

    Args:
        tune: Requests of the tune fold.
        k: Length of the list.
        overlap: Least mean overlap@k with full depth that a policy with a parameter must have.

    Returns:
        full_depth first, then top_k.
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
    """The cheapest policy, prefix cached, whose mean overlap@k is enough; full depth under its name where none is.

    Args:
        path: At least one policy, all of one name.
        full: Full depth.
        tune: Requests to choose on.
        k: Length of the list.
        overlap: Least mean overlap@k.
    """
    whole = full.decide(tune)
    best, least = RankPolicy(path[0].name, None, full.decide), float(costs(tune, whole, True).sum())
    for policy in path:
        ranking = policy.decide(tune)
        spent = float(costs(tune, ranking, True).sum())
        if spent < least and overlaps(tune, ranking, whole, k).mean() >= overlap:
            best, least = policy, spent
    return best


def overlaps(asked: ScoredRequests, ranking: Ranking, full: Ranking, k: int) -> Floats:
    """Shape (r,), share of full depth's best k that are in the ranking's best k."""
    found: Floats = overlap_at_k(asked.request, ranking.keys, full.keys, k).numpy()
    return found


def costs(asked: ScoredRequests, ranking: Ranking, prefix_cached: bool) -> Tensor:
    """Shape (r,), token-layers of each request."""
    layer = torch.tensor(asked.outputs.layers)[ranking.exits]
    return request_cost(asked.request, layer, asked.target_tokens, asked.stream_tokens, prefix_cached)


def policy_row(
    policy: RankPolicy, full: RankPolicy, catalogue: ScoredRequests, labelled: ScoredRequests | None, k: int
) -> dict[str, Any]:
    """One policy's row of `requests` in results/rank.json.

    Args:
        policy: Who is judged.
        full: Full depth.
        catalogue: Requests for overlap, depth and cost, which need no labels.
        labelled: Requests whose candidates all have labels, for precision@k and GAUC; None: there are none.
        k: Length of the list.

    Returns:
        policy, parameter, k, candidates (fewest and most of a request: a small catalogue cannot fill them all), overlap
        and its interval (users resampled), mean_depth in layers and as a share of full
        depth, cost and cost_cached as shares of full depth's token-layers, precision, gauc (mean AUC inside a
        request, weighted by its candidates), n_requests, n_labelled.
    """
    ranking, whole = policy.decide(catalogue), full.decide(catalogue)
    overlap, counts = overlaps(catalogue, ranking, whole, k), torch.bincount(catalogue.request)
    interval = UserBootstrap(catalogue.user, DRAWS).ratio_interval(overlap, np.ones_like(overlap))["interval"]
    depth = float(torch.tensor(catalogue.outputs.layers)[ranking.exits].double().mean())
    cost = {
        name: float(costs(catalogue, ranking, cached).sum() / costs(catalogue, whole, cached).sum())
        for name, cached in (("cost", False), ("cost_cached", True))
    }
    return {
        "policy": policy.name,
        "parameter": policy.parameter,
        "k": k,
        "candidates": [int(counts.min()), int(counts.max())],
        "overlap": float(overlap.mean()),
        "overlap_interval": interval,
        "mean_depth": depth,
        "depth_share": depth / catalogue.outputs.layers[-1],
        **cost,
        **_by_labels(policy, labelled, k),
        "n_requests": len(catalogue.user),
        "n_labelled": 0 if labelled is None else len(labelled.user),
    }


def _by_labels(policy: RankPolicy, labelled: ScoredRequests | None, k: int) -> dict[str, float | None]:
    if labelled is None:
        return {"precision": None, "gauc": None}
    judged = policy.decide(labelled)
    precision = precision_at_k(labelled.request, judged.keys, torch.from_numpy(labelled.label), k)
    aucs = user_aucs(judged.keys.numpy(), labelled.label, labelled.request.numpy())
    return {"precision": float(precision.double().mean()), "gauc": aucs["gauc_impressions"]["value"]}


def _emitted(asked: ScoredRequests, exits: Tensor) -> Ranking:
    return Ranking(exits, asked.outputs.logits.gather(1, exits[:, None]).squeeze(1).double())


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
        data: Logs, protocol and retrieved features.
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
