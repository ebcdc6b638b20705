"""Files, logs and a random backbone for tests of the data's way."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from project.data.logs import RAW_SCHEMA, RawLogs

Row = tuple[str, str, float, float]
MakeLogs = Callable[..., RawLogs]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a text file into the test's folder; returns its path."""

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def make_logs() -> MakeLogs:
    """RawLogs from (user_id, item_id, timestamp, rating) rows; labels and splits may be given as columns."""

    def make(
        rows: list[Row], labels: list[int] | None = None, splits: list[str] | None = None
    ) -> RawLogs:
        users, items, times, ratings = (list(column) for column in zip(*rows, strict=True))
        number = len(rows)
        interactions = pl.DataFrame(
            {
                "user_id": users,
                "item_id": items,
                "timestamp": times,
                "rating": ratings if labels is None else [None] * number,
                "label": labels or [None] * number,
                "split": splits or [None] * number,
                "source_file": ["log.csv"] * number,
                "source_row": range(1, number + 1),
            },
            schema=RAW_SCHEMA,
        )
        catalogue = sorted(set(items))
        table = pl.DataFrame(
            {"item_id": catalogue, "title": [f"Title {item}" for item in catalogue]}
        )
        return RawLogs(interactions, table, {"log.csv": "aa", "items.csv": "bb"})

    return make
