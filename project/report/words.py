"""What the numbers of a run say, in sentences: worth over counting, savings, who wins, what is certified.

Unusual here: the verdicts are code. A difference whose interval includes 0 is "not told apart"; an adaptive policy wins
over the static shallow model only where it is cheaper and its AUC is not lower, and where it does not the text says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from project.report.tables import plain
from project.tables import UNDEFINED, interval, number, times

Row = Mapping[str, Any]
Ratio = tuple[float, Sequence[float] | None]

UNIT_NAMES = {"user": "users", "users": "users", "row": "rows", "rows": "rows", "request": "requests"}
SAVED_NOTHING = 1.005  # a speed-up that rounds to x1.00


def headline(result: Row, rows: str, floor_auc: float | None) -> str:
    """LLM and adaptive score against the best floor, in words.

    Args:
        result: A `test`, `fit` or `validate` result.
        rows: What the numbers are of: "test".
        floor_auc: AUC of the best floor on these rows.
    """
    difference, adaptive = result.get("floor_difference"), result.get("adaptive") or {}
    if not difference:
        return "Not compared: no result of this run has both an exit and a floor."
    subject = f"LLM exit {difference['layer']}"
    text = f"On {rows}, {against_floor(subject, difference['floor'], difference)}."
    if own := adaptive.get("floor_difference"):
        return f"{text} With early exit, {against_floor('the adaptive score', own['floor'], own)}."
    if adaptive.get("auc") is not None and floor_auc is not None:
        gap = number(adaptive["auc"] - floor_auc, signed=True)
        text += f" The adaptive score minus that floor: AUC {gap} (no interval was computed)."
    return text


def against_floor(subject: str, floor: str, difference: Row) -> str:
    """A difference to the best floor as a clause; the word follows from the interval."""
    value, bounds = difference["value"], difference["interval"]
    if value is None:
        return f"{subject} against the best floor ({floor}) is {UNDEFINED}: a class is missing"
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        verb = "cannot be told apart from"
    else:
        verb = "is better than" if value > 0 else "is worse than"
    numbers = f"AUC {number(value, signed=True)} {interval(bounds, signed=True)}"
    return f"{subject} {verb} the best floor ({floor}): {numbers} (paired, users resampled)"


def savings(adaptive: Row, depth: int) -> list[str]:
    """What early exit saved and cost, a sentence each.

    Args:
        adaptive: The `adaptive` dictionary of a result file.
        depth: Layers of full depth.
    """
    lines = [_saved(adaptive, depth), _cost(adaptive)]
    rival, ratio = adaptive.get("rival"), ratio_of(adaptive, "speedup_over_rival")
    if rival and ratio:
        lines.append(
            f"Against the honest rival, exit {rival['layer']} for every row (the shallowest static depth whose "
            f"validation AUC is within .002 of the best): token-layer speed-up {_ratio(ratio)}."
        )
    if without := adaptive.get("without_exit_0"):
        parts = [f"mean depth {number(without.get('mean_depth'), 2)}"]
        if ratio := ratio_of(without, "token_layer_speedup"):
            parts.append(f"token-layer speed-up {_ratio(ratio)}")
        drop = interval(without.get("auc_drop_interval"), signed=True)
        parts.append(f"AUC drop {number(without.get('auc_drop'), signed=True)} {drop}")
        if ratio := ratio_of(without, "speedup_over_rival"):
            parts.append(f"{_ratio(ratio)} over its rival")
        lines.append(f"Without exit 0: {', '.join(parts)}.")
    return lines


def verdict(adaptive: Row) -> str:
    """Who wins, the adaptive policy or the static shallow model, and what the best static depth of its cost does.

    Args:
        adaptive: `rival` and `equal_cost` {`layer`, `auc`, `auc_gain`, `auc_gain_interval`}, `speedup_over_rival`.
    """
    rival, ratio = adaptive.get("rival") or {}, ratio_of(adaptive, "speedup_over_rival")
    gain, bounds = rival.get("auc_gain"), rival.get("auc_gain_interval")
    free = (
        adaptive.get("mean_depth") == 0
    )  # nobody enters the trunk: cheaper than anything, by no finite ratio
    if gain is None or not (ratio or free):
        return "Who wins, adaptive or static, is not decided: a number is missing or undefined."
    if free and rival["layer"] == 0:
        return "Counting alone is within the budget: everyone leaves at exit 0, and the LLM need not run."
    open_question = bounds is not None and bounds[0] <= 0 <= bounds[1]
    faster = free or (ratio is not None and (ratio[1][0] if ratio[1] else ratio[0]) > 1)
    model = f"the static model of exit {rival['layer']}"
    cost = f"token-layer speed-up {_ratio(ratio)}" if ratio else "no layer runs"
    numbers = f"{cost}, AUC {_gain(rival)}"
    if faster and gain >= 0:
        text = f"The adaptive policy wins over {model}: {numbers}."
    elif faster and open_question:
        text = f"The adaptive policy is cheaper than {model}, the AUCs cannot be told apart ({numbers})."
    elif faster:
        text = f"Neither wins: the adaptive policy is cheaper than {model} but its AUC is lower ({numbers})."
    elif gain > 0 and not open_question:
        text = f"Neither wins: the adaptive policy is not cheaper than {model} but its AUC is higher ({numbers})."
    else:
        text = (
            f"The adaptive policy does not beat {model} ({numbers}): the static model is the better choice."
        )
    equal = adaptive.get("equal_cost")
    if not equal or equal.get("auc_gain") is None:
        return text
    return f"{text} Against exit {equal['layer']}, the deepest static depth that costs no more: AUC {_gain(equal)}."


def certificate_words(certificate: Row, mode: str) -> list[str]:
    """The certificate, a sentence each: passed or not, what for, on what, and what it does not say.

    Args:
        certificate: `words`, `passed`, ..., as `calibrate` writes it.
        mode: budget (one test of the chosen policy) or risk (the last step of the path that passed).
    """
    lines = [certificate["words"]]
    if mode == "budget":
        lines.append("Budget mode: one test of the one policy that was chosen, printed whatever it says.")
    else:
        last = (
            "the last step of the path that passed is used" if certificate["passed"] else "full depth is used"
        )
        lines.append(f"Risk mode: {last}.")
    lines.append("This is a statement about validation-like traffic; test risk is reported, not guaranteed.")
    return lines


def certified_words(certified: Row) -> str:
    """The fastest policy that the sequence of tests reached: what may be said of it, and what it did on `tune`.

    Args:
        certified: Of a `calibrate` result: `words`, `cost`, `auc_drop`.
    """
    drop = number(certified["auc_drop"], signed=True)
    return (
        f"{certified['words']} On tune that policy costs {number(certified['cost'], 3)} of full depth's token-layers "
        f"at an AUC drop of {drop}."
    )


def risk_on_test(certificate: Row, risk: Row | None) -> str:
    """The certified risk as measured on test, against epsilon.

    Args:
        certificate: Its `risk` and `epsilon`.
        risk: `adaptive.risk` of a `test` result: {`risk`, `value`, maybe `interval`}.
    """
    name, epsilon = certificate["risk"], certificate["epsilon"]
    if not risk or risk.get("value") is None:
        return f"The {name} on test is in no result file."
    bounds = f" {interval(risk['interval'])}" if risk.get("interval") else ""
    side = "above" if risk["value"] > epsilon else "within"
    return f"On test the {name} is {number(risk['value'])}{bounds}: {side} epsilon {plain(epsilon)}."


def ratio_of(row: Row, key: str) -> Ratio | None:
    """A speed-up, a number or {`value`, `interval`}, as value and interval; None where there is none."""
    found = row.get(key)
    if isinstance(found, Mapping):
        value, bounds = found["value"], found.get("interval")
    else:
        value, bounds = found, row.get(f"{key}_interval")
    return None if value is None else (float(value), bounds)


def _gain(against: Row) -> str:
    """Adaptive minus static, with the paired interval where there is one."""
    gain, bounds = number(against["auc_gain"], signed=True), against.get("auc_gain_interval")
    return f"{gain} {interval(bounds, signed=True)}" if bounds else gain


def _ratio(ratio: Ratio) -> str:
    value, bounds = ratio
    return times(value) + (f" [{', '.join(times(b) for b in bounds)}]" if bounds else "")


def _saved(adaptive: Row, depth: int) -> str:
    mean, ratio = adaptive.get("mean_depth"), ratio_of(adaptive, "token_layer_speedup")
    text = f"Mean depth {number(mean, 2)} of {depth} layers"
    if mean == 0:
        return f"{text}: every row leaves at exit 0, no layer runs."
    if ratio is None:
        return text + "."
    if ratio[0] < SAVED_NOTHING:
        return f"{text}: nothing saved, the policy runs full depth ({times(ratio[0])} token-layers)."
    return f"{text}; token-layer speed-up {_ratio(ratio)} over full depth, the stream's tokens counted."


def _cost(adaptive: Row) -> str:
    drop, bounds = adaptive.get("auc_drop"), adaptive.get("auc_drop_interval")
    if drop is None:
        return f"AUC drop against full depth: {UNDEFINED}."
    text = f"AUC drop against full depth: {number(drop, signed=True)}"
    if bounds is None:
        return f"{text} (no interval was computed)."
    includes = "no loss is told apart from 0" if bounds[0] <= 0 <= bounds[1] else "the interval leaves 0 out"
    return f"{text} {interval(bounds, signed=True)}, positive is a loss; {includes}."
