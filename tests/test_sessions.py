"""Sessions: rows of one never read each other's answers, nor another user's answer before it is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import polars as pl
import polars.selectors as cs
import pytest
import yaml
from example_logs import CoLikes
from world import (
    Letters,
    given,
    no_retrieved,
    result,
    tiny_settings,
    whole_prompts,
)

from project.api import open_run
from project.data.logs import OWN_SCORE, TableLogs
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import (
    SPLITS,
    Interactions,
    Protocol,
    SplitInteractions,
    _with_roles,
    apply_protocol,
    build_interactions,
    known_at,
    until_known,
)
from project.data.requests import Requests, catalogue_requests, request_streams
from project.data.stream import build_streams
from project.errors import ConfigError, DataError
from project.features import RATE
from project.metrics import auc, session_metrics
from project.request import RankRequest
from project.retrieval import MatrixFactorisation, RetrievedFeatures
from project.retrieval.rates import ContextRates
from project.serve.ranker import Ranker

ITEMS = 12


def session_log(seed: int = 0, users: int = 60, sessions: int = 4) -> pl.DataFrame:
    """Sessions of five rows, some minutes apart, that overlap; one coin decides all labels of a session."""
    rng = np.random.default_rng(seed)
    number = users * sessions
    session = np.repeat(np.arange(number), 5)
    start = rng.integers(0, 20 * number, number)
    return pl.DataFrame(
        {
            "user_id": session % users,
            "item_id": rng.integers(0, ITEMS, session.size),
            "timestamp": 1_700_000_000 + start[session] + rng.integers(0, 60, session.size),
            "label": rng.integers(0, 2, number)[session],
            "session_id": [f"s{k}" if k % 7 else None for k in session],
            "device": np.array(["phone", "pc"])[rng.integers(0, 2, session.size)],
        }
    ).unique(["user_id", "item_id", "timestamp"], maintain_order=True)


def read(log: pl.DataFrame, folder: Path, protocol: Protocol) -> Interactions:
    log.write_csv(folder / "log.csv")
    titles = [f"item {k}" for k in range(ITEMS)]
    pl.DataFrame({"item_id": range(ITEMS), "title": titles}).write_csv(folder / "items.csv")
    files = [str(folder / f"{name}.csv") for name in ("log", "items")]
    return build_interactions(TableLogs(*files, context=["device"]).read(), protocol)


def split_of(
    log: pl.DataFrame, folder: Path, kind: str = "global_time", delay: float = 0
) -> SplitInteractions:
    protocol = Protocol(kind, [0.6, 0.2, 0.2], answer_delay=delay)  # type: ignore[arg-type]
    return apply_protocol(read(log, folder, protocol), protocol)


def features_of(split: SplitInteractions, cache: Path) -> RetrievedFeatures:
    retriever = CoLikes(neighbours=4, item_neighbours=3)
    return RetrievedFeatures(split, retriever, 12, cache, MatrixFactorisation(dim=2))


def encoder_of(split: SplitInteractions) -> PromptEncoder:
    wording = Prompt(instruction="I", segment="{title} {user_percent} {item_percent}:")
    return PromptEncoder(Letters(), wording, split.interactions.items)


def flipped(split: SplitInteractions, where: pl.Expr) -> SplitInteractions:
    """The log with other answers in these rows."""
    label = pl.when(where).then(1 - pl.col("label")).otherwise("label").cast(pl.Int8)
    rows = split.rows.with_columns(label=label)
    return replace(split, rows=rows, hash=str(hash(tuple(rows["label"]))))


def test_sessions_by_hand(tmp_path: Path) -> None:
    """Sessions a and b of user 0 overlap, so both are asked at 10; user 1's a is another; others are rows alone."""
    columns = {
        "user_id": [0, 0, 0, 0, 0, 0, 1, 1],
        "session_id": ["a", "b", "a", "b", "c", None, "a", None],
        "timestamp": [10, 20, 30, 40, 50, 51, 35, 36],
        "item_id": range(8),
        "label": [0, 1] * 4,
        "device": ["pc"] * 8,
    }
    rows = read(pl.DataFrame(columns), tmp_path, Protocol()).rows.sort("item")
    assert rows["known_at"].to_list() == columns["timestamp"]
    assert rows["timestamp"].to_list() == [10, 10, 10, 10, 50, 51, 35, 36]
    session = rows["session"].to_list()
    assert session[0] == session[2] != session[1] == session[3]
    assert len(set(session)) == 6


