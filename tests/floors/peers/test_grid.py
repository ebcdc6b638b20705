"""The networks as floors: what they learn, that they are the same again, and what is said where they are missing."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from project import verbs
from project.data.datamodule import InteractionData
from project.errors import DataError
from project.evaluation.metrics import auc
from project.floors import kept as kept_floors
from project.floors.peers import grid, peer_floors, peers_installed
from project.floors.peers.features import PADDING, PeerFeatures
from project.floors.peers.grid import GRID, GridPoint
from project.floors.peers.training import score
from project.floors.quick import Floor, best_floor, floor_rows, floor_scores
from project.retrieval import ItemKNN, evidence_tables
from project.verbs import run_floors

POINT = GridPoint(embedding=4, weight_decay=1e-4)

needs_extra = pytest.mark.skipif(not peers_installed(), reason="needs the extra peers")


@pytest.fixture
def data(tiny_config, tmp_path, monkeypatch):
    """The tiny world's data, without the CLI; floors that other tests may have kept are out of reach."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    parser = ArgumentParser()
    parser.add_class_arguments(InteractionData, "data")
    settings = {"data": yaml.safe_load(tiny_config().read_text())["data"]}
    return parser.instantiate_classes(parser.parse_object(settings)).data


class TestWithoutTheExtra:
    def test_floors_run_and_say_how_to_install(self, data, tmp_path, monkeypatch, capsys):
        """Asked for but absent: one line with the command, and the floors there are without asking."""
        monkeypatch.setattr(grid, "find_spec", lambda name: None)
        result = run_floors(data, tmp_path, peers=True)
        said = capsys.readouterr().out
        assert "DeepFM, DCN-v2 and DIN are left out" in said.splitlines()[0]
        assert "pip install 'exitrec[peers]'" in said
        assert {row["name"] for row in result["floors"]} >= {"lr_evidence", "lightgcn_dot"}
        assert not {row["name"] for row in result["floors"]} & set(grid.PEERS)

    def test_nothing_is_said_unasked(self, data, tmp_path, capsys):
        """Whether the extra is there or not, floors without --peers do not mention them."""
        run_floors(data, tmp_path)
        assert "DeepFM" not in capsys.readouterr().out


def test_kept_networks_are_shown_unasked(data, tmp_path, monkeypatch):
    """Networks that `floors --peers true` has trained stand in the next `floors` too, and compete for the best."""
    oracle = floor_scores(
        data.split.rows, {s: data.targets(s)["label"].to_numpy() - 0.5 for s in ("valid", "test")}
    )
    trained = []

    def train(*arguments, **settings):
        trained.append(arguments)
        return [Floor("din", oracle, {"embedding": 8})]

    monkeypatch.setattr(kept_floors, "peer_floors", train)
    for module in (kept_floors, verbs):
        monkeypatch.setattr(module, "peers_installed", lambda: True)
    monkeypatch.setattr(grid, "version", lambda name: "1.0")
    assert "din" not in {row["name"] for row in run_floors(data, tmp_path)["floors"]}
    assert trained == []
    asked, unasked = run_floors(data, tmp_path, peers=True), run_floors(data, tmp_path)
    assert len(trained) == 1
    assert asked["floors"] == unasked["floors"]
    assert asked["best_floor"] == "din"
    assert {row["auc"] for row in asked["floors"] if row["name"] == "din"} == {1.0}


def test_settings_are_plain(monkeypatch):
    """What kept networks are found by can be written as JSON and says every setting, the library's version too."""
    monkeypatch.setattr(grid, "version", lambda name: f"{name} 1.0")
    settings = json.loads(json.dumps(grid.peer_settings()))
    assert settings["torch-rechub"] == "torch-rechub 1.0"
    assert settings["grid"] == [asdict(point) for point in GRID]
    assert (settings["epochs"], settings["crosses"], settings["history_rows"]) == (10, 2, 20)


def test_the_grid_is_small():
    """At most four points, all different."""
    assert len(set(GRID)) == len(GRID) <= 4


@pytest.mark.parametrize("fold", ["select", "tune"])
def test_one_class_in_a_fold(build, draw, tmp_path, fold):
    """A fold that decides something needs both classes: said before any network is trained."""
    split = build(draw("by_time", 300))
    evidence = evidence_tables(split, ItemKNN(), 100, tmp_path)
    one = (pl.col("split") == "valid") & (pl.col("fold") == fold)
    rows = split.rows.with_columns(label=pl.when(one).then(1).otherwise(pl.col("label")).cast(pl.Int8))
    with pytest.raises(DataError, match=f"{fold} has \\d+ targets, \\d+ of them liked, expected both"):
        peer_floors(replace(split, rows=rows), evidence)


