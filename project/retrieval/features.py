"""The retrieved features table: what similar users, the item's raters and the user's past say about a row, before it.

Columns: row_id; neighbours (row ids of the neighbours' own interactions with the candidate), similarities,
answers (lists, most similar first); vote (mean answer, null without neighbours); neighbour_count; item_rate
and item_count, user_rate and user_count (liked share and number of strictly earlier readable rows; a rate of
nothing is null). Where the retriever's item_neighbours is above 0 also alike, the user's own answers on the earlier
items most like the candidate, averaged by similarity (null without any), and item_similarity_weight, the sum of these
similarities. Where the retriever's similar_every is above 0 also similar_after: item codes that similar users liked,
or null. It alone is dated just *after* the row's second and may tell the row's own answer: it is for the prompts of
later rows (see `SimilarLikes`). text and text_weight are the user's own answers on items of similar text (see
`own_text.py`). Where a factorisation is asked for also factorisation (see `MatrixFactorisation`), null before its
first block.

A row of split S reads rows of splits up to S, so there is a table per split. Where no row has a later split's row in
its past (a split by time), the three coincide and are computed once.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.data.protocol import SPLITS, SplitInteractions
from project.errors import ConfigError, DataError
from project.retrieval.base import IntArray, Retriever
from project.retrieval.controls import NoRetriever
from project.retrieval.factorisation import MatrixFactorisation, mf_of_requests, mf_tables
from project.retrieval.own_text import item_vectors, text_similarity, text_tables
from project.retrieval.walk import (
    BoolArray,
    Snapshots,
    WalkRows,
    block_cuts,
    cached_folder,
    fit_snapshots,
    tables_by_split,
    walk,
)


def retrieved_tables(
    split: SplitInteractions,
    retriever: Retriever,
    refits: int,
    cache_dir: Path,
    mf: MatrixFactorisation | None = None,
) -> dict[str, pl.DataFrame]:
    """Retrieved features of every row with split <= S, for S = train, valid and test; cached.

    Args:
        split: the log under its protocol.
        retriever: who picks neighbours.
        refits: the log is cut into so many shares; the retriever is fitted before each but the first.
        cache_dir: folder the tables and the snapshots are kept in, under a hash of everything they depend on.
        mf: the factorisation of the column factorisation; None leaves it out.

    Returns:
        One table for each of "train", "valid" and "test", in the order of the split's rows.
    """
    folder = retrieved_folder(split, retriever, refits, cache_dir)
    tables = {name: pl.read_parquet(folder / f"{name}.parquet", glob=False) for name in SPLITS}
    added = [text_tables(split, cache_dir)]
    if mf is not None:
        added.append(mf_tables(split, mf, refits, cache_dir))
    for more in added:
        tables = {
            name: table.join(more[name], on="row_id", how="left", maintain_order="left", validate="1:1")
            for name, table in tables.items()
        }
    return tables


def request_retrieved(
    split: SplitInteractions,
    retriever: Retriever,
    refits: int,
    cache_dir: Path,
    user: IntArray,
    item: IntArray,
    timestamp: NDArray[np.float64],
    label: IntArray,
    own: BoolArray,
    mf: MatrixFactorisation | None = None,
    catalogue: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Retrieved features of rows outside the log, read as split "test": from the log and their own user's past.

    A user code with `own` rows has exactly those as its past, also where the log knows that user; a user code
    of the log without `own` rows has the log's. Either way that user's own ratings in the log are not
    neighbours.

    Args:
        split: the log under its protocol.
        retriever: who picks neighbours, with the settings the log's retrieved features was made with.
        refits: as in `retrieved_tables`.
        cache_dir: as in `retrieved_tables`; snapshots are read from here and fitted only where absent.
        user: user codes, shape (rows,); codes the log does not have are unseen users.
        item: item codes, shape (rows,); codes the log does not have are unseen items.
        timestamp: seconds, shape (rows,).
        label: 0, 1, or -1 for unknown, shape (rows,); own rows need a known label.
        own: whether the row is the user's past (else a candidate), shape (rows,).
        mf: as in `retrieved_tables`.
        catalogue: items table that `item` counts in, where requests bring items of their own; None: the log's.

    Returns:
        The retrieved features table in the order given; row_id is -1 - position, also among neighbours.

    Raises:
        DataError: an own row without a label.
    """
    unlabelled = np.flatnonzero(own & (label < 0))
    if unlabelled.size:
        raise DataError(
            f"request row {unlabelled[0]} is history (own) but its label is {label[unlabelled[0]]}: "
            "expected 0 or 1; give every history row its answer, or make it a candidate"
        )
    snapshots = Snapshots.load(retrieved_folder(split, retriever, refits, cache_dir) / "snapshots.npz")
    log = split.rows.filter(pl.col("timestamp") < timestamp.max(initial=-np.inf))
    extra = _request_rows(split, user, item, timestamp, label, own)
    rows = _merged(WalkRows.from_log(log, query=False), extra)
    items = split.interactions.items
    table = walk(rows, retriever, items, snapshots.cuts, snapshots.fitted, "request retrieved features")
    if mf is not None:
        table = table.with_columns(mf_of_requests(rows, split, mf, refits, cache_dir))
    if catalogue is not None:  # an item the log does not have still has a text
        extra = replace(extra, item=np.minimum(item, catalogue.height).astype(np.int64))
        rows = _merged(WalkRows.from_log(log, query=False), extra)
    texts = text_similarity(rows, item_vectors(items if catalogue is None else catalogue, items))
    table = table.join(texts, on="row_id", how="left", maintain_order="left", validate="1:1")
    return table.sort("row_id", descending=True)


