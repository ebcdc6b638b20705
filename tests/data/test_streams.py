"""A request reads what a row of the log reads at the same time.

Prompts are characters, so what a target reads can be compared as text.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
from world import Letters, no_retrieved, read_split, text_of

from project.data.batch import pack
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import Protocol
from project.data.requests import Request, Requests, request_streams
from project.data.stream import Streams, build_streams


def known(rows: pl.DataFrame) -> pl.DataFrame:
    """Retrieved features that says 70 percent of every row."""
    return no_retrieved(rows).with_columns(item_rate=pl.lit(0.7, pl.Float32))


def read(streams: Streams) -> dict[int, tuple[str, str, list[int], int]]:
    """By row: the stream that a target reads, its own segment up to the slot, positions, and the stream's tokens."""
    found: dict[int, tuple[str, str, list[int], int]] = {}
    for window in streams.evaluation(200):
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


def test_requests(tiny_logs: Path) -> None:
    """A request at a test row's own time reads what the row reads in `test`; many rows share a timestamp."""
    split = read_split(tiny_logs, Protocol(minimum_history=1))
    prompt = Prompt(instruction="I\n", segment="{title}|{item_percent}:")
    encoder = PromptEncoder(Letters(), prompt, split.interactions.items)
    expected = read(build_streams(split.rows, known(split.rows), "test", encoder))
    assert max(tokens for *_, tokens in expected.values()) > 150  # windows fill up and drop their oldest half
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
    requests = Requests(asked, split.interactions.items, codes)
    by_request = read(request_streams(requests, split, known(split.rows), encoder, known))
    assert [by_request[i] for i in range(len(asked))] == [expected[r] for r in targets["row_id"].to_list()]
