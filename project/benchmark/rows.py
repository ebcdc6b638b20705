"""Rows of the engine's benchmark: what each side needed, as numbers of a result file.

Unusual here: a unit's time is the median of its rounds, and ratios are of sums of such medians, with an interval from
resampling requests; the spread beside them is of whole rounds, so it is wider. Only FLOPs that the exits need count as
achieved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from project.benchmark.limits import Limits, useful_flops
from project.benchmark.sides import Side, Unit

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

Floats = NDArray[np.float64]

DRAWS = 2000  # resamples of requests behind an interval


@dataclass(frozen=True)
class Against:
    """What a side is compared with, all measured in the same run.

    Attributes:
        full: Packed full depth, which speed and efficiency are over.
        rival: The honest rival; None where it is counting, which runs no layer.
        limits: What the machine allows.
    """

    full: Side
    rival: Side | None
    limits: Limits


def ratio_interval(slow: Floats, fast: Floats, seed: int = 0) -> dict[str, Any]:
    """How many times faster, {`value`, `interval`}: a ratio of sums, 95 % by resampling units, paired.

    Args:
        slow: (units,) seconds.
        fast: (units,) seconds of the same units.
        seed: Of the resamples.
    """
    drawn = np.random.default_rng(seed).integers(0, len(slow), (DRAWS, len(slow)))
    ratios = slow[drawn].sum(axis=1) / fast[drawn].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"value": float(slow.sum() / fast.sum()), "interval": [float(low), float(high)]}


def side_row(
    side: Side,
    against: Against,
    units: list[Unit],
    model: ExitRecommender,
    prepare_ms: float,
) -> dict[str, Any]:
    """One row of a result file.

    Args:
        side: What is described.
        against: What it is compared with.
        units: The sample.
        model: The run.
        prepare_ms: What a request needs before it can be scored: history, evidence, exit 0 and token ids.
    """
    assert model.trunk is not None
    own = str(model.trunk.embed_tokens.weight.dtype).removeprefix("torch.")
    asked = [request for unit in units[: side.units] for request in unit]
    wall, each = side.typical("wall"), np.array(side.wall).ravel() * 1e3
    rates = len(asked) / side.totals("wall")
    flops = _flops(side, units, model)
    useful = sum(float(own.sum()) for unit in flops for own in unit)
    depths = np.concatenate([s.exit_layers for s in side.scored])
    return {
        "engine": side.engine,
        "policy": side.policy,
        "requests": len(asked),
        "at_once": len(units[0]),
        "rounds": len(side.wall),
        "dtype": own,
        "requests_per_s": len(asked) / float(wall.sum()),
        "candidates_per_s": len(depths) / float(wall.sum()),
        "spread": [float(rates.min()), float(rates.max())],
        **{f"p{p}_ms": float(np.percentile(each, p)) for p in (50, 95, 99)},
        "auc": None,
        "auc_drop": None,
        **side.worth,
        "mean_depth": float(depths.mean()),
        "token_layers": side.token_layers(),
        **_ratios(side, against, len(asked), prepare_ms),
        **_limits(side, against, flops, _flops(against.full, units[: side.units], model)),
        "gflops": useful / float(side.typical("trunk").sum()) / 1e9,
    }


def _flops(side: Side, units: list[Unit], model: ExitRecommender) -> list[list[Floats]]:
    """Per unit that a side scored, per request: useful FLOPs by layer."""
    found = {s.request_id: s for s in side.scored}
    return [[useful_flops(found[r.request_id], r, model) for r in unit] for unit in units[: side.units]]


def _limits(
    side: Side, against: Against, flops: list[list[Floats]], same: list[list[Floats]]
) -> dict[str, Any]:
    """How near a side's trunk comes to what the machine allows, and the efficiency that it would have there."""
    limits, saved = against.limits, _saved(side, against.full)
    least, whole = (sum(map(limits.least_seconds, each)) for each in (flops, same))
    return {
        "of_limit": least / float(side.typical("trunk").sum()),
        # who runs more tokens than packed full depth does not need them
        "efficiency_at_limit": whole / least / saved if saved and saved >= 1 and least else None,
        "gflops_ceiling": limits.gflops,
        "gbytes_ceiling": limits.gbytes,
    }


def _ratios(side: Side, against: Against, requests: int, prepare_ms: float) -> dict[str, Any]:
    """A side against full depth and the rival, on the requests that it scored itself."""
    n, wall, trunk, full = side.units, side.typical("wall"), side.typical("trunk"), against.full
    whole = full.typical("wall", n)
    mine, theirs = (prepare_ms * requests / 1e3 + float(seconds.sum()) for seconds in (wall, whole))
    saved = _saved(side, full)
    measured = ratio_interval(whole, wall)
    return {
        "measured_speedup": measured["value"],
        "measured_speedup_interval": measured["interval"],
        "speedup_over_rival": {"value": None, "interval": None}
        if against.rival is None
        else ratio_interval(against.rival.typical("wall", n), wall),
        "prepare_ms": prepare_ms,
        "request_ms": mine / requests * 1e3,
        "request_speedup": theirs / mine,
        "trunk_speedup": float(full.typical("trunk", n).sum() / trunk.sum()),
        "token_layer_speedup": saved,
        **_efficiency(side, full, saved),
    }


def _saved(side: Side, full: Side) -> float | None:
    """Token-layers of full depth over a side's, on the requests that it scored; None where it ran none."""
    spent = side.token_layers()
    return full.token_layers(len(side.scored)) / spent if spent else None


def _efficiency(side: Side, full: Side, saved: float | None) -> dict[str, Any]:
    """Trunk time saved over token-layers saved."""
    if not saved:
        return {"efficiency": None, "efficiency_spread": None}
    n = side.units
    typical = float(full.typical("trunk", n).sum() / side.typical("trunk").sum())
    rounds = full.totals("trunk", n)[: len(side.wall)] / side.totals("trunk")
    spread = [float(ratio) / saved for ratio in (rounds.min(), rounds.max())]
    return {"efficiency": typical / saved, "efficiency_spread": spread}
