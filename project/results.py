"""Types of what stands in result files: writers build them, tables and reports read them.

JSON is written and read as it is, so these are dictionaries with names. None: a number is undefined (one class, no
rows), or a run has no such part (no plan, no baseline). Files of another schema version are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

Bounds = list[float]  # [low, high], 95 % of resampled users


class Estimate(TypedDict):
    """A number with its interval."""

    value: float | None
    interval: Bounds | None


class Difference(Estimate):
    """Scores minus a baseline's, in AUC, paired."""

    baseline: str


class UserMean(TypedDict):
    """A mean over so many users; of AUCs inside users, those with both classes."""

    value: float | None
    users: int


class Losses(TypedDict):
    """Of probabilities."""

    log_loss: float | None
    brier: float | None
    ece: float | None


class HeadMetrics(Losses):
    """All metrics of one head's or baseline's scores of n rows."""

    n: int
    auc: float | None
    uauc: UserMean


class Metrics(HeadMetrics):
    """The same with an interval."""

    auc_interval: Bounds | None


class SessionMetrics(TypedDict):
    """Means over so many sessions with both labels; NDCG and hits of the first 10 rows."""

    sessions: int
    ndcg: float | None
    mrr: float | None
    hits: float | None
    gauc: float | None


class Where(TypedDict):
    """The rows that numbers are of: a split, or one fold of validation."""

    split: str
    fold: str | None


class Calibrated(Losses):
    """An exit as the plan calibrates it."""

    auc: float | None


class ExitRow(Where, Metrics):
    """One exit for all rows; the last two under a plan alone."""

    layer: int
    baseline_difference: Difference | None
    calibrated: Calibrated | None
    auc_leaving: float | None  # of the rows that leave there


class BaselineRow(Where, Metrics):
    """One baseline; `calibrated` on the fold select, `chosen` what was chosen for it on tune."""

    name: str
    calibrated: Losses | None
    chosen: Mapping[str, float] | None


class AgainstStatic(TypedDict):
    """A static exit, and the plan's AUC minus its AUC, paired."""

    layer: int
    auc: float | None
    auc_gain: float | None
    auc_gain_interval: Bounds | None


class PlanRow(Metrics):
    """Accuracy and cost of a plan, beside the static exits of equal accuracy and of equal cost."""

    criterion: str
    mean_depth: float
    exit_shares: dict[str, float]  # by layer
    auc_drop: float | None  # full depth minus the plan
    auc_drop_interval: Bounds | None
    token_layer_speedup: float | None
    speedup_over_static: Estimate
    static_exit: AgainstStatic
    equal_cost: AgainstStatic


class Adaptive(Where, PlanRow):
    """The plan in use on reported rows."""

    baseline_difference: Difference | None
    budget_words: str | None


class MomentRow(TypedDict):
    """Scores inside users, weighted by rows; the difference is paired."""

    auc: float | None
    ndcg: float | None  # of the first 10
    minus_exit_0: Estimate | None


class MomentRows(TypedDict):
    """A user's rows as candidates of one moment: so many users with both labels, and their rows."""

    users: int
    rows: int
    scores: dict[str, MomentRow]  # by the names of `Slice.auc`


class Slice(Where):
    """A part of the reported rows, such as item_0: items that nobody had rated before."""

    name: str
    n: int
    auc: dict[str, float | None]  # by "exit 4", "baseline lr_text", "plan"


class OwnMetricRows(TypedDict):
    """A metric of one's own by the names of `Slice.auc`."""

    name: str
    scores: dict[str, float | None]


class CertificateRow(TypedDict):
    """What was promised of a plan, and whether it holds at this number of users, whatever the distribution of losses.

    `estimate` is the mean loss of the plan and `bound` its upper bound at level delta; the promise is epsilon. `passed`
    is None where nothing was tested, so that the fold has not been read, for want of users or for a `reason`.
    `users_needed` says about how many of the `n` users would do: before a test of a plan without any loss, after a
    failure with losses such as the plan's; None: more would not help. `words` are a sentence for a report.
    """

    epsilon: float
    delta: float
    n: int
    estimand: str
    bound: float | None
    estimate: float | None
    passed: bool | None
    users_needed: int | None
    reason: str | None
    words: str


class Point(TypedDict):
    """A point of a curve of AUC by cost, which is a share of full depth's token-layers."""

    cost: float
    mean_depth: float
    auc: float | None
    auc_drop: float | None
    layer: NotRequired[int]  # of a static exit


class Specification(TypedDict):
    """A class, and the arguments that it was made with."""

    class_path: str
    init_args: dict[str, object]


class PolicyRow(TypedDict):
    """A criterion with its curve on tune; `chosen_step` of it is the budget's."""

    criterion: str
    thresholds: dict[str, float | str]  # by layer; "never" and "everyone" are infinite
    calibration: dict[str, dict[str, float]]  # by layer: logit, exit_0 and offset
    pareto: list[Point]
    chosen_step: int


class ListRow(TypedDict):
    """Lists of the best k by margins, on tune; the certificate is one of their overlap with full depth's."""

    k: int
    level: float | None  # of the margins; None: nobody leaves
    overlap: float
    cost: float
    certificate: CertificateRow | None


class ListRows(TypedDict):
    """Lists of all lengths, or why there are none."""

    requests: int
    lengths: list[ListRow]
    error: str | None


class Issued(TypedDict):
    """A certificate in the ledger of a fold: what decided which policies were tested, by YAML key."""

    protocol_hash: str
    settings: Mapping[str, Any]


