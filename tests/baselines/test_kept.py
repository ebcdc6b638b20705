"""Kept networks: found under their own hash and no other, whole or not at all, and used by the commands that follow."""

from __future__ import annotations

import json

import polars as pl
import pytest
import yaml
from jsonargparse import ArgumentParser

from project.datamodule import InteractionData
from project.evaluation import networks
from project.evaluation import networks as kept
from project.evaluation.baselines import Baseline, baseline_scores, best_baseline, fit_baselines, targets_of
from project.evaluation.networks import kept_networks, trained_networks
from project.evaluation.result import comparison

NAMES = ["oracle", "liar"]


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


@pytest.fixture
def quick(monkeypatch):
    """Networks are planted baselines, one that knows the answers and its opposite; the list says how often."""
    made = []

    def planted(split, retrieved, splits=("valid", "test"), seed=0):
        made.append(seed)
        answers = {name: targets_of(split.rows, name)["label"].to_numpy() - 0.5 for name in splits}
        opposite = {name: -values for name, values in answers.items()}
        return [
            Baseline("oracle", baseline_scores(split.rows, answers), {"epochs": 3}),
            Baseline("liar", baseline_scores(split.rows, opposite)),
        ]

    monkeypatch.setattr(kept, "network_baselines", planted)
    return made


def names(baselines):
    return [baseline.name for baseline in baselines]


class TestKeptAndFound:
    def test_trained_once_and_found_as_made(self, make_data, quick):
        """Nothing is there before; then all scores come back bit for bit, without training, and of one split alone."""
        data = make_data()
        assert kept_networks(data) == []
        made, again, found = trained_networks(data), trained_networks(make_data()), kept_networks(make_data())
        assert quick == [0]
        assert names(made) == names(again) == names(found) == NAMES
        for one, other in zip(made, found, strict=True):
            assert one.scores.equals(other.scores)
            assert one.chosen == other.chosen
            assert set(one.scores["split"]) == {"valid", "test"}
        (first, *_) = kept_networks(data, ("valid",))
        assert set(first.scores["split"]) == {"valid"}

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
        """Another protocol, another retriever's retrieved features or another seed: networks trained before are not
        theirs.
        """
        trained_networks(make_data())
        assert kept_networks(make_data(**change)) == []

    @pytest.mark.usefixtures("quick")
    def test_another_retrieved_finds_nothing(self, make_data):
        """One number of one row of the retrieved features is enough, whatever the settings say."""
        data = make_data()
        trained_networks(data)
        target = data.targets("test")["row_id"][-1]
        rate = pl.when(pl.col("row_id") == target).then(0.123).otherwise("item_rate").alias("item_rate")
        data.retrieved["test"] = data.retrieved["test"].with_columns(rate, pl.col("item_count").clip(1))
        assert kept_networks(data) == []

    @pytest.mark.usefixtures("quick")
    def test_other_settings_find_nothing(self, make_data, monkeypatch):
        """Networks are found under the constants that trained them."""
        data = make_data()
        trained_networks(data)
        monkeypatch.setattr(networks, "EPOCHS", networks.EPOCHS + 1)
        assert kept_networks(data) == []

    @pytest.mark.parametrize("stop", ["network_baselines", "write_table"])
    def test_interrupted(self, make_data, quick, monkeypatch, stop):
        """Stopped at any point: no folder is left, nothing is found, and the next attempt trains."""
        data = make_data()

        def stopped(path, *arguments, **settings):
            if stop == "write_table":
                path.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(kept, stop, stopped)
            with pytest.raises(KeyboardInterrupt):
                trained_networks(data)
        assert list((data.cache_dir / "baseline_scores").iterdir()) == []
        assert kept_networks(data) == []
        assert names(trained_networks(data)) == NAMES


@pytest.mark.usefixtures("quick")
def test_a_kept_network_may_be_the_best(make_data):
    """Beside baselines that are made on the spot, the one that knows every answer is best: AUC 1, so an exit falls
    short.

    The exit here is the item's rate: its difference is its own AUC minus 1.
    """
    data = make_data()
    trained_networks(data)
    split = data.split
    baselines = [*fit_baselines(split.rows, data.retrieved), *kept_networks(data)]
    best = best_baseline(baselines, split.rows)
    assert best is not None
    assert best.name == "oracle"
    test = targets_of(split.rows, "test")
    scores = test.with_columns(
        logit_0=pl.lit(None, pl.Float32), logit_3=pl.Series(baselines[0].logits(test["row_id"]))
    )
    result = comparison(scores, split, baselines, "test", 3)
    (row,) = result["exits"]
    assert row["baseline_difference"]["baseline"] == "oracle"
    assert row["baseline_difference"]["value"] == pytest.approx(row["auc"] - 1)
    assert names(baselines)[-2:] == [f["name"] for f in result["baselines"]][-2:]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_commands_know_what_baselines_has_trained(run, tiny_config, make_data, tmp_path, monkeypatch):
    """Before networks are trained fit finds nothing; test after it has them, of seed 1 none."""
    monkeypatch.setattr("project.trainer.networks_installed", lambda: True)
    config = tiny_config()
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    run("fit", "--config", config)
    folder = tmp_path / "runs" / "tiny" / "version_0"

    def result(command):
        return json.loads((folder / "results" / f"{command}.json").read_text())

    quick = {row["name"] for row in result("fit")["baselines"]}
    assert result("fit")["kept_baselines"] == []
    given = ("--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt")
    run("baselines", *given, "--networks", "true")
    run("test", *given)
    test = result("test")
    assert test["kept_baselines"] == NAMES
    assert [row["name"] for row in test["baselines"] if row["name"] not in quick] == NAMES
    alone = {row["name"]: row["auc"] for row in result("baselines")["baselines"] if row["split"] == "test"}
    assert {row["name"]: row["auc"] for row in test["baselines"]} == alone
    run("validate", *given, "--seed_everything", 1)
    assert result("validate")["kept_baselines"] == []
