"""Certificates: with confidence 1 - delta the risk of a plan is at most epsilon, users being the units.

1. Losses. Each user gives one loss, the mean over the user's rows; for the AUC gap each of n / 2 disjoint random pairs
   of users gives one. Losses of different units are independent and lie in a known range; nothing else is assumed.
2. Bets. Capital is staked on "the mean loss is below epsilon", loss by loss (Waudby-Smith and Ramdas 2024, "Estimating
   means of bounded random variables by betting"). Where the mean is epsilon or more, its expectation is at most 1.
3. p-value. Of users, 1 / the largest capital ever held (Ville 1939). Of pairs, whose capital depends on who is paired
   with whom, 1 / the average of the final capitals of many pairings: an average of e-values, however dependent, is an
   e-value (Vovk and Wang 2021). Each passes more often than the other would.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from scipy.stats import rankdata

from project.arrays import F64, I64
from project.errors import ConfigError, DataError
from project.results import CertificateRow

ROWS_OF_A_USER = 16  # of each user so many random rows are paired, which bounds the work
PAIRINGS = 20  # random pairings of all users that capital is averaged over
# Largest share of the capital that one loss may take (WSR's c, there 1/2 or 3/4). At few
# users only bets near the limit reach 1 / delta: of plans without a drop .9 passes 65 %,
# .99 72 % at 300 users.
BET_SHARE = 0.99
# Variance of the losses in [0, 1] before any was seen, counted as so many losses (WSR: one
# of 1/4, their maximum).
# Losses of early exits vary little, and small bets earn little. Validity does not depend on
# either constant.
PRIOR_WEIGHT, PRIOR_VARIANCE = 5, 0.0025
BISECTIONS = 40  # a bound is exact to 2 ** -40 of the range


@dataclass(frozen=True)
class CertificateSettings:
    """What is promised of a plan's AUC gap, fixed before the `certify` fold is read.

    Args:
        epsilon: Largest AUC gap allowed, above 0 and below 1.
        delta: Chance that the promise may be broken, above 0 and at most 0.5.
    """

    epsilon: float = 0.02
    delta: float = 0.1

    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    """Smallest and largest loss possible."""

    users_of_a_loss: ClassVar[int] = 2

    estimand: ClassVar[str] = (
        f"AUC gap between the rows of two random users (of each at most {ROWS_OF_A_USER} random rows)"
    )
    """What exactly is promised to be at most epsilon."""

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ConfigError(
                f"exits.certificate.epsilon: found {self.epsilon}, expected a number above 0 and below 1"
            )
        if not 0 < self.delta <= 0.5:
            found = f"exits.certificate.delta: found {self.delta}"
            raise ConfigError(f"{found}, expected a number above 0 and at most 0.5")

    def rescale(self, values: ArrayLike) -> F64:
        """The risk's range -> [0, 1]."""
        low, high = self.range
        return np.clip(
            (np.asarray(values, dtype=np.float64) - low) / (high - low), 0.0, 1.0
        )

    def users_needed(self, losses: ArrayLike = 0.0) -> int | None:
        """About how many users with such losses pass: log(1 / delta) over the growth rate of the best constant bet.

        Losses are in the risk's range, NaN ignored; 0 are those of a plan that is full depth itself. No test that holds
        for every distribution does with many fewer: where a share epsilon of users, or of pairs, loses the maximum,
        fewer would show none of them with a chance above delta. None: the mean loss is not below epsilon, which more
        users would not cure.
        """
        x = self.rescale(np.ravel(losses))
        x = x[~np.isnan(x)]
        epsilon = float(self.rescale(self.epsilon))
        # constant bets up to the largest allowed
        bets = BET_SHARE / (1.0 - epsilon) * np.linspace(0.01, 1, 100)
        # log of the capital's growth by one loss; capital 1 / delta is enough
        rate = max(float(np.log1p(bet * (epsilon - x)).mean()) for bet in bets)
        if rate <= 1e-12:
            return None
        return self.users_of_a_loss * math.ceil(math.log(1 / self.delta) / rate)


class OverlapPromise(CertificateSettings):
    """What lists of the best k promise: their loss is 1 - overlap@k with full depth's list."""

    range = (0.0, 1.0)
    users_of_a_loss = 1
    estimand = "mean overlap_loss over users, each counting once,"


def certificate_row(
    settings: CertificateSettings,
    n: int,
    bound: float | None = None,
    estimate: float | None = None,
    passed: bool | None = None,
    users_needed: int | None = None,
    reason: str | None = None,
) -> CertificateRow:
    """The certificate with its sentence for a report."""
    estimand = settings.estimand
    epsilon = settings.epsilon
    delta = settings.delta
    promise = (
        f"the {estimand} is at most {epsilon:g} with {100 - 100 * delta:.0f} % confidence"
    )
    needed = f"about {users_needed or 0:,} users"
    if reason is not None:
        words = f"There is no certificate: {reason}."
    elif passed is None:
        words = (
            f"There is no certificate: it takes {needed}, not {n:,}, to show that {promise}, even where early exits "
            "change no score."
        )
    else:
        basis = f"estimate {estimate:.4g}, bound {bound:.4g}; {n:,} users, finite-sample"
        words = f"The certificate passed: {promise} ({basis})."
        if not passed:
            need = f"{needed} with such losses would be needed"
            if users_needed is None:
                need = "the estimate is not below epsilon, which more users would not cure"
            words = f"The certificate did not pass: it is not shown that {promise} ({basis}); {need}."
    return {
        "epsilon": epsilon,
        "delta": delta,
        "n": n,
        "estimand": estimand,
        "bound": bound,
        "estimate": estimate,
        "passed": passed,
        "users_needed": users_needed,
        "reason": reason,
        "words": words,
    }