def retrieved_warnings(
    split: SplitInteractions, retrieved: Mapping[str, pl.DataFrame], retriever: Retriever, refits: int
) -> list[str]:
    """A line for every split whose targets a retriever was never fitted for, or whose features are all alike.

    Args:
        split: the log under its protocol.
        retrieved: from `retrieved_tables`.
        retriever: who picked neighbours; of NoRetriever no vote is expected.
        refits: as in `retrieved_tables`.
    """
    found, fits = [], type(retriever).fit is not Retriever.fit
    cuts = block_cuts(split.rows["timestamp"].to_numpy(), refits)
    names = ["item_similarity", "mf", "item_rate", "user_rate"]
    names += [] if isinstance(retriever, NoRetriever) else ["vote"]
    for name, table in retrieved.items():
        targets = split.rows.filter((pl.col("role") == "target") & (pl.col("split") == name))
        if targets.height < 2:
            continue
        if fits and not (targets["timestamp"] >= cuts.min(initial=np.inf)).any():
            found.append(
                f"{type(retriever).__name__} was never fitted before the {targets.height} targets of {name}: "
                f"data.refits is {refits} for {split.rows.height} rows. Raise data.refits."
            )
            continue
        read = table.filter(pl.col("row_id").is_in(targets["row_id"].implode()))
        constant = [n for n in names if n in read.columns and read[n].drop_nulls().n_unique() < 2]
        if constant:
            found.append(
                f"retrieved features tell nothing about the {targets.height} targets of {name}: "
                f"{', '.join(constant)} has "
                "one value or none. Check data.protocol.label and how many earlier rows users and items have, raise "
                "data.refits, or leave the retriever out (project.retrieval.NoRetriever, data.mf: null)."
            )
    return found


def retrieved_folder(split: SplitInteractions, retriever: Retriever, refits: int, cache_dir: Path) -> Path:
    """Folder with train, valid and test.parquet and snapshots.npz; made where the cache does not have it.

    Args:
        split: the log under its protocol.
        retriever: who picks neighbours.
        refits: as in `retrieved_tables`.
        cache_dir: as in `retrieved_tables`.

    Raises:
        ConfigError: refits is less than 1.
    """
    if refits < 1:
        raise ConfigError(f"data.refits is {refits}, expected 1 or more: 10 is the default")
    content = {
        "files": split.interactions.files,
        "protocol": split.hash,
        "retriever": retriever.settings(),
        "refits": refits,
    }
    return cached_folder(cache_dir / "retrieved", content, partial(_write, split, retriever, refits))


def _write(split: SplitInteractions, retriever: Retriever, refits: int, folder: Path) -> None:
    """Compute the tables of all splits; keep the snapshots of test, which is what requests read."""
    log = split.interactions
    cuts = block_cuts(split.rows["timestamp"].to_numpy(), refits)  # of the whole log, for every split

    def make(readable: pl.DataFrame, name: str) -> pl.DataFrame:
        snapshots = fit_snapshots(readable, retriever, log.users.height, log.items, cuts)
        if name == SPLITS[-1]:
            snapshots.save(folder / "snapshots.npz")
        rows = WalkRows.from_log(readable)
        return walk(rows, retriever, log.items, cuts, snapshots.fitted, f"retrieved features ({name})")

    for name, table in tables_by_split(split, make, own_second=retriever.similar_every > 0):
        table.write_parquet(folder / f"{name}.parquet")


def _request_rows(
    split: SplitInteractions,
    user: IntArray,
    item: IntArray,
    timestamp: NDArray[np.float64],
    label: IntArray,
    own: BoolArray,
) -> WalkRows:
    """Requests as rows to walk over; a user with a past of their own gets a code the log has not used."""
    num_users, num_items = split.interactions.users.height, split.interactions.items.height
    _, alias = np.unique(user, return_inverse=True)
    fresh = np.isin(user, user[own]) | (user >= num_users)
    return WalkRows(
        row_id=-1 - np.arange(user.size),
        user=np.where(fresh, num_users + alias, user),
        person=user.astype(np.int64),
        item=np.minimum(item, num_items).astype(np.int64),
        timestamp=timestamp.astype(np.float64),
        label=label.astype(np.int8),
        query=np.ones(user.size, np.bool_),
        rater=np.zeros(user.size, np.bool_),
        own=own,
    )


def _merged(log: WalkRows, extra: WalkRows) -> WalkRows:
    """Both in the order of a log: time, then person, then item."""
    joined = {name: np.concatenate([vars(log)[name], vars(extra)[name]]) for name in vars(log)}
    order = np.lexsort((joined["item"], joined["person"], joined["timestamp"]))
    return WalkRows(**{name: array[order] for name, array in joined.items()})
