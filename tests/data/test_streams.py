"""What history and candidates tell of their evidence, in training, evaluation and requests.

Unusual here: prompts are characters and evidence is one character ("|7:" told, "|?:" not), so what a target reads under
any setting is what it reads under `both` with some of these characters changed, and nothing else may differ.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from world import Letters, no_evidence, read_split, text_of

from project.data.packing import pack
from project.data.prompts import Prompt, PromptEncoder, Told
from project.data.requests import Request, Requests, request_streams
from project.data.splits import Protocol, SplitInteractions
from project.data.streams import Streams, build_streams
from project.data.windows import Window

PLACES: list[Told] = ["history", "candidates", "none"]


@pytest.fixture(scope="module")
def split(tiny_logs: Path) -> SplitInteractions:
    """The tiny log; many rows share a timestamp."""
    return read_split(tiny_logs, Protocol(minimum_history=1))


def known(rows: pl.DataFrame) -> pl.DataFrame:
    """Evidence that says 7 of ten of every row, and a list of similar users' titles after every fifth time group."""
    last = rows.sort("user", "row_id").unique(["user", "timestamp"], keep="last", maintain_order=True)[
        "row_id"
    ]
    lists = [[0, 1] if r in set(last.to_list()[::5]) else None for r in rows["row_id"].to_list()]
    evidence = no_evidence(rows).with_columns(item_rate=pl.lit(0.7, pl.Float32))
    return evidence.with_columns(similar_after=pl.Series(lists, dtype=pl.List(pl.Int64)))


def encoder_of(split: SplitInteractions, told: Told, similar: str | None = None) -> PromptEncoder:
    prompt = Prompt(instruction="I\n", segment="{title}|{item_rate}:", similar=similar, evidence=told)
    return PromptEncoder(Letters(), prompt, split.interactions.items)


def streams_of_split(split: SplitInteractions, name: str, told: Told, similar: str | None = None) -> Streams:
    rows = split.rows.filter(pl.col("split").to_physical() <= ("train", "valid", "test").index(name))
    return build_streams(rows, known(rows), name, encoder_of(split, told, similar))


def read(streams: Streams, windows: list[tuple[int, Window]]) -> dict[int, tuple[str, str, list[int], int]]:
    """By row: the stream that a target reads, its own segment up to the slot, positions, and the stream's tokens."""
    found: dict[int, tuple[str, str, list[int], int]] = {}
    for window in windows:
        batch = pack(streams, [window])
        mask, layout = batch.layout.dense_mask()[0], batch.layout
        for i, slot in enumerate(batch.slots.tolist()):
            own = layout.segment[0] == layout.segment[0, slot]
            texts = [text_of(batch.tokens[0, mask[slot] & part].numpy()) for part in (~own, own)]
            row = int(batch.row_id[i])
            assert row not in found  # every target once
            positions = layout.position[0, mask[slot]].tolist()
            found[row] = texts[0], texts[1], positions, int(batch.stream_tokens[i])
    return found


def changed(
    both: dict[int, tuple[str, str, list[int], int]], told: Told
) -> dict[int, tuple[str, str, list[int], int]]:
    """What must be read where evidence is told at other places."""

    def hide(text: str, hidden: bool) -> str:
        return text.replace("|7:", "|?:") if hidden else text

    return {
        row: (hide(stream, told != "history"), hide(own, told != "candidates"), *rest)
        for row, (stream, own, *rest) in both.items()
    }


@pytest.mark.parametrize("similar", [None, "S {titles}\n"], ids=["", "lists"])
@pytest.mark.parametrize("told", PLACES)
@pytest.mark.parametrize("name", ["train", "test"])
def test_evaluation(split: SplitInteractions, name: str, told: Told, similar: str | None) -> None:
    """Every target reads what it reads under `both`, at the same positions, but for the evidence that is not told."""
    both, other = (streams_of_split(split, name, t, similar) for t in ("both", told))
    expected = read(both, both.evaluation(200))
    assert "|7:" in "".join(stream + own for stream, own, *_ in expected.values())
    assert max(tokens for *_, tokens in expected.values()) > 150  # windows fill up and drop their oldest half
    assert read(other, other.evaluation(200)) == changed(expected, told)


@pytest.mark.parametrize("told", PLACES)
def test_training(split: SplitInteractions, told: Told) -> None:
    """An epoch has the windows that it has under `both`: every target once, with the same history."""
    both, other = (streams_of_split(split, "train", t) for t in ("both", told))
    windows = [s.training(200, np.random.default_rng(3)) for s in (both, other)]
    assert len(windows[0]) == len(windows[1]) > 30
    assert read(other, windows[1]) == changed(read(both, windows[0]), told)


@pytest.mark.parametrize("told", ["both", *PLACES])
def test_requests(split: SplitInteractions, told: Told) -> None:
    """A request at a test row's own time reads what the row reads in `test`: history and candidate as told there."""
    streams = streams_of_split(split, "test", told)
    expected = read(streams, streams.evaluation(200))
    users, items = (
        dict(t.select(c, f"{c}_id").iter_rows())
        for t, c in ((split.interactions.users, "user"), (split.interactions.items, "item"))
    )
    targets = split.rows.filter(pl.col("row_id").is_in(list(expected)))
    asked = [
        Request(f"r{r['row_id']}", users[r["user"]], (), r["timestamp"], (items[r["item"]],))
        for r in targets.iter_rows(named=True)
    ]
    codes = {name: code for code, name in items.items()}
    evidence = known(split.rows).drop("similar_after")
    found = request_streams(
        Requests(asked, split.interactions.items, codes),
        split,
        evidence,
        encoder_of(split, told),
        lambda rows: known(rows).drop("similar_after"),
    )
    by_request = read(found, found.evaluation(200))
    assert [by_request[i] for i in range(len(asked))] == [expected[r] for r in targets["row_id"].to_list()]


def test_targets_are_read_twice_only_where_it_matters(split: SplitInteractions) -> None:
    """`none` needs no second segment; `history` has one for each target, without answer and seen by nobody."""
    both, none, history = (streams_of_split(split, "valid", t) for t in ("both", "none", "history"))
    assert len(none.row_id) == len(both.row_id)
    assert len(history.row_id) == len(both.row_id) + both.target.sum()
    assert not (history.target & history.context).any()
    lengths = history.tokens.lengths[:-1]
    assert (lengths[history.target] == history.slots[history.target] + 1).all()
