"""Streams are cut into windows; lists of what similar users liked are segments of theirs, served as logged.

What a prompt should be is put together from the log and the retrieved features table by plain loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from world import Letters, dense_mask, no_retrieved, read_split, text_of

from project.data.batch import Batch, pack
from project.data.logs import TableLogs
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import SPLITS, Protocol, SplitInteractions
from project.data.requests import Requests, request_streams
from project.data.stream import (
    Streams,
    Window,
    build_streams,
    context_starts,
    evaluation_windows,
    time_groups,
    training_windows,
)
from project.datamodule import InteractionData
from project.errors import ConfigError
from project.request import HistoryRow, RankRequest
from project.retrieval import ItemKNN, LightGCN, RetrievedFeatures, Retriever
from research.packing import prompts_of

KINDS = ("global_time", "user_time", "random", "leave_last")
REFITS = 5
PROMPT = Prompt(instruction="I\n", segment="{title} {vote_percent}:", similar="[{titles}]")
RETRIEVER = LightGCN(dim=8, epochs=1, similar_every=3)


def random_stream(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    time = np.sort(rng.integers(0, rng.integers(1, 40), n)).astype(float)
    return rng.integers(5, 40, n), time, rng.random(n) < 0.5, int(rng.integers(50, 400))


def test_oldest_half_is_dropped() -> None:
    """Capacity 30, segments of 10: the 4th makes 40 > 30, so at most 15 are kept (one segment); golden."""
    lengths, groups = np.full(6, 10), np.arange(7)
    #            before row 0  1  2  3  4  5  and after all
    assert context_starts(lengths, groups, 30).tolist() == [0, 0, 0, 0, 3, 3, 3]


def test_context_depends_on_earlier_rows_only() -> None:
    """Where a group's context starts does not change with the rows that come after it: serving equals evaluation."""
    for seed in range(100):
        lengths, time, _, capacity = random_stream(seed)
        groups = time_groups(time)
        whole = context_starts(lengths, groups, capacity)
        for j in range(len(groups)):
            n = groups[j]
            part = context_starts(
                lengths[:n], time_groups(time[:n]) if n else np.array([0]), capacity
            )
            assert part[-1] == whole[j]


def test_every_target_is_scored_once_with_its_context() -> None:
    """Each target is in one window, which holds exactly the strictly earlier rows that the rule keeps for it."""
    for seed in range(300):
        lengths, time, target, capacity = random_stream(seed)
        groups = time_groups(time)
        starts = context_starts(lengths, groups, capacity)
        group_of = np.searchsorted(groups, np.arange(len(time)), side="right") - 1
        scored = np.zeros(len(time), dtype=int)
        for w in evaluation_windows(
            lengths, groups, target, capacity, np.ones_like(target)
        ):
            assert lengths[w.positions].sum() <= max(
                1.25 * capacity, capacity + lengths.max()
            )
            for p in range(w.first, w.last):
                scored[p] += 1
                if target[p]:
                    seen = [q for q in w.positions if time[q] < time[p]]
                    assert seen == list(range(starts[group_of[p]], groups[group_of[p]]))
        assert (scored[target] == 1).all()
        assert scored.max(initial=0) <= 1


