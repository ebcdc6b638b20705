"""The CTR networks: what they are given and learn, that they are the same again, and how they are kept and found."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from example_logs import flip, numbered
from jsonargparse import ArgumentParser
from world import call, given, result

from project import trainer as commands
from project.data.protocol import (
    FOLDS,
    ROLES,
    SPLITS,
    Interactions,
    Protocol,
    SplitInteractions,
)
from project.datamodule import InteractionData
from project.errors import DataError
from project.evaluation import networks
from project.evaluation.baselines import (
    Baseline,
    baseline_rows,
    baseline_scores,
    best_baseline,
    targets_of,
)
from project.evaluation.networks import (
    BINS,
    FIRST,
    HISTORY,
    HISTORY_ROWS,
    NO_ROW,
    PADDING,
    SCALED,
    UNKNOWN,
    NetworkFeatures,
    earlier_rows,
    kept_networks,
    network_baselines,
    networks_installed,
    score,
    trained_networks,
)
from project.features import FEATURES
from project.metrics import auc
from project.retrieval import ItemKNN, RetrievedFeatures
from project.trainer import run_baselines

USERS, ITEMS = 24, 12
Retrieved = dict[str, pl.DataFrame]
Fitted = tuple[SplitInteractions, Retrieved, NetworkFeatures]
Make = Callable[..., InteractionData]


def make_split(rows: pl.DataFrame) -> SplitInteractions:
    """A split log from rows with user, item, timestamp, label and split, in time order; all are targets.

    Valid's folds go by user: select, tune, certify, and so on.
    """
    fold = (
        pl.col("user")
        .mod(3)
        .replace_strict(dict(enumerate(FOLDS)), return_dtype=pl.Enum(FOLDS))
    )
    rows = numbered(rows).with_columns(
        pl.col("user", "item").cast(pl.Int32),
        pl.col("timestamp").cast(pl.Float64),
        pl.col("label").cast(pl.Int8),
        pl.col("split").cast(pl.Enum(SPLITS)),
        rating=pl.lit(None, pl.Float64),
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
            "genres": [
                ["Drama", "Drama|War", "Comedy  War", ""][i % 4] for i in range(ITEMS)
            ],
        }
    )
    digest = hashlib.sha256(rows.write_csv().encode()).hexdigest()[:16]
    return SplitInteractions(
        Interactions(rows, users, items, {}), rows, Protocol(), {}, digest
    )


def draw(kind: str, size: int = 300) -> pl.DataFrame:
    """Many rows share a second; users differ in kindness and items in quality; cut by time, or at random."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, USERS, size), rng.integers(0, ITEMS, size)
    kindness, quality = rng.normal(size=USERS), rng.normal(size=ITEMS)
    chance = 1 / (1 + np.exp(-2.5 * (kindness[user] + quality[item])))
    seconds, label = (
        rng.integers(0, size // 3, size),
        (rng.random(size) < chance).astype(int),
    )
    table = pl.DataFrame({"user": user, "item": item, "timestamp": seconds, "label": label})
    table = table.sort("timestamp", "user", "item")
    late = table["timestamp"].to_numpy() / (size // 3)
    code = (
        (late > 0.6).astype(int) + (late > 0.8)
        if kind == "by_time"
        else rng.integers(0, 3, size)
    )
    return table.with_columns(split=pl.Series([SPLITS[c] for c in code]))


def features_of(rows: pl.DataFrame, folder: Path) -> Fitted:
    """The split log, its retrieved features and the features fitted on them."""
    split = make_split(rows)
    retrieved = RetrievedFeatures(split, ItemKNN(), 5, folder).tables()
    return (
        split,
        retrieved,
        NetworkFeatures.fit(split.rows, split.interactions.items, retrieved, {}),
    )


@pytest.mark.parametrize("kind", ["by_time", "random"])
@pytest.mark.parametrize("at", [40, 150, 270])
def test_own_second_and_later_labels_are_not_read(
    tmp_path: Path, kind: str, at: int
) -> None:
    """Flip a row's label, those of its second and all later: up to that second all features stay, bit by bit.

    In every split. Later rows' features do change, so the features read answers.
    """
    rows = draw(kind)
    now, changed = rows["timestamp"][at], 0
    first, retrieved, features = features_of(rows, tmp_path)
    second, others, _ = features_of(flip(rows, pl.col("timestamp") >= now), tmp_path)
    for split in SPLITS:
        before, after = (
            features.table(first.rows, retrieved, split),
            features.table(second.rows, others, split),
        )
        early = torch.from_numpy(
            rows.filter(pl.col("split") == split)["timestamp"].to_numpy() <= now
        )
        for name, values in before.items():
            assert (
                values[early].numpy().tobytes() == after[name][early].numpy().tobytes()
            ), (split, name)
            changed += not torch.equal(values, after[name])
    assert changed >= 3


def test_fitted_on_train_alone_and_each_split_reads_its_own_features(
    tmp_path: Path,
) -> None:
    """Flipping every label of valid and test changes no vocabulary, bin, scale or base.

    Valid's features stay as they are when test's retrieved features and test's rows are spoilt.
    """
    rows = draw("by_time")
    first, second = (
        features_of(log, tmp_path)[2]
        for log in (rows, flip(rows, pl.col("split") != "train"))
    )
    for field in fields(NetworkFeatures):
        np.testing.assert_equal(getattr(first, field.name), getattr(second, field.name))
    split, retrieved, features = features_of(draw("random"), tmp_path)
    spoilt = retrieved | {
        "test": retrieved["test"].with_columns(item_rate=1 - pl.col("item_rate"))
    }
    before = features.table(split.rows, retrieved, "valid")
    after = features.table(flip(split.rows, pl.col("split") == "test"), spoilt, "valid")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def fitted(tmp_path: Path) -> Fitted:
    """User 3 has no train row."""
    rows = draw("by_time")
    return features_of(
        rows.filter((pl.col("user") != 3) | (pl.col("split") != "train")), tmp_path
    )


def test_ids(fitted: Fitted) -> None:
    """A user without train targets is UNKNOWN, the others are numbered from FIRST in order."""
    split, retrieved, features = fitted
    users = split.rows.filter(pl.col("split") == "test")["user"].to_numpy()
    codes = features.table(split.rows, retrieved, "test")["user"].numpy()
    expected = np.where(users < 3, users, users - 1) + FIRST
    np.testing.assert_array_equal(codes, np.where(users == 3, UNKNOWN, expected))
    assert (users == 3).any()
    assert features.sizes["user"] == 23 + FIRST


def test_words(fitted: Fitted, tmp_path: Path) -> None:
    """Words are split at blanks and bars and coded in order: Comedy 2, Drama 3, War 4; "" has none.

    Train without the items of "Comedy War" knows no Comedy: their genres are War alone.
    """
    *_, features = fitted
    year, genres = features.words["attribute_0"], features.words["attribute_1"]
    assert genres[:4, :3].tolist() == [[3, 0, 0], [3, 4, 0], [2, 4, 0], [0, 0, 0]]
    assert year[:4, :2].tolist() == [[2, 0], [3, 0], [4, 0], [5, 0]]
    assert features.word_sizes == {"attribute_0": 6, "attribute_1": 5}
    rows = draw("by_time").filter((pl.col("split") != "train") | (pl.col("item") % 4 != 2))
    *_, fewer = features_of(rows, tmp_path)
    assert fewer.words["attribute_1"][1:3, :2].tolist() == [[2, 3], [3, 0]]


def test_history_goes_by_answer(fitted: Fitted) -> None:
    """Every place holds an item among liked, or among disliked, or none: together the user's earlier rows."""
    split, retrieved, features = fitted
    table = features.table(split.rows, retrieved, "test")
    liked, disliked = (table[name].numpy() != PADDING for name in HISTORY)
    assert liked.shape == (table["user"].shape[0], HISTORY_ROWS)
    assert not (liked & disliked).any()
    _, answers = earlier_rows(split.rows, "test", HISTORY_ROWS)
    assert liked.sum(1).tolist() == (answers == 1).sum(1).tolist()
    assert disliked.sum(1).tolist() == (answers == 0).sum(1).tolist()


def test_numbers(fitted: Fitted) -> None:
    """Train's scaled numbers have mean 0 and deviation 1 (or are constant 0); bins are in range and in order."""
    split, retrieved, features = fitted
    table = features.table(split.rows, retrieved, "train")
    scaled = table[SCALED].double().numpy()
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(
        scaled.std(axis=0), np.where(np.ptp(scaled, axis=0) > 0, 1, 0), atol=1e-5
    )
    for name, column in zip(FEATURES, scaled.T, strict=True):
        codes = table[name].numpy()
        assert codes.max() < features.sizes[name] <= BINS
        order = np.lexsort((codes, column))  # float32 may make equal what lies in two bins
        assert (np.diff(codes[order]) >= 0).all()


@pytest.mark.parametrize("kind", ["by_time", "random"])
def test_earlier_rows_equal_the_slow_way(kind: str) -> None:
    """The user's last five rows of smaller time in splits up to the target's, context too, in the log's order."""
    role = (
        pl.when(pl.col("row_id") % 5 == 0)
        .then(pl.lit("context"))
        .otherwise(pl.lit("target"))
    )
    log = make_split(draw(kind)).rows.with_columns(role=role.cast(pl.Enum(ROLES)))
    for k, split in enumerate(SPLITS):
        items, answers = earlier_rows(log, split, 5)
        targets = log.filter(pl.col("split") == split, pl.col("role") == "target")
        assert len(items) == targets.height
        readable = log.filter(pl.col("split").cast(pl.String).is_in(SPLITS[: k + 1]))
        user, time, item, label = (
            readable[c].to_numpy() for c in ("user", "timestamp", "item", "label")
        )
        for row, found, said in zip(
            targets.iter_rows(named=True), items, answers, strict=True
        ):
            past = np.flatnonzero((user == row["user"]) & (time < row["timestamp"]))[-5:]
            padding = [NO_ROW] * (5 - past.size)
            assert found.tolist() == padding + item[past].tolist()
            assert said.tolist() == padding + label[past].tolist()


@pytest.mark.parametrize("fold", ["select", "tune"])
def test_one_class_in_a_fold(tmp_path: Path, fold: str) -> None:
    """A fold that decides something needs both classes: said before any network is trained."""
    split, retrieved, _ = features_of(draw("by_time"), tmp_path)
    one = (pl.col("split") == "valid") & (pl.col("fold") == fold)
    rows = split.rows.with_columns(
        label=pl.when(one).then(1).otherwise(pl.col("label")).cast(pl.Int8)
    )
    with pytest.raises(DataError, match=f"{fold} has .* expected both"):
        network_baselines(replace(split, rows=rows), retrieved)


NAMES = ["oracle", "liar"]


@pytest.fixture
def make_data(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Make:
    """The tiny world's data with changed settings, and a cache of the test's own."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    parser = ArgumentParser()
    parser.add_class_arguments(InteractionData, "data")

    def make(**changes: object) -> InteractionData:
        settings = {"data": yaml.safe_load(tiny_config(**changes).read_text())["data"]}
        found: InteractionData = parser.instantiate_classes(
            parser.parse_object(settings)
        ).data
        return found

    return make


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Networks are planted baselines, one that knows the answers and its opposite; the list says how often."""
    made: list[int] = []

    def plant(
        split: SplitInteractions,
        retrieved: Retrieved,
        seed: int = 0,
    ) -> list[Baseline]:
        made.append(seed)
        answers = {
            name: targets_of(split.rows, name)["label"].to_numpy() - 0.5
            for name in SPLITS[1:]
        }
        opposite = {name: -values for name, values in answers.items()}
        oracle = Baseline("oracle", baseline_scores(split.rows, answers), {"epochs": 3})
        return [oracle, Baseline("liar", baseline_scores(split.rows, opposite))]

    monkeypatch.setattr(networks, "network_baselines", plant)
    monkeypatch.setattr(commands, "networks_installed", lambda: True)
    return made


def names(baselines: list[Baseline]) -> list[str]:
    return [baseline.name for baseline in baselines]


def test_trained_once_and_found_as_made(make_data: Make, planted: list[int]) -> None:
    """Nothing is there before; then all scores come back bit for bit, without training."""
    data = make_data()
    assert kept_networks(data) == []
    made, again, found = (
        trained_networks(data),
        trained_networks(make_data()),
        kept_networks(make_data()),
    )
    assert planted == [0]
    assert names(made) == names(again) == names(found) == NAMES
    for one, other in zip(made, found, strict=True):
        assert one.scores.equals(other.scores)
        assert one.chosen == other.chosen
        assert set(one.scores["split"]) == {"valid", "test"}


@pytest.mark.usefixtures("planted")
def test_others_are_not_found(make_data: Make) -> None:
    """Another protocol, retriever or seed."""
    data = make_data()
    trained_networks(data)
    for change in (
        {"data.protocol.minimum_history": 2},
        {"data.retriever": "project.retrieval.NoRetriever"},
        {"data.seed": 1},
    ):
        assert kept_networks(make_data(**change)) == []


def test_without_the_extra(
    make_data: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Requested but not installed: one line with the command, and the other baselines."""
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    found = {
        row["name"]
        for row in run_baselines(make_data(), tmp_path, networks=True)["baselines"]
    }
    assert ".[networks]" in capsys.readouterr().out
    assert "lr_features" in found
    assert not found & set(networks.NETWORKS)


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_commands_know_what_baselines_has_trained(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Before networks are trained fit finds nothing; test after it has them, of seed 1 none."""
    config = tiny_config()
    # a cache of its own: what is planted here must not be another test's best baseline
    run = functools.partial(call, tmp_path / "cache")
    run("fit", "--config", config)
    folder = tmp_path / "runs" / "tiny" / "version_0"

    quick = {row["name"] for row in result(folder, "fit")["baselines"]}
    run("baselines", *given(folder), "--networks", "true")
    run("test", *given(folder))
    test = result(folder, "test")
    (row,) = [row for row in test["exits"] if row["layer"] == 3]
    found = row["baseline_difference"]
    assert (found["baseline"], found["value"]) == ("oracle", pytest.approx(row["auc"] - 1))
    assert [row["name"] for row in test["baselines"] if row["name"] not in quick] == NAMES
    alone = {
        row["name"]: row["auc"]
        for row in result(folder, "baselines")["baselines"]
        if row["split"] == "test"
    }
    assert {row["name"]: row["auc"] for row in test["baselines"]} == alone
    run("validate", *given(folder), "--seed_everything", 1)
    assert {row["name"] for row in result(folder, "validate")["baselines"]} == quick


POINT = (4, 1e-4)


@pytest.mark.skipif(not networks_installed(), reason="needs the extra networks")
@pytest.mark.slow
class TestWithTheExtra:
    @pytest.fixture
    def world(self, tmp_path: Path) -> tuple[SplitInteractions, Retrieved]:
        split = make_split(draw("by_time", 3000))
        return split, RetrievedFeatures(split, ItemKNN(), 3, tmp_path).tables()

    def test_planted_signal(self, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Kind users and good items are found by all three: test AUC above .8, about that of knowing the chances.

        They are baselines like others: rows with what was chosen, and in the choice of the best baseline.
        """
        split, retrieved = world
        monkeypatch.setattr(networks, "BATCH_ROWS", 128)
        baselines = network_baselines(split, retrieved, grid=[POINT])
        assert names(baselines) == ["deepfm", "dcn_v2", "din"]
        test = split.rows.filter(pl.col("split") == "test")
        values = [
            auc(baseline.logits(test["row_id"]), test["label"].to_numpy())
            for baseline in baselines
        ]
        assert min(value or 0 for value in values) > 0.8
        rows = baseline_rows(baselines, split.rows, draws=5)
        assert {row["chosen"]["embedding"] for row in rows} == {4}
        assert all(1 <= row["chosen"]["epochs"] <= 10 for row in rows)
        assert best_baseline(baselines, split.rows) in baselines

    def test_same_again_blind_to_test_and_to_the_callers_random_numbers(
        self, world: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another state of torch's generator and flipped test labels: scores of valid are the same bit by bit."""
        split, retrieved = world
        monkeypatch.setattr(networks, "EPOCHS", 2)
        before = network_baselines(split, retrieved, grid=[POINT])
        torch.manual_seed(99)
        state = torch.get_rng_state()
        flipped = replace(split, rows=flip(split.rows, pl.col("split") == "test"))
        after = network_baselines(flipped, retrieved, grid=[POINT])
        assert torch.equal(torch.get_rng_state(), state)
        for one, other in zip(before, after, strict=True):
            before_test = pl.col("split") == "valid"
            assert one.scores.filter(before_test).equals(other.scores.filter(before_test))

    def test_tune_chooses(self, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The point of highest AUC on tune is taken, whatever other rows say, and named."""
        split, retrieved = world
        monkeypatch.setattr(networks, "NETWORKS", ("deepfm",))
        monkeypatch.setattr(networks, "EPOCHS", 1)
        points = [POINT, (2, 1e-4), (6, 1e-4)]
        tune = split.rows.filter((pl.col("split") == "valid") & (pl.col("fold") == "tune"))
        alone = [network_baselines(split, retrieved, grid=[point])[0] for point in points]
        values = [
            auc(baseline.logits(tune["row_id"]), tune["label"].to_numpy()) or 0
            for baseline in alone
        ]
        best = int(np.argmax(values))
        (found,) = network_baselines(split, retrieved, grid=points)
        assert len(set(values)) == 3
        assert found.scores.equals(alone[best].scores)
        chosen = dict(zip(("embedding", "weight_decay"), points[best], strict=True))
        assert found.chosen == {**chosen, "epochs": 1}

    def test_only_din_reads_the_history_and_padding_adds_nothing(self, world: Any) -> None:
        """Swapping likes and dislikes moves DIN alone; places without a row weigh 0, wherever they stand."""
        split, retrieved = world
        features = NetworkFeatures.fit(split.rows, split.interactions.items, retrieved, {})
        table = {
            k: v[:64] for k, v in features.table(split.rows, retrieved, "test").items()
        }
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
                    if (
                        isinstance(module, torch.nn.Embedding)
                        and module.padding_idx is not None
                    ):
                        module.weight[module.padding_idx] = 0
            first = score(network, table)
            assert np.array_equal(first, score(network, swapped)) == (name != "din")
            np.testing.assert_allclose(first, score(network, turned), atol=1e-4)
