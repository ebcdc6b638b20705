"""Computes text similarity: the user's answers about earlier items with a text like the candidate's.

Item text is every column of the items table, as TF-IDF over words and character n-grams (Salton and Buckley 1988). With
w_j = cosine(candidate, j)^2 over the user's strictly earlier rows j, answers a_j and their mean m, the feature is

    text = sum_j w_j (a_j - m) / (sum_j w_j + 1/2)      text_weight = sum_j w_j

It is defined for items that nobody has rated yet, too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from project.arrays import F64
from project.retrieval.past import WalkRows, queries_by_user

# added to the sum of squared similarities, so that few similar items give a small feature
SHRINK = 0.5
# entries of a block of similarities, which bounds the memory that long histories take
TOGETHER = 2**22


def item_vectors(items: pl.DataFrame, known: pl.DataFrame) -> Any:
    """Vectors of items' texts by the terms of `known`, `with_any_other`."""
    return with_any_other(text_encoder(known)(term_texts(items)))


def with_any_other(vectors: Any) -> Any:
    """A sparse matrix with one more row, all 0, for any other item."""
    vectors.resize(vectors.shape[0] + 1, vectors.shape[1])
    return vectors


def term_texts(items: pl.DataFrame) -> list[str]:
    """The texts of an items table whose terms are counted.

    Each starts with a word, so that a text without any letter has a term, too.
    """
    columns = items.select(pl.exclude("item", "item_id")).fill_null("")
    return (
        columns.select(pl.concat_str(pl.lit("item"), pl.all(), separator=" "))
        .to_series()
        .to_list()
    )


def text_encoder(known: pl.DataFrame) -> Callable[[list[str]], Any]:
    """A function that gives `term_texts` TF-IDF vectors of length 1, a sparse matrix (texts, terms).

    Texts of `known`, the log's items table, decide which terms there are and what each weighs. It takes 1.7
    microseconds a character.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union
    from sklearn.preprocessing import normalize

    # words say what a text is about, n-grams find forms and spellings of a word
    terms = make_union(
        TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+"),
        TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5)),
    )
    terms.fit(term_texts(known))
    # each of the two parts has length 1; the union is brought to length 1 again
    return lambda texts: normalize(terms.transform(texts))


def text_similarity(rows: WalkRows, vectors: Any) -> pl.DataFrame:
    """row_id, text Float32 (null without an earlier row) and text_weight Float32 of the `query` rows, in their order.

    `item` of the rows is a row of `vectors`.
    """
    text, weight = text_and_weight(rows, vectors)
    return pl.DataFrame(
        {
            "row_id": rows.row_id[rows.query],
            "text": pl.Series(text, dtype=pl.Float32, nan_to_null=True),
            "text_weight": pl.Series(weight, dtype=pl.Float32),
        }
    )


def text_and_weight(rows: WalkRows, vectors: Any) -> tuple[F64, F64]:
    """What `text_similarity` tabulates, (queries,) each; NaN where it has null."""
    text = np.full(rows.row_id.size, np.nan)  # (rows,)
    weight = np.zeros(rows.row_id.size)
    for every, own, all_earlier in queries_by_user(rows):
        answers = rows.label[own].astype(np.float64)  # (own,)
        sums = np.cumsum(np.append(0.0, answers))  # (own + 1,) of the first k answers
        step = max(1, TOGETHER // max(own.size, 1))  # queries of a block
        for start in range(0, every.size, step):
            queries = every[start : start + step]
            earlier = all_earlier[start : start + step]
            # no query of the block reads more
            past = own[: int(earlier.max())]
            # 1. w_j, (queries, past): 0 where the past is not earlier
            cosine = vectors[rows.item[queries]] @ vectors[rows.item[past]].T
            w = np.square(cosine.toarray())
            w[np.arange(past.size) >= earlier[:, None]] = 0
            weight[queries] = w.sum(axis=1)
            # 2. the formula on top of this file: (queries,) the mean label of each query's
            # past
            mean = sums[earlier] / np.maximum(earlier, 1)
            shrunk = (w @ answers[: past.size] - mean * weight[queries]) / (
                weight[queries] + SHRINK
            )
            # without a past the feature is undefined, not 0
            text[queries[earlier > 0]] = shrunk[earlier > 0]
    return text[rows.query], weight[rows.query]