def not_tested(
    users: int, settings: CertificateSettings, reason: str | None = None
) -> CertificateRow | None:
    """The certificate where there is a `reason`, or too few users for any plan to pass; else None."""
    needed = settings.users_needed() or 0
    if reason is None and users >= needed:
        return None
    return certificate_row(
        settings, users, users_needed=None if reason else needed, reason=reason
    )


def certify(
    emitted: ArrayLike,
    full: ArrayLike,
    labels: ArrayLike,
    users: ArrayLike,
    settings: CertificateSettings,
    reason: str | None = None,
) -> CertificateRow:
    """Certify the AUC gap of a plan on the n rows of the `certify` fold, unless there is a `reason` to test nothing.

    `emitted` (n,) are the calibrated logits that rows leave with, `full` (n,) those of the last head.
    """
    adaptive, last = (np.asarray(x, dtype=np.float64) for x in (emitted, full))
    if np.isnan(adaptive).any() or np.isnan(last).any():
        raise DataError("certify: logits are NaN")
    # (n,) users as numbers from 0
    names, owners = np.unique(users, return_inverse=True)
    n = names.size
    # the fold is not read
    untested = not_tested(n, settings, reason)
    if untested is not None:
        return untested
    truth = np.asarray(labels)
    if np.unique(truth).size < 2:
        raise DataError(
            "exits.certificate: the AUC gap needs both classes in the certify fold"
        )
    pairs = UserPairs(truth, owners)
    return _test(pairs.auc(last) - pairs.auc(adaptive), n, settings)


def certify_losses(losses: ArrayLike, settings: CertificateSettings) -> CertificateRow:
    """Certify a plan by its losses (users,) in the risk's range."""
    values = np.asarray(losses, dtype=np.float64)
    low, high = settings.range
    # the bets are valid for losses in the range alone
    outside = ~((values >= low - 1e-9) & (values <= high + 1e-9))
    if outside.any():
        raise DataError(
            f"{outside.sum()} losses outside [{low:.4g}, {high:.4g}], first {values[outside][0]}"
        )
    # bets must not follow time or label
    order = np.random.default_rng(0).permutation(values.size)
    return not_tested(values.size, settings) or _test(
        values[order][None], values.size, settings
    )


def _test(losses: F64, n: int, settings: CertificateSettings) -> CertificateRow:
    """The certificate of losses as of `p_value`, but in the risk's range."""
    low, high = settings.range
    epsilon = float(settings.rescale(settings.epsilon))
    rescaled = settings.rescale(losses)
    passed = p_value(rescaled, epsilon, settings.delta) <= settings.delta
    bound = upper_bound(rescaled, epsilon, settings.delta)
    return certificate_row(
        settings,
        n,
        bound=low + bound * (high - low),
        estimate=float(np.nanmean(losses)),
        passed=passed,
        users_needed=None if passed else settings.users_needed(losses),
    )


def p_value(losses: F64, epsilon: float, delta: float) -> float:
    """P-value of "the mean loss is epsilon or more", valid at every level; bets aim at level delta.

    Losses are (1, m) of users or (pairings, m) of pairs of users, in [0, 1], in random order; independent within a
    line, NaN where there is none.
    """
    return _p_of(losses, plug_in_bets(losses, epsilon, delta), epsilon)


def upper_bound(losses: F64, epsilon: float, delta: float) -> float:
    """The least mean that the same bets reject at level delta; at most epsilon where `p_value` is at most delta."""
    bets = plug_in_bets(losses, epsilon, delta)
    largest = BET_SHARE / (1.0 - epsilon)
    low = max(0.0, 1.0 - 1.0 / largest)  # below, bets could lose everything
    high = 1.0
    # bisection: `high` is rejected, or 1; `low` is not
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if _p_of(losses, bets, middle) <= delta else (middle, high)
        )
    return high


def plug_in_bets(losses: F64, epsilon: float, delta: float) -> F64:
    """Bet on each loss, made from the losses before it (WSR 2024, section 3.2), in the shape of the losses.

    bet_t = min(sqrt(2 log(1 / delta) / (m * variance_(t-1))), c / (1 - epsilon)), 0 where there is no loss.
    """
    # 1. losses so far, (lines, m); a missing one counts nowhere
    real = ~np.isnan(losses)
    x = np.where(real, losses, 0.0)
    t = np.cumsum(real, axis=-1)  # how many losses there are up to each
    # 2. running mean and variance, each shrunk to a prior
    mean = (PRIOR_WEIGHT * epsilon + np.cumsum(x, axis=-1)) / (PRIOR_WEIGHT + t)
    spread = np.where(real, (x - mean) ** 2, 0.0)
    # without the loss itself: a bet may only know what came before it
    before = np.cumsum(spread, axis=-1) - spread
    variance = (PRIOR_WEIGHT * PRIOR_VARIANCE + before) / (PRIOR_WEIGHT + t - real)
    # 3. the bet that would be best were the variance known
    bets = np.sqrt(2 * math.log(1 / delta) / (np.maximum(t[..., -1:], 1) * variance))
    return np.where(real, np.minimum(bets, BET_SHARE / (1.0 - epsilon)), 0.0)


