"""Watches whether the plan still scores as full depth does: drift is an alarm.

1. Audits. A share of the requests, drawn by lot, runs to full depth; the same heads tell what the plan would have
   answered. An audit's loss is the mean over its candidates of |probability of the plan - probability of full depth|.
2. Null. At every audit the expected loss, given all before it, is at most the mean loss on the rows that the plan was
   calibrated on plus a tolerance.
3. Bets. A fraction of the capital buys tickets whose price is the null and which pay the loss. Under the null the
   capital's expectation never rises, so the chance that it ever reaches 1 / delta is at most delta (Ville 1939;
   Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting"). Several fractions hold
   shares of the capital, 0 among them, and after audit t a part 1 / (t + 1) of it is shared anew (Herbster and Warmuth
   1998, "Tracking the best expert"): the share at fraction 0 is still there when drift begins late.
4. Bound. Nulls of a grid whose capital has reached 1 / delta are rejected: with confidence 1 - delta, at all times, the
   expected loss of some audit so far was above the largest of them. The alarm: this is not below the null of 2.
5. Lists. An audited list of the best k loses the share of full depth's list that is not in it. The null is what its
   certificate promises. This alarm stands alone: from then on lists are made of every candidate's score at full depth.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import polars as pl
import torch

from project.arrays import F64, I64
from project.datamodule import InteractionData
from project.engine.cache import StreamCache
from project.engine.decisions import EveryHead
from project.engine.engine import Engine
from project.engine.predict import scores_of_run
from project.engine.requests import PreparedRequest, Scored
from project.exits.criteria import HeadOutputs
from project.exits.plan import ExitPlan
from project.exits.ranking import EPSILON, Lists, list_keys
from project.exits.top_k import overlap_at_k
from project.metrics import probabilities
from project.model.module import ExitRecommender

LOG = logging.getLogger(__name__)

FRACTIONS = np.array([0.0, 0.9, *2.0 ** -np.arange(1, 9)])
# of the capital that a fraction stakes, at first and when shared anew
SHARES = np.array([0.5, *[0.5 / 9] * 9])
# How much larger than the reference the expected loss may be. A hundredth is several times what rows of other folds and
# candidates from the catalogue differ by, and reorders few.
TOLERANCE = 0.01
# chance of a false alarm, however long the server runs: the alarm is for good, so it is small
DELTA = 0.01


class Capital:
    """Capital staked against each of n nulls, 1 at first."""

    def __init__(self, nulls: F64) -> None:
        self._nulls = nulls[:, None]
        self._shares = np.tile(SHARES, (len(nulls), 1))
        self._bets = 0
        self._log = np.zeros(len(nulls))
        self.highest = np.zeros(len(nulls))  # (n,) logarithm of the highest it ever was

    def stake(self, loss: float | F64) -> None:
        """Bet on one more loss in [0, 1], or on one of its own for each null, (n,)."""
        self._bets += 1
        pays = np.reshape(loss, (-1, 1)) / self._nulls
        found = self._shares * (1 + FRACTIONS * (pays - 1))
        gain = found.sum(axis=1, keepdims=True)
        renewed = 1 / (self._bets + 1)
        self._shares = (1 - renewed) * found / gain + renewed * SHARES
        self._log += np.log(gain[:, 0])
        self.highest = np.maximum(self.highest, self._log)


class Watch:
    """Bets on losses in [0, 1] as they come, and raises the alarm of 4.

    Args:
        null: Largest expected loss that is no drift.
        found: What the log says in front of the numbers.
        follows: What follows of them.
    """

    def __init__(self, null: float, found: str, follows: str) -> None:
        self.null = null
        self._words = found, follows
        self._grid = np.union1d(np.linspace(0, 1, 201)[1:], null)
        self._capital = Capital(self._grid)
        self._sum = 0.0
        self.audits = 0
        self.lower = 0.0  # bound of 4.
        self.alarm = False  # for good, whatever comes

    @property
    def mean(self) -> float:
        """Mean loss of all audits; 0 before the first."""
        return self._sum / max(self.audits, 1)

    def observe(self, loss: float) -> None:
        """Bet on the loss of an audit."""
        self.audits += 1
        self._sum += loss
        self._capital.stake(loss)
        rejected = self._capital.highest >= -np.log(DELTA)
        self.lower = float(self._grid[rejected].max(initial=0.0))
        if self.lower >= self.null and not self.alarm:
            self.alarm = True
            LOG.warning(
                "drift: %s by %.4f or more (confidence %g, %d audits), %.4f was expected at most; %s",
                self._words[0],
                self.lower,
                1 - DELTA,
                self.audits,
                self.null,
                self._words[1],
            )


class Monitor(Watch):
    """Draws audits, bets on the losses of plan and `lists`, and raises their alarms.

    Args:
        model: Of the run; packed already where other engines have it.
        plan: The exit plan in use.
        lists: Margins in use.
        reference: Mean loss on the rows the plan was calibrated on, see `reference_loss`.
        cache: Of users' streams.
        share: Share of requests that are audited.
    """

    def __init__(
        self,
        model: ExitRecommender,
        plan: ExitPlan,
        lists: Lists,
        reference: float,
        cache: StreamCache | None = None,
        share: float = 0.01,
    ) -> None:
        super().__init__(
            reference + TOLERANCE,
            "the probabilities of plan and full depth have come to differ",
            "from now on every request runs to full depth",
        )
        self.lists = Watch(
            EPSILON,
            "lists have come to differ from those of full depth",
            "from now on requests for a list run to full depth",
        )
        self._plan = plan
        self._margins = lists
        self._heads = EveryHead(plan.calibration)
        self._engine = Engine(model, self._heads, cache)
        self.share = share
        self._lot = Random(0)

    def draws(self) -> bool:
        """Whether the next request is audited."""
        return self._lot.random() < self.share

    def audit(self, request: PreparedRequest) -> Scored:
        """The plan's or the list's answer to a request, from a run to full depth, whose probabilities are `audit`.

        Where the deadline cut it, what it answers then, without.
        """
        self._heads.outputs.clear()
        (scored,) = self._engine.score([request])
        if scored.late or scored.error is not None or not len(request):
            return scored
        (found,) = self._heads.outputs
        outputs = HeadOutputs(found.layers, found.logits.cpu(), found.retrieved.cpu())
        full = scored.probabilities
        k = self._margins.length(request.list_of, len(request))
        if not k:
            layers, logits, losses = answered(self._plan, outputs)
            self.observe(float(losses.mean()))
            return replace(scored, logits=logits, exit_layers=layers, audit=full)
        whole = outputs.logits[:, -1]
        one = torch.zeros(len(whole), dtype=torch.int64)
        exits = self._margins.top_k(k).exits(one, outputs)
        self.lists.observe(
            1 - float(overlap_at_k(one, list_keys(outputs, exits), whole, k))
        )
        logits = outputs.logits.gather(1, exits[:, None]).squeeze(1).double().numpy()
        layers = np.array(outputs.layers)[exits.numpy()]
        return replace(scored, logits=logits, exit_layers=layers, list_of=k, audit=full)


def answered(plan: ExitPlan, outputs: HeadOutputs) -> tuple[I64, F64, F64]:
    """Of n rows at all heads, calibrated: layers and logits that they leave with, and their losses, (n,) each."""
    layers, logits = plan.emitted(outputs)
    answer, full = (x.double().numpy() for x in (logits, outputs.logits[:, -1]))
    return layers.numpy(), answer, np.abs(probabilities(answer) - probabilities(full))


def reference_loss(
    run: Path, model: ExitRecommender, data: InteractionData, plan: ExitPlan
) -> float | None:
    """What is no drift: mean loss of the tune fold of a run's score table; None where it is not of this checkpoint."""
    scores = scores_of_run(run, "valid", model)
    if scores is None:
        return None
    tune = scores.filter(pl.col("fold") == "tune")
    features = data.features_of(tune, model.feature_baseline().base)
    return float(answered(plan, plan.outputs(tune, features))[2].mean())
