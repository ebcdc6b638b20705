"""From a table of scores to the rows of a result file: exits, slices, plan, each with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from project.arrays import F64, I64
from project.data.protocol import SplitInteractions
from project.errors import ConfigError
from project.evaluation.baselines import (
    AgainstBaseline,
    Baseline,
    baseline_rows,
    best_baseline,
    targets_of,
)
from project.evaluation.bootstrap import UserBootstrap
from project.exits.certificate import row_losses
from project.exits.cost import row_cost
from project.exits.plan import ExitPlan, Plans
from project.metrics import OwnMetric, auc, head_metrics, probabilities
from project.run import exit_layers_of, score_table

# first value of each bucket: strictly earlier rows of the user (0 to 4, 5 to 20, more) and
# of the item
EDGES = {"history": (0, 5, 21), "item": (0, 1, 6, 21)}
# resamples behind a slice's interval: fewer than for a whole split, there are many slices
SLICE_DRAWS = 200


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


def scores_of_rows(
    ids: Tensor, values: Tensor, rows: pl.DataFrame, exit_0: F64, exit_layers: list[int]
) -> pl.DataFrame:
    """Score table of n rows of the log: ids (n, 3) and logits (n, k) as collected, logits (n,) of exit 0."""
    columns = {name: rows[name] for name in ("row_id", "user", "split", "fold", "label")}
    return _table(columns, ids, values, exit_0, exit_layers)


def scores_of_candidates(
    ids: Tensor,
    values: Tensor,
    candidates: pl.DataFrame,
    exit_0: F64,
    exit_layers: list[int],
) -> pl.DataFrame:
    """Score table of candidates with their item ids; a row's id is its position in `Requests.table()`."""
    about = candidates[ids[:, 0].cpu().numpy()]
    columns = {name: about[name] for name in ("request_id", "candidate_index")}
    table = _table(columns, ids, values, exit_0, exit_layers)
    return table.insert_column(3, about["item_id"])


def _table(
    columns: dict[str, pl.Series],
    ids: Tensor,
    values: Tensor,
    exit_0: F64,
    exit_layers: list[int],
) -> pl.DataFrame:
    tokens = ids.cpu().numpy()
    columns |= {
        "target_tokens": pl.Series(tokens[:, 1]),
        "stream_tokens": pl.Series(tokens[:, 2]),
        "logit_0": pl.Series(exit_0),
    }
    return score_table(columns, values.cpu().numpy(), exit_layers)


