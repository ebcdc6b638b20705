"""Tables of the user and of MovieLens become one form of log; what cannot be read is located."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from project.data import logs as log_module
from project.data.logs import (
    RAW_SCHEMA,
    Logs,
    MovieLens1M,
    MovieLens100K,
    MovieLensLatestSmall,
    RawLogs,
    RecBoleLogs,
    TableLogs,
    checked,
)
from project.data.negatives import Negatives
from project.data.protocol import Protocol, apply_protocol, build_interactions
from project.errors import DataError

Write = Callable[[str, str], str]

ITEMS = "item_id,title,year\n1,Alien,1979\n2,Brazil,1985\n"
HEADER = "user_id,item_id,timestamp,rating\n"
LOG = HEADER + "u1,1,10,5\nu1,2,20,2\n"


def read(
    write: Write, log: str = LOG, items: str = ITEMS, **keywords: dict[str, str]
) -> RawLogs:
    return TableLogs(write("log.csv", log), write("items.csv", items), **keywords).read()


def test_csv_gives_the_canonical_columns(write: Write) -> None:
    """What the log lacks is null; rows count from 1; `files` has the SHA-256 of the bytes, in reading order."""
    raw = read(write)
    assert dict(raw.interactions.schema) == RAW_SCHEMA
    assert raw.interactions.drop("source_file").rows() == [
        ("u1", "1", 10.0, 5.0, None, None, 1),
        ("u1", "2", 20.0, 2.0, None, None, 2),
    ]
    assert raw.items.rows() == [("1", "Alien", "1979"), ("2", "Brazil", "1985")]
    texts = {"log.csv": LOG, "items.csv": ITEMS}
    sums = [
        (name, hashlib.sha256(text.encode()).hexdigest()) for name, text in texts.items()
    ]
    assert list(raw.files.items()) == sums


def test_a_mapping_is_part_of_the_log(write: Write) -> None:
    """The same bytes read by other columns have other `files`, so another hash and other caches."""
    log = "user_id,item_id,shelf,timestamp,rating\nu1,1,2,10,5\nu1,2,1,20,2\n"
    plain, shelf, same = (
        read(write, log, columns=columns)
        for columns in ({}, {"item_id": "shelf"}, {"item_id": "shelf"})
    )
    assert (
        plain.interactions["item_id"].to_list() != shelf.interactions["item_id"].to_list()
    )
    assert shelf.files == same.files
    assert set(shelf.files.items()) > set(plain.files.items())
    titled = read(
        write, log, "item_id,title,name\n1,A,B\n2,C,D\n", item_columns={"title": "name"}
    )
    assert titled.files["names of columns"] != shelf.files["names of columns"]


def test_columns_are_mapped_from_the_users_names(write: Write) -> None:
    raw = read(
        write,
        "who,what,item_id,when,liked\nu1,1,ignored,10,True\nu1,2,ignored,20,False\n",
        "id,name,released,studio\n1,Alien,1979,Fox\n2,Brazil,1985,\n",
        columns={
            "user_id": "who",
            "item_id": "what",
            "timestamp": "when",
            "label": "liked",
        },
        item_columns={
            "item_id": "id",
            "title": "name",
            "year": "released",
            "heading": "name",
        },
    )
    assert raw.interactions.select("item_id", "label", "rating").rows() == [
        ("1", 1, None),
        ("2", 0, None),
    ]
    expected = {
        "item_id": "2",
        "title": "Brazil",
        "heading": "Brazil",
        "year": "1985",
        "studio": "",
    }
    assert raw.items.rows(named=True)[1] == expected


def test_one_file_per_split_names_the_split(write: Write) -> None:
    """Rows of each file carry its split, in the order history, train, valid, test, not the YAML's."""
    parts = {
        "test": write(
            "c.csv", "user_id,item_id,timestamp,rating,split\nu1,2,30,1,anything\n"
        ),
        "history": write("a.csv", LOG),
        "train": write("b.csv", HEADER + "u2,1,5,4\n"),
    }
    raw = TableLogs(parts, write("items.csv", ITEMS)).read()
    assert raw.interactions["split"].to_list() == ["history", "history", "train", "test"]
    assert list(raw.files) == ["a.csv", "b.csv", "c.csv", "items.csv"]


