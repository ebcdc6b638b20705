"""What a criterion of one's own returns is looked at: one clear error instead of a crash, if possible before training.

Unusual: a criterion that is not of this package is tried out on a few made-up rows when settings are read. What it
raises there is no verdict, the rows are not real; what it returns has the shape that it will always have.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from project.counting import FEATURES
from project.errors import ConfigError
from project.exits.outputs import HeadOutputs

if TYPE_CHECKING:
    from project.exits.criteria import Criterion

ROWS = 64


def checked(criterion: Criterion, outputs: HeadOutputs) -> Tensor:
    """The criterion's safety (n,), if it is that.

    Args:
        criterion: Fitted.
        outputs: n rows, heads 0..k.

    Raises:
        ConfigError: It is no tensor (n,), or NaN where the heads gave numbers.
    """
    return _check(criterion, outputs, criterion.safety(outputs))


def _check(criterion: Criterion, outputs: HeadOutputs, safety: object) -> Tensor:
    n = outputs.logits.shape[0]
    if not isinstance(safety, Tensor):
        raise _refused(criterion, outputs, "None" if safety is None else f"a {_path(type(safety))}")
    if safety.shape != (n,) or safety.is_complex():
        raise _refused(criterion, outputs, f"a tensor {tuple(safety.shape)} of {safety.dtype}")
    bad = safety.isnan() & ~outputs.logits.isnan().any(dim=1)
    if bad.any():
        raise _refused(
            criterion, outputs, f"NaN for {int(bad.sum())} of them although the logits are numbers"
        )
    return safety


def try_out(criterion: Criterion, prior: bool) -> None:
    """Look at what a criterion of one's own returns for made-up rows; others are left alone.

    Args:
        criterion: Not fitted, and left so.
        prior: Whether exit 0 is a head.

    Raises:
        ConfigError: As `checked`.
    """
    if type(criterion).__module__.split(".")[0] == __name__.split(".")[0]:
        return
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, 3, generator=made, dtype=torch.float64)
    evidence = torch.randn(ROWS, len(FEATURES), generator=made, dtype=torch.float64)
    outputs = HeadOutputs.of((0, 1, 2) if prior else (1, 2, 3), logits, evidence)
    with torch.random.fork_rng(devices=[]):
        try:
            copy = deepcopy(criterion)
            copy.fit(outputs)
            said = [copy.safety(outputs.until(head)) for head in range(outputs.heads - 1)]
        except Exception:  # on made-up rows: real ones may be better
            return
    for head, safety in enumerate(said):
        _check(criterion, outputs.until(head), safety)


def _refused(criterion: Criterion, outputs: HeadOutputs, found: str) -> ConfigError:
    asked = f"{outputs.logits.shape[0]} rows at the exit at layer {outputs.layers[-1]}"
    return ConfigError(
        f"the criterion {_path(type(criterion))}: asked about {asked}, its safety returned {found}; expected a torch "
        "tensor of shape (rows,), higher is safer, -inf where it cannot decide."
    )


def _path(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