@needs_extra
@pytest.mark.slow
class TestWithTheExtra:
    @pytest.fixture
    def world(self, build, draw, tmp_path):
        split = build(draw("by_time", 3000))
        return split, evidence_tables(split, ItemKNN(), 1000, tmp_path)

    def test_planted_signal(self, world, monkeypatch):
        """Kind users and good items are found by all three: test AUC above .8, about that of knowing the chances.

        They are floors like others: rows with what was chosen, and in the choice of the best floor.
        """
        split, evidence = world
        monkeypatch.setattr("project.floors.peers.training.BATCH_ROWS", 128)
        floors = peer_floors(split, evidence, grid=[POINT])
        assert [floor.name for floor in floors] == ["deepfm", "dcn_v2", "din"]
        test = split.rows.filter(pl.col("split") == "test")
        for floor in floors:
            value = auc(floor.logits(test["row_id"]), test["label"].to_numpy())
            assert value is not None
            assert value > 0.8
        rows = floor_rows(floors, split.rows, draws=5)
        assert {row["chosen"]["embedding"] for row in rows} == {4}
        assert all(1 <= row["chosen"]["epochs"] <= 10 for row in rows)
        assert best_floor(floors, split.rows) in floors

    def test_same_again_blind_to_test_and_to_the_callers_random_numbers(self, world, monkeypatch):
        """Another state of torch's generator and flipped test labels: valid scores are the same bit by bit."""
        split, evidence = world
        monkeypatch.setattr("project.floors.peers.training.EPOCHS", 2)
        before = peer_floors(split, evidence, splits=("valid",), grid=[POINT])
        torch.manual_seed(99)
        state = torch.get_rng_state()
        test = pl.col("split") == "test"
        rows = split.rows.with_columns(
            label=pl.when(test).then(1 - pl.col("label")).otherwise(pl.col("label"))
        )
        flipped = replace(split, rows=rows)
        without = {name: evidence[name] for name in ("train", "valid")}
        after = peer_floors(flipped, without, splits=("valid",), grid=[POINT])
        assert torch.equal(torch.get_rng_state(), state)
        for one, other in zip(before, after, strict=True):
            assert one.scores.equals(other.scores)

    def test_tune_chooses(self, world, monkeypatch):
        """The point of highest AUC on tune is taken, whatever other rows say, and named."""
        split, evidence = world
        monkeypatch.setattr(grid, "PEERS", {"deepfm": grid.PEERS["deepfm"]})
        monkeypatch.setattr("project.floors.peers.training.EPOCHS", 1)
        points = [POINT, replace(POINT, embedding=2), replace(POINT, embedding=6)]
        tune = split.rows.filter((pl.col("split") == "valid") & (pl.col("fold") == "tune"))
        alone = [peer_floors(split, evidence, ("valid",), grid=[point])[0] for point in points]
        values = [auc(floor.logits(tune["row_id"]), tune["label"].to_numpy()) for floor in alone]
        best = int(np.argmax(values))
        (found,) = peer_floors(split, evidence, ("valid",), grid=points)
        assert len(set(values)) == 3
        assert found.scores.equals(alone[best].scores)
        assert found.chosen == {**asdict(points[best]), "epochs": 1}

    def test_only_din_reads_the_history_and_padding_adds_nothing(self, world):
        """Swapping likes and dislikes moves DIN alone; places without a row weigh 0, wherever they stand."""
        split, evidence = world
        features = PeerFeatures.fit(split.rows, split.interactions.items, evidence)
        table = {k: v[:64] for k, v in features.table(split.rows, evidence, "test").items()}
        swapped = table | {"liked": table["disliked"], "disliked": table["liked"]}
        turned = table | {name: table[name].flip(1) for name in ("liked", "disliked")}
        assert (table["liked"] == PADDING).any()
        for name, build_network in grid.PEERS.items():
            torch.manual_seed(0)
            network = build_network(features, 4)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            with torch.no_grad():
                for module in network.modules():
                    if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                        module.weight[module.padding_idx] = 0
            first = score(network, table)
            assert np.array_equal(first, score(network, swapped)) == (name != "din")
            np.testing.assert_allclose(first, score(network, turned), atol=1e-4)
