"""Finds candidates: which of all items a user may like, from what a run has already.

Four sources score every item exactly, each by one product:

    light_gcn   the item's vector times the user's, of the retriever's last fit before now
    similar     cosines of the item's likers with those of the items that the user liked, summed
    text        cosines of the item's text with those of liked items, summed: how new items come in
    popular     likes, of which half count after every HALF_LIFE of the log

A user is one matrix-vector product a source, so that nothing depends on who asks together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_array

from project.arrays import F32, F64, I64, Bool
from project.data.protocol import SplitInteractions, answered, known_at
from project.errors import ConfigError
from project.retrieval.base import top
from project.retrieval.lightgcn import DISLIKE_WEIGHT
from project.retrieval.walk import Snapshots

# on validation of MovieLens latest-small popular finds most and text least, which alone finds new items
SHARES = {"light_gcn": 1.0, "similar": 1.0, "text": 0.5, "popular": 2.0}
# of the likes: a like counts half after as long as the latest tenth took. A shop's log of weeks
# and one of twenty years of films have no number of days in common
HALF_LIFE = 0.1


@dataclass(frozen=True)
class CandidateSettings:
    """How many candidates a recommendation is made of, and where they come from.

    Args:
        number: Candidates of a user.
        shares: Source -> its share of them, relative to the others': light_gcn (where the retriever has vectors),
            similar, text and popular. One that is left out gives none; places that a source cannot fill go to the
            others.
        popularity: The list is in order of the probability of a like times likes of late, plus one, to this power: a
            model of rated items knows who would like an item, not who comes across it. 0: the probability alone,
            where candidates leave early that cannot reach the list.
    """

    number: int = 100
    shares: dict[str, float] = field(default_factory=SHARES.copy)
    popularity: float = 1.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` where no candidate can come of it."""
        shares = self.shares.values()
        usual = not self.shares.keys() - SHARES.keys() and min(shares, default=0) >= 0
        if not (usual and 0 < sum(shares) < np.inf and self.number >= 1):
            raise ConfigError(
                f"data.candidates has number {self.number} and shares {self.shares}; expected a number of 1 or more, "
                f"and shares of 0 or more, one at least above 0, of {', '.join(SHARES)}."
            )
        if not 0 <= self.popularity < np.inf:
            raise ConfigError(
                f"data.candidates.popularity is {self.popularity}; expected 0 or more."
            )


