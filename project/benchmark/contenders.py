"""The engine benchmark's contenders: full depth, static exits, plans, and the library's own model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from project.benchmark.transformers import Pointwise, SharedPrefix
from project.callbacks import features_of
from project.data.requests import Workload, catalogue_requests, labelled_requests
from project.engine.cache import StreamCache
from project.engine.decisions import Decision, ListExits, RowExits, static_exits
from project.engine.engine import Engine, copied, packed, score_every_head
from project.engine.requests import PreparedRequest, Scored, Scores, prepare_requests
from project.errors import ConfigError, DataError
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.result import labelled_scores
from project.exits.budget import budget_plan
from project.exits.calibration import Calibration
from project.exits.criteria import Criterion, HeadOutputs, RatioConsistency
from project.exits.plan import ExitPlan, ExitSettings, Plans
from project.exits.policy import Policy
from project.exits.top_k import TopK, fit_margins
from project.metrics import auc
from project.model.heads import heads_digest
from project.rank import LEVELS, ScoredRequests, by_margin, fastest, fixed_depth, policy_row
from project.run import table_about, write_table

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

REQUESTS = {1: 48, 8: 24, 64: 16, 256: 4}
"""Candidates of a request -> most requests in the timed sample."""
TUNED = {8: 96, 64: 60, 256: 16}
"""Candidates of a request -> requests of the fold tune that margins are made on."""
FIXED_HISTORY = 50


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        candidates: Candidates of a request.
        prefix_cached: All histories' keys and values are cached at full depth before the clock starts.
        history: Latest rows that make the history; None: as logged.
        at_once: Requests in one call.
        plain: Time transformers' own forward too: each way to do it by name.
    """

    candidates: int
    prefix_cached: bool
    history: int | None = None
    at_once: int = 1
    plain: tuple[str, ...] = ()

    @property
    def usual(self) -> bool:
        """History as logged, requests one by one: where they get plans and lists of their own."""
        return self.history is None and self.at_once == 1

    @property
    def short(self) -> bool:
        """Whether only the sides that matter most are timed: the others say nothing new here, or take too long."""
        return not self.usual or self.candidates > 64

    @property
    def requests(self) -> int:
        """Most requests in the sample, a multiple of `at_once`."""
        return REQUESTS.get(self.candidates, 8) // self.at_once * self.at_once

    def row(self) -> dict[str, object]:
        """What a result file says of it."""
        kind = "history as logged" if self.history is None else f"{self.history}-item history"
        return {
            "candidates": self.candidates,
            "prefix_cached": self.prefix_cached,
            "history": self.history,
            "workload": f"catalogue, {kind}",
        }


def cases(sizes: Sequence[int]) -> list[Case]:
    """All workloads of these sizes.

    One prompt per candidate over a long logged history takes minutes a request at 64 candidates, so there it is timed
    on the fixed history alone, as the comparison's usual setting is; at 256 transformers is not timed at all.

    Args:
        sizes: Candidates of a request.
    """
    found = []
    for size in sizes:
        shared = ("shared_prefix",) if size <= 64 else ()
        alone = ("pointwise", *shared) if size < 64 else shared
        found += [Case(size, prefix_cached=False, plain=alone), Case(size, prefix_cached=True, plain=shared)]
        if size == 64:
            found.append(
                Case(size, prefix_cached=False, history=FIXED_HISTORY, plain=("pointwise", "shared_prefix"))
            )
            found.append(Case(size, prefix_cached=True, history=FIXED_HISTORY, plain=("shared_prefix",)))
        if size in (1, 8):
            found.append(Case(size, prefix_cached=True, at_once=8))
    return found


Floats = NDArray[np.float64]
Unit = list[PreparedRequest]
"""Requests that are scored in one call."""


class Runner(Protocol):
    """Scores requests: the engine, or what it is compared with."""

    def score(self, requests: Sequence[PreparedRequest]) -> Scores:
        """Scores in the order of the requests, with seconds and token-layers."""
        ...


