"""Exit criteria: how sure the heads are that a candidate may leave, one number a head."""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from project.errors import ConfigError, DataError
from project.features import FEATURES
from project.metrics import SMALLEST_PROBABILITY


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """Calibrated outputs of n rows at K heads.

    Attributes:
        layers: (K,) layer of each head, ascending; 0 is the exit 0, which runs before the backbone.
        logits: (n, K) calibrated logits, float32 or float64.
        retrieved: (n, F) numbers known before the backbone runs (log counts, rates); F may be 0.
    """

    layers: tuple[int, ...]
    logits: Tensor
    retrieved: Tensor

    def __post_init__(self) -> None:
        n, heads = self.logits.shape
        if len(self.layers) != heads:
            raise ValueError(f"{len(self.layers)} layers, but logits of shape {(n, heads)}")
        if self.retrieved.ndim != 2 or self.retrieved.shape[0] != n:
            raise ValueError(
                f"{n} rows of logits, but retrieved features of shape {tuple(self.retrieved.shape)}"
            )
        if any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError(f"layers must ascend, found {self.layers}")

    @classmethod
    def of(cls, layers: Sequence[int], logits: Tensor, retrieved: Tensor | None = None) -> HeadOutputs:
        """The retrieved features in the type of the logits; None is F = 0. Arguments as the attributes."""
        known = logits.new_zeros(logits.shape[0], 0) if retrieved is None else retrieved.to(logits)
        return cls(tuple(layers), logits, known)

    @property
    def heads(self) -> int:
        """K, the number of heads that have spoken."""
        return len(self.layers)

    @property
    def probabilities(self) -> Tensor:
        """(n, K) probabilities as emitted: sigmoid, clipped to [.001, .999]."""
        return torch.sigmoid(self.logits).clamp(SMALLEST_PROBABILITY, 1.0 - SMALLEST_PROBABILITY)

    def until(self, k: int) -> HeadOutputs:
        """Heads 0..k only: what is known when the rows stand at head k."""
        if not 0 <= k < self.heads:
            raise ValueError(f"head {k} of {self.heads}")
        end = k + 1
        return HeadOutputs(self.layers[:end], self.logits[:, :end], self.retrieved)

    def rows(self, index: Tensor) -> HeadOutputs:
        """The rows of `index`: (m,) positions or a mask (n,)."""
        return HeadOutputs(self.layers, self.logits[index], self.retrieved[index])


ITEM_ROWS = FEATURES.index("item_rows")
TRIED_ROWS = 64  # made-up rows that a criterion of one's own is tried on when settings are read
QUANTILES = 1001  # points of a frozen distribution: its error is below .001 in quantile


class Criterion(ABC):
    """Scores how safe it is that a row leaves at the last head of what it is shown."""

    learns: ClassVar[bool] = False
    """`fit` learns from how rows ended, so confidence on the rows of the fit must be out-of-fold."""

    first: int = 0
    """Index of the first head where it can decide."""

    _fitted: ClassVar[tuple[str, ...]] = ()  # names of the tensors that `fit` makes

    def fit(self, outputs: HeadOutputs) -> None:  # noqa: B027  # most criteria have nothing to fit
        """Fit on rows of `tune`, all K heads visible."""

    @abstractmethod
    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """Confidence of leaving at the last head shown.

        Args:
            outputs: n rows, heads 0..k (`outputs.until(k)`).

        Returns:
            (n,) torch tensor, higher is safer, -inf where it cannot decide; never NaN.
        """

    def state(self) -> dict[str, Tensor]:
        """Fitted tensors, for a checkpoint."""
        return {key: self._tensor(key) for key in self._fitted}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned; DataError where tensors are missing."""
        missing = sorted(set(self._fitted) - set(state))
        if missing:
            raise DataError(
                f"fitted state of the criterion {name(self)} lacks {missing}, found {sorted(state)}: it was "
                "made by another criterion; run the command calibrate again"
            )
        for key in self._fitted:
            setattr(self, f"_{key}", state[key])

    def _tensor(self, key: str) -> Tensor:
        found: Tensor | None = getattr(self, f"_{key}", None)
        if found is None:
            raise ConfigError(
                f"the criterion {name(self)} was not fitted, so it has no confidence to give; run the command calibrate"
            )
        return found

    def _undecided(self, outputs: HeadOutputs) -> Tensor:
        return torch.full_like(outputs.logits[:, -1], -torch.inf)


class Ratio(Criterion):
    """|calibrated logit|: the log of the ratio of the likelier to the less likely class."""

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) |logit|."""
        return outputs.logits[:, -1].abs()