@pytest.mark.parametrize("seed", range(3))
def test_what_stands_earlier_in_a_history_was_known(seed: int, tmp_path: Path) -> None:
    """Of one user a row that was asked earlier was known before: prompts go by the time of asking alone."""
    rows = split_of(session_log(seed), tmp_path).rows
    assert (rows["known_at"] > rows["timestamp"]).any()
    for _, own in rows.group_by("user"):
        asked, known = own["timestamp"].to_numpy(), own["known_at"].to_numpy()
        earlier = asked[:, None] < asked
        assert (known[:, None] < np.broadcast_to(asked, earlier.shape))[earlier].all()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 150])
@pytest.mark.parametrize("kind", ["global_time", "random", "leave_last"])
def test_no_row_reads_what_was_not_known(kind: str, delay: int, tmp_path: Path) -> None:
    """Flipping an answer changes no feature and no prompt of rows asked until it was known, its session's included."""
    split = split_of(session_log(users=20), tmp_path, kind, delay)
    encoder = encoder_of(split)

    def everything(split: SplitInteractions) -> list[pl.DataFrame]:
        tables = features_of(split, tmp_path / split.hash).tables()
        rates = ContextRates(split)
        rates.base = 0.5  # of all train rows, also of later ones
        found = [rates.of_log(split.rows).hstack(split.rows.select("row_id"))]
        for name in SPLITS:
            streams = build_streams(split.rows, tables[name], name, encoder)
            texts = whole_prompts(streams)
            prompts = pl.DataFrame({"row_id": [*texts], "prompt": [*texts.values()]})
            table = tables[name].select(~cs.starts_with(RATE))
            found.append(table.join(prompts, on="row_id", maintain_order="left"))
        return found

    before = everything(split)
    changed = 0
    cuts = features_of(split, tmp_path).cuts
    late = split.rows.filter(pl.col("known_at") > pl.col("timestamp"))
    blocks = [np.searchsorted(cuts, late[c], "right") for c in ("timestamp", "known_at")]
    between = np.flatnonzero(blocks[0] < blocks[1])  # a block begins before it is known
    for row in late[[*between[:2], 5, 25]].iter_rows(named=True):
        known = row["known_at"]
        early = split.rows.filter(pl.col("timestamp") <= known)["row_id"].implode()
        other = flipped(split, pl.col("row_id") == row["row_id"])
        for old, new in zip(before, everything(other), strict=True):
            until = pl.col("row_id").is_in(early)
            assert new.filter(until).equals(old.filter(until))
            changed += not new.equals(old)
    assert changed


def test_a_delay_by_hand(tmp_path: Path) -> None:
    """Answers come 20 seconds after their rows; a row asked before all earlier ones are known stands at their time."""
    seconds = [0, 10, 15, 36, 60]
    log = pl.DataFrame({"user_id": 0, "item_id": range(5), "timestamp": seconds})
    log = log.with_columns(label=pl.col("item_id") % 2, device=pl.lit("pc"))
    protocol = Protocol("given", answer_delay=20, minimum_history=2)
    log = log.with_columns(split=pl.Series(["train", "train", "train", "valid", "test"]))
    raw = read(log, tmp_path, protocol)
    rows = _with_roles(raw.rows, protocol)
    assert rows["known_at"].to_list() == [20, 30, 35, 56, 80]
    assert rows["hist"].to_list() == [0, 0, 0, 3, 4]
    assert rows["role"].to_list() == ["context"] * 3 + ["target"] * 2
    together = until_known(rows)
    assert together["timestamp"].to_list() == [0, 0, 0, 36, 60]
    assert together["known_at"].to_list() == [35, 35, 35, 56, 80]
    assert protocol.name == "given-h2-delay20"
    with pytest.raises(ConfigError, match=r"no column timestamp.*answer_delay 20"):
        read(log.drop("timestamp"), tmp_path, protocol)


@pytest.mark.slow
def test_a_memoriser_learns_nothing_of_a_session(tmp_path: Path) -> None:
    """The user's own share of likes tells the label where rows of a session read each other, and else nothing."""
    log = session_log(users=600, sessions=2).drop_nulls("session_id")
    for rows, low, high in ((log, 0.45, 0.55), (log.drop("session_id"), 0.75, 1.0)):
        split = split_of(rows, tmp_path)
        rate = features_of(split, tmp_path / split.hash).tables()["test"]["user_rate"]
        value = auc(rate.fill_null(0.5), split.rows["label"])
        assert value is not None
        assert low <= value <= high


