"""Exit criteria: at each head, one number a row that says how confidently the row may leave."""

from __future__ import annotations

import hashlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from project.errors import ConfigError, DataError
from project.features import FEATURES
from project.metrics import SMALLEST_PROBABILITY

QUANTILES = 1001  # points of a frozen distribution: its error is below .001 in quantile


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """Calibrated outputs of n rows at K heads.

    `layers` (K,) ascend, 0 is exit 0, which runs before the backbone; `logits` are (n, K), `retrieved` features (n, F),
    known before the backbone runs; F may be 0.
    """

    layers: tuple[int, ...]
    logits: Tensor
    retrieved: Tensor

    @classmethod
    def of(
        cls, layers: Sequence[int], logits: Tensor, retrieved: Tensor | None = None
    ) -> HeadOutputs:
        """The retrieved features in the type of the logits; None is F = 0."""
        if retrieved is None:
            retrieved = logits.new_zeros(logits.shape[0], 0)
        return cls(tuple(layers), logits, retrieved.to(logits))

    @property
    def heads(self) -> int:
        """K, the number of heads shown."""
        return len(self.layers)

    @property
    def probabilities(self) -> Tensor:
        """(n, K) probabilities as emitted: sigmoid, clipped to [.001, .999]."""
        return torch.sigmoid(self.logits).clamp(
            SMALLEST_PROBABILITY, 1.0 - SMALLEST_PROBABILITY
        )

    def until(self, k: int) -> HeadOutputs:
        """Heads 0..k only: what is known when the rows stand at head k."""
        return HeadOutputs(self.layers[: k + 1], self.logits[:, : k + 1], self.retrieved)

    def rows(self, index: Tensor) -> HeadOutputs:
        """The rows of `index`: (m,) positions or a mask (n,)."""
        return HeadOutputs(self.layers, self.logits[index], self.retrieved[index])


class Criterion(ABC):
    """Confidence that a row may leave at the last head it is shown."""

    learns: ClassVar[bool] = False
    """`fit` learns from how rows ended, so confidence on the rows of the fit must be out-of-fold."""

    tensors: Mapping[str, Tensor] = MappingProxyType({})
    """What `fit` has made, kept in the checkpoint."""

    def fit(self, outputs: HeadOutputs) -> None:  # noqa: B027  # most criteria have nothing to fit
        """Fit on rows of the fold tune, all K heads visible."""

    @abstractmethod
    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """Confidence (n,) of leaving at the last head shown; higher leaves first, -inf where it cannot decide, no NaN.

        `outputs` has heads 0..k of n rows (`outputs.until(k)`).
        """


class Ratio(Criterion):
    """|calibrated logit|: the log of the ratio of the likelier to the less likely class."""

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) |logit|."""
        return outputs.logits[:, -1].abs()


class StaticExit(Criterion):
    """Everybody leaves at one layer: what a report recommends where no other criterion is worth its trouble.

    The budget does not decide, and the best k leave there, too.

    Args:
        layer: One of the exit layers, or 0 for exit 0.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) 0 at the layer, -inf elsewhere."""
        here = 0.0 if outputs.layers[-1] == self.layer else -torch.inf
        return torch.full_like(outputs.logits[:, -1], here)


class Consistency(Criterion):
    """Minus |p_k - p_(k-1)|: the score stopped moving."""

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) in [-1, 0]; -inf at the first head."""
        if outputs.heads == 1:
            return torch.full_like(outputs.logits[:, -1], -torch.inf)
        return -outputs.probabilities[:, -2:].diff(dim=1).abs().squeeze(1)


class RatioConsistency(Consistency):
    """Confident and no longer moving: the smaller of the two quantiles among the tune rows at that head.

    The rule of the paper: both conditions must hold. Quantiles put them on one scale.
    """

    def fit(self, outputs: HeadOutputs) -> None:
        """Freeze both distributions at every head."""
        # what is known at each head
        parts = [outputs.until(k) for k in range(outputs.heads)]
        rules = {"ratio": Ratio(), "consistency": Consistency()}
        self.tensors = {
            f"{of}_quantiles": torch.stack(
                [_quantiles(rule.confidence(part)) for part in parts]
            )
            for of, rule in rules.items()
        }

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,) in [0, 1]; -inf at the first head."""
        consistency = super().confidence(outputs)
        if outputs.heads == 1:
            return consistency
        # (n,) each, on one scale once they are quantiles
        head = outputs.heads - 1
        ratio = Ratio().confidence(outputs)
        return torch.minimum(
            _quantile_of(ratio, self.tensors["ratio_quantiles"][head]),
            _quantile_of(consistency, self.tensors["consistency_quantiles"][head]),
        )


def name(criterion: Criterion) -> str:
    """Its class in snake_case: the name in result files."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(criterion).__name__).lower()


