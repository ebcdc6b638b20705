"""From a table of scores to the rows of a result file: exits, slices, plan, each with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from project.arrays import F64, I64
from project.errors import ConfigError
from project.evaluation.baselines import (
    AgainstBaseline,
    Baseline,
    baseline_rows,
    best_baseline,
    fit_baselines,
    part_of,
    targets_of,
)
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.moment import moment_rows
from project.evaluation.networks import kept_networks
from project.exits.cost import row_tokens
from project.exits.plan import ExitPlan, Plans
from project.metrics import OwnMetric, auc, losses, probabilities, session_metrics
from project.results import (
    Adaptive,
    AgainstStatic,
    Calibrated,
    Comparison,
    ExitRow,
    Head,
    OwnMetricRows,
    PlanRow,
    ScoredResult,
    ScoredRows,
    Slice,
)
from project.run import SCORE_COLUMNS, exit_layers_of, score_table

if TYPE_CHECKING:
    from project.data.protocol import SplitInteractions
    from project.datamodule import InteractionData

# first value of each bucket: strictly earlier rows of the user (0 to 4, 5 to 20, more) and
# of the item
EDGES = {"history": (0, 5, 21), "item": (0, 1, 6, 21)}


class ScoreCollector(Metric):
    """Keeps (row id, target tokens, stream tokens, logits of the heads) of every scored row."""

    full_state_update = False
    ids: list[Tensor]
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("ids", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(
        self, row_id: Tensor, target_tokens: Tensor, stream_tokens: Tensor, values: Tensor
    ) -> None:
        """Add n rows: ids and token counts (n,), values (n, m)."""
        self.ids.append(torch.stack([row_id, target_tokens, stream_tokens], dim=1))
        self.values.append(values.float())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Of all processes, by row id: (n, 3) ids and tokens, (n, m) values."""
        ids, values = dim_zero_cat(self.ids), dim_zero_cat(self.values)
        _, first = np.unique(ids[:, 0].cpu().numpy(), return_index=True)
        index = torch.from_numpy(first).to(ids.device)
        return ids[index], values[index]


def scores_of(
    ids: Tensor, values: Tensor, about: pl.DataFrame, exit_0: F64, exit_layers: list[int]
) -> pl.DataFrame:
    """Score table of n rows: ids (n, 3) and logits (n, k) as collected, logits (n,) of exit 0.

    `about` are the n rows of the log, or of `Requests.table()`, whose item ids the score table has, too.
    """
    tokens = ids.cpu().numpy()
    columns = {name: about[name] for name in SCORE_COLUMNS if name in about.columns}
    columns |= {
        "target_tokens": pl.Series(tokens[:, 1]),
        "stream_tokens": pl.Series(tokens[:, 2]),
        "logit_0": pl.Series(exit_0),
    }
    made = score_table(columns, values.cpu().numpy(), exit_layers)
    if "item_id" in about.columns:
        made.insert_column(3, about["item_id"])
    return made


