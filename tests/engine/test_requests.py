"""Tests requests of logs, end to end: every head and exit scores as `predict` does, and the commands work.

One tiny fit with sharp attention serves all tests (as in tests/test_predict.py), so a wrong position, group or window
moves scores far more than rounding does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from example_engine import World, subset
from world import call, given, sharpened, spread_exits, tiny_settings

from project.api import open_run
from project.data.parts import by_part
from project.data.requests import read_requests
from project.engine.engine import score_every_head
from project.engine.requests import prepare_requests
from project.errors import DataError
from project.exits.plan import raw_outputs
from project.run import read_result


@pytest.mark.parametrize("batch_tokens", [1, 100, 16_384])
def test_every_head_is_each_candidate_by_itself(world: World, batch_tokens: int) -> None:
    """Logits of every head to 1e-5, rows in the order of the requests, in batches of one request or of all."""
    scores = score_every_head(world.module, world.requests, batch_tokens)
    features = np.concatenate([r.retrieved for r in world.requests])
    found = raw_outputs(scores, features, exit_0=True)
    expected = torch.cat([o.logits for o in world.outputs])
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=0)
    expected_rows = [(r.request_id, k) for r in world.requests for k in range(len(r))]
    assert scores.select("request_id", "candidate_index").rows() == expected_rows
    tokens = [
        (int(own), len(r.stream)) for r in world.requests for own in r.candidates.lengths
    ]
    assert scores.select("target_tokens", "stream_tokens").rows() == tokens


def test_no_request_and_requests_that_cannot_be_scored(world: World) -> None:
    """No request, or one without candidates, gives no rows; a broken request is an error that names it."""
    few = world.requests[6]
    empty = subset(few, np.array([], dtype=np.int64))
    for requests in ([], [empty]):
        assert score_every_head(world.module, requests).height == 0
    assert (
        score_every_head(world.module, [empty, few])["request_id"].to_list()
        == [few.request_id] * 2
    )
    broken = replace(few, request_id="nan", retrieved=np.full((2, 3), np.nan))
    with pytest.raises(DataError, match=r"'nan' cannot be scored.*NaN"):
        score_every_head(world.module, [few, broken])


@pytest.fixture(scope="module")
def fitted(
    tiny_model: Path,
    tiny_logs: Path,
    session_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run folder of one tiny fit with a test, its exits calibrated."""
    folder = tmp_path_factory.mktemp("engine")
    run = folder / "version_0"
    sharp = sharpened(tiny_model, folder / "model")
    config = tiny_settings(tiny_logs, sharp, folder, name="")
    config["data"] |= {"context_tokens": 256, "batch_tokens": 1024}
    config["model"]["exit_layers"] = [1, 2, 3]
    config["exits"] = {"criterion": "project.exits.criteria.Ratio"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    call(session_cache, "fit", "--config", folder / "tiny.yaml")
    call(session_cache, "test", *given(run))
    spread_exits(run)
    return run


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    """Known, unseen and anonymous users, a history beyond the window, one candidate twice, more than fit a window."""
    long = [{"item_id": f"i{k % 20}", "label": k % 2, "time": 10.0 * k} for k in range(60)]
    tied = [{"item_id": f"i{k}", "label": k % 2, "time": 5.0} for k in range(6)]
    items = [f"i{k}" for k in range(20)]
    records = [
        {
            "request_id": "known",
            "user_id": "u1",
            "time": 200.0,
            "candidates": ["i3", "i0", "i3"],
        },
        {"request_id": "again", "user_id": "u1", "time": 240.0, "candidates": ["i3", "i5"]},
        {"request_id": "unseen", "user_id": "nobody", "candidates": ["i1"]},
        {"request_id": "empty", "history": [], "candidates": ["i1", "i2"]},
        {"request_id": "long", "history": long, "candidates": items[:7]},
        {"request_id": "tied", "history": tied, "candidates": [*items, *items]},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.slow
def test_early_exit_leaves_where_the_plan_leaves_packed_scores(
    fitted: Path, requests_file: Path, run: Callable[..., None]
) -> None:
    """`predict`, `predict --engine early_exit` and `score_every_head`: the same candidates, exits and logits."""
    for extra in ((), ("--engine", "early_exit")):
        run("predict", *given(fitted), "--data.requests", requests_file, *extra)
    packed = pl.read_parquet(fitted / "scores" / "predict.parquet")
    early = pl.read_parquet(fitted / "scores" / "predict-early_exit.parquet")
    keys = ["request_id", "candidate_index", "item_id"]
    assert early.select(keys).equals(packed.select(keys))
    assert early["error"].null_count() == len(early) == 55
    same = (early["exit_layer"] == packed["exit_layer"]).to_numpy()
    assert same.mean() > 0.95  # but for rows near a threshold
    logits = (scores["adaptive_logit"].filter(same) for scores in (early, packed))
    np.testing.assert_allclose(*logits, atol=1e-4)
    assert packed["exit_layer"].n_unique() >= 3
    assert packed["logit_3"].std() > 0.05  # what is read moves the score  # type: ignore[operator]

    opened = open_run(fitted, "cpu")
    asked = read_requests(str(requests_file), opened.data.split.interactions)
    prepared = prepare_requests(opened.model, opened.data, asked)
    every = score_every_head(opened.model, prepared, batch_tokens=300)
    expected, heads = (
        packed.drop("exit_layer", "adaptive_logit", "item_id"),
        [f"logit_{k}" for k in range(4)],
    )
    assert every.schema == expected.schema
    assert every.drop(heads).equals(expected.drop(heads))
    np.testing.assert_allclose(every.select(heads), expected.select(heads), atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:request .* is not scored")
def test_bad_requests_have_rows_of_their_own(
    fitted: Path, requests_file: Path, run: Callable[..., None]
) -> None:
    """Unknown items, in candidates or history, and no candidate: an error each; others score as without them."""
    good, path = (
        requests_file.read_text().splitlines(),
        requests_file.with_name("mixed.jsonl"),
    )
    bad = [
        {"request_id": "unknown", "user_id": "u1", "candidates": ["i3", "zzz"]},
        {"request_id": "nothing", "user_id": "u1", "candidates": []},
        {
            "request_id": "past",
            "history": [{"item_id": "zzz", "label": 1, "time": 5}],
            "candidates": ["i3"],
        },
    ]
    path.write_text(
        "\n".join([json.dumps(bad[0]), *good[:2], *map(json.dumps, bad[1:]), *good[2:]])
    )
    found = []
    for requests in (requests_file, path):
        run(
            "predict", *given(fitted), "--data.requests", requests, "--engine", "early_exit"
        )
        found.append(pl.read_parquet(fitted / "scores" / "predict-early_exit.parquet"))
    plain, mixed = found
    scored, failed = (
        mixed.filter(pl.col("error").is_null()),
        mixed.filter(pl.col("error").is_not_null()),
    )
    assert scored.drop("adaptive_logit", "probability").equals(
        plain.drop("adaptive_logit", "probability")
    )
    np.testing.assert_allclose(scored["adaptive_logit"], plain["adaptive_logit"], atol=1e-5)
    assert failed.select("request_id", "candidate_index", "item_id").rows() == [
        ("unknown", 0, "i3"),
        ("unknown", 1, "zzz"),
        ("nothing", None, None),
        ("past", 0, "i3"),
    ]
    assert failed["exit_layer"].to_list() == [-1] * 4
    assert failed["adaptive_logit"].is_nan().all()
    order = mixed["request_id"].unique(maintain_order=True).to_list()
    assert order[:5] == ["unknown", "known", "again", "nothing", "past"]
    run("predict", *given(fitted), "--data.requests", path)
    assert len(pl.read_parquet(fitted / "scores" / "predict.parquet")) == len(plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:request .* is not scored")
def test_ray_actors_score_as_one_process(
    fitted: Path, requests_file: Path, run: Callable[..., None]
) -> None:
    """Rows of `--engine early_exit`, to 1e-4 since batches differ; a part that is missing is made again, alone."""
    pytest.importorskip("ray", reason="--engine ray needs the extra `ray`")
    two = ["i7", "i8"]
    more = [
        {"request_id": f"more {k}", "user_id": f"u{k % 9}", "candidates": two}
        for k in range(30)
    ]
    more[3]["candidates"] = [{"item_id": "new", "title": "a dog at sea"}, "i2"]
    more += [{"request_id": "none", "user_id": "u1", "candidates": []}]
    more += [{"request_id": "unknown", "history": [], "candidates": ["zzz"]}]
    requests_file.write_text("\n".join([requests_file.read_text(), *map(json.dumps, more)]))
    asked = ("predict", *given(fitted), "--data.requests", requests_file, "--engine")
    run(*asked, "early_exit")
    keys = ["request_id", "candidate_index", "item_id", "exit_layer"]
    numbers = ["adaptive_logit", "probability"]
    expected = pl.read_parquet(fitted / "scores" / "predict-early_exit.parquet").sort(keys)
    command = [
        sys.executable,
        "-m",
        "project",
        *map(str, asked),
        "ray",
        "--trainer.devices",
        "2",
    ]
    folder = fitted / "scores" / "predict-ray"
    written = list[dict[Path, int]]()
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        written.append({file: file.stat().st_mtime_ns for file in folder.iterdir()})
        found = pl.concat(map(pl.read_parquet, written[-1])).sort(keys)
        assert found.select(keys).equals(expected.select(keys))
        np.testing.assert_allclose(
            found.select(numbers), expected.select(numbers), atol=1e-4
        )
        assert (
            found["error"].null_count() == expected["error"].null_count() == len(found) - 2
        )
        gone = max(written[-1])
        of_users = [pl.read_parquet(file)["request_id"].unique() for file in written[-1]]
        assert (
            sum(
                names.is_in(["known", "again", "more 1", "more 10"]).any()
                for names in of_users
            )
            == 1
        )
        gone.unlink()
    assert {file for file in written[0] if written[0][file] != written[1][file]} == {gone}
    assert len(written[0]) > 2


def test_requests_of_a_user_are_one_part() -> None:
    """Of lines and of columns; bytes that are no text stay as they are; a line without a user stands for itself."""
    pytest.importorskip("pyarrow", reason="--engine ray needs the extra `ray`")
    records = [
        {"request_id": f"r{k}", "user_id": f"é{k % 3}", "candidates": [f"i{k}"]}
        for k in range(9)
    ]
    lines = [
        *(json.dumps(r, ensure_ascii=False).encode() for r in records),
        b'\xff{"user_id": 1}\r',
        b"[]",
    ]
    text = pl.DataFrame({"text": [line.decode("latin-1") for line in lines]})
    columns = pl.DataFrame(records)
    of_lines, of_columns = (
        pl.DataFrame(by_part(t.to_arrow(), 16, set())) for t in (text, columns)
    )
    assert [line.encode("latin-1") for line in of_lines["line"]] == [
        line.strip() for line in lines
    ]
    assert [json.loads(line) for line in of_columns["line"]] == records
    assert of_columns.drop("line").equals(of_lines.head(9).drop("line"))
    assert of_columns["part"].to_list() == of_columns["part"].to_list()[:3] * 3
    part = int(of_lines["part"][0])
    left = pl.DataFrame(by_part(text.to_arrow(), 16, {part}))
    assert left.equals(of_lines.filter(pl.col("part") != part))


@pytest.mark.slow
def test_benchmark_writes_rows_of_every_engine(
    fitted: Path, run: Callable[..., None]
) -> None:
    """Packed, static depths and early exit, prefix cached and not; ratios are against packed, so its own are 1."""
    run("benchmark", *given(fitted), "--only", "engine", "--seconds", "0.1")
    rows = read_result(fitted / "results" / "benchmark.json")["rows"]
    cases = {(n, s) for n in (1, 8) for s in (False, True)}  # there are 20 items
    assert {(r["candidates"], r["prefix_cached"]) for r in rows} == cases
    for row in rows:
        if row["engine"] == "packed":
            assert (row["measured_speedup"], row["token_layer_speedup"]) == (1, 1)
        if row["engine"] == "fixed_depth_1":
            assert row["token_layer_speedup"] == pytest.approx(3)
    early = {
        (r["candidates"], r["prefix_cached"]) for r in rows if r["engine"] == "early_exit"
    }
    assert early == cases


@pytest.mark.slow
def test_benchmark_times_lists(
    fitted: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one of eight, prefix cached and not: a list has an overlap, and costs no more than full depth."""
    monkeypatch.setattr("project.benchmark.configurations.LISTED", 1)
    monkeypatch.setattr("project.trainer.SIZES", (8,))
    run("benchmark", *given(fitted), "--only", "engine", "--seconds", "0.1")
    rows = read_result(fitted / "results" / "benchmark.json")["rows"]
    lists = [row for row in rows if row["engine"] == "top_k"]
    assert [(row["policy"], row["prefix_cached"]) for row in lists] == [
        ("best 1", False),
        ("best 1", True),
    ]
    for row in lists:
        assert 0 <= row["overlap"] <= 1
        assert row["auc"] is None
        assert row["token_layer_speedup"] >= 1