def labelled_scores(scores: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """The score table of candidates with user, label and row_id of `Workload.table`, in that table's order."""
    known, keys = ["user", "label", "row_id"], ["request_id", "candidate_index"]
    joined = table.join(
        scores.drop(known), on=keys, how="left", maintain_order="left", validate="1:1"
    )
    return joined.select(scores.columns)


def part_of(scores: pl.DataFrame, split: str, fold: str | None) -> pl.DataFrame:
    """Rows of one split, or of one fold of validation, of a score table."""
    part = scores.filter(pl.col("split") == split)
    return part if fold is None else part.filter(pl.col("fold") == fold)


def _logits(part: pl.DataFrame, layer: int) -> F64:
    return part[f"logit_{layer}"].to_numpy().astype(np.float64)


def exit_rows(
    scores: pl.DataFrame, split: str, fold: str | None = None, draws: int = 1000
) -> list[dict[str, Any]]:
    """The `exits` list of a result file for one split, or one fold of validation; no intervals where draws is 0."""
    part = part_of(scores, split, fold)
    labels, bootstrap = (
        part["label"].to_numpy(),
        UserBootstrap(part["user"].to_numpy(), draws),
    )
    exit_0 = [0] if len(part) and not part["logit_0"].null_count() else []
    about = {"split": split} | ({"fold": fold} if fold else {})
    return [
        {"layer": layer} | about | bootstrap.metrics(_logits(part, layer), labels)
        for layer in [*exit_0, *exit_layers_of(scores)]
    ]


def choose_exit(scores: pl.DataFrame) -> int | None:
    """The exit layer of highest AUC on the `tune` fold (the shallowest of equals); None where that is undefined."""
    tune = part_of(scores, "valid", "tune")
    labels = tune["label"].to_numpy()
    values = {k: auc(_logits(tune, k), labels) for k in exit_layers_of(scores)}
    defined = {k: v for k, v in values.items() if v is not None}
    return max(defined, key=lambda k: defined[k]) if defined else None


def comparison(
    scores: pl.DataFrame,
    split: SplitInteractions,
    baselines: list[Baseline],
    reported: str,
    chosen_exit: int | None,
) -> dict[str, Any]:
    """Exits and baselines on the reported split; of validation on the tune fold, since certify is for certificates.

    `exits`, each minus the best baseline under `baseline_difference` (see `AgainstBaseline.difference`),
    `chosen_exit`, `baselines`, `best_baseline`, and `baseline_difference`, that of the chosen exit;
    `baseline_differences` has it and the one to `lr_rates`. All paired, users resampled.
    """
    fold = "tune" if reported == "valid" else None
    best = best_baseline(baselines, split.rows)
    exits = exit_rows(scores, reported, fold)
    result: dict[str, Any] = {
        "exits": exits,
        "chosen_exit": chosen_exit,
        "baselines": baseline_rows(baselines, split.rows, parts=[(reported, fold)]),
        "best_baseline": best.name if best else None,
    }
    if best is None:
        return result
    part = part_of(scores, reported, fold)
    others = [b for b in baselines if b.name == "lr_rates" and b is not best]
    against = [
        AgainstBaseline(b, part["row_id"].to_numpy(), split.rows) for b in (best, *others)
    ]
    for row in exits:
        row["baseline_difference"] = against[0].difference(_logits(part, row["layer"]))
    if chosen_exit is not None:
        differences = [
            {"layer": chosen_exit} | a.difference(_logits(part, chosen_exit))
            for a in against
        ]
        result |= {
            "baseline_difference": differences[0],
            "baseline_differences": differences,
        }
    return result


def with_and_without_exit_0(
    heads: Mapping[str, F64], against: AgainstBaseline
) -> dict[str, Any]:
    """One exit calibrated with exit 0 and without, and the difference.

    `heads`: with_exit_0, without_exit_0 -> calibrated logits (n,) of the exit on the rows of `against`, the best
    baseline. Under each key stand metrics and `baseline_difference`; `difference` is with exit 0 minus without.
    """
    draws, labels = against.bootstrap, against.labels
    found: dict[str, Any] = {
        name: draws.metrics(logits, labels)
        | {"baseline_difference": against.difference(logits)}
        for name, logits in heads.items()
    }
    if {"with_exit_0", "without_exit_0"} <= heads.keys():
        pair = heads["with_exit_0"], heads["without_exit_0"]
        found["difference"] = draws.difference_interval(*pair, labels)
        found["difference"]["log_loss"] = draws.log_loss_difference_interval(*pair, labels)
    return found


def slice_masks(
    rows: pl.DataFrame,
    retrieved: Mapping[str, pl.DataFrame],
    split: str,
    fold: str | None = None,
) -> dict[str, pl.Series]:
    """Slice name (warm_users, cold_users, history_0_4, ..., item_21_plus) -> Boolean (n,) of the targets it holds.

    A user is warm who has a target in train, as in the manifest's cold_user_share; history is the protocol's `hist`,
    and an item's count is `item_count` of the retrieved features. `hidden_items`, targets of items that
    the protocol hides, is there where it has any.
    """
    part = targets_of(rows, split, fold)
    warm = part["user"].is_in(targets_of(rows, "train")["user"].unique().implode())
    masks = {"warm_users": warm, "cold_users": ~warm}
    counts = retrieved[split].select("row_id", "item_count")
    with_counts = part.join(counts, on="row_id", how="left", maintain_order="left")
    known = {"history": part["hist"], "item": with_counts["item_count"]}
    for kind, edges in EDGES.items():
        for low, above in zip(edges, [*edges[1:], None], strict=True):
            if above is None:
                masks[f"{kind}_{low}_plus"] = known[kind] >= low
            else:
                name = f"{kind}_{low}" if above == low + 1 else f"{kind}_{low}_{above - 1}"
                masks[name] = known[kind].is_between(low, above - 1)
    if part["hidden"].any():
        masks["hidden_items"] = part["hidden"]
    return masks


def slice_rows(
    rows: pl.DataFrame,
    retrieved: Mapping[str, pl.DataFrame],
    scores: Sequence[tuple[Mapping[str, Any], F64]],
    split: str,
    fold: str | None = None,
    draws: int = SLICE_DRAWS,
    depth: F64 | None = None,
) -> list[dict[str, Any]]:
    """The `slices` list of a result file for one split, or one fold of validation: an entry a slice.

    `scores`: for each baseline, exit or plan what names it ({"name": ...}, {"layer": ...} or {"plan": True}) and its
    logits (n,) of the targets, in the order of `rows`. `depth`: layers (n,) that the plan runs, for its `mean_depth`.
    """
    part = targets_of(rows, split, fold)
    found = []
    for name, mask in slice_masks(rows, retrieved, split, fold).items():
        inside, chosen = part.filter(mask), mask.to_numpy()
        labels, bootstrap = (
            inside["label"].to_numpy(),
            UserBootstrap(inside["user"].to_numpy(), draws),
        )
        scored = []
        for who, logits in scores:
            row = dict(who) | bootstrap.metrics(logits[chosen], labels)
            if depth is not None and "plan" in who:
                row["mean_depth"] = float(np.mean(depth[chosen])) if chosen.any() else None
            scored.append(row)
        found.append(
            {
                "name": name,
                "split": split,
                **({"fold": fold} if fold else {}),
                "n": inside.height,
                "users": inside["user"].n_unique(),
                "positives": int(labels.sum()),
                "rows": scored,
            }
        )
    return found


def own_metric(
    metric: OwnMetric,
    scores: Sequence[tuple[Mapping[str, Any], F64]],
    labels: F64,
    users: F64,
) -> dict[str, Any]:
    """The `own_metric` of a result file: `name` and `rows`, each of `scores` (see `slice_rows`) with its `value`."""
    name, rows = getattr(metric, "__name__", type(metric).__name__), []
    for who, logits in scores:
        try:
            value = metric(labels, probabilities(logits), users)
            rows.append(
                {
                    **who,
                    "value": float(value)
                    if value is not None and np.isfinite(value)
                    else None,
                }
            )
        except Exception as error:
            raise ConfigError(
                f"results.metric: {name} failed: {type(error).__name__}: {error}"
            ) from error
    return {"name": name, "rows": rows}


def baseline_scores_of(
    baselines: Sequence[Baseline], rows: pl.DataFrame, split: str, fold: str | None = None
) -> list[tuple[dict[str, Any], F64]]:
    """Names and logits of baselines, for `slice_rows`."""
    ids = targets_of(rows, split, fold)["row_id"]
    return [({"name": baseline.name}, baseline.logits(ids)) for baseline in baselines]


def exit_scores_of(
    scores: pl.DataFrame,
    rows: pl.DataFrame,
    layers: Sequence[int],
    split: str,
    fold: str | None = None,
) -> list[tuple[dict[str, Any], F64]]:
    """Layers and logits of the exits of a score table, for `slice_rows`."""
    ids = targets_of(rows, split, fold).select("row_id")
    ordered = ids.join(scores, on="row_id", how="left", maintain_order="left")
    return [
        ({"layer": k}, ordered[f"logit_{k}"].cast(pl.Float64).to_numpy()) for k in layers
    ]


def plan_scores_of(
    scores: pl.DataFrame,
    logits: F64,
    layer: ArrayLike,
    rows: pl.DataFrame,
    split: str,
    fold: str | None = None,
) -> tuple[F64, F64]:
    """A plan's logits and layers run, both (n,), from the order of `scores` into the order of `slice_rows`."""
    run = np.asarray(layer, np.float64)
    decided = scores.select("row_id").with_columns(
        logit=pl.Series(logits), layer=pl.Series(run)
    )
    ids = targets_of(rows, split, fold).select("row_id")
    ordered = ids.join(decided, on="row_id", how="left", maintain_order="left")
    return ordered["logit"].to_numpy(), ordered["layer"].to_numpy()


class PlannedRows:
    """Labelled rows of a score table under a plan: where each leaves, with which logit, at which cost.

    `features` are (n, F) of the same rows; where prefix_cached, a request's history costs nothing; `draws` resamples of
    users stand behind every interval.
    """

    def __init__(
        self,
        plan: ExitPlan,
        scores: pl.DataFrame,
        features: F64,
        prefix_cached: bool,
        draws: int = 1000,
    ) -> None:
        self._arguments = scores, features, prefix_cached, draws
        outputs = plan.outputs(scores, features)
        layer, logit = plan.emitted(outputs)
        self.plan = plan
        self.row_id, self.labels, self.users = (
            scores[x].to_numpy() for x in ("row_id", "label", "user")
        )
        self.calibrated: F64 = outputs.logits.double().numpy()
        self.layer: I64 = layer.numpy()
        self.logit: F64 = logit.double().numpy()
        self._target, self._shared = (
            torch.from_numpy(scores[f"{x}_tokens"].to_numpy().copy())
            for x in ("target", "stream")
        )
        self._prefix_cached = prefix_cached
        self._bootstrap = UserBootstrap(self.users, draws)

    def under(self, plan: ExitPlan) -> PlannedRows:
        """The same rows under another plan."""
        return PlannedRows(plan, *self._arguments)

    def exits(self) -> dict[int, dict[str, Any]]:
        """By layer: the calibrated head on all rows, the share that leaves there, and the AUC of those that do."""
        found = {}
        for column, layer in enumerate(self.plan.layers):
            gone = self.layer == layer
            metrics = head_metrics(self.calibrated[:, column], self.labels, self.users)
            found[layer] = {
                "calibrated": {
                    name: metrics[name] for name in ("auc", "log_loss", "brier", "ece")
                },
                "exit_share": float(gone.mean()),
                "auc_leaving": auc(self.logit[gone], self.labels[gone]),
            }
        return found

    def summary(self, static_exit: int) -> dict[str, Any]:
        """Accuracy and cost of the plan, beside the static exit of equal accuracy and that of equal cost."""
        full, spent = self.plan.layers[-1], self._cost(self.layer)
        drop = self._bootstrap.difference_interval(
            self._head(full), self.logit, self.labels
        )
        saved = self._bootstrap.ratio_interval(self._static_cost(full), spent)
        # of equal cost: the deepest exit that costs no more; the shallowest where all cost
        # more
        affordable = [
            k for k in self.plan.layers if self._static_cost(k).sum() <= float(spent.sum())
        ]
        equal_cost = affordable[-1] if affordable else self.plan.layers[0]
        return {
            "criterion": self.plan.criterion,
            **self._bootstrap.metrics(self.logit, self.labels),
            "mean_depth": float(self.layer.mean()),
            "exit_shares": {
                str(k): float((self.layer == k).mean()) for k in self.plan.layers
            },
            "auc_drop": drop["value"],
            "auc_drop_interval": drop["interval"],
            "token_layer_speedup": saved["value"],
            "token_layer_speedup_interval": saved["interval"],
            "speedup_over_static": self._bootstrap.ratio_interval(
                self._static_cost(static_exit), spent
            ),
            "static_exit": self._against(static_exit),
            "equal_cost": self._against(equal_cost),
        }

    def risk(self, name: str) -> dict[str, Any]:
        """The certified risk on these rows, {`risk`, `value`, `interval`}; a report, not a guarantee.

        auc_gap is of the pooled rows, score_drift a mean over users, each counting once.
        """
        full = self._head(self.plan.layers[-1])
        if name == "auc_gap":
            return {
                "risk": name,
                **self._bootstrap.difference_interval(full, self.logit, self.labels),
            }
        losses = row_losses(name, probabilities(self.logit), probabilities(full))
        _, user, rows = np.unique(self.users, return_inverse=True, return_counts=True)
        weights = 1 / rows[user]
        return {"risk": name, **self._bootstrap.ratio_interval(losses * weights, weights)}

    def _cost(self, layer: I64) -> F64:
        """Token-layers (n,) where each row leaves at `layer` (n,)."""
        spent = row_cost(
            torch.from_numpy(layer), self._target, self._shared, self._prefix_cached
        )
        return spent.double().numpy()

    def _static_cost(self, layer: int) -> F64:
        return self._cost(np.full(self.layer.shape, layer, dtype=np.int64))

    def _head(self, layer: int) -> F64:
        return self.calibrated[:, self.plan.layers.index(layer)]

    def _against(self, layer: int) -> dict[str, Any]:
        """The plan minus a static exit, in AUC, paired."""
        gain = self._bootstrap.difference_interval(
            self.logit, self._head(layer), self.labels
        )
        return {
            "layer": layer,
            "auc": auc(self._head(layer), self.labels),
            "auc_gain": gain["value"],
            "auc_gain_interval": gain["interval"],
        }


def adaptive_summary(
    plans: Plans, rows: PlannedRows, risk: str | None = None
) -> dict[str, Any]:
    """The `adaptive` part of a result file, from rows under `plans.plan`; `risk` is the certificate's."""

    def measured(rows: PlannedRows) -> dict[str, Any]:
        return rows.summary(plans.static_exit) | (
            {} if risk is None else {"risk": rows.risk(risk)}
        )

    without = rows.under(plans.without).summary(plans.static_without)
    certified = None if plans.certified is None else measured(rows.under(plans.certified))
    words = {"budget_words": plans.document.get("budget_words")}
    return measured(rows) | {"without_exit_0": without, "certified": certified} | words