class CandidateFinder:
    """The sources as of a second, `before` which a log's rows are read; likes that come later are observed.

    What is fitted stays as it is: vectors, and who liked which item together. Items are codes; those that the log does
    not have are found by their texts, and by likes observed.
    """

    def __init__(
        self,
        split: SplitInteractions,
        snapshots: Snapshots,
        settings: CandidateSettings,
        before: float = np.inf,
    ) -> None:
        self.settings = settings
        items = split.interactions.items.height
        users = split.interactions.users.height
        known = known_at(split.rows)
        read = (known < before) & answered(split.rows).to_numpy()
        liked = read & (split.rows["label"].to_numpy() == 1)
        user = split.rows["user"].to_numpy()[liked].astype(np.int64)
        item = split.rows["item"].to_numpy()[liked].astype(np.int64)
        seconds = known[liked]
        # 1. vectors of the last fit before now, (items, d); LightGCN's own from what a snapshot
        # keeps, which is divided by the root of the likes before it
        self._weighted: F32 | None = None
        block = int(np.searchsorted(snapshots.cuts, before, side="right"))
        if block and "weighted" in snapshots.fitted[block - 1]:
            self._weighted = snapshots.fitted[block - 1]["weighted"]
            fitted = seconds < snapshots.cuts[block - 1]
            degree = np.bincount(item[fitted], minlength=items)  # (items,)
            roots = np.sqrt(np.maximum(degree, 1)).astype(np.float32)
            self._vectors = self._weighted * roots[:, None]
            self._has_vector = self._vectors.any(axis=1)  # (items,)
        # 2. who liked what, (users, items): each pair once, divided by the root of an item's likers
        pairs = np.unique(user * items + item)
        columns = pairs % items
        likers = np.bincount(columns, minlength=items)
        values = 1.0 / np.sqrt(likers[columns])
        self._likes = csr_array((values, (pairs // items, columns)), (users, items))
        # 3. likes by how long ago they came, (items,), as of the latest
        self._latest = float(seconds.max(initial=0.0))
        late = np.quantile(seconds, 1 - HALF_LIFE) if seconds.size else 0.0
        self._half_life = max(self._latest - float(late), 1.0)
        weights = self._weight(seconds)
        self._popular = np.bincount(item, weights, items).astype(np.float64)

    def _weight(self, seconds: F64) -> F64:
        """What a like at these seconds counts; as of the latest of the log, so that time changes no order."""
        # 2^1000 is not reached by events of this century, but by clocks that are wrong
        return np.exp2(np.minimum((seconds - self._latest) / self._half_life, 1000.0))

    def forget(self, user: int, rows: Sequence[tuple[int, int, float]]) -> None:
        """Take back rows of a user: item, label, seconds."""
        for item, label, seconds in rows:
            self._popular[item] -= label * self._weight(np.array(seconds))
        if user < self._likes.shape[0]:
            own = slice(*self._likes.indptr[user : user + 2])
            gone = np.isin(self._likes.indices[own], [item for item, *_ in rows])
            self._likes.data[own][gone] = 0.0

    def observe(self, item: int, label: int, seconds: float) -> None:
        """Count an event among the likes of late."""
        self._popular = _padded(self._popular, item + 1, 0.0)
        self._popular[item] += label * self._weight(np.array(seconds))

    def weights(self, items: I64) -> F64:
        """(n,) what the probabilities of items (n,) count in a list."""
        likes = _padded(self._popular, int(items.max(initial=-1)) + 1, 0.0)[items]
        found: F64 = (1.0 + np.maximum(likes, 0.0)) ** self.settings.popularity
        return found

    def find(self, items: I64, labels: I64, allowed: Bool, by_text: F64) -> dict[int, str]:
        """Candidates and the source of each, best first; fewer than `settings.number` where no more are allowed.

        Args:
            items: (m,) what the user answered.
            labels: (m,)
            allowed: (n,) which of all items may be listed.
            by_text: (n,) summed cosines of every item's text with those of liked items.
        """
        size = allowed.size
        known = items < self._likes.shape[1]
        scores = {
            "light_gcn": self._by_vectors(items[known], labels[known]),
            "similar": self._by_likers(items[known & (labels == 1)]),
            "text": np.where(by_text > 0, by_text, -np.inf),
            "popular": _padded(self._popular, size, 0.0)[:size],  # every item, if it must
        }
        shares = {name: self.settings.shares.get(name, 0.0) for name in SHARES}
        ranked = {
            name: best(_padded(scores[name], size, -np.inf), allowed, self.settings.number)
            for name, share in shares.items()
            if share > 0
        }
        return merged(ranked, shares, self.settings.number)

    def _by_vectors(self, items: I64, labels: I64) -> F64:
        """(items of the log,) the user's vector times items'; minus infinity where one of them has none."""
        if self._weighted is None:
            return np.full(self._likes.shape[1], -np.inf)
        signs = np.where(labels == 1, 1.0, DISLIKE_WEIGHT).astype(np.float32)
        vector = signs @ self._weighted[items]  # (d,)
        there = self._has_vector & vector.any()
        return np.where(there, self._vectors @ vector, -np.inf)

    def _by_likers(self, liked: I64) -> F64:
        """(items of the log,) cosines of items' likers with those of liked items, summed; minus infinity for 0."""
        # how often the user liked each, over the root of its likers: twice is once
        own = np.zeros(self._likes.shape[1])
        own[liked] = 1.0
        found = self._likes.T @ (self._likes @ own)
        return np.where(found > 0, found, -np.inf)


def best(scores: F64, allowed: Bool, number: int) -> I64:
    """Codes of at most `number` allowed items of the highest scores (items,); equal scores in order of their codes."""
    codes = np.flatnonzero(allowed & (scores > -np.inf))[::-1]
    return codes[top(scores[codes], number)]


def merged(
    ranked: Mapping[str, I64], shares: Mapping[str, float], number: int
) -> dict[int, str]:
    """At most `number` items with their sources, which take turns so that each is as near to its share as can be.

    An item that a source gave already is skipped; a source without further items leaves its turns to the others.
    """
    found = dict[int, str]()
    given = dict.fromkeys(ranked, 0)
    left = {name: iter(codes.tolist()) for name, codes in ranked.items()}
    while left and len(found) < number:
        # whose next item goes least beyond its share (D'Hondt); the first of equals
        name = min(left, key=lambda name: (given[name] + 1) / shares[name])
        item = next((item for item in left[name] if item not in found), None)
        if item is None:
            del left[name]
        else:
            found[item] = name
            given[name] += 1
    return found


def _padded(values: F64, size: int, value: float) -> F64:
    """Values (n,), followed by one value up to `size`, for items that came after the log."""
    more = max(size - values.size, 0)
    return np.concatenate([values, np.full(more, value)])
