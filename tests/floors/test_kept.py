"""Kept floors: found under their own hash and no other, whole or not at all, and used by the verbs that follow."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import yaml
from jsonargparse import ArgumentParser

from project.data.datamodule import InteractionData
from project.evaluation.exits import comparison
from project.floors import kept as kept_floors
from project.floors.kept import KeptFloors
from project.floors.peers import grid, training
from project.floors.quick import Floor, best_floor, fit_floors, floor_scores, targets_of

MORE = ["rates_summed", "last_10", "mf", "lightgcn_dot"]


@pytest.fixture
def make_data(tiny_config, tmp_path, monkeypatch):
    """The tiny world's data with changed settings, and a cache of the test's own."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    parser = ArgumentParser()
    parser.add_class_arguments(InteractionData, "data")

    def make(**changes):
        settings = {"data": yaml.safe_load(tiny_config(**changes).read_text())["data"]}
        return parser.instantiate_classes(parser.parse_object(settings)).data

    return make


def planted(split, evidence, source=None, splits=("valid", "test"), seed=0):
    """Two floors made in no time: one knows the answers, the other their opposite."""
    answers = {name: targets_of(split.rows, name)["label"].to_numpy() - 0.5 for name in splits}
    return [
        Floor("oracle", floor_scores(split.rows, answers), {"epochs": 3}),
        Floor("liar", floor_scores(split.rows, {name: -values for name, values in answers.items()})),
    ]


@pytest.fixture
def quick(monkeypatch):
    """`more` and `peers` are planted floors; the list says which were made."""
    made = []

    def maker(kind):
        def make(*arguments, **settings):
            made.append(kind)
            return planted(*arguments, **settings)

        return make

    monkeypatch.setattr(kept_floors, "more_floors", maker("more"))
    monkeypatch.setattr(kept_floors, "peer_floors", maker("peers"))
    monkeypatch.setattr(kept_floors, "peers_installed", lambda: True)
    monkeypatch.setattr(grid, "version", lambda name: "1.0")
    return made


def names(floors):
    return [floor.name for floor in floors]


class TestKeptAndFound:
    def test_made_once_and_found_as_made(self, make_data):
        """Nothing is there before; then the scores of all rows come back bit for bit, and of one split alone."""
        kept = KeptFloors.of(make_data())
        assert kept.find() == []
        made, found = kept.make("more"), kept.find()
        assert names(made) == names(found) == MORE
        for one, other in zip(made, found, strict=True):
            assert one.scores.equals(other.scores)
            assert set(one.scores["split"]) == {"valid", "test"}
            ids = targets_of(kept.split.rows, "test")["row_id"]
            assert np.isfinite(one.logits(ids)).all()
        (first, *_) = kept.find(("valid",))
        assert set(first.scores["split"]) == {"valid"}

    def test_not_made_again(self, make_data, quick):
        """The same data under the same settings, in another process for all it knows, makes nothing twice."""
        for _ in range(2):
            floors = KeptFloors.of(make_data()).make("peers")
            assert [floor.chosen for floor in floors] == [{"epochs": 3}, None]
        assert quick == ["peers"]

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize(
        "change",
        [
            {"data.protocol.minimum_history": 2},
            {"data.retriever": "project.retrieval.NoRetriever"},
            {"data.seed": 1},
        ],
    )
    def test_another_hash_finds_nothing(self, make_data, change):
        """Another protocol, another retriever's evidence or another seed: floors made before are not theirs."""
        first = KeptFloors.of(make_data())
        first.make("more")
        first.make("peers")
        assert len(first.find()) == 4
        assert KeptFloors.of(make_data(**change)).find() == []

    @pytest.mark.usefixtures("quick")
    def test_another_evidence_finds_nothing(self, make_data):
        """One number of one row of the evidence is enough, whatever the settings say."""
        kept = KeptFloors.of(make_data())
        kept.make("more")
        target = targets_of(kept.split.rows, "test")["row_id"][-1]
        rate = pl.when(pl.col("row_id") == target).then(0.123).otherwise("item_rate").alias("item_rate")
        count = pl.col("item_count").clip(lower_bound=1)
        changed = kept.evidence | {"test": kept.evidence["test"].with_columns(rate, count)}
        assert names(kept.find()) == ["oracle", "liar"]
        assert replace(kept, evidence=changed).find() == []

    @pytest.mark.usefixtures("quick")
    def test_peers_of_other_settings_or_another_library(self, make_data, monkeypatch):
        """Peers are found under the constants and the torch-rechub that trained them; `more` does not mind."""
        kept = KeptFloors.of(make_data())
        kept.make("more")
        kept.make("peers")
        with monkeypatch.context() as patch:
            patch.setattr(training, "EPOCHS", training.EPOCHS + 1)
            assert len(kept.find()) == 2
        with monkeypatch.context() as patch:
            patch.setattr(grid, "version", lambda name: "2.0")
            assert len(kept.find()) == 2
        assert len(kept.find()) == 4

    @pytest.mark.usefixtures("quick")
    def test_peers_where_the_library_is_not_installed(self, make_data, monkeypatch):
        """Where none is installed nothing contradicts the peers that were made last; another seed's are none."""
        kept = KeptFloors.of(make_data())
        monkeypatch.setattr(kept_floors, "peers_installed", lambda: False)
        assert kept.find() == []
        for number, library in enumerate(("2.0", "1.0")):
            monkeypatch.setattr(grid, "version", lambda name, library=library: library)
            kept.make("peers")
            (folder,) = (
                path.parent
                for path in kept.source.cache_dir.glob("floor_scores/*/content.json")
                if json.loads(path.read_text())["settings"]["torch-rechub"] == library
            )
            os.utime(folder / "content.json", (number, number))
        used = kept._kept("peers")
        assert [json.loads((f / "content.json").read_text())["settings"]["torch-rechub"] for f in used] == [
            "1.0"
        ]
        assert names(kept.find()) == ["oracle", "liar"]
        assert replace(kept, seed=1).find() == []

    @pytest.mark.parametrize("stop", ["making", "writing"])
    def test_interrupted(self, make_data, quick, monkeypatch, stop):
        """Stopped at any point: no folder is left, nothing is found, and the next attempt makes it."""
        kept = KeptFloors.of(make_data())

        def stopped(path, *arguments, **settings):
            if stop == "writing":
                path.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(kept_floors, "more_floors" if stop == "making" else "write_table", stopped)
            with pytest.raises(KeyboardInterrupt):
                kept.make("more")
        assert list((kept.source.cache_dir / "floor_scores").iterdir()) == []
        assert kept.find() == []
        assert names(kept.make("more")) == ["oracle", "liar"]


