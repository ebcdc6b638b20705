"""Makes the retrieved features table: neighbours' answers, rates and similarities, from strictly earlier rows.

Columns: row_id; neighbours (row ids of the neighbours' own interactions with the candidate), similarities, answers
(lists, most similar first); vote (mean answer, null without neighbours); neighbour_count; item_rate and item_count,
user_rate and user_count (liked share and number of strictly earlier readable rows; a rate of nothing is null). With the
retriever's item_neighbours: item_similarity, the user's own answers on the earlier items most similar to the candidate,
averaged by similarity (null without any), and item_similarity_weight, the sum of these similarities. With its
similar_every: similar_after, item codes that similar users liked, or null; it alone is dated just *after* the row's
second and may hold the row's own answer, so it is for the prompts of later rows (`walk.SimilarLikes`). text and
text_weight (`own_text`). With a factorisation: mf, null before its first block.

A row of split S reads rows of splits up to S, so there is a table per split. Where no row has a later split's row in
its past (a split by time), the three coincide and are computed once.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from project.arrays import F64, I64, Bool
from project.data.protocol import SPLITS, SplitInteractions
from project.errors import ConfigError, DataError
from project.retrieval.base import Retriever
from project.retrieval.controls import NoRetriever
from project.retrieval.factorisation import MatrixFactorisation, mf_column, mf_folder, mf_snapshots
from project.retrieval.own_text import item_vectors, text_folder, text_similarity
from project.retrieval.walk import (
    Snapshots,
    WalkRows,
    block_cuts,
    cached_folder,
    fit_snapshots,
    read_tables,
    split_tables,
    walk,
)


def retrieved_tables(
    split: SplitInteractions,
    retriever: Retriever,
    refits: int,
    cache_dir: Path,
    mf: MatrixFactorisation | None = None,
) -> dict[str, pl.DataFrame]:
    """Retrieved features of every row with split <= S, for S = train, valid and test.

    The log is cut into `refits` shares; retriever and factorisation are fitted before each but the first. Tables and
    snapshots are kept in `cache_dir`, under a hash of everything they depend on. Without `mf` that column is left out.
    """
    folders = [retrieved_folder(split, retriever, refits, cache_dir), text_folder(split, cache_dir)]
    if mf is not None:
        folders.append(mf_folder(split, mf, refits, cache_dir))
    tables, *others = map(read_tables, folders)
    for more in others:
        for name, table in tables.items():
            assert table["row_id"].equals(more[name]["row_id"])
            tables[name] = table.hstack(more[name].drop("row_id"))
    return tables


def retrieved_folder(split: SplitInteractions, retriever: Retriever, refits: int, cache_dir: Path) -> Path:
    """Folder of the cache with the retriever's tables, and snapshots.npz: those of test, which requests read.

    Until it is whole, what was fitted has a folder of its own: who is killed while walking need not fit again.
    """
    if refits < 1:
        raise ConfigError(f"data.refits is {refits}, expected 1 or more: 10 is the default")
    log, fitted = split.interactions, list[Path]()
    cuts = block_cuts(split.rows["timestamp"].to_numpy(), refits)  # of the whole log, for every split
    content = {"retriever": retriever.settings(), "refits": refits}

    def make(readable: pl.DataFrame, name: str, folder: Path) -> pl.DataFrame:
        def fit(made: Path) -> None:
            snapshots = fit_snapshots(readable, retriever, log.users.height, log.items, cuts)
            snapshots.save(made / "snapshots.npz")

        depends = {"files": log.files, "protocol": split.hash, "split": name, **content}
        fitted.append(cached_folder(cache_dir / "fitted", depends, fit))
        file = fitted[-1] / "snapshots.npz"
        if name == SPLITS[-1]:
            shutil.copy(file, folder)
        rows, snapshots = WalkRows.from_log(readable), Snapshots.load(file)
        return walk(rows, retriever, log.items, cuts, snapshots.fitted, f"retrieved features ({name})")

    whole = split_tables(split, cache_dir / "retrieved", content, make, retriever.similar_every > 0)
    for made in fitted:
        shutil.rmtree(made, ignore_errors=True)
    return whole


def request_retrieved(
    split: SplitInteractions,
    retriever: Retriever,
    refits: int,
    cache_dir: Path,
    user: I64,
    item: I64,
    timestamp: F64,
    label: I64,
    own: Bool,
    mf: MatrixFactorisation | None = None,
    catalogue: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Retrieved features of rows outside the log, read as split "test": from the log and their own user's past.

    Rows have shape (rows,): codes of users and items (codes that the log does not have are unseen), seconds, labels (-1
    is unknown), and `own`, whether the row is the user's past, else a candidate. A user code with `own` rows has
    exactly those as its past, also where the log knows that user; a user code of the log without `own` rows has the
    log's. Either way that user's own ratings in the log are not neighbours. Snapshots are fitted only where the cache
    lacks them. `catalogue` is the items table of `item` where requests bring items of their own.

    The table is in the order given; row_id is -1 - position, also among neighbours.
    """
    # 1. refuse a history without answers
    unlabelled = np.flatnonzero(own & (label < 0))
    if unlabelled.size:
        raise DataError(
            f"request row {unlabelled[0]} is history (own) but its label is {label[unlabelled[0]]}: "
            "expected 0 or 1; give every history row its answer, or make it a candidate"
        )
    # 2. rows of the log and of the requests, together in time order
    snapshots = Snapshots.load(retrieved_folder(split, retriever, refits, cache_dir) / "snapshots.npz")
    items, num_users = split.interactions.items, split.interactions.users.height
    log = split.rows.filter(pl.col("timestamp") < timestamp.max(initial=-np.inf))
    # a user with a past of their own gets a code that the log has not used
    fresh = np.isin(user, user[own]) | (user >= num_users)
    requests = WalkRows(
        row_id=-1 - np.arange(user.size),
        user=np.where(fresh, num_users + np.unique(user, return_inverse=True)[1], user),
        person=user.astype(np.int64),
        item=np.minimum(item, items.height).astype(np.int64),
        timestamp=timestamp.astype(np.float64),
        label=label.astype(np.int8),
        query=np.ones(user.size, np.bool_),
        rater=np.zeros(user.size, np.bool_),
        own=own,
    )
    rows = _merged(WalkRows.from_log(log, query=False), requests)
    # 3. the walk, then factorisation and text similarity, as the log's tables have them
    table = walk(rows, retriever, items, snapshots.cuts, snapshots.fitted, "retrieved features (requests)")
    if mf is not None:
        chances = mf.chances(rows, mf_snapshots(split, mf, refits, cache_dir))
        table = table.with_columns(mf_column(chances))
    if catalogue is not None:  # an item the log does not have still has a text
        known = replace(requests, item=np.minimum(item, catalogue.height).astype(np.int64))
        rows = _merged(WalkRows.from_log(log, query=False), known)
    texts = text_similarity(rows, item_vectors(items if catalogue is None else catalogue, items))
    table = table.join(texts, on="row_id", how="left", maintain_order="left", validate="1:1")
    return table.sort("row_id", descending=True)