def confidence_table(criterion: Criterion, outputs: HeadOutputs) -> Tensor:
    """Confidence at every head, (n, K); +inf at the last head, where everyone leaves."""
    # (n,) of each head but the last
    columns = list[Tensor]()
    rows = len(outputs.logits)
    for head, layer in enumerate(outputs.layers[:-1]):
        confidence: object = criterion.confidence(outputs.until(head))
        undefined = outputs.logits[:, : head + 1].isnan().any(dim=1)
        # a class of the user's own may return anything, and a row whose confidence is NaN
        # would never leave
        if (
            not isinstance(confidence, Tensor)
            or confidence.shape != (rows,)
            or (confidence.isnan() & ~undefined).any()
        ):
            returned = repr(confidence)
            if isinstance(confidence, Tensor):
                nan = int(confidence.isnan().sum())
                returned = f"tensor {tuple(confidence.shape)} with {nan} NaN"
            raise ConfigError(
                f"the criterion {type(criterion).__module__}.{type(criterion).__qualname__} returned {returned} "
                f"at the exit at layer {layer}; expected a torch tensor of shape (rows,) without NaN, {rows} here."
            )
        columns.append(confidence)
    return torch.stack([*columns, torch.full_like(outputs.logits[:, -1], torch.inf)], dim=1)


def try_out(criterion: Criterion, exit_0: bool) -> None:
    """Refuse, on made-up rows and so before training, a criterion that returns something other than confidence.

    So is one that keeps an argument under another name: result files and checkpoints say what it was made with.
    """
    for key in inspect.signature(type(criterion)).parameters:
        if not hasattr(criterion, key):
            raise ConfigError(
                f"the criterion {type(criterion).__name__} has no attribute {key}; keep every constructor argument "
                f"under its own name: self.{key} = {key}."
            )
    made = torch.randn(
        64,
        3 + len(FEATURES),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    outputs = HeadOutputs.of((0, 1, 2) if exit_0 else (1, 2, 3), made[:, :3], made[:, 3:])
    with torch.random.fork_rng(devices=[]):
        try:
            # the criterion itself stays unfitted
            copy = deepcopy(criterion)
            copy.fit(outputs)
            confidence_table(copy, outputs)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the criterion {type(criterion).__name__} failed on made-up rows: {type(error).__name__}: {error}"
            ) from error


def out_of_fold_confidence(
    make: Callable[[], Criterion], outputs: HeadOutputs, users: ArrayLike
) -> Tensor:
    """Confidence of tune rows by criteria that saw no row of the same user, (n, K): what thresholds are fitted on.

    `make` makes an unfitted criterion; `users` (n,) are cut into two halves in the order of a salted hash.
    """
    # users, and the user of each row as a number
    names, code = np.unique(users, return_inverse=True)
    if names.size < 2:
        raise DataError(
            f"a criterion that learns is scored on other users than it is fitted on: {names.size} users of the fold "
            "tune cannot make 2 parts; use more data, or a criterion that does not learn"
        )
    # in the order of a hash, which has nothing to do with the order of rows or names
    digests = [hashlib.sha256(f"0:{user}".encode()).digest() for user in names.tolist()]
    rank = np.argsort(sorted(range(names.size), key=digests.__getitem__))  # (users,)
    # (n,) whether a row's user is of the second half
    second = torch.from_numpy((rank * 2 >= names.size)[code])
    table = torch.empty_like(outputs.logits)
    for half in (~second, second):
        criterion = make()
        # fitted on the other users, read on these
        criterion.fit(outputs.rows(~half))
        table[half] = confidence_table(criterion, outputs.rows(half))
    return table


def fit_criteria(
    given: Criterion | None, outputs: HeadOutputs, users: ArrayLike
) -> list[tuple[Criterion, Tensor]]:
    """The `given` criterion, if any, then those of this file, fitted on the rows of tune.

    Each has its confidence there, (n, K), out-of-fold where it learns. One that has too few rows to learn from is left
    out; where it is `given`, that is an error.
    """
    unfitted = [Ratio(), Consistency(), RatioConsistency(), Learned()]
    if given is not None:
        unfitted = [given, *(c for c in unfitted if type(c) is not type(given))]
    fitted = list[tuple[Criterion, Tensor]]()
    for one in unfitted:
        # the settings' own stays unfitted: the next calibration begins with it
        criterion = deepcopy(one)
        try:
            criterion.fit(outputs)
            # a criterion that learns is more confident on the rows of its fit than on others
            if criterion.learns:
                confidence = out_of_fold_confidence(partial(deepcopy, one), outputs, users)
            else:
                confidence = confidence_table(criterion, outputs)
        except DataError:
            if one is given:
                raise
        else:
            fitted.append((criterion, confidence))
    return fitted


def _quantiles(values: Tensor) -> Tensor:
    # evenly spaced ranks of the sorted values are its quantiles
    ordered = values.sort().values
    place = (
        torch.linspace(0, values.numel() - 1, QUANTILES, dtype=torch.float64).round().long()
    )
    return ordered[place.to(values.device)]


