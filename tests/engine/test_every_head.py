"""The score table of `score_every_head` is the one that `predict` writes, and that of one candidate at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from example_engine import EXITS, World, subset
from world import SEGMENT, tiny_settings

from project.data.logs import TableLogs
from project.data.prompt import Prompt
from project.data.protocol import Protocol
from project.engine.engine import score_every_head
from project.errors import DataError
from project.exits.plan import raw_outputs


@pytest.mark.parametrize("batch_tokens", [1, 100, 16_384])
def test_every_head_is_each_candidate_by_itself(world: World, batch_tokens: int) -> None:
    """Logits of every head to 1e-5, rows in the order asked, in batches of one request or of all."""
    scores = score_every_head(world.module, world.requests, batch_tokens)
    features = np.concatenate([r.retrieved for r in world.requests])
    found = raw_outputs(scores, features, EXITS, exit_0=True)
    expected = torch.cat([o.logits for o in world.outputs])
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=0)
    asked = [(r.request_id, k) for r in world.requests for k in range(len(r))]
    assert scores.select("request_id", "candidate_index").rows() == asked
    tokens = [
        (int(n), len(r.stream)) for r in world.requests for n in r.candidates.lengths
    ]  # own tokens, stream's
    assert scores.select("target_tokens", "stream_tokens").rows() == tokens


def test_nothing_asked_and_what_cannot_be_scored(world: World) -> None:
    """No request, or one without candidates, gives no rows; a broken request is an error that names it."""
    few = world.requests[6]
    empty = subset(few, np.array([], dtype=np.int64))
    for requests in ([], [empty]):
        assert score_every_head(world.module, requests).height == 0
    both = score_every_head(world.module, [empty, few])
    assert both["request_id"].to_list() == [few.request_id] * 2
    broken = replace(few, request_id="nan", retrieved=np.full((2, 3), np.nan))
    with pytest.raises(DataError, match=r"'nan' cannot be scored.*NaN"):
        score_every_head(world.module, [few, broken])


@pytest.mark.slow
def test_it_is_the_table_of_predict(
    run: Callable[..., None], tiny_model: Path, tiny_logs: Path, tmp_path: Path
) -> None:
    """After a tiny fit: same columns, keys, tokens and, to 1e-4, heads; ties, several users, a candidate twice."""
    from project.datamodule import InteractionData
    from project.engine.predict import load_weights
    from project.engine.requests import prepare_requests
    from project.model.module import ExitRecommender
    from project.retrieval import ItemKNN

    config = tiny_settings(tiny_logs, tiny_model, tmp_path, name="")
    config["data"] |= {"context_tokens": 256, "batch_tokens": 1024}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    items = [f"i{k}" for k in range(20)]
    tied = [{"item_id": f"i{k}", "label": k % 2, "time": 5.0} for k in range(6)]
    records = [
        {"request_id": "known", "user_id": "u1", "time": 200.0, "candidates": ["i3", "i0", "i3"]},
        {"request_id": "again", "user_id": "u1", "time": 240.0, "candidates": ["i3", "i5"]},
        {"request_id": "other", "user_id": "u2", "candidates": items[:9]},
        {"request_id": "empty", "history": [], "candidates": ["i1", "i2"]},
        {"request_id": "tied", "history": tied, "candidates": [*items, *items]},
    ]
    asked = tmp_path / "requests.jsonl"
    asked.write_text("\n".join(map(json.dumps, records)))
    checkpoint = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    run("fit", "--config", tmp_path / "tiny.yaml")
    given = ("--config", tmp_path / "tiny.yaml", "--ckpt_path", checkpoint)
    run("predict", *given, "--data.requests", asked)
    expected = pl.read_parquet(tmp_path / "version_0" / "scores" / "predict.parquet")

    data = InteractionData(
        TableLogs(str(tiny_logs / "interactions.csv"), str(tiny_logs / "items.csv")),
        ItemKNN(),
        Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2], label="rating > 3"),
        Prompt(segment=SEGMENT),
        tokenizer=str(tiny_model),
        context_tokens=256,
        batch_tokens=1024,
        refits=5,
        mf=None,
        requests=str(asked),
    )
    model = ExitRecommender(str(tiny_model), [1, 3], numbers=True)
    load_weights(model, data.tokenizer, checkpoint)
    prepared = prepare_requests(model, data)
    assert data.requests is not None
    scores = score_every_head(model, prepared, batch_tokens=300, candidates=data.requests.table())
    expected = expected.drop("exit_layer", "adaptive_logit")
    assert scores.schema == expected.schema
    heads = [c for c in scores.columns if c.startswith("logit_")]
    assert heads == ["logit_0", "logit_1", "logit_3"]
    assert scores.drop(heads).equals(expected.drop(heads))
    np.testing.assert_allclose(scores.select(heads), expected.select(heads), atol=1e-4)
    assert scores["logit_3"].std() > 1e-3  # type: ignore[operator]