def test_later_rows_have_half_a_window() -> None:
    """After the first window no target has less than half a window of context, one segment more or less."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 30, 400)
    starts = context_starts(lengths, np.arange(401), 300)
    context = np.array([lengths[s:j].sum() for j, s in enumerate(starts)])
    first = int(np.argmax(starts > 0))
    assert context[first:].min() > 150 - 30
    assert context.max() <= 300


def test_many_rows_of_one_second() -> None:
    """Capacity 100, ten rows of 20 with one timestamp and no past: 125 has room for 6, so two windows score 6 and 4."""
    lengths, groups = np.full(10, 20), np.array([0, 10])
    windows = list(
        evaluation_windows(lengths, groups, np.ones(10, bool), 100, np.ones(10, bool))
    )
    assert [(w.start, w.stop, w.first, w.last) for w in windows] == [
        (0, 0, 0, 6),
        (0, 0, 6, 10),
    ]


@pytest.mark.parametrize("first_cut", [1, 17, 60])
def test_training_windows_tile_the_stream(first_cut: int) -> None:
    for seed in range(50):
        lengths, *_ = random_stream(seed)
        windows = training_windows(lengths, 60, first_cut)
        assert [w[0] for w in windows] == [0, *(w[1] for w in windows[:-1])]
        assert windows[-1][1] == len(lengths)
        assert all(lengths[a:b].sum() <= 60 or b - a == 1 for a, b in windows)


# Lists of what similar users liked


@dataclass
class World:
    """A split with its retrieved features, and the two ways to read it."""

    split: SplitInteractions
    retrieved: dict[str, pl.DataFrame]
    encoder: PromptEncoder
    cache: Path

    def streams(self, name: str = "test") -> Streams:
        rows = self.split.rows.filter(pl.col("split").to_physical() <= SPLITS.index(name))
        return build_streams(rows, self.retrieved[name], name, self.encoder)

    def serve(self, asked: list[RankRequest]) -> Streams:
        items = self.split.interactions.items
        requests = Requests(asked, items)

        features = RetrievedFeatures(self.split, RETRIEVER, REFITS, self.cache)
        tables = self.retrieved["test"]
        return request_streams(
            requests, self.split, tables, self.encoder, features.of_requests
        )


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tiny_logs: Path, session_cache: Path) -> World:
    split = read_split(tiny_logs, Protocol(split=request.param, minimum_history=1))
    retrieved = RetrievedFeatures(split, RETRIEVER, REFITS, session_cache).tables()
    return World(
        split,
        retrieved,
        PromptEncoder(Letters(), PROMPT, split.interactions.items),
        session_cache,
    )


def test_rows_that_become_tokens_in_parts_are_one_stream(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = world.streams()
    monkeypatch.setattr("project.data.stream.TOGETHER", 7)
    np.testing.assert_equal(asdict(world.streams()), asdict(whole))


def all_texts(streams: Streams, context_tokens: int) -> dict[int, str]:
    found: dict[int, str] = {}
    for s, w in streams.evaluation(context_tokens):
        ids = streams.row_id[streams.offsets[s] + w.first : streams.offsets[s] + w.last]
        scored = streams.target[streams.offsets[s] + w.first : streams.offsets[s] + w.last]
        texts = map(text_of, prompts_of(streams, s, w))
        found |= dict(zip(ids[scored].tolist(), texts, strict=True))
    return found


def seen(batch: Batch) -> dict[int, str]:
    """What each answer slot of a batch can read, by the written-out rule."""
    mask, tokens = dense_mask(batch.layout)[0], batch.tokens[0]
    pairs = zip(batch.row_id.tolist(), batch.slots.tolist(), strict=True)
    return {row: text_of(tokens[mask[slot]].numpy()) for row, slot in pairs}


def expected_texts(
    split: SplitInteractions, table: pl.DataFrame, name: str
) -> dict[int, str]:
    """Instruction, earlier rows with answers, after each second its list, and the row without its answer."""
    titles = split.interactions.items["title"].to_list()
    rows = split.rows.filter(pl.col("split").to_physical() <= SPLITS.index(name)).join(
        table, on="row_id"
    )
    found = {}
    for user in rows.sort("row_id").partition_by("user", maintain_order=True):
        text = "I\n"
        for second in user.partition_by("timestamp", maintain_order=True):
            past = ""
            for row in second.iter_rows(named=True):
                question = plain(titles, row)
                past += question + (" yes" if row["label"] else " no")
                if (row["split"], row["role"]) == (name, "target"):
                    found[row["row_id"]] = text + question
            for items in second["similar_after"].drop_nulls().to_list():
                past += "[" + "; ".join(titles[item] for item in items) + "]"
            text += past
    return found


def plain(titles: list[str], row: dict) -> str:
    vote = "?" if row["vote"] is None else f"{min(int(100 * row['vote'] + 0.5), 99):02d}"
    return f"{titles[row['item']]} {vote}:"


@pytest.mark.parametrize("name", SPLITS)
def test_a_target_reads_the_lists_of_earlier_seconds(world: World, name: str) -> None:
    """Packed, each answer slot reads exactly what the log and the retrieved features say, and stream_tokens counts
    lists too.
    """
    streams = world.streams(name)
    expected = expected_texts(world.split, world.retrieved[name], name)
    batch = pack(streams, streams.evaluation(10**6)[:8])
    texts = seen(batch)
    assert texts == {row: expected[row] for row in texts}
    own, read = (
        dict(zip(batch.row_id.tolist(), tokens.tolist(), strict=True))
        for tokens in (batch.target_tokens, batch.stream_tokens)
    )
    assert read == {row: len(text) - own[row] for row, text in texts.items()}
    assert any("[" in text for text in texts.values())
    assert all_texts(streams, 10**6) == expected


def test_lists_are_context_of_their_own(world: World) -> None:
    """Without its lists a stream is what it is without the template; a list has its own time group, and no row."""
    streams = world.streams()
    retrieved = world.retrieved["test"]
    bare = PromptEncoder(
        Letters(), replace(PROMPT, similar=None), world.split.interactions.items
    )
    without = replace(
        world, retrieved={"test": retrieved.drop("similar_after")}, encoder=bare
    ).streams()
    lists = streams.row_id < 0
    assert lists.sum() == retrieved["similar_after"].drop_nulls().len() > 20
    for name in ("row_id", "timestamp", "label", "target", "context", "slots"):
        assert np.array_equal(getattr(streams, name)[~lists], getattr(without, name))
    rows = np.append(np.flatnonzero(~lists), streams.instructions)
    assert np.array_equal(streams.tokens.take(rows).values, without.tokens.values)
    assert not streams.target[lists].any()
    assert streams.context[lists].all()
    # a list follows a row of its stream, and is earlier than the stream's next row
    stream = np.repeat(np.arange(len(streams)), np.diff(streams.offsets))
    at = np.flatnonzero(lists)
    assert (streams.timestamp[at - 1] < streams.timestamp[at]).all()
    assert (stream[at - 1] == stream[at]).all()
    inside = at[np.append(stream, -1)[at + 1] == stream[at]]
    assert (streams.timestamp[inside] < streams.timestamp[inside + 1]).all()


def test_training_windows_score_rows_alone(world: World) -> None:
    """An epoch scores every train target once and no list, wherever windows are cut, also right before a list."""
    streams = world.streams("train")
    targets = np.sort(streams.row_id[streams.target]).tolist()
    first = set()
    for seed in range(5):
        windows = streams.training(150, np.random.default_rng(seed))
        first |= {int(streams.row_id[streams.offsets[s] + w.first]) for s, w in windows}
        assert sorted(pack(streams, windows).row_id.tolist()) == targets
    assert -1 in first


def test_a_request_reads_what_the_log_row_read(
    world: World, hidden: Callable[..., Any]
) -> None:
    """At a test row's own time its item has the row's prompt, numbers and hidden state, whatever else is asked."""
    streams = world.streams()
    logged = all_texts(streams, 250)
    rows = world.split.rows.filter(pl.col("row_id").is_in(list(logged))).sort("row_id")
    users, items = (
        t.to_series(1)
        for t in (world.split.interactions.users, world.split.interactions.items)
    )

    def served(others: int) -> Streams:
        """One request a row, of its user, at its own time: for other items, and the row's."""
        pairs = zip(rows["user"], rows["item"], rows["timestamp"], strict=True)
        return world.serve(
            [
                RankRequest(
                    users[user],
                    None,
                    (items[(item + 7) % len(items)],) * others + (items[item],),
                    time=time,
                    request_id=f"r{k}",
                )
                for k, (user, item, time) in enumerate(pairs)
            ]
        )

    both = served(2)
    texts, ids = all_texts(both, 250), rows["row_id"].to_list()
    assert [texts[3 * k + 2] for k in range(len(ids))] == [logged[row] for row in ids]
    assert all_texts(served(0), 250) == {k: logged[row] for k, row in enumerate(ids)}
    assert sum("[" in text for text in texts.values()) > len(ids)
    from_log, batch = (
        pack(streams, streams.evaluation(250)),
        pack(both, both.evaluation(250)),
    )
    expected, found = hidden(from_log), hidden(batch)
    read = [
        dict(zip(b.row_id.tolist(), b.stream_tokens.tolist(), strict=True))
        for b in (from_log, batch)
    ]
    for k, row in enumerate(ids):
        torch.testing.assert_close(found[3 * k + 2], expected[row], atol=1e-4, rtol=0)
        assert read[1][3 * k] == read[1][3 * k + 2] == read[0][row]