def test_recbole_files_lose_their_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Atomic files: tab-separated, typed headers, quotes are plain characters, lines may end in CR LF.

    MovieLens 100K and 1M are such files, fetched when they are read; films of one title are two items.
    """
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    texts = {
        "ml-100k.inter": header + "7\t1\t4\t9\n",
        "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '1\t"Alien\t1979\tHorror SF\n',
        "ml-1m.inter": header + "1m_1\tSabrina (1995)\t5\t978300760\n",
        "ml-1m.item": "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\n"
        "Sabrina (1954)\tSabrina\t1954\tComedy\nSabrina (1995)\tSabrina\t1995\tComedy Romance\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode())
    monkeypatch.setattr(log_module, "fetch", lambda key: tmp_path)
    names = {"title": "movie_title", "year": "release_year", "genres": "class"}
    alien = [("1", '"Alien', "1979", "Horror SF")]
    sabrinas = [
        ("Sabrina (1954)", "Sabrina", "1954", "Comedy"),
        ("Sabrina (1995)", "Sabrina", "1995", "Comedy Romance"),
    ]
    for logs, row, items in (
        (
            RecBoleLogs(str(tmp_path), "ml-100k", item_columns=names),
            ("7", "1", 9, 4),
            alien,
        ),
        (MovieLens100K(), ("7", "1", 9, 4), alien),
        (MovieLens1M(), ("1m_1", "Sabrina (1995)", 978_300_760, 5), sabrinas),
    ):
        raw = checked(logs.read())
        assert raw.interactions.select(
            "user_id", "item_id", "timestamp", "rating"
        ).rows() == [row]
        assert raw.items.columns == ["item_id", "title", "year", "genres"]
        assert raw.items.rows() == items


def log_of(write: Write, **columns: list[Any]) -> RawLogs:
    """Users u0, u1, ..., items 0, 1, ..., and these columns."""
    ids = range(len(next(iter(columns.values()))))
    log = pl.DataFrame({"user_id": [f"u{k}" for k in ids], "item_id": ids, **columns})
    items = log.select("item_id", title="item_id")
    return read(write, log.write_csv(), items.write_csv())


def test_columns_that_nothing_reads_are_named(write: Write) -> None:
    """Once, in the file's order, in the manifest too; what is mapped or has one of our names is read."""
    numbers = list(range(8))
    stars = [5, 1] * 4
    raw = log_of(
        write, timestamp=numbers, dwell_time=numbers, rating=stars, order_id=numbers
    )
    protocol = Protocol(shares=[0.5, 0.25, 0.25], label="rating > 3")
    split = apply_protocol(build_interactions(raw, protocol), protocol)
    assert split.manifest["not_read"] == ["dwell_time", "order_id"]
    assert split.warnings == [
        "of the interactions not read: dwell_time, order_id; list under data.logs.init_args.context what is known "
        "before the answer."
    ]


def test_clicked_does_not_turn_labels_round(write: Write) -> None:
    """A row with label 0 is no click: an error that names the row and both ways out; a column of ones is clicks."""
    protocol = Protocol(split="random", label="clicked", negatives=Negatives())
    words = r"row 2: label is 0 \(2 of 3 rows\), but data\.protocol\.label is clicked.*label: null.*remove"
    with pytest.raises(DataError, match=words):
        build_interactions(log_of(write, label=[1, 0, 0]), protocol)
    ones = build_interactions(log_of(write, label=[1, 1, 1]), protocol)
    assert ones.rows["label"].to_list() == [1, 1, 1]