class Consistency(Criterion):
    """Minus the largest |p_j - p_(j-1)| over the last heads: the score stopped moving.

    Args:
        heads: Number of last changes that count, at least 1; the first decision is at head number `heads`.
    """

    def __init__(self, heads: int = 1) -> None:
        if heads < 1:
            raise ConfigError(
                f"{type(self).__name__}: heads is {heads}, expected at least 1 change to look at"
            )
        self.heads = heads
        self.first = heads

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) in [-1, 0]; -inf before there were `heads` changes."""
        if outputs.heads <= self.first:
            return self._undecided(outputs)
        return -outputs.probabilities[:, -self.heads - 1 :].diff(dim=1).abs().amax(dim=1)


class RatioConsistency(Consistency):
    """Confident and no longer moving: the smaller of the two quantiles among the tune rows at that head.

    The rule of the paper, where both conditions must hold; quantiles put them on one scale.

    Args:
        heads: Number of last changes that count, at least 1; the first decision is at head number `heads`.
    """

    _fitted = ("ratio_quantiles", "consistency_quantiles")

    def fit(self, outputs: HeadOutputs) -> None:
        """Freeze both distributions at every head."""
        if not outputs.logits.shape[0]:
            raise DataError("ratio_consistency needs rows in the fold tune to take quantiles of, found none")
        parts = [outputs.until(k) for k in range(outputs.heads)]
        self._ratio_quantiles = torch.stack([_quantiles(Ratio().confidence(part)) for part in parts])
        self._consistency_quantiles = torch.stack(
            [_quantiles(super(RatioConsistency, self).confidence(p)) for p in parts]
        )

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) in [0, 1]; -inf before there were `heads` changes."""
        if outputs.heads <= self.first:
            return self._undecided(outputs)
        head = outputs.heads - 1
        ratio = _quantile_of(Ratio().confidence(outputs), self._tensor("ratio_quantiles")[head])
        consistency = _quantile_of(super().confidence(outputs), self._tensor("consistency_quantiles")[head])
        return torch.minimum(ratio, consistency)


class ItemCount(Criterion):
    """log(1 + number of the item's earlier rows): exit 0 knows an item that was seen often, a new one goes on.

    Logits are not read: at every head a threshold says how many rows are enough.
    """

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) at least 0, the same at every head."""
        return outputs.retrieved[:, ITEM_ROWS]


def name(criterion: Criterion) -> str:
    """Its class in snake_case: the name in result files."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(criterion).__name__).lower()


def confidence_table(criterion: Criterion, outputs: HeadOutputs) -> Tensor:
    """Confidence at every head, (n, K); at the last head, where everyone leaves, +inf.

    Raises:
        ConfigError: The criterion returns something else, see `checked`.
    """
    columns = [checked(criterion, outputs.until(k)) for k in range(outputs.heads - 1)]
    return torch.stack([*columns, torch.full_like(outputs.logits[:, -1], torch.inf)], dim=1)


def out_of_fold_confidence(
    make: Callable[[], Criterion], outputs: HeadOutputs, users: ArrayLike, folds: int = 2, seed: int = 0
) -> Tensor:
    """Confidence of tune rows by criteria that saw no row of the same user: what thresholds may be fitted on.

    Args:
        make: Makes an unfitted criterion.
        outputs: The n rows of tune.
        users: (n,) integers or strings.
        folds: Parts the users are cut into, in the order of a salted hash.
        seed: Salt.

    Returns:
        (n, K), as `confidence_table`.

    Raises:
        DataError: Fewer users than folds.
    """
    part = torch.from_numpy(_user_folds(users, folds, seed)).to(outputs.logits.device)
    table = torch.empty_like(outputs.logits)
    for fold in range(folds):
        criterion = make()
        criterion.fit(outputs.rows(part != fold))
        table[part == fold] = confidence_table(criterion, outputs.rows(part == fold))
    return table