def _merged(log: WalkRows, extra: WalkRows) -> WalkRows:
    """Both in the order of a log: time, then person, then item."""
    joined = {name: np.concatenate([vars(log)[name], vars(extra)[name]]) for name in vars(log)}
    order = np.lexsort((joined["item"], joined["person"], joined["timestamp"]))
    return WalkRows(**{name: array[order] for name, array in joined.items()})


def retrieved_warnings(
    split: SplitInteractions, retrieved: Mapping[str, pl.DataFrame], retriever: Retriever, refits: int
) -> list[str]:
    """A line for every split whose targets a retriever was never fitted for, or whose features have one value.

    `retrieved` and `refits` are those of `retrieved_tables`.
    """
    found, fits = [], type(retriever).fit is not Retriever.fit
    cuts = block_cuts(split.rows["timestamp"].to_numpy(), refits)
    votes = [] if isinstance(retriever, NoRetriever) else ["vote"]
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
        names = [n for n in ("item_similarity", "mf", "item_rate", "user_rate", *votes) if n in read.columns]
        names = [] if split.protocol.negatives else names  # of clicks alone all rates are 1
        constant = [n for n in names if read[n].drop_nulls().n_unique() < 2]
        if constant:
            found.append(
                f"retrieved features do not differ between the {targets.height} targets of {name}: "
                f"{', '.join(constant)} has one value or none. Check data.protocol.label and how many earlier rows "
                "users and items have, raise data.refits, or leave the retriever out "
                "(project.retrieval.NoRetriever, data.mf: null)."
            )
    return found