def labelled_scores(scores: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """The score table of candidates with user, label and row_id of `Workload.table`, in that table's order."""
    known, keys = ["user", "label", "row_id"], ["request_id", "candidate_index"]
    joined = table.join(
        scores.drop(known), on=keys, how="left", maintain_order="left", validate="1:1"
    )
    return joined.select(scores.columns)


def _logits(part: pl.DataFrame, layer: int) -> F64:
    return part[f"logit_{layer}"].to_numpy().astype(np.float64)


def exit_rows(
    scores: pl.DataFrame, split: str, fold: str | None = None, draws: int = 1000
) -> list[ExitRow]:
    """The `exits` of a result file for one split, or one fold of validation; no intervals where draws is 0."""
    part = part_of(scores, split, fold)
    labels = part["label"]
    bootstrap = UserBootstrap(part["user"], draws)
    layers = exit_layers_of(scores)
    if len(part) and not part["logit_0"].null_count():
        layers = [0, *layers]
    return [
        {
            "layer": layer,
            "split": split,
            "fold": fold,
            **bootstrap.metrics(_logits(part, layer), labels),
            "baseline_difference": None,
            "calibrated": None,
            "auc_leaving": None,
        }
        for layer in layers
    ]


def choose_exit(scores: pl.DataFrame) -> int | None:
    """The exit layer of highest AUC on the `tune` fold (the shallowest of equals); None where that is undefined."""
    tune = part_of(scores, "valid", "tune")
    values = {k: auc(_logits(tune, k), tune["label"]) for k in exit_layers_of(scores)}
    defined = {k: v for k, v in values.items() if v is not None}
    return max(defined, key=lambda k: defined[k]) if defined else None


def comparison(
    scores: pl.DataFrame,
    rows: pl.DataFrame,
    baselines: list[Baseline],
    reported: str,
    chosen_exit: int | None,
) -> Comparison:
    """Exits and baselines on the reported split of the log's `rows`, differences to the best baseline.

    Of validation it is the tune fold, since certify is for certificates.
    """
    fold = fold_of(reported)
    best = best_baseline(baselines, rows)
    exits = exit_rows(scores, reported, fold)
    if best is not None:
        part = part_of(scores, reported, fold)
        against = AgainstBaseline(best, part["row_id"], rows)
        for row in exits:
            row["baseline_difference"] = against.difference(_logits(part, row["layer"]))
    chosen = (row["baseline_difference"] for row in exits if row["layer"] == chosen_exit)
    return {
        "exits": exits,
        "chosen_exit": chosen_exit,
        "baselines": baseline_rows(baselines, rows, parts=[(reported, fold)]),
        "best_baseline": best.name if best else None,
        "baseline_difference": next(chosen, None),
    }


def fold_of(split: str) -> str | None:
    """The fold that is reported of a split: tune of validation, all of test."""
    return "tune" if split == "valid" else None


def scored_rows(
    data: InteractionData,
    scores: pl.DataFrame,
    split: str,
    chosen_exit: int | None,
    plans: Plans | None,
    base: float,
    metric: OwnMetric | None,
    moment: tuple[pl.DataFrame, F64] | None,
) -> ScoredRows:
    """What a score table says of a split: exits, baselines, the plan, slices; `base` is train's share of likes.

    `moment` are scores and features of the candidates at hand, those of `moment_requests`.
    """
    rows = data.split.rows
    log = data.split.interactions
    # 1. exits beside the baselines
    with data.clock.stage("baselines"):
        read = list(dict.fromkeys(("valid", split)))
        baselines = [
            *fit_baselines(
                rows,
                data.retrieved,
                read,
                log.columns,
                log.own_scores,
                None if moment is None else data.candidate_retrieved,
            ),
            *kept_networks(data),
        ]
        found = comparison(scores, rows, baselines, split, chosen_exit)
    fold = fold_of(split)
    part = part_of(scores, split, fold)
    by_name = {f"exit {e['layer']}": _logits(part, e["layer"]) for e in found["exits"]}
    by_name |= {f"baseline {b.name}": b.logits(part["row_id"]) for b in baselines}
    # 2. the plan on the same rows, and what it makes of every exit
    adaptive = None
    with_exit_0 = None
    if plans is not None:
        features = data.features_of(part, base)
        planned = PlannedRows(plans.plan, part, features)
        by_name["plan"] = planned.logit
        for row in found["exits"]:
            if row["layer"] in plans.plan.layers:
                row["calibrated"] = planned.calibrated_metrics(row["layer"])
                row["auc_leaving"] = planned.auc_leaving(row["layer"])
        best = next((b for b in baselines if b.name == found["best_baseline"]), None)
        against = None if best is None else AgainstBaseline(best, part["row_id"], rows)
        adaptive = adaptive_summary(plans, planned, split, against)
        if against is not None and chosen_exit is not None and plans.plan.exit_0:
            with_exit_0 = against.difference(planned.head(chosen_exit))
    # 3. slices by how much was known of item and user, and a metric of one's own
    with data.clock.stage("slices"):
        targets = part.select("row_id").join(
            rows, on="row_id", how="left", maintain_order="left"
        )
        slices = slice_rows(targets, rows, data.retrieved[split], by_name, split)
        own = None
        if metric is not None:
            own = own_metric(metric, by_name, part["label"], part["user"])
    scored: ScoredRows = {
        **found,
        "adaptive": adaptive,
        "certificate": None if plans is None else plans.certificate,
        "with_exit_0": with_exit_0,
        "slices": slices,
        "own_metric": own,
    }
    if moment is not None:
        scored["moment"] = moment_rows(*moment, plans, baselines, log.own_scores)
    # 4. what only some logs have
    add_comparisons(scored, data.split, baselines, targets, by_name)
    return scored


def add_comparisons(
    found: Comparison,
    split: SplitInteractions,
    baselines: list[Baseline],
    targets: pl.DataFrame,
    scores: Mapping[str, F64],
) -> None:
    """Add of named `scores` (n,) of n targets: metrics by session, and differences to the ranker that runs today.

    Nothing is added for a log that has no sessions, or no scores of a ranker.
    """
    if "session" in targets.columns:
        found["sessions"] = {
            of: session_metrics(logits, targets["label"], targets["session"])
            for of, logits in scores.items()
        }
    ranker = split.interactions.own_scores
    if ranker is not None:
        own = next(baseline for baseline in baselines if baseline.name == ranker)
        against = AgainstBaseline(own, targets["row_id"], split.rows)
        found["own_differences"] = {
            of: against.difference(logits)
            for of, logits in scores.items()
            if of != f"baseline {ranker}"
        }


def scored_result(
    head: Head, scored: ScoredRows, data: InteractionData, not_calibrated: str | None
) -> ScoredResult:
    """A whole result file of rows that were scored."""
    return {
        **head,
        **scored,
        "warnings": data.warnings,
        "not_calibrated": not_calibrated,
        "stage_seconds": data.clock.rounded(),
    }


def slice_masks(
    targets: pl.DataFrame, rows: pl.DataFrame, retrieved: pl.DataFrame
) -> dict[str, pl.Series]:
    """Slice name (warm_users, cold_users, history_0_4, ..., item_21_plus) -> Boolean (n,) of the targets it holds.

    A user is warm who has a target in train, as in the manifest's cold_user_share; history is the protocol's `hist`,
    and an item's count is `item_count` of the retrieved features of the split. `hidden_items`, targets of items that
    the protocol hides, is there where it has any.
    """
    warm = targets["user"].is_in(targets_of(rows, "train")["user"].unique().implode())
    masks = {"warm_users": warm, "cold_users": ~warm}
    counts = retrieved.select("row_id", "item_count")
    with_counts = targets.join(counts, on="row_id", how="left", maintain_order="left")
    known = {"history": targets["hist"], "item": with_counts["item_count"]}
    for kind, edges in EDGES.items():
        for low, above in zip(edges, [*edges[1:], None], strict=True):
            if above is None:
                masks[f"{kind}_{low}_plus"] = known[kind] >= low
            else:
                name = f"{kind}_{low}" if above == low + 1 else f"{kind}_{low}_{above - 1}"
                masks[name] = known[kind].is_between(low, above - 1)
    if targets["hidden"].any():
        masks["hidden_items"] = targets["hidden"]
    return masks


def slice_rows(
    targets: pl.DataFrame,
    rows: pl.DataFrame,
    retrieved: pl.DataFrame,
    scores: Mapping[str, F64],
    split: str,
) -> list[Slice]:
    """The `slices` of a result file: AUCs of named `scores` (n,) on parts of n targets; see `slice_masks`."""
    labels = targets["label"].to_numpy()
    found = list[Slice]()
    for name, mask in slice_masks(targets, rows, retrieved).items():
        inside = mask.to_numpy()
        found.append(
            {
                "name": name,
                "split": split,
                "fold": fold_of(split),
                "n": int(inside.sum()),
                "auc": {
                    of: auc(logits[inside], labels[inside]) for of, logits in scores.items()
                },
            }
        )
    return found


def own_metric(
    metric: OwnMetric, scores: Mapping[str, F64], labels: ArrayLike, users: ArrayLike
) -> OwnMetricRows:
    """The `own_metric` of a result file, of each of the named `scores` (n,)."""
    name = getattr(metric, "__name__", type(metric).__name__)
    found = dict[str, float | None]()
    try:
        for of, logits in scores.items():
            value = metric(np.asarray(labels), probabilities(logits), np.asarray(users))
            found[of] = None if value is None or not np.isfinite(value) else float(value)
    except Exception as error:
        raise ConfigError(
            f"results.metric: {name} failed: {type(error).__name__}: {error}"
        ) from error
    return {"name": name, "scores": found}


class PlannedRows:
    """Labelled rows of a score table under a plan: where each leaves, with which logit, at which cost.

    `features` are (n, F) of the same rows; `draws` resamples of
    users stand behind every interval.
    """

    def __init__(
        self,
        plan: ExitPlan,
        scores: pl.DataFrame,
        features: F64,
        draws: int = 1000,
    ) -> None:
        outputs = plan.outputs(scores, features)
        layer, logit = plan.emitted(outputs)
        self.plan = plan
        self.labels = scores["label"].to_numpy()
        self.calibrated: F64 = outputs.logits.double().numpy()
        self.layer: I64 = layer.numpy()
        self.logit: F64 = logit.double().numpy()
        # (n,) tokens that run in every layer
        self._tokens: F64 = row_tokens(scores).double().numpy()
        self._bootstrap = UserBootstrap(scores["user"], draws)

    def calibrated_metrics(self, layer: int) -> Calibrated:
        """Of one head on all rows."""
        head = self.head(layer)
        return {"auc": auc(head, self.labels), **losses(head, self.labels)}

    def auc_leaving(self, layer: int) -> float | None:
        """AUC of the rows that leave at this layer."""
        gone = self.layer == layer
        return auc(self.logit[gone], self.labels[gone])

    def summary(self, static_exit: int) -> PlanRow:
        """Accuracy and cost of the plan, beside the static exit of equal accuracy and that of equal cost."""
        full = self.plan.layers[-1]
        spent = self.layer * self._tokens  # (n,) token-layers
        total = spent.sum()
        whole = full * self._tokens.sum()
        drop = self._bootstrap.difference_interval(self.head(full), self.logit, self.labels)
        # of equal cost: the deepest exit that costs no more; the shallowest where all cost
        # more
        affordable = [k for k in self.plan.layers if k * self._tokens.sum() <= total]
        equal_cost = affordable[-1] if affordable else self.plan.layers[0]
        return {
            "criterion": self.plan.criterion_name,
            **self._bootstrap.metrics(self.logit, self.labels),
            "mean_depth": float(self.layer.mean()),
            "exit_shares": {
                str(k): float((self.layer == k).mean()) for k in self.plan.layers
            },
            "auc_drop": drop["value"],
            "auc_drop_interval": drop["interval"],
            "token_layer_speedup": float(whole / total) if total else None,
            "speedup_over_static": self._bootstrap.ratio_interval(
                static_exit * self._tokens, spent
            ),
            "static_exit": self._against(static_exit),
            "equal_cost": self._against(equal_cost),
        }

    def head(self, layer: int) -> F64:
        """(n,) calibrated logits of one head."""
        return self.calibrated[:, self.plan.layers.index(layer)]

    def _against(self, layer: int) -> AgainstStatic:
        """The plan minus a static exit, in AUC, paired."""
        gain = self._bootstrap.difference_interval(
            self.logit, self.head(layer), self.labels
        )
        return {
            "layer": layer,
            "auc": auc(self.head(layer), self.labels),
            "auc_gain": gain["value"],
            "auc_gain_interval": gain["interval"],
        }


def adaptive_summary(
    plans: Plans, rows: PlannedRows, split: str, against: AgainstBaseline | None = None
) -> Adaptive:
    """The `adaptive` part of a result file, from rows under `plans.plan`."""
    return {
        "split": split,
        "fold": fold_of(split),
        **rows.summary(plans.static_exit),
        "baseline_difference": None if against is None else against.difference(rows.logit),
        "budget_words": plans.budget_words,
    }