@pytest.mark.usefixtures("quick")
def test_a_kept_floor_may_be_the_best(make_data):
    """Beside floors that are made on the spot, the one that knows every answer is best: AUC 1, so an exit falls short.

    The exit here is the item's rate: its difference is its own AUC minus 1.
    """
    kept = KeptFloors.of(make_data())
    kept.make("peers")
    split = kept.split
    floors = [*fit_floors(split.rows, kept.evidence), *kept.find()]
    best = best_floor(floors, split.rows)
    assert best is not None
    assert best.name == "oracle"
    test = targets_of(split.rows, "test")
    scores = test.with_columns(
        logit_0=pl.lit(None, pl.Float32), logit_3=pl.Series(floors[0].logits(test["row_id"]))
    )
    result = comparison(scores, split, floors, "test", 3)
    (row,) = result["exits"]
    assert row["floor_difference"]["floor"] == "oracle"
    assert row["floor_difference"]["value"] == pytest.approx(row["auc"] - 1)
    assert names(floors)[-2:] == [f["name"] for f in result["floors"]][-2:]


@pytest.mark.slow
def test_verbs_know_what_floors_has_made(run, tiny_config, tmp_path, monkeypatch, capsys):
    """Before `floors` fit finds nothing and says what adds more; test after it has all, of another seed none."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    config = tiny_config()
    run("fit", "--config", config)
    folder = tmp_path / "runs" / "tiny" / "version_0"

    def result(verb):
        return json.loads((folder / "results" / f"{verb}.json").read_text())

    quick = {row["name"] for row in result("fit")["floors"]}
    assert result("fit")["kept_floors"] == []
    assert "--peers true` adds more" in " ".join(capsys.readouterr().out.split())
    given = ("--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt")
    run("floors", *given)
    capsys.readouterr()
    run("test", *given)
    assert f"Floors kept from before: {', '.join(MORE)}." in " ".join(capsys.readouterr().out.split())
    test = result("test")
    assert test["kept_floors"] == MORE
    assert [row["name"] for row in test["floors"] if row["name"] not in quick] == MORE
    assert {row["floor_difference"]["floor"] for row in test["exits"]} == {test["best_floor"]}
    alone = {row["name"]: row["auc"] for row in result("floors")["floors"] if row["split"] == "test"}
    assert {row["name"]: row["auc"] for row in test["floors"]} == alone
    run("validate", *given, "--seed_everything", 1)
    assert result("validate")["kept_floors"] == []