@pytest.mark.parametrize("delay", [0, 150])
def test_the_index_and_requests_read_what_is_known(delay: int, tmp_path: Path) -> None:
    """After the log the index is the walk; inside a session a request reads its rows until then, and no later one."""
    split = split_of(session_log(users=20), tmp_path, delay=delay)
    features = features_of(split, tmp_path / "cache")
    index = features.index()
    end = float(known_at(split.rows).max())
    assert index.latest == end
    asked = pl.DataFrame({"item": range(5)}).with_columns(
        user=3, timestamp=end + 1, label=-1, rating=np.nan, candidate=True
    )
    walked = features.of_requests(asked)
    now = index.retrieved(3, range(5)).table()
    columns = [name for name in now.columns if name != "row_id"]
    assert now.select(columns).equals(walked.select(columns))
    # a request inside a session
    own = split.rows.filter(pl.col("timestamp") < pl.col("known_at")).row(-1, named=True)
    time = own["known_at"]
    asked = asked.with_columns(user=own["user"], timestamp=time)
    later = flipped(split, pl.col("known_at") >= time)
    other = features_of(later, tmp_path / "cache")
    assert other.of_requests(asked).equals(features.of_requests(asked))
    user = split.interactions.users["user_id"][own["user"]]
    request = RankRequest(user, None, ("1",), time=time, request_id="r")
    items = split.interactions.items
    streams = request_streams(
        Requests([request], items),
        split,
        features.tables()["test"],
        encoder_of(split),
        lambda rows: features.tables()["test"].head(rows.height),
    )
    if not delay:
        readable = pl.col("user") == own["user"], pl.col("known_at") < time
        expected = split.rows.filter(readable)["row_id"].to_list()
        assert streams.row_id[:-1].tolist() == expected


def test_a_request_at_the_time_of_a_row_shows_what_the_row_shows(tmp_path: Path) -> None:
    """Of a log with sessions and a delay; requests of a catalogue bring what was known, and no server is started."""
    split = split_of(session_log(users=20), tmp_path, delay=150)
    encoder = PromptEncoder(Letters(), Prompt("I", "{title}:"), split.interactions.items)
    expected = whole_prompts(
        build_streams(split.rows, no_retrieved(split.rows), "test", encoder)
    )
    assert max(text.count("yes") for text in expected.values()) > 3
    asked = catalogue_requests(split, "test", 10**6, 1, 0)
    features = no_retrieved(split.rows)
    streams = request_streams(asked.requests, split, features, encoder, no_retrieved)
    found = whole_prompts(streams)
    assert [*found.values()] == [expected[row] for row in asked.table["row_id"]]
    drawn = catalogue_requests(split, "test", 20, 3, 0, history=3).requests.requests
    assert drawn
    for request in drawn:
        row = split.rows.row(int(request.request_id.rpartition("/")[2]), named=True)
        own = pl.col("user") == row["user"], pl.col("known_at") < row["timestamp"]
        times = [brought.time for brought in request.history or ()]
        assert times == split.rows.filter(own)["timestamp"].tail(3).to_list()
    with pytest.raises(ConfigError, match=r"answer_delay is 150, but a server"):
        Ranker(tmp_path, Mock(data=Mock(split=split)), 0, 0.0)


@pytest.mark.slow
def test_a_fit_of_sessions_and_own_scores(
    run: Callable[..., None],
    tiny_logs: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Of each log alone, fit, test and report; the result's numbers are those of its score table and the log."""
    log = pl.read_csv(tiny_logs / "interactions.csv")
    log.with_columns(
        session_id=pl.format("{} {}", "user_id", pl.col("timestamp") // 20)
    ).write_csv(tmp_path / "session_id.csv")
    noise = np.random.default_rng(0).normal(size=log.height)
    log.with_columns(own=pl.col("rating") + noise).write_csv(tmp_path / "own.csv")
    for name, column in (("session_id", "by session"), ("own", "minus own")):
        config = tiny_settings(tiny_logs, tiny_model, tmp_path, name=name)
        logs = config["data"]["logs"]["init_args"]
        logs["interactions"] = str(tmp_path / f"{name}.csv")
        logs["own_scores"] = "own" if name == "own" else None
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        run("fit", "--config", tmp_path / "config.yaml")
        folder = tmp_path / name / "version_0"
        run("test", *given(folder))
        run("report", folder)
        assert column in (folder / "report" / "report.md").read_text()
        found = result(folder, "test")
        scores = pl.read_parquet(folder / "scores" / "test.parquet")
        rows = open_run(folder).data.split.rows[scores["row_id"].to_list()]
        deepest, label = scores["logit_3"], rows["label"]
        if name == "session_id":
            expected = session_metrics(deepest, label, rows["session"])
            assert expected["sessions"]
            assert found["sessions"]["exit 3"] == pytest.approx(expected)
        else:
            values = [auc(score, label) or 0 for score in (deepest, rows[OWN_SCORE])]
            difference = found["own_differences"]["exit 3"]["value"]
            assert difference == pytest.approx(values[0] - values[1])


def test_sessions_need_times(tmp_path: Path) -> None:
    log = session_log().drop("timestamp").unique(["user_id", "item_id"])
    with pytest.raises(DataError, match="session_id and no timestamp"):
        split_of(log, tmp_path, "random")