@dataclass
class Side:
    """One runner, what its scores are worth, and what it needed.

    Attributes:
        engine: Name in result files: pointwise, shared_prefix, packed, fixed_depth_<k>, early_exit, top_k.
        policy: Who leaves where, in words.
        runs: Scores requests.
        worth: What is known of its scores: auc, auc_drop and so on; lists of the best k have overlap and precision.
        most: Units it is measured on, the first ones; None: all.
        rounds: Rounds it is measured in; None: all.
        wall: Seconds, a list a round, an entry a unit.
        backbone: The backbone's share of them.
        scored: What the last round scored.
    """

    engine: str
    policy: str
    runs: Runner
    worth: dict[str, Any] = field(default_factory=dict)
    most: int | None = None
    rounds: int | None = None
    wall: list[list[float]] = field(default_factory=list)
    backbone: list[list[float]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)

    def start_round(self) -> bool:
        """Begin a round; False where this side has done all of its."""
        if self.rounds is not None and len(self.wall) >= self.rounds:
            return False
        self.wall.append([])
        self.backbone.append([])
        self.scored = []
        return True

    def takes(self, unit: int) -> bool:
        """Whether this unit is one of its."""
        return self.most is None or unit < self.most

    def score(self, unit: Unit) -> None:
        """Score one unit and note the time."""
        start = time.perf_counter()
        scores = self.runs.score(unit)
        self.wall[-1].append(time.perf_counter() - start)
        self.backbone[-1].append(scores.seconds["backbone"])
        self.scored += scores.requests

    @property
    def units(self) -> int:
        """Units it scored in a round."""
        return len(self.wall[0])

    def typical(self, which: str, units: int | None = None) -> Floats:
        """(units,) seconds of each unit, the median of its rounds.

        Args:
            which: wall or backbone.
            units: Of the first so many; None: of all it scored.
        """
        found: Floats = np.median(np.array(getattr(self, which)), axis=0)[:units]
        return found

    def totals(self, which: str, units: int | None = None) -> Floats:
        """(rounds,) seconds of all units, or of the first so many. Arguments as for `typical`."""
        found: Floats = np.array(getattr(self, which))[:, :units].sum(axis=1)
        return found

    def token_layers(self, requests: int | None = None) -> int:
        """Of all requests it scored, or of the first so many."""
        return sum(s.token_layers for s in self.scored[:requests])


def run_rounds(sides: Sequence[Side], units: Sequence[Unit], number: int) -> None:
    """One round: every unit is scored by all sides in turn before the next one; the order of the sides rotates.

    Args:
        sides: At least one.
        units: What is scored.
        number: Of the round, from 0.
    """
    running = [side for side in sides if side.start_round()]
    for k, unit in enumerate(units):
        turn = (number + k) % len(running)
        for side in running[turn:] + running[:turn]:
            if side.takes(k):
                side.score(unit)


LABELLED = 64  # most candidates of a request over rated items, and the key of its scores
LEAST_LABELLED = 20


