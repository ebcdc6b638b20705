"""What the networks are given: canaries for labels they may not read, and codes by hand."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import polars as pl
import pytest
import torch

from project.counting import FEATURES
from project.floors.peers.features import (
    BINS,
    FIRST,
    HISTORY,
    HISTORY_ROWS,
    PADDING,
    SCALED,
    UNKNOWN,
    PeerFeatures,
)
from project.retrieval import ItemKNN, evidence_tables

SIZE = 300


def flip(rows: pl.DataFrame, at: np.ndarray) -> pl.DataFrame:
    return rows.with_columns(label=pl.Series(np.where(at, 1 - rows["label"].to_numpy(), rows["label"])))


def evidence_of(split, folder):
    return evidence_tables(split, ItemKNN(), 60, folder)


class TestCanaries:
    @pytest.mark.parametrize("kind", ["by_time", "random"])
    @pytest.mark.parametrize("at", [40, 150, 270])
    def test_own_second_and_later_labels_are_not_read(self, build, draw, tmp_path, kind, at):
        """Flip a row's label, those of its second and all later: up to that second all features stay, bit by bit.

        In every split. That later rows' features do change shows that the features would tell.
        """
        rows = draw(kind, SIZE)
        time = rows["timestamp"].to_numpy()
        logs = [build(r) for r in (rows, flip(rows, time >= time[at]))]
        evidence = [evidence_of(log, tmp_path) for log in logs]
        features = PeerFeatures.fit(logs[0].rows, logs[0].interactions.items, evidence[0])
        changed = 0
        for split in ("train", "valid", "test"):
            tables = [features.table(log.rows, e, split) for log, e in zip(logs, evidence, strict=True)]
            seconds = rows.filter(pl.col("split") == split)["timestamp"].to_numpy()
            early = torch.from_numpy(seconds <= time[at])
            for name, values in tables[0].items():
                other = tables[1][name]
                assert values[early].numpy().tobytes() == other[early].numpy().tobytes(), (split, name)
                changed += not torch.equal(values, other)
        assert changed >= 3

    def test_fitted_on_train_alone(self, build, draw, tmp_path):
        """Flipping every label of valid and test changes no vocabulary, bin, scale or base."""
        rows = draw("by_time", SIZE)
        found = []
        for log in (rows, flip(rows, (rows["split"] != "train").to_numpy())):
            split = build(log)
            found.append(PeerFeatures.fit(split.rows, split.interactions.items, evidence_of(split, tmp_path)))
        for field in fields(PeerFeatures):
            np.testing.assert_equal(*(getattr(f, field.name) for f in found))

    def test_each_split_reads_its_own_evidence(self, build, draw, tmp_path):
        """Valid's features stay as they are when test's evidence and test's rows are spoilt."""
        rows = draw("random", SIZE)
        split = build(rows)
        evidence = evidence_of(split, tmp_path)
        features = PeerFeatures.fit(split.rows, split.interactions.items, evidence)
        spoilt = evidence | {"test": evidence["test"].with_columns(item_rate=1 - pl.col("item_rate"))}
        flipped = flip(split.rows, (rows["split"] == "test").to_numpy())
        before, after = (
            features.table(split.rows, evidence, "valid"),
            features.table(flipped, spoilt, "valid"),
        )
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def fitted(build, draw, tmp_path):
    rows = draw("by_time", SIZE)
    split = build(rows.filter((pl.col("user") != 3) | (pl.col("split") != "train")))
    evidence = evidence_of(split, tmp_path)
    return split, evidence, PeerFeatures.fit(split.rows, split.interactions.items, evidence)


class TestCodes:
    def test_ids(self, fitted):
        """A user without train targets is UNKNOWN, the others are numbered from FIRST in order."""
        split, evidence, features = fitted
        users = split.rows.filter(pl.col("split") == "test")["user"].to_numpy()
        codes = features.table(split.rows, evidence, "test")["user"].numpy()
        expected = np.where(users < 3, users, users - 1) + FIRST
        np.testing.assert_array_equal(codes, np.where(users == 3, UNKNOWN, expected))
        assert (users == 3).any()
        assert features.sizes["user"] == 23 + FIRST

    def test_words(self, fitted):
        """Words are split at blanks and bars and coded in order: Comedy 2, Drama 3, War 4; "" has none."""
        *_, features = fitted
        year, genres = features.words["attribute_0"], features.words["attribute_1"]
        assert genres[:4, :3].tolist() == [[3, 0, 0], [3, 4, 0], [2, 4, 0], [0, 0, 0]]
        assert year[:4, :2].tolist() == [[2, 0], [3, 0], [4, 0], [5, 0]]
        assert features.word_sizes == {"attribute_0": 6, "attribute_1": 5}

    def test_words_of_unknown_items_have_no_code(self, build, draw, tmp_path):
        """Train without the items of "Comedy War" knows no Comedy: their genres are War alone."""
        rows = draw("by_time", SIZE).filter((pl.col("split") != "train") | (pl.col("item") % 4 != 2))
        split = build(rows)
        features = PeerFeatures.fit(split.rows, split.interactions.items, evidence_of(split, tmp_path))
        assert features.words["attribute_1"][1:3, :2].tolist() == [[2, 3], [3, 0]]

    def test_history_goes_by_answer(self, fitted):
        """Every place holds an item among liked, or among disliked, or none: together the user's earlier rows."""
        split, evidence, features = fitted
        table = features.table(split.rows, evidence, "test")
        liked, disliked = (table[name].numpy() for name in HISTORY)
        assert liked.shape == (table["user"].shape[0], HISTORY_ROWS)
        assert not ((liked != PADDING) & (disliked != PADDING)).any()
        targets = split.rows.filter(pl.col("split") == "test")
        for k, row in enumerate(targets.iter_rows(named=True)):
            past = split.rows.filter(
                (pl.col("user") == row["user"]) & (pl.col("timestamp") < row["timestamp"])
            ).tail(HISTORY_ROWS)
            assert (liked[k] != PADDING).sum() == past["label"].sum()
            assert (disliked[k] != PADDING).sum() == past.height - past["label"].sum()

    def test_numbers(self, fitted):
        """Train's scaled numbers have mean 0 and deviation 1 (or are constant 0); bins are in range and in order."""
        split, evidence, features = fitted
        table = features.table(split.rows, evidence, "train")
        scaled = table[SCALED].double().numpy()
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.std(axis=0), np.where(np.ptp(scaled, axis=0) > 0, 1, 0), atol=1e-5)
        for name, column in zip(FEATURES, scaled.T, strict=True):
            codes = table[name].numpy()
            assert codes.max() < features.sizes[name] <= BINS
            assert (np.diff(codes[np.argsort(column, kind="stable")]) >= 0).all()
