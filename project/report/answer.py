"""What to deploy, decided from a result file: the plan, one exit for every row, or no LLM at all.

The LLM is worth deploying only where what is deployed is better than the best baseline, its 95 % interval above 0. The
plan is worth its machinery only where it is cheaper than the static exit of equal accuracy and not less accurate, or
more accurate. The sentences are in tables.md.j2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
TOLERANCE = 0.002  # of AUC: as near as the static exit of equal accuracy is to the best one


@dataclass(frozen=True)
class Answer:
    """The decision.

    Attributes:
        kind: "plan" and "exit" deploy the LLM; "no_llm" does not; "undecided": a class or a baseline is missing;
            "baselines": no exit was scored.
        rival: no_llm: "exit 0", or the best baseline's name.
        how: no_llm: the rival is "as good", "better", within the "budget", or the LLM is "not better": the interval
            holds 0, but the difference is no small one.
        layer: exit: the one to deploy.
        gain: What would be deployed (no_llm: the best that the LLM has to offer) minus the best baseline.
        calibrated: exit: whether `gain` is of the exit calibrated with exit 0, else as trained.
    """

    kind: Literal["plan", "exit", "no_llm", "undecided", "baselines"]
    rival: str = ""
    how: Literal["", "as good", "better", "not better", "budget"] = ""
    layer: int | None = None
    gain: Row | None = None
    calibrated: bool = False


def decide(result: Row) -> Answer:
    """The decision on the rows of a result.

    Args:
        result: Of `fit`, `validate`, `test` or `calibrate`: `exits`, `chosen_exit`, `floor_difference` and, once
            calibrated, `adaptive`.
    """
    if not result.get("exits"):
        return Answer("baselines")
    plan: Row = result.get("adaptive") or {}
    gain = (plan or result).get("floor_difference")
    if not gain or not gain["interval"]:
        return Answer("undecided", gain=gain)
    static: Row = plan.get("rival") or {}
    if plan and plan["mean_depth"] == 0:
        loses = (plan.get("auc_drop") or 0) > TOLERANCE and _above(plan.get("auc_drop_interval"))
        return Answer("no_llm", "exit 0", "budget" if loses else "as good", gain=gain)
    with_exit_0 = ((result.get("chosen_exit_by_prior") or {}).get("counting") or {}).get(
        "floor_difference"
    ) or {}
    for static_gain, calibrated in ((with_exit_0, True), (result.get("floor_difference") or {}, False)):
        if not _above(gain["interval"]) and _above(static_gain.get("interval")):
            return Answer("exit", layer=result["chosen_exit"], gain=static_gain, calibrated=calibrated)
    if _below(gain["interval"]):
        return Answer("no_llm", gain["floor"], "better", gain=gain)
    if not _above(gain["interval"]):
        rival = "exit 0" if static.get("layer") == 0 else gain["floor"]
        return Answer("no_llm", rival, "as good" if gain["value"] <= TOLERANCE else "not better", gain=gain)
    if not plan:
        return Answer("exit", layer=result["chosen_exit"], gain=gain)
    if static.get("auc_gain_interval") is None:
        return Answer("undecided", gain=gain)
    more_accurate = _above(static["auc_gain_interval"])
    cheaper = plan["speedup_over_rival"]["value"] > 1 and not _below(static["auc_gain_interval"])
    if more_accurate or (cheaper and static["layer"] > 0):
        return Answer("plan", gain=gain)
    if static["layer"] == 0:
        return Answer("no_llm", "exit 0", "as good", gain=gain)
    own: Row = next((row for row in result["exits"] if row["layer"] == static["layer"]), {})
    return Answer("exit", layer=static["layer"], gain=own.get("floor_difference"))


def _above(bounds: list[float] | None) -> bool:
    return bounds is not None and bounds[0] > 0


def _below(bounds: list[float] | None) -> bool:
    return bounds is not None and bounds[1] < 0