BAD_LOGS = [
    ("", "is empty"),
    (HEADER, "no data rows"),
    (LOG + "u1,1,30,5,6,7\n", "a row has more fields than the header.*double quotes"),
    (
        HEADER + '"u1,1,10,5\nu2",2,20,2\n',
        "row 1: column user_id is .*without a line break",
    ),
    *(
        (LOG.replace(c, "other"), f"no column {c}.*other.*columns")
        for c in ("user_id", "item_id")
    ),
    *(
        (HEADER + f"u1,1,10,5\nu1,2,{v},2\n", "row 2: .* timestamp")
        for v in ("soon", "nan", "inf", "")
    ),
    *(
        (HEADER + f"u1,1,10,5\nu1,2,20,{v}\n", "row 2: column rating")
        for v in ("soon", "nan", "inf", "")
    ),
    (LOG.replace("rating", "label").replace("5", "1"), r"row 2: column label is 2\.0"),
    (
        LOG.replace("rating", "rating,split")
        .replace("5\n", "5,train\n")
        .replace(",2\n", ",2,dev\n"),
        "'dev'",
    ),
    (
        LOG + "u2,9,30,5\nu2,9,31,5\nu2,8,32,5\n",
        r"row 3: item '9' .* items \(3 rows, 2 items",
    ),
    (LOG.replace("rating", "rating,rating"), "'rating' more than once"),
    (LOG.replace("rating", "rating,user_id"), "'user_id' more than once"),
    # no colour code reaches the terminal
    (LOG + "u2,\x1b[31m9,30,5\n", r"item '\\x1b\[31m9'"),
]
BAD_ITEMS = [
    ("item_id,name\n1,Alien\n", "no column title.*item_columns.*title: <your column>"),
    (
        'item_id,title,year\n1,Alien,1979\n2,"Brazil,1985\n3,Casablanca",1942\n',
        "row 2: column title",
    ),
    (
        'item_id,title,year\n1,Alien,1979\n2,Brazil,"1985\n3,Casablanca,1942"\n',
        "row 2: column year",
    ),
    (ITEMS + "2,Brasil,1985\n", "item '2' .*'Brazil' and 'Brasil'"),
    ("item_id,title,item\n1,A,x\n2,B,y\n", "attribute name item"),
]


