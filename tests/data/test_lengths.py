"""What cannot stand in a window: items and streams of the log stop a run, a request is refused alone."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from world import Letters, read_split

from project.data.logs import TableLogs
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import Protocol, SplitInteractions
from project.data.requests import check_items, read_requests, without_long
from project.datamodule import InteractionData
from project.errors import ConfigError, DataError
from project.retrieval import NoRetriever

PROMPT = Prompt(instruction="I\n", segment="{title}:")
AROUND = len("I\n: yes")


@pytest.fixture(scope="module")
def split(tiny_logs: Path) -> SplitInteractions:
    return read_split(tiny_logs, Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2]))


def longest(items: pl.DataFrame) -> tuple[str, int]:
    """Item id and tokens of the longest prompt of one item."""
    item_id, title = max(items.select("item_id", "title").iter_rows(), key=lambda row: len(row[1]))
    return item_id, len(title) + AROUND


def test_items_fit_or_are_named(split: SplitInteractions) -> None:
    """Just enough room is enough; a token less names the item, its tokens, the key and what helps."""
    items = split.interactions.items
    item_id, tokens = longest(items)
    encoder = PromptEncoder(Letters(), PROMPT, items)
    check_items(encoder, items, tokens)
    with pytest.raises(
        ConfigError,
        match=rf"item '{item_id}' alone has {tokens} tokens .* data\.context_tokens is {tokens - 1} "
        r"\(\d+ of 20 items.*{title:\.40}.*data\.context_tokens",
    ):
        check_items(encoder, items, tokens - 1)


def test_a_request_with_a_long_title_is_refused_alone(split: SplitInteractions, tmp_path: Path) -> None:
    """As candidate or in the history; who asks for items that fit is served. Nobody left is an error."""
    new = {"item_id": "new", "title": "x" * 200}
    records = [
        {"request_id": "unknown", "user_id": "u1", "candidates": ["nowhere"]},
        {"request_id": "long", "user_id": "u1", "candidates": ["i1", new]},
        {"request_id": "fits", "user_id": "u1", "candidates": ["i1"]},
        {"request_id": "past", "history": [{**new, "label": 1, "time": 1}], "candidates": ["i1"]},
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    requests = read_requests(str(file), split.interactions)
    encoder = PromptEncoder(Letters(), PROMPT, requests.items)
    found = without_long(requests, encoder, 100)
    assert [r.request_id for r in found.requests] == ["fits"]
    assert [(r.place, r.request_id) for r in found.refused] == [(0, "unknown"), (1, "long"), (3, "past")]
    assert (
        f"request 'long': The prompt of item 'new' alone has {200 + AROUND} tokens" in found.refused[1].error
    )
    assert without_long(requests, encoder, 200 + AROUND) is requests
    file.write_text(json.dumps(records[1]))
    alone = read_requests(str(file), split.interactions)
    with pytest.raises(DataError, match="None of the 1 requests"):
        without_long(alone, encoder, 100)


def test_the_datamodule_asks_before_it_retrieves(
    tiny_logs: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long title stops a run before retrieved features is made; shortened in the template it does not."""
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    items = pl.read_csv(tiny_logs / "items.csv")
    long = pl.when(pl.col("item_id") == "i7").then(pl.lit("sea " * 4500)).otherwise("title")
    items.with_columns(title=long).write_csv(tmp_path / "items.csv")

    def data(segment: str, requests: str | None = None) -> InteractionData:
        logs = TableLogs(str(tiny_logs / "interactions.csv"), str(tmp_path / "items.csv"))
        prompt = Prompt(segment=segment)
        return InteractionData(
            logs,
            NoRetriever(),
            Protocol(label="rating > 3"),
            prompt=prompt,
            tokenizer=str(tiny_model),
            requests=requests,
        )

    stopped = data("{title}:")
    with pytest.raises(ConfigError, match=r"item 'i7' .* data\.context_tokens is 1,024 \(1 of 20 items"):
        stopped.prepare_data()
    assert "retrieved" not in vars(stopped)
    data("{title:.40}:").setup("fit")
    asked = tmp_path / "requests.jsonl"
    asked.write_text('{"request_id": "a", "user_id": "u1", "candidates": ["i1"]}\n')
    predicting = data("{title}:", str(asked))  # nobody asks about the long one
    predicting.prepare_data()
    predicting.setup("predict")
    assert predicting.requests is not None
    assert [r.request_id for r in predicting.requests.requests] == ["a"]
