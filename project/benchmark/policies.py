"""The sides of a workload: transformers, full depth, static depths, early exit by several plans, lists of the best k.

A request of 64 candidates runs its stream until the last one has left, so thresholds that pay for mean depth alone are
timed beside the run's own, which pay for token-layers of one candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from project.benchmark.asked import AskedRequests
from project.benchmark.cases import Case
from project.benchmark.plain import Pointwise, SharedPrefix
from project.benchmark.sides import Runner, Side, Unit
from project.benchmark.worth import RunWorth
from project.engine.decisions import Decision, ListExits, RowExits, static_exits
from project.engine.engine import Engine
from project.engine.packed import copied, packed
from project.engine.stream_cache import StreamCache
from project.exits.criteria import RatioConsistency
from project.exits.plan import ExitPlan

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

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
        assert found.trunk is not None
        found.trunk = packed(found.trunk.eval())
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
            cache: Streams; None where they are cold.
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
        layers = [k for k in self.model.exit_layers[:-1] if not case.short or k == self.worth.rival]
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
            found["budget, cost mean depth"] = worth.budget("cold", by_depth=True)
            found["budget without exit 0"] = plans.without
            found["budget, the paper's rule"] = worth.budget("cold", criterion=RatioConsistency())
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
                runs: Runner = SharedPrefix(self.model, warm=case.stream == "warm")
                yield Side(name, "full depth", runs, most=4)
