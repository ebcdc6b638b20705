"""Makes the retrieved features table: neighbours' answers, rates and similarities, from strictly earlier rows.

Columns: row_id; of the neighbours' own interactions with the candidate vote (mean answer) and neighbour_count,
weighted_vote and vote_weight (the same by similarity, one below 0 counts as 0) and similarity (their mean);
item_rate and item_count, user_rate and user_count (liked share and number of strictly earlier readable rows). A mean of
nothing is null. With the retriever's item_neighbours: item_similarity, the user's own answers on the earlier items most
similar to the candidate, averaged by similarity (null without any), and item_similarity_weight, the sum of these
similarities. With its similar_every: similar_after, item codes that similar users liked, or null; it alone is dated
just *after* the row's second and may hold the row's own answer, so it is for the prompts of later rows
(`past.SimilarLikes`). text and text_weight (`own_text`). With a factorisation: mf and, of a log with ratings,
mf_rating, null before its first block.

A row of split S reads rows of splits up to S, so there is a table per split. Where no row has a later split's row in
its past (a split by time), the three coincide and are computed once.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from project.arrays import F64, I64
from project.cache import cached_folder
from project.data.protocol import SPLITS, SplitInteractions
from project.errors import ConfigError
from project.retrieval.base import Retriever
from project.retrieval.controls import NoRetriever
from project.retrieval.factorisation import MatrixFactorisation
from project.retrieval.online import FeatureIndex
from project.retrieval.own_text import SHRINK, item_vectors, text_similarity
from project.retrieval.past import WalkRows
from project.retrieval.rates import with_context
from project.retrieval.walk import Snapshots, block_cuts, fit_snapshots, walk

# in a folder of tables: what was fitted for test, which requests read
SNAPSHOTS = "snapshots.npz"
# readable rows, split and folder -> table with row_id
Make = Callable[[pl.DataFrame, str, Path], pl.DataFrame]


class RetrievedFeatures:
    """The retrieved features of a log's rows and of requests.

    The log is cut into `refits` shares of equal rows. Retriever and factorisation (None: no column mf) are fitted
    before each share but the first. Tables and what was fitted are kept in `cache_dir`, under a hash of everything
    they depend on.
    """

    def __init__(
        self,
        split: SplitInteractions,
        retriever: Retriever,
        refits: int,
        cache_dir: Path,
        mf: MatrixFactorisation | None = None,
    ) -> None:
        if refits < 1:
            raise ConfigError(
                f"data.refits is {refits}, expected 1 or more: 10 is the default"
            )
        self.split = split
        self.retriever = retriever
        self.refits = refits
        self.cache_dir = cache_dir
        self.mf = mf
        # (blocks - 1,) seconds at which blocks 1, 2, ... begin: of the whole log, for every
        # split
        self.cuts = block_cuts(split.rows["timestamp"].to_numpy(), refits)

    def tables(self) -> dict[str, pl.DataFrame]:
        """The table of every split S = train, valid and test: a row for each row of splits up to S."""
        first, *others = map(read_tables, self.folders().values())
        for more in others:
            for name, table in first.items():
                assert table["row_id"].equals(more[name]["row_id"])
                first[name] = table.hstack(more[name].drop("row_id"))
        rows = self.split.rows
        code = rows["split"].to_physical().to_numpy()
        once = reads_all_earlier(rows["timestamp"].to_numpy(), code)
        return with_context(self.split, first, once)

    def folders(self) -> dict[str, Path]:
        """Folders of the cache with the tables: retrieved, text and, with a factorisation, mf.

        They are made where the cache lacks them.
        """
        folders = {"retrieved": self._retrieved_folder(), "text": self._text_folder()}
        if self.mf is not None:
            folders["mf"] = self._mf_folder(self.mf)
        return folders

    def snapshots(self) -> Snapshots:
        """What the retriever fitted for test, which requests read."""
        return Snapshots.load(self._retrieved_folder() / SNAPSHOTS)

    def chances(self) -> dict[str, Callable[[WalkRows], F64]]:
        """Chances of rows by what the factorisation fitted for test, by column."""
        if self.mf is None:
            return {}
        files = sorted(self._mf_folder(self.mf).glob("*.npz"))
        return {
            file.stem: partial(self.mf.chances, snapshots=Snapshots.load(file))
            for file in files
        }

    def index(self) -> FeatureIndex:
        """An index, which answers requests after the log without another walk."""
        return FeatureIndex(self.split, self.retriever, self.snapshots(), self.chances())

    def of_requests(
        self, asked: pl.DataFrame, catalogue: pl.DataFrame | None = None
    ) -> pl.DataFrame:
        """Retrieved features of rows outside the log, read as split "test": from the log and their own user's past.

        Rows have codes of user and item (codes that the log does not have are unseen), timestamp, label (-1 is unknown)
        and candidate: whether it is asked, else it is the user's own past. A user code with own rows has exactly those
        as its past, also where the log knows that user; a user code of the log without own rows has the log's. Either
        way that user's own ratings in the log are not neighbours. `catalogue` is the items table of the codes where
        requests bring items of their own.

        The table is in the order given; row_id is -1 - position, also among neighbours.
        """
        # 1. rows of the log and of the requests, together in time order
        items = self.split.interactions.items
        num_users = self.split.interactions.users.height
        rows = WalkRows.from_log(asked.with_columns(row_id=-1 - pl.int_range(pl.len())))
        end = rows.timestamp.max(initial=-np.inf)
        log = self.split.rows.filter(pl.col("timestamp") < end)
        past = WalkRows.from_log(log, query=False)
        own = ~asked["candidate"].to_numpy()
        # a user with a past of their own gets a code that the log has not used
        fresh = np.isin(rows.user, rows.user[own]) | (rows.user >= num_users)
        codes = num_users + np.unique(rows.user, return_inverse=True)[1]
        requests = replace(
            rows,
            user=np.where(fresh, codes, rows.user),
            item=np.minimum(rows.item, items.height),
            rater=np.zeros_like(own),
            own=own,
        )
        # 2. the walk, then factorisation and text similarity, as the log's tables have them
        fitted = self.snapshots()
        merged = _merged(past, requests)
        table = walk(
            merged,
            self.retriever,
            items,
            fitted.cuts,
            fitted.fitted,
        )
        for name, chances in self.chances().items():
            table = table.with_columns(mf_column(chances(merged)).alias(name))
        # an item that the log does not have still has a text
        catalogue = items if catalogue is None else catalogue
        with_texts = replace(requests, item=np.minimum(rows.item, catalogue.height))
        texts = text_similarity(_merged(past, with_texts), item_vectors(catalogue, items))
        table = table.join(
            texts, on="row_id", how="left", maintain_order="left", validate="1:1"
        )
        return table.sort("row_id", descending=True)

    def warnings(self, tables: Mapping[str, pl.DataFrame]) -> list[str]:
        """A line for every split whose targets a retriever was never fitted for, or whose features have one value."""
        lines = list[str]()
        fits = type(self.retriever).fit is not Retriever.fit
        columns = ["item_similarity", "mf", "item_rate", "user_rate"]
        if not isinstance(self.retriever, NoRetriever):
            columns.append("vote")
        if self.split.protocol.negatives:  # of clicks alone all rates are 1
            columns = []
        for name, table in tables.items():
            targets = self.split.rows.filter(role="target", split=name)
            if targets.height < 2:
                continue
            if fits and not (targets["timestamp"] >= self.cuts.min(initial=np.inf)).any():
                lines.append(
                    f"{type(self.retriever).__name__} was never fitted before the {targets.height} targets of {name}: "
                    f"data.refits is {self.refits} for {self.split.rows.height} rows. Raise data.refits."
                )
                continue
            read = table.filter(pl.col("row_id").is_in(targets["row_id"].implode()))
            constant = [
                c
                for c in columns
                if c in read.columns and read[c].drop_nulls().n_unique() < 2
            ]
            if constant:
                lines.append(
                    f"retrieved features do not differ between the {targets.height} targets of {name}: "
                    f"{', '.join(constant)} has one value or none. Check data.protocol.label and how many earlier rows "
                    "users and items have, raise data.refits, or leave the retriever out "
                    "(project.retrieval.NoRetriever, data.mf: null)."
                )
        return lines

    def _retrieved_folder(self) -> Path:
        """Folder with the walks' tables.

        Until it is whole, what was fitted has a folder of its own: a process that is killed while it walks need not
        fit again.
        """
        log = self.split.interactions
        content = {"retriever": self.retriever.settings(), "refits": self.refits}
        fitted = list[Path]()

        def make(readable: pl.DataFrame, name: str, folder: Path) -> pl.DataFrame:
            def fit(made: Path) -> None:
                snapshots = fit_snapshots(
                    readable, self.retriever, log.users.height, log.items, self.cuts
                )
                snapshots.save(made / SNAPSHOTS)

            depends = {
                "files": log.files,
                "protocol": self.split.hash,
                "split": name,
                **content,
            }
            fitted.append(cached_folder(self.cache_dir / "fitted", depends, fit))
            file = fitted[-1] / SNAPSHOTS
            if name == SPLITS[-1]:
                shutil.copy(file, folder)
            snapshots = Snapshots.load(file).fitted
            return walk(
                WalkRows.from_log(readable),
                self.retriever,
                log.items,
                self.cuts,
                snapshots,
            )

        # lists of what similar users liked read what happened in their row's own second
        whole = self._split_folder(
            "retrieved", content, make, self.retriever.similar_every > 0
        )
        for made in fitted:
            shutil.rmtree(made, ignore_errors=True)
        return whole

    def _text_folder(self) -> Path:
        """Folder with row_id, text and text_weight."""
        items = self.split.interactions.items
        # made only where the cache lacks the tables
        vectors = cache(lambda: item_vectors(items, items))

        def make(readable: pl.DataFrame, name: str, folder: Path) -> pl.DataFrame:
            return text_similarity(WalkRows.from_log(readable), vectors())

        return self._split_folder("text", {"shrink": SHRINK}, make)

    def _mf_folder(self, mf: MatrixFactorisation) -> Path:
        """Folder with row_id, mf and, of a log with ratings, mf_rating, null before the first cut."""
        kinds = {"mf": False}
        if self.split.train_ratings.size:
            kinds["mf_rating"] = True

        def make(readable: pl.DataFrame, name: str, folder: Path) -> pl.DataFrame:
            items = self.split.interactions.items.height
            table = readable.select("row_id")
            for column, ratings in kinds.items():
                snapshots = mf.fit(readable, items, self.cuts, ratings)
                if name == SPLITS[-1]:
                    snapshots.save(folder / f"{column}.npz")
                chances = mf.chances(WalkRows.from_log(readable), snapshots)
                table = table.with_columns(mf_column(chances).alias(column))
            return table

        content = {"mf": asdict(mf), "refits": self.refits, "columns": list(kinds)}
        return self._split_folder("mf", content, make)

    def _split_folder(
        self, kind: str, content: dict[str, Any], make: Make, own_second: bool = False
    ) -> Path:
        """Folder of a kind with train, valid and test.parquet, named by a hash of log, protocol and `content`.

        Where the cache lacks it, `make` makes a split's table: first for test, then for valid and train where their
        tables are not parts of test's. A table that begins one written before is stored as its row_id alone.
        """

        def write(folder: Path) -> None:
            rows = self.split.rows
            code = rows["split"].to_physical()
            once = reads_all_earlier(
                rows["timestamp"].to_numpy(), code.to_numpy(), own_second
            )
            table: pl.DataFrame | None = None
            for k, name in reversed(list(enumerate(SPLITS))):
                readable = rows.filter(code <= k)
                if table is None or not once:
                    written = table = make(readable, name, folder)
                # of a log cut by time
                elif table["row_id"].head(readable.height).equals(readable["row_id"]):
                    table = table.head(readable.height)  # no copy
                    written = table.select("row_id")
                else:
                    written = table = table.filter(
                        pl.col("row_id").is_in(readable["row_id"].implode())
                    )
                written.write_parquet(folder / f"{name}.parquet")

        depends = {
            "files": self.split.interactions.files,
            "protocol": self.split.hash,
            **content,
        }
        return cached_folder(self.cache_dir / kind, depends, write)


def read_tables(folder: Path) -> dict[str, pl.DataFrame]:
    """The tables of train, valid and test in one of `RetrievedFeatures.folders`."""
    tables = dict.fromkeys(SPLITS, pl.DataFrame())
    later = pl.DataFrame()  # the next split's table, which a table of row_id alone begins
    for name in reversed(SPLITS):
        table = pl.read_parquet(folder / f"{name}.parquet", glob=False)
        later = later.head(table.height) if table.width == 1 else table
        tables[name] = later
    return tables


def reads_all_earlier(timestamp: F64, split: I64, own_second: bool = False) -> bool:
    """Whether no row has a row of a later split strictly before it: then all splits' tables coincide.

    Rows ascend in time, splits are 0, 1, 2. With `own_second` a row's own second counts too.
    """
    latest_before = np.concatenate([[0], np.maximum.accumulate(split)])
    side: Literal["left", "right"] = "right" if own_second else "left"
    return bool(
        np.all(latest_before[np.searchsorted(timestamp, timestamp, side=side)] <= split)
    )


def mf_column(chances: F64) -> pl.Series:
    """Answers (n,) that factorisation expects as the table's column; NaN is null."""
    return pl.Series("mf", chances, dtype=pl.Float32, nan_to_null=True)


def _merged(log: WalkRows, extra: WalkRows) -> WalkRows:
    """Both in the order of a log: time, then person, then item."""
    rows = WalkRows(
        **{name: np.concatenate([of, vars(extra)[name]]) for name, of in vars(log).items()}
    )
    return rows.at(np.lexsort((rows.item, rows.person, rows.timestamp)))
