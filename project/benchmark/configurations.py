"""What the engine benchmark times: full depth, static exits, plans, lists of the best k."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from torch import Tensor

from project.arrays import F64
from project.data.requests import catalogue_requests
from project.engine.cache import StreamCache
from project.engine.decisions import ListExits, RowExits, static_exits
from project.engine.engine import Engine, score_workload
from project.engine.predict import scores_of_run
from project.engine.prepacked import copied, prepacked
from project.engine.requests import PreparedRequest, Scored, prepare_requests
from project.exits.criteria import HeadOutputs
from project.exits.plan import Plans
from project.exits.ranking import ScoredRequests, list_keys
from project.metrics import auc
from project.results import ListQuality

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

# candidates of a request -> most requests in the timed sample
REQUESTS = {1: 48, 8: 24, 64: 16, 256: 4}
SHOWN = 100  # requests of test that show what lists hold
TOGETHER = 8  # requests that are also scored at once, where lists are timed
LISTED = 10  # length of the lists that are timed
FIXED_HISTORY = 50  # rows
FLOAT32 = "float32"  # full depth of a run that computes in bfloat16


@dataclass(frozen=True)
class Case:
    """One workload."""

    candidates: int  # of a request
    # all histories' keys and values are cached at full depth before the clock starts
    prefix_cached: bool
    history: int | None = None  # latest rows that make the history; None: as logged
    at_once: int = 1  # requests that are scored together


def cases(sizes: Sequence[int]) -> list[Case]:
    """All workloads of these numbers of candidates; of 64 also behind a short history.

    Several requests at once are of 64 candidates or more; of more than 64 with their histories cached, as others take
    too long.
    """
    found = [Case(size, cached) for size in sizes for cached in (False, True)]
    found += [Case(size, True, at_once=TOGETHER) for size in sizes if size >= 64]
    if 64 in sizes:
        found.append(Case(64, False, at_once=TOGETHER))
        found.append(Case(64, False, history=FIXED_HISTORY))
    return found


@dataclass
class Configuration:
    """One runner, the accuracy of its scores, and its times."""

    # name in result files: packed, fixed_depth_<k>, early_exit, top_k
    engine: str
    policy: str  # who leaves where, in words
    runner: Engine
    auc: float | None = None  # of the rows of test
    quality: ListQuality | None = None  # of its lists
    # seconds, a list a round, an entry a turn: requests that are scored together
    wall: list[list[float]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)  # what the last round scored

    def score(self, requests: Sequence[PreparedRequest]) -> None:
        """Score requests together and note the time."""
        start = time.perf_counter()
        scores = self.runner.score(requests)
        self.wall[-1].append(time.perf_counter() - start)
        self.scored += scores

    def typical(self) -> F64:
        """(turns,) seconds of each turn: the median of rounds."""
        found: F64 = np.median(np.array(self.wall), axis=0)
        return found


def run_rounds(
    configurations: Sequence[Configuration],
    turns: Sequence[Sequence[PreparedRequest]],
    number: int,
) -> None:
    """Round `number`, from 0: a turn's requests are scored by all before the next turn; who is first rotates."""
    for configuration in configurations:
        configuration.wall.append([])
        configuration.scored = []
    for k, requests in enumerate(turns):
        first = (number + k) % len(configurations)
        for configuration in (*configurations[first:], *configurations[:first]):
            configuration.score(requests)


def with_prepacked(model: ExitRecommender, bfloat16: bool) -> ExitRecommender:
    """A copy with prepacked weights, which engines take as they are."""
    found = copied(model)
    assert found.backbone is not None
    found.backbone = prepacked(found.backbone.eval(), bfloat16)
    return found


class Bench:
    """What all workloads of a run share: the model with prepacked weights, its plans, and scores they are judged by.

    `folder` holds the run's score table of test; without one of this checkpoint AUCs are unknown.
    """

    def __init__(
        self, model: ExitRecommender, data: InteractionData, folder: Path, plans: Plans
    ) -> None:
        self.model = model
        self.plans = plans
        self._data = data
        # 1. weights are packed once for all engines
        self.module = with_prepacked(model, model.in_bfloat16)
        assert model.backbone is not None
        weight = model.backbone.embed_tokens.weight
        self._device = weight.device
        in_words = str(weight.dtype).removeprefix("torch.")
        self.dtype = "bfloat16" if model.in_bfloat16 else in_words
        # 2. the scores of test and features of the same rows; a table of another checkpoint
        # does not count
        self._table: tuple[pl.DataFrame, F64] | None = None
        scores = scores_of_run(folder, "test", model)
        if scores is not None:
            self._table = scores, data.features_of(scores, model.feature_baseline().base)
        # 3. requests of test scored at every head, by number of candidates
        self._requests: dict[int, ScoredRequests] = {}

    def configurations(self, case: Case, cache: StreamCache | None) -> list[Configuration]:
        """All configurations of a workload; `cache` holds its histories, None: they are not cached."""
        plan = self.plans.plan
        scored = None
        if case.candidates > LISTED and self.plans.lists.longest >= LISTED:
            scored = self._scored(case.candidates)
        found = list[Configuration]()

        def add(
            name: str,
            policy: str,
            decision: RowExits,
            logits: Callable[[HeadOutputs], Tensor],
        ) -> None:
            """With AUC and lists by the `logits` that candidates leave with."""
            made = Configuration(name, policy, Engine(self.module, decision, cache))
            if self._table is not None:
                of_rows = logits(plan.outputs(*self._table)).double().numpy()
                made.auc = auc(of_rows, self._table[0]["label"])
            if scored is not None:
                made.quality = scored.quality(logits(scored.outputs), LISTED)
            found.append(made)

        def add_static(name: str, policy: str, layer: int) -> None:
            head = plan.layers.index(layer)
            decision = static_exits(plan, layer, self._device)
            add(name, policy, decision, lambda outputs: outputs.logits[:, head])

        # 1. full depth with prepacked weights, which every speed-up is over
        add_static("packed", "full depth", self.model.depth)
        # 2. static exits
        for layer in self.model.exit_layers[:-1]:
            if case.history is None or layer == self.plans.static_exit:
                add_static(f"fixed_depth_{layer}", "static", layer)
        # 3. the run's plan
        decision = RowExits(plan, self._device)
        policy = f"budget: {plan.criterion_name}"
        add("early_exit", policy, decision, lambda outputs: plan.emitted(outputs)[1])
        # 4. lists of the best k
        if scored is not None:
            exits = self.plans.lists.top_k(LISTED).exits(scored.request, scored.outputs)
            decision = ListExits(plan, self.plans.lists, self._device)
            engine = Engine(self.module, decision, cache)
            quality = scored.quality(list_keys(scored.outputs, exits), LISTED)
            found.append(Configuration("top_k", f"best {LISTED}", engine, quality=quality))
        # 5. what bfloat16 wins
        if self.model.in_bfloat16:
            whole = static_exits(plan, self.model.depth, self._device)
            engine = Engine(with_prepacked(self.model, False), whole, cache)
            found.append(Configuration(FLOAT32, "full depth", engine))
        return found

    def _scored(self, candidates: int) -> ScoredRequests:
        """Catalogue requests of test, scored at every head."""
        if candidates not in self._requests:
            drawn = catalogue_requests(
                self._data.split, "test", SHOWN, candidates, self._data.seed
            )
            prepared = prepare_requests(self.model, self._data, drawn.requests)
            self._requests[candidates] = score_workload(
                self.model, drawn, prepared, self.plans.plan
            )
        return self._requests[candidates]
