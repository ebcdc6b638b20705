"""Whether more text makes better baselines: `text_baselines.py CONFIG...` writes results/text_baselines.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentParser
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import StandardScaler

from project.arrays import F32, F64
from project.cache import default_cache
from project.datamodule import InteractionData
from project.evaluation.baselines import (
    boosting,
    targets_of,
    targets_table,
    train_labels,
)
from project.evaluation.bootstrap import UserBootstrap
from project.features import feature_matrix, logistic_regression
from project.retrieval.own_text import SHRINK, item_vectors
from project.retrieval.past import WalkRows, queries_by_user
from project.retrieval.text import MeanPooling, encode_once, item_texts
from project.run import SCHEMA_VERSION, write_json

OUT = Path(__file__).parents[1] / "results" / "text_baselines.json"
SPLITS = ("train", "valid", "test")
DIMENSIONS = 48
# of 4, 8 and 16 the best on tune; TF-IDF similarities are squared
ENCODER, POWER = "all-minilm-l6-v2", 8
TOGETHER = 2000
ABOUT = (
    f"Beside gbdt_text (boosting on all retrieved features, TF-IDF similarity among them): {DIMENSIONS} dimensions of "
    f"an SVD of the item's TF-IDF vector (svd), and the user's own earlier answers by the similarity of a frozen "
    f"sentence encoder, {ENCODER}, to the power of {POWER} (encoder). Differences to gbdt_text are paired, users "
    "resampled, 95 %."
)


def answers_by_similarity(rows: WalkRows, vectors: F32) -> F64:
    """(rows, 2): the user's own strictly earlier answers, by similarity to the candidate, and log(1 + its sum).

    The formula is that of `project.retrieval.own_text`, with another similarity.
    """
    found = np.zeros((rows.row_id.size, 2))
    for every, own, all_earlier in queries_by_user(rows):
        answers = rows.label[own].astype(np.float64)
        sums = np.cumsum(np.append(0.0, answers))
        for start in range(0, every.size, TOGETHER):
            queries, earlier = (
                every[start : start + TOGETHER],
                all_earlier[start : start + TOGETHER],
            )
            past = own[: int(earlier.max())]
            similarity = (
                np.clip(vectors[rows.item[queries]] @ vectors[rows.item[past]].T, 0, 1)
                ** POWER
            )
            similarity[np.arange(past.size) >= earlier[:, None]] = 0
            weight, mean = similarity.sum(axis=1), sums[earlier] / np.maximum(earlier, 1)
            shift = (similarity @ answers[: past.size] - mean * weight) / (weight + SHRINK)
            found[queries] = np.stack([4 * shift, np.log1p(weight)], axis=1)
    return found


def data_of(config: Path) -> InteractionData:
    """The data of a configuration file."""
    parser = ArgumentParser()
    parser.add_class_arguments(InteractionData, "data")
    settings = parser.parse_object(
        {"data": yaml.safe_load(config.read_text(encoding="utf-8"))["data"]}
    )
    data: InteractionData = parser.instantiate(settings).data
    return data


def study(config: Path) -> list[dict[str, Any]]:
    """Rows of the table for one data configuration."""
    # 1. retrieved features of the configuration's log
    data = data_of(config)
    rows, items = data.split.rows, data.split.interactions.items
    labels = train_labels(rows)
    targets = {split: targets_of(rows, split) for split in SPLITS}
    base = float(labels.mean())
    known = {
        split: feature_matrix(targets_table(rows, data.retrieved, split), base)
        for split in SPLITS
    }
    # 2. more text: of the item itself, and of the user's own answers
    terms = item_vectors(items, items)[:-1]
    svd = StandardScaler().fit_transform(
        TruncatedSVD(DIMENSIONS, random_state=0).fit_transform(terms)
    )
    encoded = encode_once(MeanPooling(ENCODER, 64), item_texts(items), default_cache())
    by_encoder = answers_by_similarity(WalkRows.from_log(rows), encoded)
    more = {
        split: {
            "svd": svd[part["item"].to_numpy()],
            "encoder": by_encoder[part["row_id"].to_numpy()],
        }
        for split, part in targets.items()
    }
    # 3. the same models on every set of features
    scores: dict[str, dict[str, F64]] = {}
    for name, kinds in {"": [], " + svd": ["svd"], " + encoder": ["encoder"]}.items():
        features = {
            s: np.hstack([known[s], *(more[s][kind] for kind in kinds)]) for s in SPLITS
        }
        for model, made in (("gbdt_text", boosting()), ("lr_text", logistic_regression())):
            made.fit(features["train"], labels)
            scores[model + name] = {
                s: made.decision_function(features[s]) for s in ("valid", "test")
            }
    # 4. paired with gbdt_text, on tune and on test
    found = []
    for name, logits in scores.items():
        row: dict[str, Any] = {
            "log": config.stem,
            "protocol": data.split.hash,
            "baseline": name,
        }
        for part, split in (("tune", "valid"), ("test", "test")):
            chosen = (
                (targets[split]["fold"] == "tune").to_numpy()
                if part == "tune"
                else np.s_[:]
            )
            of, truth, user = (
                logits[split][chosen],
                *(targets[split][c].to_numpy()[chosen] for c in ("label", "user")),
            )
            bootstrap = UserBootstrap(user)
            gap = bootstrap.difference_interval(
                of, scores["gbdt_text"][split][chosen], truth
            )
            shown = None if name == "gbdt_text" else gap
            row |= {
                part: bootstrap.metrics(of, truth)["auc"],
                f"{part}_minus_gbdt_text": shown,
            }
        found.append(row)
        print(row, flush=True)
    return found


def study_all(
    configs: Sequence[str],
    study: Callable[[Path], list[dict[str, Any]]],
    out: Path,
    about: str,
) -> None:
    """Study every configuration; rows of others stay. The file is written after each."""
    old = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    rows = [row for row in old if row["log"] not in {Path(c).stem for c in configs}]
    head = {
        "schema_version": SCHEMA_VERSION,
        "command": "study",
        "protocol": {"name": "of each log", "hash": "several"},
        "about": about,
    }
    for config in configs:
        rows += study(Path(config))
        write_json(out, head | {"rows": rows})


if __name__ == "__main__":
    study_all(sys.argv[1:], study, OUT, ABOUT)