@dataclass
class AskedRequests:
    """Scored requests of a run.

    Attributes:
        model: The run.
        data: Its logs.
        folder: Where scores are kept.
        calibration: Of its heads.
    """

    model: ExitRecommender
    data: InteractionData
    folder: Path
    calibration: Calibration

    @cached_property
    def no_tune(self) -> str | None:
        """Why the fold tune has no requests; None where it has."""
        try:
            catalogue_requests(self.data.split, "tune", 1, 2, self.data.seed)
        except ConfigError as error:
            return str(error)
        return None

    def best(self, k: int, candidates: int, overlap: float) -> tuple[TopK, dict[str, Any]] | None:
        """The list policy that is fastest on tune at this overlap, and what it is worth on test; None if none is.

        Args:
            k: Length of the list.
            candidates: Of a request.
            overlap: Least mean overlap@k with full depth on tune.
        """
        tune = self._ranked("tune", candidates)
        layers = tune.outputs.layers
        full = fixed_depth(layers, len(layers) - 1)
        margins = {q: TopK(k, fit_margins(tune.request, tune.outputs, q)) for q in LEVELS}
        chosen = fastest([by_margin(m, q) for q, m in margins.items()], full, tune, k, overlap)
        if chosen.parameter is None:
            return None
        asked, labelled = self._ranked("test", candidates), self._labelled()
        row, whole = (policy_row(policy, full, asked, labelled, k) for policy in (chosen, full))
        worth = {key: row[key] for key in ("k", "overlap", "overlap_interval", "precision", "n_requests")}
        return margins[chosen.parameter], worth | {"precision_full": whole["precision"]}

    def _ranked(self, part: str, candidates: int) -> ScoredRequests:
        """A part's catalogue requests."""
        count = TUNED.get(candidates, TUNED[64])
        drawn = catalogue_requests(self.data.split, part, count, candidates, self.data.seed)
        return ScoredRequests.of(self._scored(f"{part}-{candidates}", drawn), self.calibration)

    def _labelled(self) -> ScoredRequests | None:
        """Requests over what users rated anyway; None where nobody rated enough."""
        try:
            drawn = labelled_requests(self.data.split, "test", LABELLED, LEAST_LABELLED)
        except DataError:
            return None
        return ScoredRequests.of(self._scored("labelled-test", drawn), self.calibration)

    def _scored(self, name: str, workload: Workload) -> pl.DataFrame:
        path = self.folder / "scores" / f"benchmark-{name}.parquet"
        about = {
            "heads": heads_digest(self.model.state_dict()),
            "protocol": self.data.split.hash,
            "requests": str(len(workload.requests.requests)),
            "seed": str(self.data.seed),
        }
        if path.is_file() and about.items() <= table_about(path).items():
            return pl.read_parquet(path, glob=False)
        prepared = prepare_requests(self.model, self.data, workload.requests)
        scores = labelled_scores(score_every_head(self.model, prepared), workload.table)
        write_table(path, scores, about)
        return scores


Worth = dict[str, Any]
ScoredTable = tuple[pl.DataFrame, Floats]