def test_a_history_is_served_with_its_lists(world: World) -> None:
    """A history that a request brings gets lists of its own, wherever its rows stand in the request's second."""
    items = world.split.interactions.items["item_id"].to_list()
    end = float(world.split.rows["timestamp"].max())  # type: ignore[arg-type]
    history = tuple(HistoryRow(items[k], 1, end + k // 2) for k in range(6))
    streams = world.serve(
        [RankRequest(None, rows, (items[9],)) for rows in (history, history[::-1])]
    )
    first, second = (
        text.replace("]", "[").split("[") for text in all_texts(streams, 10**6).values()
    )
    # rows 3 (the second of end + 1) and 6 (of end + 2) complete three rows, so lists follow
    # four rows and six
    assert [part.count(":") for part in first] == [4, 0, 2, 0, 1]
    assert first[1::2] == second[1::2]
    titles = world.split.interactions.items["title"].to_list()[:6]
    assert not set("; ".join(first[1::2]).split("; ")) & set(titles)


def golden() -> Streams:
    """Two users; lists after the rows 0 and 1, which share a second, and after the last row of user 1."""
    items = pl.DataFrame({"item": [0, 1], "item_id": ["a", "b"], "title": ["A", "{B}"]})
    rows = pl.DataFrame(
        {
            "row_id": [0, 1, 2, 3],
            "user": [0, 0, 0, 1],
            "item": [0, 1, 0, 1],
            "timestamp": [5.0, 5.0, 6.0, 7.0],
            "label": [1, 0, 1, 1],
            "rating": [None] * 4,
            "split": ["train"] * 4,
            "role": ["target"] * 4,
        }
    )
    lists = pl.Series([[1, 0], None, None, [0]], dtype=pl.List(pl.Int32))
    prompt = Prompt(instruction="I", segment="{title}:", similar="<{titles}>")
    retrieved = no_retrieved(rows).with_columns(similar_after=lists)
    return build_streams(rows, retrieved, "train", PromptEncoder(Letters(), prompt, items))


def test_golden() -> None:
    """A list follows its whole second, whichever row of it it is stored with; braces in titles stay as they are."""
    streams = golden()
    texts = [text_of(streams.tokens[k]) for k in range(len(streams.row_id) + 1)]
    assert texts == ["A: yes", "{B}: no", "<{B}; A>", "A: yes", "{B}: yes", "<A>", "I"]
    assert streams.row_id.tolist() == [0, 1, -1, 2, 3, -1]
    assert streams.offsets.tolist() == [0, 4, 6]
    assert seen(pack(streams, [(0, Window(0, 0, 0, 4)), (1, Window(0, 0, 0, 2))])) == {
        0: "IA:", 1: "I{B}:", 2: "IA: yes{B}: no<{B}; A>A:", 3: "I{B}:",
    }  # fmt: skip
    # I is 1, rows 0 and 1 start at 1, the list after both (6 + 7), row 2 after its 8
    # characters
    layout = pack(streams, [(0, Window(0, 0, 0, 4))]).layout
    assert [int(layout.position[layout.segment == k].min()) for k in range(5)] == [
        0,
        1,
        1,
        14,
        22,
    ]


@pytest.mark.parametrize(
    ("retriever", "similar"),
    [(LightGCN(), "{titles}"), (ItemKNN(), "{titles}"), (LightGCN(similar_every=5), None)],
)
def test_wording_and_retriever_must_agree(
    retriever: Retriever, similar: str | None, tiny_logs: Path
) -> None:
    logs = TableLogs(str(tiny_logs / "interactions.csv"), str(tiny_logs / "items.csv"))
    with pytest.raises(
        ConfigError, match=r"data\.prompt\.similar .* similar_every of data\.retriever"
    ):
        InteractionData(logs, retriever, prompt=Prompt(similar=similar))
