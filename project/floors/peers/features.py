"""What the networks read of a row: ids, item attributes, the evidence's as-of numbers, the user's earlier answers.

Unusual here: everything that is fitted (vocabularies, bins, scales) comes from train targets; an id they do not have
is UNKNOWN, which training learns from rows whose id was hidden. As-of numbers come twice, scaled and as the bin of
equal mass they fall in, since factorisation machines and DIN take categories alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.counting import FEATURES
from project.floors.peers.history import earlier_rows
from project.floors.quick import Floats, evidence_features, targets_of, train_labels

Ints = NDArray[np.int64]
Table = dict[str, Tensor]

PADDING, UNKNOWN, FIRST = 0, 1, 2
"""Codes: no row (its vector is 0), an id that train targets do not have, the first known id."""

BINS = 32
HISTORY_ROWS = 20
"""How many of the user's latest strictly earlier rows DIN sees."""

ATTRIBUTE_WORDS = 8
"""An attribute is read as its first so many words: three genres are three words, a year is one."""

IDS = ("user", "item")
HISTORY = ("liked", "disliked")
SCALED = "scaled"


@dataclass(frozen=True)
class PeerFeatures:
    """Fitted on the train targets of a log.

    Attributes:
        base: Share of likes among train targets, to which rates of few rows shrink.
        known: Field -> the ids or words that have a code, ascending; FIRST is the code of the first.
        words: Attribute field -> codes (items, ATTRIBUTE_WORDS) by item code, PADDING where there are fewer.
        edges: One array a counting feature: inner edges of its bins.
        mean: (len(FEATURES),) of the train targets' counting features.
        scale: Their standard deviation, 1 where that is 0.
    """

    base: float
    known: dict[str, Ints]
    words: dict[str, Ints]
    edges: list[Floats]
    mean: Floats
    scale: Floats

    @classmethod
    def fit(
        cls, rows: pl.DataFrame, items: pl.DataFrame, evidence: Mapping[str, pl.DataFrame]
    ) -> PeerFeatures:
        """Fit on train targets.

        Args:
            rows: Rows of a split (row_id, user, item, timestamp, label, split, role).
            items: `item` (0..), item_id, title, then attributes.
            evidence: Evidence table of each split; train's is read.

        Raises:
            DataError: Train targets lack a class, or evidence lacks a target's row.
        """
        base = float(train_labels(rows).mean())
        numbers = evidence_features(rows, evidence, "train", base)
        train = targets_of(rows, "train")
        known = {name: np.unique(train[name].to_numpy().astype(np.int64)) for name in IDS}
        # a constant's deviation may come out as a rounding error
        scale = np.where(np.ptp(numbers, axis=0) > 0, numbers.std(axis=0), 1.0)
        shares = np.linspace(0, 1, BINS + 1)[1:-1]
        edges = [np.unique(np.quantile(column, shares)) for column in numbers.T]
        words = _attribute_words(items, known["item"])
        return cls(base, known, words, edges, numbers.mean(axis=0), scale)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of codes of each field that has one vector a row: ids and bins."""
        ids = {name: FIRST + len(known) for name, known in self.known.items()}
        return ids | {name: len(edges) + 1 for name, edges in zip(FEATURES, self.edges, strict=True)}

    @property
    def word_sizes(self) -> dict[str, int]:
        """Number of codes of each attribute."""
        return {name: int(codes.max()) + 1 for name, codes in self.words.items()}

    def table(self, rows: pl.DataFrame, evidence: Mapping[str, pl.DataFrame], split: str) -> Table:
        """Features of a split's targets, in the order of `rows`.

        Args:
            rows: As in `fit`.
            evidence: Evidence table of each split.
            split: train, valid or test.

        Returns:
            Field -> (n,) codes of ids and bins, (n, ATTRIBUTE_WORDS) of attributes, (n, HISTORY_ROWS) item codes of
            `liked` and `disliked` (PADDING elsewhere), and `scaled` (n, len(FEATURES)) Float32.
        """
        targets = targets_of(rows, split)
        numbers = evidence_features(rows, evidence, split, self.base)
        item = targets["item"].to_numpy().astype(np.int64)
        codes = {name: self._codes(name, targets[name].to_numpy().astype(np.int64)) for name in IDS}
        codes |= {name: table[item] for name, table in self.words.items()}
        for name, edges, column in zip(FEATURES, self.edges, numbers.T, strict=True):
            codes[name] = np.searchsorted(edges, column, side="right")
        items, answers = earlier_rows(rows, split, HISTORY_ROWS)
        for name, answer in zip(HISTORY, (1, 0), strict=True):
            codes[name] = np.where(answers == answer, self._codes("item", items), PADDING)
        scaled = torch.from_numpy((numbers - self.mean) / self.scale).float()
        return {name: torch.from_numpy(values) for name, values in codes.items()} | {SCALED: scaled}

    def _codes(self, name: str, ids: Ints) -> Ints:
        known = self.known[name]
        found = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[found] == ids, FIRST + found, UNKNOWN)


def _attribute_words(items: pl.DataFrame, known: Ints) -> dict[str, Ints]:
    """Codes of each attribute's words; words of no known item, and attributes without others, are left out."""
    found = {}
    attributes = [name for name in items.columns if name not in ("item", "item_id", "title")]
    for number, attribute in enumerate(attributes):
        lists = [text.replace("|", " ").split()[:ATTRIBUTE_WORDS] for text in items[attribute]]
        vocabulary = sorted({word for item in known.tolist() for word in lists[item]})
        code = {word: FIRST + k for k, word in enumerate(vocabulary)}
        table = np.full((len(lists), ATTRIBUTE_WORDS), PADDING)
        for item, words in enumerate(lists):
            seen = [code[word] for word in words if word in code]
            table[item, : len(seen)] = seen
        if vocabulary:
            found[f"attribute_{number}"] = table
    return found