def _quantile_of(values: Tensor, grid: Tensor) -> Tensor:
    """Where values (n,) stand in a frozen distribution, in [0, 1], linear between its points."""
    grid = grid.to(values)
    # (n,) the grid's first point that is not below
    above = torch.searchsorted(grid, values.contiguous()).clamp(1, QUANTILES - 1)
    low, high = grid[above - 1], grid[above]
    # how far between the two points, 0 where they coincide
    part = ((values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)).clamp(
        0, 1
    )
    return (above - 1 + part) / (QUANTILES - 1)


SMALLEST_DRIFT = 1e-3  # probabilities are clipped at .001, so smaller changes mean nothing
LARGEST = 4.0  # standardised features are clipped here, else squares of outliers dominate
DERIVED = 4  # numbers that are computed from the logits, see `_features`
RIDGE_ROWS = 100.0  # the penalty's weight, in rows without any effect of the features


class Learned(Criterion):
    """Minus the predicted drift |p_last - p_k|, from the heads so far and the retrieved features.

    Features of head k: its logits and all earlier ones, |logit_k|, p_k (1 - p_k), log of the last and of the
    largest change of probability, the retrieved features; standardised, with all their products of two.
    """

    learns = True

    def fit(self, outputs: HeadOutputs) -> None:
        """Ridge regression of the drift at every head but the last."""
        n, heads = outputs.logits.shape
        if n < 2 or heads < 2:
            raise DataError(
                f"learned needs rows and heads of the fold tune to learn from, found {n} rows and {heads} heads; "
                "use more validation data or a criterion that does not learn"
            )
        # features of the last head, so that heads stack; earlier heads have zeros there
        width = outputs.retrieved.shape[1] + DERIVED + heads
        # (n, K)
        probabilities = outputs.probabilities.double()
        drifts = (probabilities[:, :-1] - probabilities[:, -1:]).abs()
        fitted = []
        for head, drift in enumerate(drifts.unbind(dim=1)):
            features = _features(outputs.until(head), width).double()
            # 1. standardise features, then their products, by rows of tune
            center = features.mean(dim=0)
            scale = inverse_spread(features)
            basis = _basis(features, center, scale)
            mean = basis.mean(dim=0)
            basis_scale = inverse_spread(basis)
            design = (basis - mean) * basis_scale
            # 2. ridge regression in closed form: (X'X + penalty)^-1 X'y
            penalty = RIDGE_ROWS * torch.eye(
                design.shape[1], dtype=design.dtype, device=design.device
            )
            moment = design.T @ (drift - drift.mean())
            weight = torch.linalg.solve(design.T @ design + penalty, moment) * basis_scale
            # 3. the mean goes into the intercept: at prediction nothing is centred again
            fitted.append((center, scale, weight, drift.mean() - mean @ weight))
        names = ("center", "scale", "weight", "intercept")
        self.tensors = dict(
            zip(names, map(torch.stack, zip(*fitted, strict=True)), strict=True)
        )

    def confidence(self, outputs: HeadOutputs) -> Tensor:
        """(n,), about in [-1, 0]: a predicted drift may be below 0. Every head but the last has one."""
        center, scale, weight, intercept = (
            self.tensors[key][outputs.heads - 1].to(outputs.logits)
            for key in ("center", "scale", "weight", "intercept")
        )
        return -(
            _basis(_features(outputs, center.numel()), center, scale) @ weight + intercept
        )


def _features(outputs: HeadOutputs, width: int) -> Tensor:
    """(n, width): retrieved features, derived numbers, logits so far, then zeros, so that heads stack."""
    chances = outputs.probabilities
    now = chances[:, -1]  # (n,)
    # (n, heads) 0 at the first head
    changes = chances.diff(dim=1, prepend=chances[:, :1]).abs()
    derived = [
        outputs.logits[:, -1].abs(),
        now * (1 - now),
        (changes[:, -1] + SMALLEST_DRIFT).log(),
        (changes.amax(dim=1) + SMALLEST_DRIFT).log(),
    ]
    known = torch.cat(
        [outputs.retrieved, torch.stack(derived, dim=1), outputs.logits], dim=1
    )
    return torch.nn.functional.pad(known, (0, width - known.shape[1]))


def _basis(features: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """Standardised features and all their products of two, (n, width (width + 3) / 2)."""
    # (n, width)
    x = ((features - center) * scale).clamp(-LARGEST, LARGEST)
    # every pair of features once, squares included
    first, second = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.cat([x, x[:, first] * x[:, second]], dim=1)


def inverse_spread(values: Tensor) -> Tensor:
    """1 / standard deviation of each column, 0 for a constant one."""
    spread = values.std(dim=0)
    varies = spread > 1e-6 * (1 + values.mean(dim=0).abs())
    return torch.where(varies, 1 / torch.where(varies, spread, 1.0), 0.0)
