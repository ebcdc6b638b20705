"""The engine benchmark's contenders: full depth, static exits, plans, lists, transformers' own model, and llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl
import torch

from project.arrays import F64
from project.benchmark.llama_cpp import LlamaCpp, can_run, load
from project.benchmark.transformers import Pointwise, SharedPrefix
from project.data.requests import Workload, catalogue_requests, labelled_requests
from project.engine.cache import StreamCache
from project.engine.decisions import Decision, ListExits, RowExits, static_exits
from project.engine.engine import Engine, copied, packed, score_every_head
from project.engine.requests import PreparedRequest, Scored, Scores, prepare_requests
from project.errors import ConfigError
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.result import labelled_scores
from project.exits.budget import budget_plan
from project.exits.criteria import Criterion, RatioConsistency
from project.exits.plan import ExitPlan, ExitSettings, Plans
from project.exits.top_k import TopK, fit_margins
from project.metrics import auc
from project.model.heads import heads_digest
from project.rank import (
    LEAST_LABELLED,
    LEVELS,
    LISTS,
    ScoredRequests,
    by_margin,
    fastest,
    fixed_depth,
    policy_row,
)
from project.run import table_about, write_table

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

REQUESTS = {1: 48, 8: 24, 64: 16, 256: 4}  # candidates of a request -> most requests in the timed sample
TUNED = {8: 96, 64: 60, 256: 16}  # candidates of a request -> requests of tune that margins are fitted on
FIXED_HISTORY = 50
LABELLED = 64  # most candidates of a request over rated items
OVERLAP = 0.97  # least overlap@k on tune of the margins that are taken


@dataclass(frozen=True)
class Case:
    """One workload."""

    candidates: int  # of a request
    prefix_cached: bool  # all histories' keys and values are cached at full depth before the clock starts
    history: int | None = None  # latest rows that make the history; None: as logged
    at_once: int = 1  # requests in one call
    plain: tuple[str, ...] = ()  # transformers' own ways that are timed too: pointwise, shared_prefix

    @property
    def usual(self) -> bool:
        """History as logged, requests one by one: where they get plans and lists of their own."""
        return self.history is None and self.at_once == 1

    @property
    def short(self) -> bool:
        """Whether only the main contenders are timed: the others take too long here, or add nothing."""
        return not self.usual or self.candidates > 64

    @property
    def requests(self) -> int:
        """Most requests in the sample, a multiple of `at_once`."""
        return REQUESTS.get(self.candidates, 8) // self.at_once * self.at_once

    def row(self) -> dict[str, object]:
        """The workload's part of a result file's row."""
        kind = "history as logged" if self.history is None else f"{self.history}-item history"
        return {
            "candidates": self.candidates,
            "prefix_cached": self.prefix_cached,
            "history": self.history,
            "workload": f"catalogue, {kind}",
        }


def cases(sizes: Sequence[int]) -> list[Case]:
    """All workloads of these numbers of candidates.

    One prompt per candidate over a long logged history takes minutes a request at 64 candidates, so there it is timed
    on the fixed history alone; at 256 transformers is not timed at all.
    """
    found = []
    for size in sizes:
        shared = ("shared_prefix",) if size <= 64 else ()
        alone = ("pointwise", *shared) if size < 64 else shared
        found += [Case(size, prefix_cached=False, plain=alone), Case(size, prefix_cached=True, plain=shared)]
        if size == 64:
            both = ("pointwise", "shared_prefix")
            found.append(Case(size, prefix_cached=False, history=FIXED_HISTORY, plain=both))
            found.append(Case(size, prefix_cached=True, history=FIXED_HISTORY, plain=shared))
        if size in (1, 8):
            found.append(Case(size, prefix_cached=True, at_once=8))
    return found


Unit = list[PreparedRequest]  # requests that are scored in one call


class Runner(Protocol):
    """Scores requests: the engine, or what it is compared with."""

    def score(self, requests: Sequence[PreparedRequest]) -> Scores:
        """Scores in the order of the requests, with seconds and token-layers."""
        ...


@dataclass
class Contender:
    """One runner, the accuracy of its scores, and its times."""

    engine: str  # name in result files: packed, fixed_depth_<k>, early_exit, top_k, pointwise, shared_prefix, llama_cpp
    policy: str  # who leaves where, in words
    runner: Runner
    # auc, auc_drop and so on; of lists overlap and precision
    accuracy: dict[str, Any] = field(default_factory=dict)
    most: int | None = None  # units it is measured on, the first ones; None: all
    rounds: int | None = None  # rounds it is measured in; None: all
    wall: list[list[float]] = field(default_factory=list)  # seconds, a list a round, an entry a unit
    backbone: list[list[float]] = field(default_factory=list)  # the backbone's share of them
    scored: list[Scored] = field(default_factory=list)  # what the last round scored

    def score(self, unit: Unit) -> None:
        """Score one unit and note the time."""
        start = time.perf_counter()
        scores = self.runner.score(unit)
        self.wall[-1].append(time.perf_counter() - start)
        self.backbone[-1].append(scores.seconds["backbone"])
        self.scored += scores.requests

    @property
    def units(self) -> int:
        """Units it scored in a round."""
        return len(self.wall[0])

    def typical(self, which: str, units: int | None = None) -> F64:
        """(units,) seconds (`which`: wall or backbone) of each unit, or of the first so many: the median of rounds."""
        found: F64 = np.median(np.array(getattr(self, which)), axis=0)[:units]
        return found

    def totals(self, which: str, units: int | None = None) -> F64:
        """(rounds,) seconds (`which`: wall or backbone) of all units, or of the first so many."""
        found: F64 = np.array(getattr(self, which))[:, :units].sum(axis=1)
        return found

    def token_layers(self, requests: int | None = None) -> int:
        """Of all requests it scored, or of the first so many."""
        return sum(s.token_layers for s in self.scored[:requests])


def run_rounds(contenders: Sequence[Contender], units: Sequence[Unit], number: int) -> None:
    """Round `number`, from 0: every unit is scored by all in turn before the next one; who is first rotates."""
    running = [c for c in contenders if c.rounds is None or len(c.wall) < c.rounds]
    for contender in running:
        contender.wall.append([])
        contender.backbone.append([])
        contender.scored = []
    for k, unit in enumerate(units):
        turn = (number + k) % len(running)
        for contender in running[turn:] + running[:turn]:
            if contender.most is None or k < contender.most:
                contender.score(unit)


class Bench:
    """What all workloads of a run share: the packed model, plans, their accuracy, and the scored requests of lists.

    `folder` holds the run's score tables; without a table the accuracy is unknown. `settings` is the run's budget,
    which also chooses the plan of the paper's rule.
    """

    def __init__(
        self,
        model: ExitRecommender,
        data: InteractionData,
        folder: Path,
        plans: Plans,
        settings: ExitSettings,
        device: torch.device,
    ) -> None:
        self.model, self.plans = model, plans
        self._data, self._folder, self._device = data, folder, device
        self._settings = {f.name: getattr(settings, f.name) for f in fields(ExitSettings)}
        self._digest = heads_digest(model.state_dict())
        self._tables: dict[str, tuple[pl.DataFrame, F64]] = {}  # scores, and features of the same rows
        for name in ("valid", "test"):
            path = folder / "scores" / f"{name}.parquet"
            # a table of another checkpoint does not count
            if path.is_file() and table_about(path).get("heads", self._digest) == self._digest:
                scores = pl.read_parquet(path, glob=False)
                if name == "valid":
                    scores = scores.filter(pl.col("fold") == "tune")
                self._tables[name] = scores, data.features_of(scores, model.feature_baseline().base)
        if "test" in self._tables:
            tested = self._tables["test"][0]
            self._labels = tested["label"].to_numpy()
            self._bootstrap = UserBootstrap(tested["user"].to_numpy())

    @cached_property
    def module(self) -> ExitRecommender:
        """The run, packed once for all engines."""
        found = copied(self.model)
        assert found.backbone is not None
        found.backbone = packed(found.backbone.eval())
        return found

    @cached_property
    def no_lists(self) -> str | None:
        """Why the fold tune has no requests to fit lists on; None where it has."""
        try:
            catalogue_requests(self._data.split, "tune", 1, 2, self._data.seed)
        except ConfigError as error:
            return str(error)
        return None

    def contenders(self, case: Case, cache: StreamCache | None) -> list[Contender]:
        """All contenders of a workload; `cache` holds its histories, None: they are not cached."""
        # 1. packed full depth, which every speed-up is over
        found = [self.static("packed", "full depth", self.model.depth, cache)]
        # 2. static exits
        for layer in self.model.exit_layers[:-1]:
            if not case.short or layer == self.plans.static_exit:
                found.append(self.static(f"fixed_depth_{layer}", "static", layer, cache))
        # 3. the run's plan, and others that its budget chooses
        for name, plan in {"budget": self.plans.plan}.items() if case.short else self._named_plans.items():
            found.append(self._early_exit(name, plan, cache))
        # 4. lists of the best k
        for k in LISTS if case.usual and not self.no_lists else ():
            if case.candidates > 4 * k and (best := self._best_list(k, case.candidates)):
                engine = self._engine(ListExits(best[0], self.plans.plan.calibration), cache)
                found.append(Contender("top_k", f"best {k}", engine, best[1]))
        # 5. transformers' own class, which has no adapters; one prompt per candidate is too slow for all units
        for name in case.plain if self.model.lora is None else ():
            if name == "pointwise":
                found.append(Contender(name, "full depth", Pointwise(self.model), most=2, rounds=2))
            else:
                runner = SharedPrefix(self.model, cached=case.prefix_cached)
                found.append(Contender(name, "full depth", runner, most=4))
        # 6. llama.cpp, where it is installed
        if case.plain and can_run(self.model):
            llama = LlamaCpp(self.model, self._llama, case.prefix_cached)
            found.append(Contender("llama_cpp", "full depth", llama))
        return found

    def static(self, name: str, policy: str, layer: int, cache: StreamCache | None) -> Contender:
        """Every candidate leaves at one layer."""
        plan, accuracy = self.plans.plan, dict[str, Any]()
        if "test" in self._tables:
            logits = plan.outputs(*self._tables["test"]).logits.double().numpy()
            accuracy = self._drop(logits[:, plan.layers.index(layer)], logits[:, -1])
        return Contender(name, policy, self._engine(static_exits(plan, layer, self._device), cache), accuracy)

    def _early_exit(self, name: str, plan: ExitPlan, cache: StreamCache | None) -> Contender:
        """Candidates leave by a plan; its accuracy has the gain over the static exit of equal accuracy."""
        accuracy = dict[str, Any]()
        if "test" in self._tables:
            outputs = plan.outputs(*self._tables["test"])
            calibrated, emitted = outputs.logits.double().numpy(), plan.emitted(outputs)[1].double().numpy()
            layer = self.plans.static_exit if plan.exit_0 else self.plans.static_without
            static = calibrated[:, plan.layers.index(layer)]
            gain = self._bootstrap.difference_interval(emitted, static, self._labels)
            accuracy = self._drop(emitted, calibrated[:, -1])
            accuracy["auc_gain_over_static"] = {"layer": layer, **gain}
        engine = self._engine(RowExits(plan, self._device), cache)
        return Contender("early_exit", f"{name}: {plan.criterion}", engine, accuracy)

    @cached_property
    def _llama(self) -> Any:
        return load(self.model)

    def _engine(self, decision: Decision, cache: StreamCache | None) -> Engine:
        return Engine(self.module, decision, cache)

    def _drop(self, logits: F64, full: F64) -> dict[str, Any]:
        drop = self._bootstrap.difference_interval(full, logits, self._labels)
        value = auc(logits, self._labels)
        return {"auc": value, "auc_drop": drop["value"], "auc_drop_interval": drop["interval"]}

    @cached_property
    def _named_plans(self) -> dict[str, ExitPlan]:
        found = {
            "budget": self.plans.plan,
            "budget without exit 0": self.plans.without,
            "budget, the paper's rule": self._budget(RatioConsistency()),
            "certified": self.plans.certified,
        }
        return {name: plan for name, plan in found.items() if plan is not None}

    def _budget(self, criterion: Criterion) -> ExitPlan | None:
        """The plan that the run's budget chooses with this criterion; None without validation's scores."""
        if "valid" not in self._tables:
            return None
        settings = ExitSettings(**{**self._settings, "prefix_cached": False})
        return budget_plan(*self._tables["valid"], settings, criterion)

    def _best_list(self, k: int, candidates: int) -> tuple[TopK, dict[str, Any]] | None:
        """The list policy that is fastest on tune at OVERLAP or more, and its accuracy on test; None: there is none."""
        tune = self._ranked("tune", candidates)
        layers = tune.outputs.layers
        full = fixed_depth(layers, len(layers) - 1)
        margins = {q: TopK(k, fit_margins(tune.request, tune.outputs, q)) for q in LEVELS}
        chosen = fastest([by_margin(m, q) for q, m in margins.items()], full, tune, k, OVERLAP)
        if chosen.parameter is None:
            return None
        workload = labelled_requests(self._data.split, "test", LABELLED, LEAST_LABELLED)
        labelled = self._scored("labelled-test", workload) if workload else None
        catalogue = self._ranked("test", candidates)
        row, whole = (policy_row(policy, full, catalogue, labelled, k) for policy in (chosen, full))
        accuracy = {key: row[key] for key in ("k", "overlap", "overlap_interval", "precision", "n_requests")}
        return margins[chosen.parameter], accuracy | {"precision_full": whole["precision"]}

    def _ranked(self, part: str, candidates: int) -> ScoredRequests:
        count = TUNED.get(candidates, TUNED[64])
        drawn = catalogue_requests(self._data.split, part, count, candidates, self._data.seed)
        return self._scored(f"{part}-{candidates}", drawn)

    def _scored(self, name: str, workload: Workload) -> ScoredRequests:
        """Requests scored at every depth; the table is kept in the run's folder."""
        path = self._folder / "scores" / f"benchmark-{name}.parquet"
        about = {
            "heads": self._digest,
            "protocol": self._data.split.hash,
            "requests": str(len(workload.requests.requests)),
            "seed": str(self._data.seed),
        }
        if path.is_file() and about.items() <= table_about(path).items():
            scores = pl.read_parquet(path, glob=False)
        else:
            prepared = prepare_requests(self.model, self._data, workload.requests)
            scores = labelled_scores(score_every_head(self.model, prepared), workload.table)
            write_table(path, scores, about)
        return ScoredRequests.of(scores, self.plans.plan.calibration)