class RunWorth:
    """Plans and AUCs of one run.

    Args:
        model: The run, with exit 0.
        data: Retrieved features of its rows.
        folder: Its score tables; what is missing there is unknown here.
        plans: Its exit plans.
        settings: Its budget.
    """

    def __init__(
        self,
        model: ExitRecommender,
        data: InteractionData,
        folder: Path,
        plans: Plans,
        settings: ExitSettings,
    ) -> None:
        self.plans, self.static_exit = plans, plans.static_exit
        self._settings = {f.name: getattr(settings, f.name) for f in fields(ExitSettings)}
        self._tables: dict[str, ScoredTable] = {}
        self._known: dict[object, Worth] = {}
        self._made: dict[object, ExitPlan] = {}
        made = heads_digest(model.state_dict())
        for name in ("valid", "test"):
            path = folder / "scores" / f"{name}.parquet"
            if path.is_file() and table_about(path).get("heads", made) == made:  # not another checkpoint's
                scores = pl.read_parquet(path, glob=False)
                if name == "valid":
                    scores = scores.filter(pl.col("fold") == "tune")
                self._tables[name] = scores, features_of(model, data, scores)
        if "test" in self._tables:
            tested = self._tables["test"][0]
            self._labels, self._bootstrap = (
                tested["label"].to_numpy(),
                UserBootstrap(tested["user"].to_numpy()),
            )

    def static(self, layer: int) -> Worth:
        """Of one calibrated head, by its layer: auc and auc_drop with its interval."""
        plan = self.plans.plan

        def judge() -> Worth:
            logits = _calibrated(plan, self._tables["test"])
            return self._drop(plan, logits[:, plan.layers.index(layer)])

        return self._once(layer, judge)

    def adaptive(self, plan: ExitPlan) -> Worth:
        """Of a plan: auc, auc_drop, and its gain over the honest static exit, with intervals."""
        return self._once(_key(plan), lambda: self._judged(plan))

    def _once(self, key: object, judge: Callable[[], Worth]) -> Worth:
        """What `judge` says, asked once whatever the number of workloads; nothing where scores are missing."""
        if "test" not in self._tables:
            return {}
        if key not in self._known:
            self._known[key] = judge()
        return self._known[key]

    def _drop(self, plan: ExitPlan, mine: Floats) -> Worth:
        """Of scores of all test rows: auc, and auc_drop from full depth as the plan calibrates it."""
        full, labels = _calibrated(plan, self._tables["test"])[:, -1], self._labels
        drop = self._bootstrap.difference_interval(full, mine, labels)
        return {"auc": auc(mine, labels), "auc_drop": drop["value"], "auc_drop_interval": drop["interval"]}

    def _judged(self, plan: ExitPlan) -> Worth:
        static_exit = self.static_exit if plan.exit_0 else self.plans.static_without
        emitted = _emitted(plan, self._tables["test"])
        theirs = _calibrated(plan, self._tables["test"])[:, plan.layers.index(static_exit)]
        gain = self._bootstrap.difference_interval(emitted, theirs, self._labels)
        return self._drop(plan, emitted) | {"auc_gain_over_static": {"layer": static_exit, **gain}}

    def budget(
        self, prefix_cached: bool, by_depth: bool = False, criterion: Criterion | None = None
    ) -> ExitPlan | None:
        """The plan that the run's budget chooses on `tune` at another price; None without validation's scores.

        Args:
            prefix_cached: Whether the history's tokens cost nothing.
            by_depth: The price is mean candidate depth.
            criterion: The only one that is tried.
        """
        if "valid" not in self._tables:
            return None
        key = prefix_cached, by_depth, type(criterion)
        if key not in self._made:
            settings = ExitSettings(**{**self._settings, "prefix_cached": prefix_cached, "mode": "budget"})
            self._made[key] = budget_plan(*self._tables["valid"], settings, by_depth, criterion)
        return self._made[key]

    def pushed(self, plan: ExitPlan, share: float) -> ExitPlan | None:
        """The plan with thresholds at which this share of the tune rows that reach an exit leave there."""
        if "valid" not in self._tables:
            return None
        outputs = plan.outputs(*self._tables["valid"])
        thresholds, running = list[float](), torch.arange(outputs.logits.shape[0])
        for head in range(outputs.heads - 1):
            confidence = plan.policy.criterion.confidence(_shown(outputs, running, head))
            known = confidence[confidence.isfinite()]
            limit = float(known.quantile(1 - share)) if len(known) else torch.inf
            thresholds.append(limit)
            running = running[confidence < limit]
        values = torch.tensor([*thresholds, -torch.inf], dtype=torch.float64)
        return replace(plan, policy=Policy(plan.policy.criterion, values, plan.layers))


def _shown(outputs: HeadOutputs, rows: torch.Tensor, head: int) -> HeadOutputs:
    return outputs.rows(rows).until(head)


def _key(plan: ExitPlan) -> object:
    return plan.criterion, plan.exit_0, tuple(plan.policy.thresholds.tolist())


def _calibrated(plan: ExitPlan, rows: ScoredTable) -> Floats:
    return plan.outputs(*rows).logits.double().numpy()


def _emitted(plan: ExitPlan, rows: ScoredTable) -> Floats:
    found: Floats = plan.emitted(plan.outputs(*rows))[1].double().numpy()
    return found


LISTS = (5, 10)  # the best k that ranking requests want
OVERLAP = 0.97  # least overlap@k on tune of the margins that are taken
SAVED = 2.0  # token-layers that the policy saves at which efficiency is quoted
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
SLOW = {"most": 2, "rounds": 2}  # one prompt per candidate is measured on so few units, in so few rounds