class Calibration(TypedDict):
    """What `calibrate` finds, apart from the plan's own numbers."""

    policies: list[PolicyRow]
    controls: dict[str, list[Point]]  # fixed_depth, oracle
    chosen: str
    budget: dict[str, float]
    budget_words: str | None
    certificate: CertificateRow | None
    certificate_words: str
    lists: ListRows
    ledger: list[Issued]


class Head(TypedDict):
    """What every result file begins with. `protocol` is the manifest of the split."""

    schema_version: int
    command: str
    version: str
    seed: int
    config: str | None
    machine: Mapping[str, Any]
    protocol: Mapping[str, Any]


class Recall(TypedDict):
    """Share of what users of test liked among candidates, by kind of item or user."""

    candidates: int  # of a user
    recall: dict[str, UserMean]


class Comparison(TypedDict):
    """Exits and baselines on the reported rows; the difference is that of the chosen exit."""

    exits: list[ExitRow]
    chosen_exit: int | None
    baselines: list[BaselineRow]
    best_baseline: str | None
    baseline_difference: Difference | None
    # by the names of `Slice.auc`, minus the ranker of the log's own_scores
    own_differences: NotRequired[dict[str, Difference]]
    # by the same names, where the log has sessions
    sessions: NotRequired[dict[str, SessionMetrics]]
    # None: the split defines none; absent in files of before it was measured
    moment: NotRequired[MomentRows | None]
    candidates: NotRequired[Recall]  # of test where recommendations work


class ScoredRows(Comparison):
    """Also the plan where there is one, and slices."""

    adaptive: Adaptive | None
    certificate: CertificateRow | None
    with_exit_0: Difference | None  # of the chosen exit, calibrated with exit 0
    slices: list[Slice]
    own_metric: OwnMetricRows | None


class ScoredResult(Head, ScoredRows):
    """Of fit, validate, test, and of baselines, which has no exits."""

    warnings: list[str]
    not_calibrated: str | None  # why there is no plan
    stage_seconds: dict[str, float]


class CalibrateResult(Head, Calibration):
    """Of calibrate."""

    adaptive: Adaptive


class HeadScores(TypedDict):
    """AUC and log loss of one head."""

    auc: float | None
    log_loss: float | None
    calibrated: HeadScores | None


class Compared(HeadScores):
    """One head beside the base's of the same layer; the deepest stands against the deepest."""

    layer: int
    n: int
    difference: dict[str, Estimate]  # of auc, log_loss, calibrated_auc, calibrated_log_loss


class CompareResult(Head):
    """Of compare."""

    base: str | None
    part: Literal["tune", "test"]
    users: int | None  # None: a file of before they were counted
    exits: list[Compared]


class Workload(TypedDict):
    """What requests of the engine benchmark are."""

    candidates: int
    prefix_cached: bool
    history: int | None  # rows; None: as logged
    at_once: int  # requests that are scored together
    dtype: str


class ListQuality(TypedDict):
    """Of the best k: overlap with full depth's list, and NDCG@k and the share of hits by the labelled candidate."""

    overlap: float | None
    ndcg: float | None
    hits: float | None


class Timed(ListQuality):
    """An engine configuration; speed-ups are over full depth."""

    engine: str
    policy: str
    auc: float | None
    token_layer_speedup: float | None
    measured_speedup: float | None
    measured_speedup_interval: Bounds | None
    speedup_over_static: Estimate
    static_exit: bool  # whether it is that of equal accuracy


class EngineRow(Workload, Timed):
    """A configuration on one workload."""


class EngineResult(Head):
    """Of benchmark --only engine."""

    rows: list[EngineRow]


class Load(TypedDict):
    """A server under so many users."""

    depth: str
    users: int
    requests: int
    requests_per_s: float
    p95_ms: float | None
    errors: int
    error: str | None
    wrong_orders: int
    overhead: float  # of HTTP and batching


class Cost(TypedDict, total=False):
    """Of scoring 1,000 requests, CPU seconds of all threads, and seconds; absent in files of before it was measured."""

    cpu_seconds: float | None  # None: nothing was answered
    busy_seconds: float | None


class ServeRow(Load, Cost):
    """Beside full depth."""

    candidates: int
    audit_share: float
    token_layer_speedup: float
    speedup: float | None


class ServeResult(Head):
    """Of benchmark --only serve."""

    serve: list[ServeRow]


class StudyResult(Head):
    """Of a script of research/: a table, and a sentence about it."""

    rows: list[dict[str, object]]
    about: str


class Refitted(TypedDict):
    """AUCs of one way to refit on a period's test; `exit` is the static exit chosen on tune."""

    exit_0: float | None
    exit: float | None
    plan: float | None
    minutes: float  # of training


class Period(TypedDict):
    """A period of a backtest: its test, and by mode (cold, warm, never) what was scored."""

    begins: str
    rows: int
    users: int
    best_baseline: str | None
    baseline: float | None
    modes: dict[str, Refitted]


class BacktestResult(Head):
    """Of backtest; `protocol` is that of the last period."""

    days: float
    valid_days: float
    warm_share: float
    periods: list[Period]
    minus: dict[str, Estimate]  # cold's AUC minus this mode's, a mean over periods
    refit_every: int  # periods
    refit_cost: float  # of AUC


Result = (
    ScoredResult
    | CalibrateResult
    | CompareResult
    | EngineResult
    | ServeResult
    | StudyResult
    | BacktestResult
)
