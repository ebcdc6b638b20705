"""The CTR networks: what they are given, what they learn, that they are the same again, and where they are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, fields, replace

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from project import trainer as commands
from project.data.protocol import FOLDS, ROLES, SPLITS, Interactions, Protocol, SplitInteractions
from project.datamodule import InteractionData
from project.errors import DataError
from project.evaluation import networks
from project.evaluation import networks as kept
from project.evaluation.baselines import Baseline, baseline_rows, baseline_scores, best_baseline
from project.evaluation.networks import (
    BINS,
    FIRST,
    GRID,
    HISTORY,
    HISTORY_ROWS,
    NO_ROW,
    PADDING,
    SCALED,
    UNKNOWN,
    GridPoint,
    NetworkFeatures,
    earlier_rows,
    network_baselines,
    networks_installed,
    score,
)
from project.features import FEATURES
from project.metrics import auc
from project.retrieval import ItemKNN, retrieved_tables
from project.trainer import run_baselines

SIZE = 300
USERS, ITEMS = 24, 12


def make_split(rows: pl.DataFrame) -> SplitInteractions:
    """A split log from rows with user, item, timestamp, label and split, in time order; all are targets.

    Valid's folds go by user: select, tune, certify, and so on.
    """
    fold = pl.col("user").mod(3).replace_strict(dict(enumerate(FOLDS)), return_dtype=pl.Enum(FOLDS))
    rows = rows.with_columns(
        pl.col("user", "item").cast(pl.Int32),
        pl.col("timestamp").cast(pl.Float64),
        pl.col("label").cast(pl.Int8),
        pl.col("split").cast(pl.Enum(SPLITS)),
        row_id=pl.int_range(pl.len(), dtype=pl.Int64),
        fold=pl.when(pl.col("split") == "valid").then(fold),
        role=pl.lit("target", pl.Enum(ROLES)),
    )
    users = pl.DataFrame({"user": np.arange(USERS, dtype=np.int32)})
    items = pl.DataFrame(
        {
            "item": np.arange(ITEMS, dtype=np.int32),
            "item_id": [f"i{i}" for i in range(ITEMS)],
            "title": ["the same title"] * ITEMS,
            "year": [str(1990 + i % 4) for i in range(ITEMS)],
            "genres": [["Drama", "Drama|War", "Comedy  War", ""][i % 4] for i in range(ITEMS)],
        }
    )
    digest = hashlib.sha256(rows.write_csv().encode()).hexdigest()[:16]
    return SplitInteractions(Interactions(rows, users, items, {}), rows, Protocol(), {}, digest)


def random_rows(kind: str, size: int, seed: int = 0) -> pl.DataFrame:
    """Many rows share a second; users differ in kindness and items in quality; cut by time, or at random."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, USERS, size), rng.integers(0, ITEMS, size)
    kindness, quality = rng.normal(size=USERS), rng.normal(size=ITEMS)
    chance = 1 / (1 + np.exp(-2.5 * (kindness[user] + quality[item])))
    table = pl.DataFrame(
        {
            "user": user,
            "item": item,
            "timestamp": rng.integers(0, size // 3, size),
            "label": (rng.random(size) < chance).astype(int),
        }
    ).sort("timestamp", "user", "item")
    late = table["timestamp"].to_numpy() / (size // 3)
    code = (late > 0.6).astype(int) + (late > 0.8) if kind == "by_time" else rng.integers(0, 3, size)
    return table.with_columns(split=pl.Series([SPLITS[c] for c in code]))


@pytest.fixture
def build() -> Callable[[pl.DataFrame], SplitInteractions]:
    """`make_split`."""
    return make_split


@pytest.fixture
def draw() -> Callable[..., pl.DataFrame]:
    """`random_rows`."""
    return random_rows


def flip(rows: pl.DataFrame, at: np.ndarray) -> pl.DataFrame:
    return rows.with_columns(label=pl.Series(np.where(at, 1 - rows["label"].to_numpy(), rows["label"])))


def retrieved_of(split, folder):
    return retrieved_tables(split, ItemKNN(), 5, folder)


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
        retrieved = [retrieved_of(log, tmp_path) for log in logs]
        features = NetworkFeatures.fit(logs[0].rows, logs[0].interactions.items, retrieved[0])
        changed = 0
        for split in ("train", "valid", "test"):
            tables = [features.table(log.rows, e, split) for log, e in zip(logs, retrieved, strict=True)]
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
            found.append(
                NetworkFeatures.fit(split.rows, split.interactions.items, retrieved_of(split, tmp_path))
            )
        for field in fields(NetworkFeatures):
            np.testing.assert_equal(*(getattr(f, field.name) for f in found))

    def test_each_split_reads_its_own_retrieved(self, build, draw, tmp_path):
        """Valid's features stay as they are when test's retrieved features and test's rows are spoilt."""
        rows = draw("random", SIZE)
        split = build(rows)
        retrieved = retrieved_of(split, tmp_path)
        features = NetworkFeatures.fit(split.rows, split.interactions.items, retrieved)
        spoilt = retrieved | {"test": retrieved["test"].with_columns(item_rate=1 - pl.col("item_rate"))}
        flipped = flip(split.rows, (rows["split"] == "test").to_numpy())
        before, after = (
            features.table(split.rows, retrieved, "valid"),
            features.table(flipped, spoilt, "valid"),
        )
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def fitted(build, draw, tmp_path):
    rows = draw("by_time", SIZE)
    split = build(rows.filter((pl.col("user") != 3) | (pl.col("split") != "train")))
    retrieved = retrieved_of(split, tmp_path)
    return split, retrieved, NetworkFeatures.fit(split.rows, split.interactions.items, retrieved)


class TestCodes:
    def test_ids(self, fitted):
        """A user without train targets is UNKNOWN, the others are numbered from FIRST in order."""
        split, retrieved, features = fitted
        users = split.rows.filter(pl.col("split") == "test")["user"].to_numpy()
        codes = features.table(split.rows, retrieved, "test")["user"].numpy()
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
        features = NetworkFeatures.fit(split.rows, split.interactions.items, retrieved_of(split, tmp_path))
        assert features.words["attribute_1"][1:3, :2].tolist() == [[2, 3], [3, 0]]

    def test_history_goes_by_answer(self, fitted):
        """Every place holds an item among liked, or among disliked, or none: together the user's earlier rows."""
        split, retrieved, features = fitted
        table = features.table(split.rows, retrieved, "test")
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
        split, retrieved, features = fitted
        table = features.table(split.rows, retrieved, "train")
        scaled = table[SCALED].double().numpy()
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.std(axis=0), np.where(np.ptp(scaled, axis=0) > 0, 1, 0), atol=1e-5)
        for name, column in zip(FEATURES, scaled.T, strict=True):
            codes = table[name].numpy()
            assert codes.max() < features.sizes[name] <= BINS
            order = np.lexsort((codes, column))  # float32 may make equal what lies in two bins
            assert (np.diff(codes[order]) >= 0).all()


def test_earlier_rows_golden(build):
    """Two places. User 0 rates items 1 to 4 at 1, 2, 2 and 3 s: rows of 2 s see item 1 alone, that of 3 s both of 2 s.

    User 1's row between them is nobody else's past.
    """
    rows = pl.DataFrame(
        {
            "user": [0, 1, 0, 0, 0],
            "item": [1, 9, 2, 3, 4],
            "timestamp": [1, 1, 2, 2, 3],
            "label": [1, 1, 0, 1, 0],
            "split": ["train"] * 5,
        }
    )
    items, answers = earlier_rows(build(rows).rows, "train", 2)
    n = NO_ROW
    assert items.tolist() == [[n, n], [n, n], [n, 1], [n, 1], [2, 3]]
    assert answers.tolist() == [[n, n], [n, n], [n, 1], [n, 1], [0, 1]]


def test_context_is_read_and_later_splits_are_not(build):
    """A valid row reads an earlier context row of train, but not an earlier row of test."""
    rows = pl.DataFrame(
        {
            "user": [0, 0, 0],
            "item": [5, 6, 7],
            "timestamp": [1, 2, 3],
            "label": [1, 0, 1],
            "split": ["train", "test", "valid"],
        }
    )
    log = build(rows).rows.with_columns(role=pl.Series(["context", "target", "target"], dtype=pl.Enum(ROLES)))
    items, answers = earlier_rows(log, "valid", 3)
    assert items.tolist() == [[NO_ROW, NO_ROW, 5]]
    assert answers.tolist() == [[NO_ROW, NO_ROW, 1]]


@pytest.mark.parametrize("kind", ["by_time", "random"])
def test_earlier_rows_equal_the_slow_way(build, draw, kind):
    """For every target: the user's last five readable rows of strictly smaller time, in the log's order."""
    log = build(draw(kind, 400)).rows
    reads = {
        "train": ["train"],
        "valid": ["train", "valid"],
        "test": ["train", "valid", "test"],
    }
    for split, readable in reads.items():
        items, answers = earlier_rows(log, split, 5)
        targets = log.filter(pl.col("split") == split)
        assert len(items) == targets.height
        for row, item, answer in zip(targets.iter_rows(named=True), items, answers, strict=True):
            past = log.filter(
                (pl.col("user") == row["user"])
                & (pl.col("timestamp") < row["timestamp"])
                & pl.col("split").cast(pl.String).is_in(readable)
            ).tail(5)
            padding = [NO_ROW] * (5 - past.height)
            np.testing.assert_array_equal(item, padding + past["item"].to_list())
            np.testing.assert_array_equal(answer, padding + past["label"].to_list())


POINT = GridPoint(embedding=4, weight_decay=1e-4)

needs_extra = pytest.mark.skipif(not networks_installed(), reason="needs the extra networks")


@pytest.fixture
def data(tiny_config, tmp_path, monkeypatch):
    """The tiny world's data, without the CLI; baselines that other tests may have kept are out of reach."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    parser = ArgumentParser()
    parser.add_class_arguments(InteractionData, "data")
    settings = {"data": yaml.safe_load(tiny_config().read_text())["data"]}
    return parser.instantiate_classes(parser.parse_object(settings)).data


class TestWithoutTheExtra:
    def test_baselines_run_and_say_how_to_install(self, data, tmp_path, monkeypatch, capsys):
        """Asked for but absent: one line with the command, and the baselines there are without asking."""
        monkeypatch.setattr(networks, "find_spec", lambda name: None)
        result = run_baselines(data, tmp_path, networks=True)
        said = capsys.readouterr().out
        assert "DeepFM, DCN-v2 and DIN are left out" in said.splitlines()[0]
        assert "pip install 'exitrec[networks]'" in said
        assert {row["name"] for row in result["baselines"]} >= {"lr_features"}
        assert not {row["name"] for row in result["baselines"]} & set(networks.NETWORKS)

    def test_nothing_is_said_unasked(self, data, tmp_path, capsys):
        """Whether the extra is there or not, baselines without --networks do not mention them."""
        run_baselines(data, tmp_path)
        assert "DeepFM" not in capsys.readouterr().out


def test_kept_networks_are_shown_unasked(data, tmp_path, monkeypatch):
    """Networks that `baselines --networks true` has trained stand in the next `baselines` too, and compete for the
    best.
    """
    oracle = baseline_scores(
        data.split.rows, {s: data.targets(s)["label"].to_numpy() - 0.5 for s in ("valid", "test")}
    )
    trained = []

    def train(*arguments, **settings):
        trained.append(arguments)
        return [Baseline("din", oracle, {"embedding": 8})]

    monkeypatch.setattr(kept, "network_baselines", train)
    monkeypatch.setattr(commands, "networks_installed", lambda: True)
    assert "din" not in {row["name"] for row in run_baselines(data, tmp_path)["baselines"]}
    assert trained == []
    asked, unasked = run_baselines(data, tmp_path, networks=True), run_baselines(data, tmp_path)
    assert len(trained) == 1
    assert asked["baselines"] == unasked["baselines"]
    assert asked["best_baseline"] == "din"
    assert {row["auc"] for row in asked["baselines"] if row["name"] == "din"} == {1.0}


def test_the_grid_is_small():
    """At most four points, all different."""
    assert len(set(GRID)) == len(GRID) <= 4


@pytest.mark.parametrize("fold", ["select", "tune"])
def test_one_class_in_a_fold(build, draw, tmp_path, fold):
    """A fold that decides something needs both classes: said before any network is trained."""
    split = build(draw("by_time", 300))
    retrieved = retrieved_tables(split, ItemKNN(), 3, tmp_path)
    one = (pl.col("split") == "valid") & (pl.col("fold") == fold)
    rows = split.rows.with_columns(label=pl.when(one).then(1).otherwise(pl.col("label")).cast(pl.Int8))
    with pytest.raises(DataError, match=f"{fold} has \\d+ targets, \\d+ of them liked, expected both"):
        network_baselines(replace(split, rows=rows), retrieved)


@needs_extra
@pytest.mark.slow
class TestWithTheExtra:
    @pytest.fixture
    def world(self, build, draw, tmp_path):
        split = build(draw("by_time", 3000))
        return split, retrieved_tables(split, ItemKNN(), 3, tmp_path)

    def test_planted_signal(self, world, monkeypatch):
        """Kind users and good items are found by all three: test AUC above .8, about that of knowing the chances.

        They are baselines like others: rows with what was chosen, and in the choice of the best baseline.
        """
        split, retrieved = world
        monkeypatch.setattr("project.evaluation.networks.BATCH_ROWS", 128)
        baselines = network_baselines(split, retrieved, grid=[POINT])
        assert [baseline.name for baseline in baselines] == ["deepfm", "dcn_v2", "din"]
        test = split.rows.filter(pl.col("split") == "test")
        for baseline in baselines:
            value = auc(baseline.logits(test["row_id"]), test["label"].to_numpy())
            assert value is not None
            assert value > 0.8
        rows = baseline_rows(baselines, split.rows, draws=5)
        assert {row["chosen"]["embedding"] for row in rows} == {4}
        assert all(1 <= row["chosen"]["epochs"] <= 10 for row in rows)
        assert best_baseline(baselines, split.rows) in baselines

    def test_same_again_blind_to_test_and_to_the_callers_random_numbers(self, world, monkeypatch):
        """Another state of torch's generator and flipped test labels: valid scores are the same bit by bit."""
        split, retrieved = world
        monkeypatch.setattr("project.evaluation.networks.EPOCHS", 2)
        before = network_baselines(split, retrieved, splits=("valid",), grid=[POINT])
        torch.manual_seed(99)
        state = torch.get_rng_state()
        test = pl.col("split") == "test"
        rows = split.rows.with_columns(
            label=pl.when(test).then(1 - pl.col("label")).otherwise(pl.col("label"))
        )
        flipped = replace(split, rows=rows)
        without = {name: retrieved[name] for name in ("train", "valid")}
        after = network_baselines(flipped, without, splits=("valid",), grid=[POINT])
        assert torch.equal(torch.get_rng_state(), state)
        for one, other in zip(before, after, strict=True):
            assert one.scores.equals(other.scores)

    def test_tune_chooses(self, world, monkeypatch):
        """The point of highest AUC on tune is taken, whatever other rows say, and named."""
        split, retrieved = world
        monkeypatch.setattr(networks, "NETWORKS", ("deepfm",))
        monkeypatch.setattr("project.evaluation.networks.EPOCHS", 1)
        points = [POINT, replace(POINT, embedding=2), replace(POINT, embedding=6)]
        tune = split.rows.filter((pl.col("split") == "valid") & (pl.col("fold") == "tune"))
        alone = [network_baselines(split, retrieved, ("valid",), grid=[point])[0] for point in points]
        values = [auc(baseline.logits(tune["row_id"]), tune["label"].to_numpy()) for baseline in alone]
        best = int(np.argmax(values))
        (found,) = network_baselines(split, retrieved, ("valid",), grid=points)
        assert len(set(values)) == 3
        assert found.scores.equals(alone[best].scores)
        assert found.chosen == {**asdict(points[best]), "epochs": 1}

    def test_only_din_reads_the_history_and_padding_adds_nothing(self, world):
        """Swapping likes and dislikes moves DIN alone; places without a row weigh 0, wherever they stand."""
        split, retrieved = world
        features = NetworkFeatures.fit(split.rows, split.interactions.items, retrieved)
        table = {k: v[:64] for k, v in features.table(split.rows, retrieved, "test").items()}
        swapped = table | {"liked": table["disliked"], "disliked": table["liked"]}
        turned = table | {name: table[name].flip(1) for name in ("liked", "disliked")}
        assert (table["liked"] == PADDING).any()
        for name in networks.NETWORKS:
            torch.manual_seed(0)
            network = networks.build_network(name, features, 4)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            with torch.no_grad():
                for module in network.modules():
                    if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                        module.weight[module.padding_idx] = 0
            first = score(network, table)
            assert np.array_equal(first, score(network, swapped)) == (name != "din")
            np.testing.assert_allclose(first, score(network, turned), atol=1e-4)