@dataclass
class Bench:
    """What all workloads of a run share.

    Attributes:
        model: The run.
        worth: Plans and AUCs.
        asked: Requests of tune and test, scored at every depth.
        device: Where it runs.
    """

    model: ExitRecommender
    worth: RunWorth
    asked: AskedRequests
    device: torch.device

    @cached_property
    def module(self) -> ExitRecommender:
        """The run, packed once for all engines."""
        found = copied(self.model)
        assert found.backbone is not None
        found.backbone = packed(found.backbone.eval())
        return found

    def hints(self) -> list[str]:
        """What to do for rows that will be missing, because nobody knows what their scores are worth."""
        return [f"no lists: {self.asked.no_tune}"] if self.asked.no_tune else []

    def full(self, cache: StreamCache | None) -> Side:
        """Packed full depth: what every speed-up is over."""
        worth, depth = self.worth, self.model.depth
        runs = self._engine(static_exits(worth.plans.plan, depth, self.device), cache)
        return Side("packed", "full depth", runs, worth.static(depth))

    def sides(self, case: Case, units: list[Unit], cache: StreamCache | None) -> list[Side]:
        """All sides, packed full depth first.

        Args:
            case: The workload.
            units: Its sample.
            cache: Streams; None where they are not cached.
        """
        full = self.full(cache)
        early = list(self._early(case, units, cache, full))
        others = [
            *self._static(case, cache),
            *early,
            *self._lists(case, cache),
            *self._plain(case),
        ]
        return [full, *others]

    def _engine(self, decision: Decision, cache: StreamCache | None) -> Engine:
        return Engine(self.module, decision, cache)

    def _static(self, case: Case, cache: StreamCache | None) -> Iterator[Side]:
        plan = self.worth.plans.plan
        layers = [k for k in self.model.exit_layers[:-1] if not case.short or k == self.worth.static_exit]
        for layer in layers:
            runs = self._engine(static_exits(plan, layer, self.device), cache)
            yield Side(f"fixed_depth_{layer}", "static", runs, self.worth.static(layer))

    def _early(self, case: Case, units: list[Unit], cache: StreamCache | None, full: Side) -> Iterator[Side]:
        for name, plan in self._plans(case).items():
            runs = self._engine(RowExits(plan, self.device), cache)
            yield Side("early_exit", f"{name}: {plan.criterion}", runs, self.worth.adaptive(plan))
        if case.usual:
            yield from self._faster(units, cache, full)

    def _plans(self, case: Case) -> dict[str, ExitPlan]:
        """The run's own plan and others that its budget chooses, by name."""
        worth, plans = self.worth, self.worth.plans
        found: dict[str, ExitPlan | None] = {"budget": plans.plan}
        if not case.short:
            found["budget, cost mean depth"] = worth.budget(False, by_depth=True)
            found["budget without exit 0"] = plans.without
            found["budget, the paper's rule"] = worth.budget(False, criterion=RatioConsistency())
            found["certified"] = plans.certified
        return {name: plan for name, plan in found.items() if plan is not None}

    def _faster(self, units: list[Unit], cache: StreamCache | None, full: Side) -> Iterator[Side]:
        """The run's criterion, pushed until it saves x2 token-layers on these requests: where efficiency is quoted."""
        requests = [request for unit in units for request in unit]
        spent = full.runs.score(requests).token_layers
        for share in SHARES:
            pushed = self.worth.pushed(self.worth.plans.plan, share)
            if pushed is None:
                return
            engine = self._engine(RowExits(pushed, self.device), cache)
            if 0 < engine.score(requests).token_layers * SAVED <= spent:
                name = f"{share:.0%} leave at each exit: {pushed.criterion}"
                yield Side("early_exit", name, engine, self.worth.adaptive(pushed))
                return

    def _lists(self, case: Case, cache: StreamCache | None) -> Iterator[Side]:
        if not case.usual or self.asked.no_tune:
            return
        for k in LISTS:
            if case.candidates > 4 * k and (found := self.asked.best(k, case.candidates, OVERLAP)):
                policy, worth = found
                decision = ListExits(policy, self.worth.plans.plan.calibration)
                yield Side("top_k", f"best {k}", self._engine(decision, cache), worth)

    def _plain(self, case: Case) -> Iterator[Side]:
        if self.model.lora is not None:
            return  # transformers' own class has no adapters
        for name in case.plain:
            if name == "pointwise":
                yield Side(name, "full depth", Pointwise(self.model), **SLOW)  # type: ignore[arg-type]
            else:
                runs: Runner = SharedPrefix(self.model, cached=case.prefix_cached)
                yield Side(name, "full depth", runs, most=4)