@pytest.mark.parametrize(
    ("tables", "words"),
    [({"log": log}, words) for log, words in BAD_LOGS]
    + [({"items": items}, words) for items, words in BAD_ITEMS],
)
def test_bad_tables(write: Write, tables: dict[str, str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        checked(read(write, **tables))


def test_a_log_without_timestamps_has_null(write: Write) -> None:
    """Without the column, or with an empty one; a mapped column must be there, and no file alone may lack it."""
    bare, empty = "user_id,item_id,rating\nu1,1,5\nu1,2,2\n", HEADER + "u1,1,,5\nu1,2,,2\n"
    for log in (bare, empty):
        raw = checked(read(write, log))
        assert raw.interactions["timestamp"].to_list() == [None, None]
        assert dict(raw.interactions.schema) == RAW_SCHEMA
    with pytest.raises(
        DataError,
        match=r"no column when \(our timestamp\); there are user_id, item_id, rating",
    ):
        read(write, bare, columns={"timestamp": "when"})
    parts = {"train": write("a.csv", LOG), "test": write("b.csv", bare)}
    with pytest.raises(DataError, match=r"b\.csv, row 1: no timestamp \(2 of 4 rows"):
        checked(TableLogs(parts, write("items.csv", ITEMS)).read())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda items: TableLogs({"train": "x.csv", "dev": "y.csv"}, items), "dev"),
        (lambda items: TableLogs({}, items), r"\(none\)"),
        (lambda items: TableLogs("nowhere.csv", items), r"nowhere\.csv does not exist"),
        (lambda items: TableLogs("pyproject.toml", items), r"'\.toml'"),
        (
            lambda items: TableLogs(items, items, columns={"user": "user_id"}),
            "maps user; our names are user_id",
        ),
    ],
)
def test_bad_names_of_files_and_columns(
    make: Callable[[str], TableLogs], words: str, write: Write
) -> None:
    with pytest.raises(DataError, match=words):
        make(write("items.csv", ITEMS)).read()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_bytes_that_are_no_text(encoding: str, write: Write, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_bytes(
        "item_id,title\n1,Misérables\n2,B\n".encode(encoding)
    )
    with pytest.raises(DataError, match=r"items\.csv .*not UTF-8"):
        TableLogs(write("log.csv", LOG), str(tmp_path / "items.csv")).read()


def test_of_rating_and_label_one_may_be_unreadable(write: Write) -> None:
    """It is null, since a label may be a record's; a protocol that needs it says so."""
    log = (
        LOG.replace("rating", "rating,label")
        .replace("5\n", "5,Sony\n")
        .replace("2\n", "2,1\n")
    )
    assert read(write, log).interactions.select("rating", "label").rows() == [
        (5, None),
        (2, 1),
    ]


def test_tables_as_people_write_them(write: Write) -> None:
    """Columns of our own names, blanks around ids, and an item that is listed twice with one title."""
    raw = read(
        write,
        "source_row,source_file,user_id,item_id,timestamp,rating\n7,x,u3, 1,10,5\n8,y, u3 ,2,20,2\n",
        ITEMS + "2,Brazil,1986\n",
    )
    assert raw.interactions.select("source_row", "user_id", "item_id").rows() == [
        (1, "u3", "1"),
        (2, "u3", "2"),
    ]
    assert raw.interactions["source_file"][0].endswith("log.csv")
    assert raw.items.height == 2


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_file_name_is_no_pattern(kind: str, tmp_path: Path) -> None:
    """log[1] is not log1, which is what a shell would make of it; a folder may have such a name too."""
    folder = tmp_path / "run[2]"
    folder.mkdir()
    for path, user in (
        (folder / f"log[1].{kind}", "right"),
        (folder / f"log1.{kind}", "wrong"),
    ):
        table = pl.DataFrame(
            {"user_id": [user], "item_id": ["1"], "timestamp": [10], "rating": [5]}
        )
        if kind == "parquet":
            table.write_parquet(path)
        else:
            table.write_csv(path, separator="," if kind == "csv" else "\t")
    (folder / "items.csv").write_text(ITEMS)
    raw = TableLogs(str(folder / f"log[1].{kind}"), str(folder / "items.csv")).read()
    assert raw.interactions["user_id"].to_list() == ["right"]


@pytest.mark.real
@pytest.mark.parametrize(
    ("logs", "rows", "users", "items", "ratings"),
    [
        (MovieLens100K(), 100_000, 943, 1682, [1, 2, 3, 4, 5]),
        (MovieLens1M(), 1_000_209, 6040, 3883, [1, 2, 3, 4, 5]),
        (MovieLensLatestSmall(), 100_004, 671, 9066, [k / 2 for k in range(1, 11)]),
    ],
)
def test_real_movielens(
    logs: Logs, rows: int, users: int, items: int, ratings: list[float]
) -> None:
    raw = logs.read()
    assert raw.interactions.height == rows
    assert raw.interactions["user_id"].n_unique() == users
    assert raw.items.height == items
    assert raw.items.columns == ["item_id", "title", "year", "genres"]
    assert sorted(raw.interactions["rating"].unique()) == ratings


@pytest.mark.real
def test_real_latest_small() -> None:
    """Five films have no title, 17 no genre."""
    items = MovieLensLatestSmall().read().items
    assert items.filter(title="").height == 5
    assert items.filter(genres="").height == 17
    genres = "Adventure Animation Children Comedy Fantasy"
    assert items.filter(item_id="1").row(0) == ("1", "Toy Story", "1995", genres)


@pytest.mark.real
def test_real_movielens_1m() -> None:
    """Counted in the file's lines without the reader: ratings by value, 3,706 films that somebody rated, dates."""
    rows = MovieLens1M().read().interactions
    counts = dict(rows["rating"].value_counts().rows())
    assert counts == {1: 56_174, 2: 107_557, 3: 261_197, 4: 348_971, 5: 226_310}
    assert (rows["timestamp"].min(), rows["timestamp"].max()) == (
        956_703_932,
        1_046_454_590,
    )
    assert not rows.select("user_id", "item_id").is_duplicated().any()
    assert rows["item_id"].n_unique() == 3706