def _user_folds(users: ArrayLike, folds: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    found, code = np.unique(np.asarray(users), return_inverse=True)
    if found.size < folds:
        raise DataError(
            f"a criterion that learns is fitted on some users of the fold tune and scored on others: {found.size} "
            f"users cannot make {folds} parts; use more data, or a criterion that does not learn"
        )
    digests = [hashlib.sha256(f"{seed}:{user}".encode()).digest() for user in found.tolist()]
    place = np.empty(found.size, dtype=np.int64)
    place[sorted(range(found.size), key=digests.__getitem__)] = np.arange(found.size)
    return (place * folds // found.size)[code.reshape(-1)]


def _quantiles(values: Tensor) -> Tensor:
    ordered = values.sort().values
    place = torch.linspace(0, values.numel() - 1, QUANTILES, dtype=torch.float64).round().long()
    return ordered[place.to(values.device)]


def _quantile_of(values: Tensor, grid: Tensor) -> Tensor:
    """Where values (n,) stand in a frozen distribution, in [0, 1], linear between its points."""
    grid = grid.to(values)
    above = torch.searchsorted(grid, values.contiguous()).clamp(1, QUANTILES - 1)
    low, high = grid[above - 1], grid[above]
    part = ((values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)).clamp(0, 1)
    return (above - 1 + part) / (QUANTILES - 1)


def checked(criterion: Criterion, outputs: HeadOutputs) -> Tensor:
    """The criterion's confidence (n,), if it is that.

    Args:
        criterion: Fitted.
        outputs: n rows, heads 0..k.

    Raises:
        ConfigError: It is no tensor (n,), or NaN where the heads gave numbers.
    """
    return _check(criterion, outputs, criterion.confidence(outputs))


def _check(criterion: Criterion, outputs: HeadOutputs, confidence: object) -> Tensor:
    n = outputs.logits.shape[0]
    if not isinstance(confidence, Tensor):
        raise _refused(criterion, outputs, "None" if confidence is None else f"a {_path(type(confidence))}")
    if confidence.shape != (n,) or confidence.is_complex():
        raise _refused(criterion, outputs, f"a tensor {tuple(confidence.shape)} of {confidence.dtype}")
    bad = confidence.isnan() & ~outputs.logits.isnan().any(dim=1)
    if bad.any():
        raise _refused(
            criterion, outputs, f"NaN for {int(bad.sum())} of them although the logits are numbers"
        )
    return confidence


def try_out(criterion: Criterion, exit_0: bool) -> None:
    """Look at what a criterion of one's own returns for made-up rows; others are left alone.

    What it raises there is no verdict, since the rows are not real; what it returns has the shape that it always has.

    Args:
        criterion: Not fitted, and left so.
        exit_0: Whether exit 0 is a head.

    Raises:
        ConfigError: As `checked`.
    """
    if type(criterion).__module__.split(".")[0] == __name__.split(".")[0]:
        return
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(TRIED_ROWS, 3, generator=made, dtype=torch.float64)
    retrieved = torch.randn(TRIED_ROWS, len(FEATURES), generator=made, dtype=torch.float64)
    outputs = HeadOutputs.of((0, 1, 2) if exit_0 else (1, 2, 3), logits, retrieved)
    with torch.random.fork_rng(devices=[]):
        try:
            copy = deepcopy(criterion)
            copy.fit(outputs)
            said = [copy.confidence(outputs.until(head)) for head in range(outputs.heads - 1)]
        except Exception:  # on made-up rows: real ones may be better
            return
    for head, confidence in enumerate(said):
        _check(criterion, outputs.until(head), confidence)


def _refused(criterion: Criterion, outputs: HeadOutputs, found: str) -> ConfigError:
    asked = f"{outputs.logits.shape[0]} rows at the exit at layer {outputs.layers[-1]}"
    return ConfigError(
        f"the criterion {_path(type(criterion))}: asked about {asked}, its confidence returned {found}; expected a "
        "torch tensor of shape (rows,), higher is safer, -inf where it cannot decide."
    )


def _path(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


SMALLEST_DRIFT = 1e-3  # probabilities are clipped at .001: smaller changes are not told apart
LARGEST = 4.0  # standardised features are clipped here: squares of outliers would rule
DERIVED = 4


class Learned(Criterion):
    """Minus the predicted drift |p_last - p_k|, from the heads so far and the retrieved features.

    Features of head k: its logits and all earlier ones, |logit_k|, p_k (1 - p_k), log of the last and of the
    largest change of probability, the retrieved features numbers; standardised.

    Args:
        ridge: Penalty on the squared weights of the standardised basis, in rows: 100 counts as much as a
            hundred rows that say no feature matters.
    """

    learns = True
    _fitted = ("center", "scale", "weight", "intercept")

    def __init__(self, ridge: float = 100.0) -> None:
        if not 0 < ridge < math.inf:
            raise ConfigError(f"learned: ridge is {ridge}, expected a penalty above 0")
        self.ridge = ridge

    def fit(self, outputs: HeadOutputs) -> None:
        """Fit every head but the last."""
        n, heads = outputs.logits.shape
        if n < 2 or heads < 2:
            raise DataError(
                f"learned needs rows and heads of the fold tune to learn from, found {n} rows and {heads} heads; "
                "use more validation data or a criterion that does not learn"
            )
        width = outputs.retrieved.shape[1] + DERIVED + heads
        probabilities = outputs.probabilities.double()
        drift = (probabilities[:, :-1] - probabilities[:, -1:]).abs()
        fitted = [
            self._fit_head(_features(outputs.until(k), width).double(), drift[:, k]) for k in range(heads - 1)
        ]
        self._center, self._scale, self._weight, self._intercept = map(torch.stack, zip(*fitted, strict=True))

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,), about [-1, 0]: a prediction may be off by being negative. Asked of all heads but the last."""
        center, scale, weight, offset = (
            self._tensor(key)[outputs.heads - 1].to(outputs.logits) for key in self._fitted
        )
        return -(_basis(_features(outputs, center.numel()), center, scale) @ weight + offset)

    def _fit_head(self, features: Tensor, drift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        center, scale = features.mean(dim=0), inverse_spread(features)
        basis = _basis(features, center, scale)
        mean, basis_scale = basis.mean(dim=0), inverse_spread(basis)
        design = (basis - mean) * basis_scale
        penalty = self.ridge * torch.eye(design.shape[1], dtype=design.dtype, device=design.device)
        weight = (
            torch.linalg.solve(design.T @ design + penalty, design.T @ (drift - drift.mean())) * basis_scale
        )
        return center, scale, weight, drift.mean() - mean @ weight


def _features(outputs: HeadOutputs, width: int) -> Tensor:
    """(n, width): retrieved features, derived numbers, logits so far, then zeros, so that heads stack."""
    probabilities = outputs.probabilities
    now = probabilities[:, -1]
    changes = probabilities.diff(dim=1).abs() if outputs.heads > 1 else torch.zeros_like(probabilities)
    derived = [
        outputs.logits[:, -1].abs(),
        now * (1 - now),
        (changes[:, -1] + SMALLEST_DRIFT).log(),
        (changes.amax(dim=1) + SMALLEST_DRIFT).log(),
    ]
    known = torch.cat([outputs.retrieved, torch.stack(derived, dim=1), outputs.logits], dim=1)
    return torch.nn.functional.pad(known, (0, width - known.shape[1]))


def _basis(features: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """Standardised features and all their products of two, (n, width (width + 3) / 2)."""
    x = ((features - center) * scale).clamp(-LARGEST, LARGEST)
    first, second = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.cat([x, x[:, first] * x[:, second]], dim=1)


def inverse_spread(values: Tensor) -> Tensor:
    """1 / standard deviation of each column, 0 for a constant one."""
    spread = values.std(dim=0)
    varies = spread > 1e-6 * (1 + values.mean(dim=0).abs())
    return torch.where(varies, 1 / torch.where(varies, spread, 1.0), 0.0)
