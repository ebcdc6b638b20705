"""Is a mean at most epsilon? Finite-sample p-values and upper bounds: betting and Hoeffding-Bentkus.

Unusual here: losses are signed ones rescaled to [0, 1] (what exits gain pays for what they lose), so the mean at
the border sits near 1/2 and betting, which learns the variance, beats bounds that see the mean alone. A bet never
depends on the mean that is tested, so capital grows with it and inverting the test needs one bisection.
Leading axes are steps, draws or pairings: everything works on all of them at once.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

Floats = NDArray[np.float64]

BET_SHARE = 0.9
"""Largest share of the capital that one loss of 1 may take, so that capital stays positive (WSR's c, there 1/2 or
3/4): .9 gave the lowest or an equal mean bound of .5, .75, .9 on eight kinds of losses, n = 80 to 4,000."""

BISECTIONS = 40  # a bound is exact to 2 ** -40 of the range


def largest_bet(epsilon: float) -> float:
    """Bets above this could lose more than `BET_SHARE` of the capital: c / (1 - epsilon)."""
    return BET_SHARE / (1.0 - epsilon)


def plug_in_bets(losses: ArrayLike, epsilon: float, delta: float, counts: ArrayLike | None = None) -> Floats:
    """Bet on each loss, made from the losses before it (Waudby-Smith and Ramdas 2024, sections 3.2 and 4.4).

    bet_t = min(sqrt(2 log(1/delta) / (n * variance_(t-1))), c / (1 - epsilon)), with the running variance
    (1/4 + sum of (x_j - mean_j)^2) / t of Bates et al. 2021 (section 3.1.3), but a prior mean of epsilon.

    Args:
        losses: Shape (..., n), in [0, 1], in an order that does not depend on them.
        epsilon: Mean that is tested first; it only caps the bets.
        delta: Level of the test.
        counts: Shape (...), real losses of each line, the rest of it being padding; None: all n.

    Returns:
        Shape (..., n), >= 0; 0 on padding.
    """
    x = np.asarray(losses, dtype=np.float64)
    n = x.shape[-1]
    size = np.full((*x.shape[:-1], 1), n) if counts is None else np.asarray(counts)[..., None]
    t = np.arange(1, n + 1)
    mean = (epsilon + np.cumsum(x, axis=-1)) / (t + 1)
    spread = np.cumsum((x - mean) ** 2, axis=-1)
    before = np.concatenate([np.zeros_like(spread[..., :1]), spread[..., :-1]], axis=-1)
    variance = (0.25 + before) / t
    bets = np.sqrt(2 * math.log(1 / delta) / (np.maximum(size, 1) * variance))
    return np.where(t <= size, np.minimum(bets, largest_bet(epsilon)), 0.0)


def log_capital(losses: ArrayLike, bets: ArrayLike, mean: ArrayLike) -> Floats:
    """Log of prod_(s <= t) (1 + bet_s * (mean - loss_s)): a supermartingale where the true mean is >= `mean`.

    Args:
        losses: Shape (..., n), in [0, 1].
        bets: Shape (..., n), >= 0 and predictable.
        mean: Shape (...), the mean that is tested, with bet * (1 - mean) < 1.

    Returns:
        Shape (..., n).
    """
    x, tested = np.asarray(losses, dtype=np.float64), np.asarray(mean, dtype=np.float64)[..., None]
    return np.cumsum(np.log1p(np.asarray(bets) * (tested - x)), axis=-1)


def wsr_p_value(losses: ArrayLike, epsilon: float, delta: float) -> Floats:
    """P-value of "mean >= epsilon": 1 / largest capital ever held (Ville 1939; WSR 2024, section 4).

    Args:
        losses: Shape (..., n), independent, in [0, 1]; their order must be random, not by time or label.
        epsilon: In (0, 1).
        delta: Level that the bets aim at; the p-value is valid at every level.

    Returns:
        Shape (...), in (0, 1].
    """
    return _best_capital_p(losses, plug_in_bets(losses, epsilon, delta), epsilon)


def wsr_upper_bound(losses: ArrayLike, epsilon: float, delta: float) -> Floats:
    """Upper bound of the mean at level delta: the least mean that the test with the same bets rejects.

    It is at most epsilon exactly where `wsr_p_value` is at most delta. Arguments as there; shape (...).
    """
    x = np.asarray(losses, dtype=np.float64)
    bets = plug_in_bets(x, epsilon, delta)
    return _invert(lambda mean: _best_capital_p(x, bets, mean) <= delta, _lowest(epsilon), x.shape[:-1])


def averaged_p_value(
    losses: ArrayLike, epsilon: float, delta: float, counts: ArrayLike | None = None
) -> Floats:
    """P-value of "mean >= epsilon" from several orderings of the same data: 1 / average final capital.

    Each pairing's final capital is an e-value, and an average of e-values, however dependent, is one
    (Vovk and Wang 2021, section 3); Markov makes it a p-value. The largest capital would not average.

    Args:
        losses: Shape (..., pairings, m), in [0, 1]; independent within a pairing.
        epsilon: In (0, 1).
        delta: Level that the bets aim at.
        counts: Shape (..., pairings), pairs of each pairing, the rest padding; None: all m.

    Returns:
        Shape (...), in [0, 1].
    """
    return _averaged_p(losses, plug_in_bets(losses, epsilon, delta, counts), epsilon)


def averaged_upper_bound(
    losses: ArrayLike, epsilon: float, delta: float, counts: ArrayLike | None = None
) -> Floats:
    """Upper bound of the mean at level delta by inverting `averaged_p_value`; arguments as there."""
    x = np.asarray(losses, dtype=np.float64)
    bets = plug_in_bets(x, epsilon, delta, counts)
    return _invert(
        lambda mean: _averaged_p(x, bets, mean[..., None]) <= delta, _lowest(epsilon), x.shape[:-2]
    )


def hoeffding_bentkus_p_value(mean: ArrayLike, n: int, epsilon: ArrayLike) -> Floats:
    """P-value of "risk > epsilon" from the mean of n independent losses in [0, 1].

    min(exp(-n h1(min(mean, epsilon), epsilon)), e P(Binomial(n, epsilon) <= ceil(n mean))), where h1 is the
    relative entropy of two coins (Bates et al. 2021, theorem 5; Angelopoulos et al. 2021, proposition 1).

    Args:
        mean: Shape (...), mean losses.
        n: Number of losses, at least 1.
        epsilon: Shape (...) or a number, in (0, 1).
    """
    r, e = np.asarray(mean, dtype=np.float64), np.asarray(epsilon, dtype=np.float64)
    hoeffding = np.exp(-n * coin_entropy(np.minimum(r, e), e))
    bentkus = math.e * binom.cdf(np.ceil(n * r), n, e)
    return np.asarray(np.minimum(hoeffding, bentkus), dtype=np.float64)


def hoeffding_bentkus_upper_bound(mean: ArrayLike, n: int, delta: float) -> Floats:
    """Upper bound of the risk at level delta by inverting the p-value; arguments as there."""
    r = np.asarray(mean, dtype=np.float64)
    return _invert(lambda tested: hoeffding_bentkus_p_value(r, n, tested) <= delta, r, r.shape)


def coin_entropy(a: ArrayLike, b: ArrayLike) -> Floats:
    """h1(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)), 0 log 0 = 0."""
    p, q = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 is what nan_to_num settles
        first, second = p * np.log(p / q), (1 - p) * np.log((1 - p) / (1 - q))
    return np.asarray(np.where(p == 0, 0.0, first) + np.where(p == 1, 0.0, second), dtype=np.float64)


def losses_needed(losses: ArrayLike, epsilon: float, delta: float) -> int | None:
    """About how many such losses betting would need: log(1/delta) over the best constant bet's growth rate.

    An extrapolation from these losses, right for a coin's toss of power; None where no bet grows, that is
    where their mean is not below epsilon. Without losses the answer is for losses of 1/2 (signed: of 0).
    """
    x, count = np.unique(np.asarray(losses, dtype=np.float64), return_counts=True)
    bets = _constant_bets(epsilon, 200)[:, None]
    rate = float((np.log1p(bets * (epsilon - x)) @ (count / count.sum())).max())
    return math.ceil(math.log(1 / delta) / rate) if rate > 1e-12 else None


def averaged_growth(losses: ArrayLike, epsilon: float, counts: ArrayLike) -> float:
    """Log of the average final capital under the best constant bet: what these pairings gain as a whole.

    It grows about in proportion to the data, so log(1/delta) over it is how many times the data are needed.

    Args:
        losses: Shape (pairings, m), in [0, 1].
        epsilon: In (0, 1).
        counts: Shape (pairings,), pairs of each pairing, the rest padding.
    """
    x, real = np.asarray(losses, dtype=np.float64), np.asarray(counts)[:, None]
    bets = [np.where(np.arange(x.shape[1]) < real, bet, 0.0) for bet in _constant_bets(epsilon, 20)]
    return max(-math.log(float(_averaged_p(x, bet, epsilon))) for bet in bets)


def _constant_bets(epsilon: float, size: int) -> Floats:
    return largest_bet(epsilon) * np.arange(1, size + 1) / size


def _best_capital_p(losses: ArrayLike, bets: Floats, mean: ArrayLike) -> Floats:
    best = log_capital(losses, bets, mean).max(axis=-1, initial=0.0)
    return np.asarray(np.exp(-best), dtype=np.float64)


def _averaged_p(losses: ArrayLike, bets: Floats, mean: ArrayLike) -> Floats:
    x, tested = np.asarray(losses, dtype=np.float64), np.asarray(mean, dtype=np.float64)[..., None]
    final = np.log1p(bets * (tested - x)).sum(axis=-1)
    top = final.max(axis=-1, keepdims=True)
    log_average = np.log(np.exp(final - top).mean(axis=-1)) + top[..., 0]
    return np.asarray(np.exp(-np.maximum(log_average, 0.0)), dtype=np.float64)


def _lowest(epsilon: float) -> float:
    """Below this mean the bets, capped for epsilon, could lose everything: no bound goes lower."""
    return max(0.0, 1.0 - 1.0 / largest_bet(epsilon))


def _invert(rejects: Callable[[Floats], NDArray[np.bool_]], low: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Least mean in (low, 1] that is rejected, by bisection from a test that is monotone in the mean; else 1."""
    lower, upper = np.broadcast_to(np.asarray(low, dtype=np.float64), shape).copy(), np.ones(shape)
    for _ in range(BISECTIONS):
        middle = (lower + upper) / 2
        found = rejects(middle)
        lower, upper = np.where(found, lower, middle), np.where(found, middle, upper)
    return upper
