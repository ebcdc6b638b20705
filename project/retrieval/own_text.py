"""Text similarity: what the user answered about earlier items whose text is like the candidate's.

Item text is every column of the items table. Its vector is TF-IDF over words and character n-grams (Salton and Buckley
1988). With w_j = cosine(candidate, j)^2 over the user's strictly earlier rows j, answers a_j and their mean m, the
feature is

    text = sum_j w_j (a_j - m) / (sum_j w_j + 1/2)      text_weight = sum_j w_j

It knows items that nobody has rated yet, which no count and no graph does.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.data.protocol import SPLITS, SplitInteractions
from project.retrieval.walk import WalkRows, cached_folder, questions_by_user, tables_by_split

SHRINK = 0.5  # so many squared similarities of nothing are added
TOGETHER = 2**22  # entries of a block of similarities, which bounds the memory that long histories take


def text_tables(split: SplitInteractions, cache_dir: Path) -> dict[str, pl.DataFrame]:
    """row_id, text and text_weight of every row with split <= S, for every split S; cached.

    Args:
        split: the log under its protocol.
        cache_dir: folder the tables are kept in, under a hash of everything they depend on.
    """
    folder = text_folder(split, cache_dir)
    return {name: pl.read_parquet(folder / f"{name}.parquet", glob=False) for name in SPLITS}


def text_folder(split: SplitInteractions, cache_dir: Path) -> Path:
    """Folder with train, valid and test.parquet; made where the cache does not have it."""
    content = {"files": split.interactions.files, "protocol": split.hash, "shrink": SHRINK}
    return cached_folder(cache_dir / "text", content, partial(_write, split))


def _write(split: SplitInteractions, folder: Path) -> None:
    vectors = item_vectors(split.interactions.items, split.interactions.items)

    def make(readable: pl.DataFrame, name: str) -> pl.DataFrame:
        return text_similarity(WalkRows.from_log(readable), vectors)

    for name, table in tables_by_split(split, make):
        table.write_parquet(folder / f"{name}.parquet")


def item_vectors(items: pl.DataFrame, known: pl.DataFrame) -> Any:
    """TF-IDF vectors of length 1, a sparse matrix (items + 1, terms); the last row, all 0, is any other item.

    Args:
        items: an items table, whose texts become vectors.
        known: the log's items table, whose texts decide which terms there are and what each is worth.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union
    from sklearn.preprocessing import normalize

    terms = make_union(
        TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+"),
        TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5)),
    )
    terms.fit(_texts(known))
    found = normalize(terms.transform(_texts(items)))
    found.resize(items.height + 1, found.shape[1])
    return found


def _texts(items: pl.DataFrame) -> list[str]:
    columns = items.select(pl.exclude("item", "item_id")).fill_null("")
    # a word of their own makes texts without any letter no special case
    return columns.select(pl.concat_str(pl.lit("item"), pl.all(), separator=" ")).to_series().to_list()


def text_similarity(rows: WalkRows, vectors: Any) -> pl.DataFrame:
    """The feature of every asking row.

    Args:
        rows: the rows, in time order; `item` is a row of `vectors`.
        vectors: of `item_vectors`.

    Returns:
        row_id, text Float32 (null without an earlier row), text_weight Float32, in the order of `rows`.
    """
    text, weight = np.full(rows.row_id.size, np.nan), np.zeros(rows.row_id.size)
    for every, own, all_earlier in questions_by_user(rows):
        answers = rows.label[own].astype(np.float64)
        sums, step = np.cumsum(np.append(0.0, answers)), max(1, TOGETHER // max(own.size, 1))
        for part in (slice(start, start + step) for start in range(0, every.size, step)):
            asks, earlier = every[part], all_earlier[part]
            past = own[: int(earlier.max())]
            similarity = (vectors[rows.item[asks]] @ vectors[rows.item[past]].T).toarray() ** 2
            similarity[np.arange(past.size) >= earlier[:, None]] = 0.0
            weight[asks] = similarity.sum(axis=1)
            mean = sums[earlier] / np.maximum(earlier, 1)
            found = (similarity @ answers[: past.size] - mean * weight[asks]) / (weight[asks] + SHRINK)
            text[asks[earlier > 0]] = found[earlier > 0]
    return pl.DataFrame(
        {
            "row_id": rows.row_id[rows.query],
            "text": pl.Series(text[rows.query], dtype=pl.Float32, nan_to_null=True),
            "text_weight": pl.Series(weight[rows.query], dtype=pl.Float32),
        }
    )