def _p_of(losses: F64, bets: F64, mean: float) -> float:
    """1 / maximum of the capital prod_t (1 + bet_t * (mean - loss_t)), or 1 / average of several final ones; <= 1."""
    # a missing loss gains log 1 = 0
    gains = np.log1p(bets * (mean - np.where(np.isnan(losses), mean, losses)))
    # of users: any moment may stop the game, so its largest capital counts
    if len(gains) == 1:
        return math.exp(-float(np.cumsum(gains).max(initial=0.0)))
    return math.exp(-max(0.0, float(logsumexp(gains.sum(axis=-1))) - math.log(len(gains))))


class UserPairs:
    """Random disjoint pairs of users, `PAIRINGS` times, and the AUC between the rows of each pair.

    Every user counts once, whatever the number of rows; rows of one user may depend on each other in any way. `labels`
    (n,) are 0 or 1, `users` (n,) 0 to users - 1.
    """

    def __init__(self, labels: ArrayLike, users: I64) -> None:
        rng = np.random.default_rng(0)
        count = int(users.max()) + 1  # users
        # 1. at most ROWS_OF_A_USER random rows of each user, as a table (users, rows)
        mixed = rng.permutation(users.size)
        # by user, each user's rows in random order
        mixed = mixed[np.argsort(users[mixed], kind="stable")]
        sizes = np.bincount(users, minlength=count)
        # (n,) which of the user's rows this is
        place = np.arange(users.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        kept = place < ROWS_OF_A_USER
        shape = count, int(min(ROWS_OF_A_USER, sizes.max()))
        self._rows = np.full(shape, -1)  # of each user, -1 as padding
        self._rows[users[mixed[kept]], place[kept]] = mixed[kept]
        # (users, rows) 1 where liked; padding reads the 0 at the end
        self._positive = np.append(np.asarray(labels).astype(np.int64), 0)[self._rows]
        self._sizes = np.stack(
            [self._positive.sum(1), (self._rows >= 0).sum(1) - self._positive.sum(1)]
        )
        # 2. users in random order, PAIRINGS times: neighbours are a pair; an odd one is left out
        orders = np.stack(
            [rng.permutation(count)[: count // 2 * 2] for _ in range(PAIRINGS)]
        )
        self._pairs = orders.reshape(-1, 2)
        self._block = max(1, 2**20 // shape[1] ** 2)  # pairs at once: a few megabytes

    def auc(self, scores: ArrayLike) -> F64:
        """Of a positive row of one user and a negative row of the other, the share that scores (n,) order right.

        Ties count half. Shape (pairings, users // 2); NaN where two users have no such rows.
        """
        # (users, rows) dense ranks compare as scores do; NaN is padding
        ranks = np.append(rankdata(scores, method="dense"), np.nan).astype(np.float32)[
            self._rows
        ]
        found = [np.zeros(0)]
        for at in range(0, len(self._pairs), self._block):
            # (block,) the users of each pair
            one, other = self._pairs[at : at + self._block].T
            # padding is neither above nor below
            above = ranks[one][:, :, None] > ranks[other][:, None, :]
            below = ranks[one][:, :, None] < ranks[other][:, None, :]
            # (block, rows, rows) 1 where the first user's row is above, -1 where below
            sign = above.view(np.int8) - below.view(np.int8)
            right = (self._positive[one] * sign.sum(2, dtype=np.int16)).sum(1)
            # two positives cancel
            right -= (self._positive[other] * sign.sum(1, dtype=np.int16)).sum(1)
            (ups, downs), (other_ups, other_downs) = (
                self._sizes[:, one],
                self._sizes[:, other],
            )
            # (block,) pairs of a like of one user and a dislike of the other
            pairs = ups * other_downs + downs * other_ups
            found.append(
                0.5 + np.where(pairs > 0, right, np.nan) / (2 * np.maximum(pairs, 1))
            )
        return np.concatenate(found).reshape(PAIRINGS, -1)


def user_means(losses: ArrayLike, users: ArrayLike) -> F64:
    """One loss a user, the mean over the user's rows: (..., n) -> (..., users)."""
    values = np.asarray(losses, dtype=np.float64)
    code = np.unique(users, return_inverse=True)[1]
    sizes = np.bincount(code)
    # rows of a user side by side, so that one `reduceat` sums them
    order = np.argsort(code, kind="stable")
    means: F64 = (
        np.add.reduceat(values[..., order], np.cumsum(sizes) - sizes, axis=-1) / sizes
    )
    return means
