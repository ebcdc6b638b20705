import hashlib
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from project.data import logs as readers
from project.data.logs import RAW_SCHEMA, MovieLens100K, MovieLensLatestSmall, RecBoleLogs, TableLogs, checked
from project.errors import DataError

Write = Callable[[str, str], str]

ITEMS = "item_id,title,year\n1,Alien,1979\n2,Brazil,1985\n"
LOG = "user_id,item_id,timestamp,rating\nu1,1,10,5\nu1,2,20,2\n"


def read(write: Write, log: str = LOG, items: str = ITEMS, **keywords: dict[str, str]) -> readers.RawLogs:
    return TableLogs(write("log.csv", log), write("items.csv", items), **keywords).read()


def test_csv_gives_the_canonical_columns(write: Write) -> None:
    """Every canonical column is there with its type; what the log lacks is null; rows count from 1."""
    raw = read(write)
    assert dict(raw.interactions.schema) == RAW_SCHEMA
    assert raw.interactions.drop("source_file").rows() == [
        ("u1", "1", 10.0, 5.0, None, None, 1),
        ("u1", "2", 20.0, 2.0, None, None, 2),
    ]
    assert raw.items.rows() == [("1", "Alien", "1979"), ("2", "Brazil", "1985")]


def test_checksums_are_of_the_bytes_read(write: Write) -> None:
    """`files` has the SHA-256 of each file, in reading order."""
    sums = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in (("log.csv", LOG), ("items.csv", ITEMS))
    }
    assert read(write).files == sums
    assert list(read(write).files) == list(sums)


def test_a_mapping_is_part_of_the_log(write: Write) -> None:
    """The same bytes read by other columns have other `files`, so another hash and other caches."""
    log = "user_id,item_id,shelf,timestamp,rating\nu1,1,2,10,5\nu1,2,1,20,2\n"
    plain, shelf, same = (
        read(write, log, columns=columns) for columns in ({}, {"item_id": "shelf"}, {"item_id": "shelf"})
    )
    assert plain.interactions["item_id"].to_list() != shelf.interactions["item_id"].to_list()
    assert shelf.files == same.files
    assert set(shelf.files.items()) > set(plain.files.items())
    titled = read(write, log, "item_id,title,name\n1,A,B\n2,C,D\n", item_columns={"title": "name"})
    assert titled.files["names of columns"] != shelf.files["names of columns"]


def test_parquet_equals_csv(write: Write, tmp_path: Path) -> None:
    """The same log as typed Parquet reads the same."""
    raw = read(write)
    log, items = tmp_path / "log.parquet", tmp_path / "items.parquet"
    pl.read_csv(tmp_path / "log.csv").write_parquet(log)
    pl.read_csv(tmp_path / "items.csv").write_parquet(items)
    other = TableLogs(str(log), str(items)).read()
    assert other.interactions.drop("source_file").equals(raw.interactions.drop("source_file"))
    assert other.items.equals(raw.items)


def test_columns_are_mapped_from_the_users_names(write: Write) -> None:
    """`columns` and `item_columns` map our names to theirs; unmapped attributes keep their own names."""
    raw = read(
        write,
        "who,what,item_id,when,liked\nu1,1,ignored,10,1\nu1,2,ignored,20,0\n",
        "id,name,released,studio\n1,Alien,1979,Fox\n2,Brazil,1985,\n",
        columns={"user_id": "who", "item_id": "what", "timestamp": "when", "label": "liked"},
        item_columns={"item_id": "id", "title": "name", "year": "released"},
    )
    assert raw.interactions["item_id"].to_list() == ["1", "2"]
    assert raw.interactions["label"].to_list() == [1, 0]
    assert raw.interactions["rating"].to_list() == [None, None]
    assert raw.items.rows(named=True)[1] == {"item_id": "2", "title": "Brazil", "year": "1985", "studio": ""}


def test_one_column_may_serve_twice(write: Write) -> None:
    """Two of our names may be mapped to the same column."""
    raw = read(write, items="item_id,title\n1,A\n2,B\n", item_columns={"heading": "title"})
    assert raw.items.rows(named=True)[0] == {"item_id": "1", "title": "A", "heading": "A"}


def test_one_file_per_split_names_the_split(write: Write) -> None:
    """Rows of each file carry its split, in the order history, train, valid, test, not the YAML's."""
    parts = {
        "test": write("c.csv", "user_id,item_id,timestamp,rating,split\nu1,2,30,1,anything\n"),
        "history": write("a.csv", LOG),
        "train": write("b.csv", "user_id,item_id,timestamp,rating\nu2,1,5,4\n"),
    }
    raw = TableLogs(parts, write("items.csv", ITEMS)).read()
    assert raw.interactions["split"].to_list() == ["history", "history", "train", "test"]
    assert list(raw.files) == ["a.csv", "b.csv", "c.csv", "items.csv"]


def test_unknown_split_file_is_an_error(write: Write) -> None:
    """A file under a name that is no split is refused before anything is read; so is no file at all."""
    with pytest.raises(DataError, match="names the splits dev; allowed are history, train, valid, test"):
        TableLogs({"train": "x.csv", "dev": "y.csv"}, "items.csv")
    with pytest.raises(DataError, match=r"\(none\)"):
        TableLogs({}, "items.csv")


def test_recbole_headers_lose_their_types(tmp_path: Path) -> None:
    """Atomic files: tab-separated, typed headers, quotes are plain characters."""
    (tmp_path / "toy.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t1\t4\t9\n"
    )
    (tmp_path / "toy.item").write_text(
        'item_id:token\tname:token_seq\tclass:token_seq\n1\t"Alien\tHorror SF\n'
    )
    raw = RecBoleLogs(str(tmp_path), "toy", item_columns={"title": "name", "genres": "class"}).read()
    assert raw.interactions.select("user_id", "item_id", "timestamp", "rating").rows() == [
        ("7", "1", 9.0, 4.0)
    ]
    assert raw.items.rows(named=True) == [{"item_id": "1", "title": '"Alien', "genres": "Horror SF"}]


def test_movielens_is_read_from_the_fetched_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Title, year and genres come from ML-100K's own column names; nothing is fetched before `read`."""
    (tmp_path / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t1\t4\t9\n"
    )
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n1\tToy "
        "Story\t1995\tComedy\n"
    )
    logs = MovieLens100K()
    monkeypatch.setattr(readers, "fetch", lambda key: {"ml-100k": tmp_path}[key])
    expected = {"item_id": "1", "title": "Toy Story", "year": "1995", "genres": "Comedy"}
    assert logs.read().items.rows(named=True) == [expected]


def test_missing_file_is_named(write: Write) -> None:
    """The message has the path."""
    with pytest.raises(DataError, match=r"File nowhere\.csv does not exist"):
        TableLogs("nowhere.csv", write("items.csv", ITEMS)).read()


@pytest.mark.parametrize(("text", "found"), [("", "is empty"), ("user_id,item_id\n", "has no data rows")])
def test_empty_file_is_an_error(write: Write, text: str, found: str) -> None:
    """No bytes, or a header only: an error that names the file."""
    with pytest.raises(DataError, match=rf"log\.csv {found}"):
        read(write, text)


def test_other_suffix_is_an_error(write: Write) -> None:
    """A file that is no table says so with its name."""
    with pytest.raises(DataError, match=r"suffix '\.json'; expected \.csv, \.tsv or \.parquet"):
        TableLogs(write("log.json", "{}"), write("items.csv", ITEMS)).read()


def test_a_row_that_is_too_long_says_what_helps(write: Write) -> None:
    """Quotes around a text that holds a comma."""
    with pytest.raises(
        DataError, match=r"log\.csv cannot be read as a table: a row has more fields.*double quotes"
    ):
        read(write, LOG + "u1,1,30,5,6,7\n")


def test_bytes_that_are_no_text_are_an_error(write: Write, tmp_path: Path) -> None:
    """A Latin-1 or UTF-16 file is refused with its name."""
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "items.csv").write_bytes("item_id,title\n1,Misérables\n2,B\n".encode(encoding))
        with pytest.raises(DataError, match=r"items\.csv cannot be read as a table: it is not UTF-8 text"):
            TableLogs(write("log.csv", LOG), str(tmp_path / "items.csv")).read()


@pytest.mark.parametrize("absent", ["user_id", "item_id", "timestamp"])
def test_missing_column_lists_what_is_there(write: Write, absent: str) -> None:
    """The message lists the file's columns and the YAML key that maps them."""
    with pytest.raises(
        DataError, match=rf"no column {absent}.*there are .*other.*data\.logs\.init_args\.columns"
    ):
        read(write, LOG.replace(absent, "other"))


def test_missing_title_names_item_columns(write: Write) -> None:
    """For the item table the key is `item_columns`; the example maps what is missing."""
    with pytest.raises(
        DataError,
        match=r"no column title.*item_id, name.*data\.logs\.init_args\.item_columns.*\{title: <your column>\}",
    ):
        read(write, items="item_id,name\n1,Alien\n")


def test_neither_rating_nor_label_is_an_error(write: Write) -> None:
    """A log needs an answer column."""
    with pytest.raises(DataError, match=r"no column rating and no column label.*stars"):
        read(write, LOG.replace("rating", "stars"))


@pytest.mark.parametrize(("column", "row"), [("timestamp", "u1,2,{},2"), ("rating", "u1,2,20,{}")])
@pytest.mark.parametrize("value", ["soon", "nan", "inf", ""])
def test_value_that_is_no_number_is_located(write: Write, column: str, row: str, value: str) -> None:
    """File, data row, column and value are in the message; NaN and infinity are no numbers."""
    log = "user_id,item_id,timestamp,rating\nu1,1,10,5\n" + row.format(value) + "\n"
    with pytest.raises(
        DataError, match=rf"log\.csv, row 2: column {column} is ({value!r}|empty); expected a finite"
    ):
        read(write, log)


def test_label_outside_0_and_1_is_located(write: Write) -> None:
    """A label is 0 or 1; the file's own column name is in the message."""
    log = "user_id,item_id,timestamp,liked\nu1,1,10,1\nu1,2,20,2\n"
    with pytest.raises(DataError, match=r"log\.csv, row 2: column liked is 2\.0.*allowed are 0, 1"):
        read(write, log, columns={"label": "liked"})


def test_labels_may_be_true_and_false(write: Write) -> None:
    """As a CSV of pandas has them."""
    log = "user_id,item_id,timestamp,label\nu1,1,10,True\nu1,2,20,False\n"
    assert read(write, log).interactions["label"].to_list() == [1, 0]


def test_of_rating_and_label_one_may_be_unreadable(write: Write) -> None:
    """What cannot be read is null: a label may be a record's. A protocol that needs it will say so."""
    raw = read(
        write, LOG.replace("rating", "rating,label").replace("5\n", "5,Sony\n").replace("2\n", "2,1\n")
    )
    assert raw.interactions.select("rating", "label").rows() == [(5, None), (2, 1)]


def test_a_log_may_have_a_column_of_our_own_name(write: Write) -> None:
    """source_row and source_file are ours, whatever the log has there."""
    raw = read(
        write, "source_row,source_file,user_id,item_id,timestamp,rating\n7,x,u1,1,10,5\n8,y,u1,2,20,2\n"
    )
    assert raw.interactions["source_row"].to_list() == [1, 2]
    assert raw.interactions["source_file"][0].endswith("log.csv")


def test_unknown_value_in_the_split_column_is_located(write: Write) -> None:
    """The allowed splits are listed."""
    log = "user_id,item_id,timestamp,rating,split\nu1,1,10,5,train\nu1,2,20,2,dev\n"
    with pytest.raises(
        DataError, match=r"row 2: column split is 'dev'.*allowed are history, train, valid, test"
    ):
        read(write, log)


def test_item_absent_from_the_item_table_is_located(write: Write) -> None:
    """The first such row, and how many rows and items there are."""
    raw = read(write, LOG + "u2,9,30,5\nu2,9,31,5\nu2,8,32,5\n")
    with pytest.raises(DataError, match=r"log\.csv, row 3: item '9' is not in .*items \(3 rows, 2 items\)"):
        checked(raw)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_name_is_no_pattern(kind: str, tmp_path: Path) -> None:
    """log[1] is not log1, which is what a shell would make of it; a folder may have such a name too."""
    folder = tmp_path / "run[2]"
    folder.mkdir()
    for path, user in ((folder / f"log[1].{kind}", "right"), (folder / f"log1.{kind}", "wrong")):
        table = pl.DataFrame({"user_id": [user], "item_id": ["1"], "timestamp": [10], "rating": [5]})
        table.write_csv(path) if kind == "csv" else table.write_parquet(path)
    (folder / "items.csv").write_text(ITEMS)
    raw = TableLogs(str(folder / f"log[1].{kind}"), str(folder / "items.csv")).read()
    assert raw.interactions["user_id"].to_list() == ["right"]


@pytest.mark.parametrize("name", ["rating", "user_id"])
def test_repeated_columns_are_refused(write: Write, name: str) -> None:
    """Which of the two is meant nobody knows."""
    with pytest.raises(DataError, match=rf"log\.csv has the column '{name}' more than once"):
        read(write, f"user_id,item_id,timestamp,rating,{name}\nu1,1,10,5,3\n")


def test_blanks_around_ids_are_no_part_of_them(write: Write) -> None:
    """As a person writes a table: one user, and an item that the item table knows."""
    raw = read(write, "user_id,item_id,timestamp,rating\nu3, 1,10,5\n u3 ,2,20,2\n")
    assert raw.interactions["user_id"].to_list() == ["u3", "u3"]
    assert raw.interactions["item_id"].to_list() == ["1", "2"]


@pytest.mark.parametrize("column", ["title", "year"])
def test_a_quote_that_is_not_closed_is_located(write: Write, column: str) -> None:
    """It pairs with the next one, and the rows between would be swallowed."""
    row = {"title": '2,"Brazil,1985\n3,Casablanca",1942\n', "year": '2,Brazil,"1985\n3,Casablanca,1942"\n'}[
        column
    ]
    with pytest.raises(
        DataError, match=rf"items\.csv, row 2: column {column} holds a line break.*Close the quote"
    ):
        read(write, items=f"item_id,title,year\n1,Alien,1979\n{row}")


def test_control_characters_do_not_reach_the_terminal(write: Write) -> None:
    """An id that holds a colour code is escaped in an error."""
    with pytest.raises(DataError) as error:
        checked(read(write, LOG + "u2,\x1b[31m9,30,5\n"))
    assert "\x1b" not in str(error.value)
    assert "\\x1b[31m9" in str(error.value)


def test_item_listed_twice(write: Write) -> None:
    """With one title the first row stays; with two titles both are named."""
    assert read(write, items=ITEMS + "2,Brazil,1986\n").items.height == 2
    with pytest.raises(DataError, match="item '2' is listed with the titles 'Brazil' and 'Brasil'"):
        read(write, items=ITEMS + "2,Brasil,1985\n")


def test_attribute_named_item_is_refused(write: Write) -> None:
    """The name of the item code is taken; the message shows the mapping that frees it."""
    with pytest.raises(DataError, match="attribute name item"):
        read(write, items="item_id,title,item\n1,A,x\n2,B,y\n")


@pytest.mark.real
def test_real_ml100k() -> None:
    """943 users, 1,682 films, 100,000 ratings from 1 to 5, every film with a title."""
    raw = MovieLens100K().read()
    assert raw.interactions.height == 100_000
    assert raw.interactions["user_id"].n_unique() == 943
    assert raw.items.height == 1682
    assert raw.items.columns == ["item_id", "title", "year", "genres"]
    assert sorted(raw.interactions["rating"].unique()) == [1, 2, 3, 4, 5]


@pytest.mark.real
def test_real_latest_small() -> None:
    """671 users, 9,066 films, 100,004 ratings in halves; five films have no title, 17 no genre."""
    raw = MovieLensLatestSmall().read()
    assert raw.interactions.height == 100_004
    assert raw.interactions["user_id"].n_unique() == 671
    assert raw.items.columns == ["item_id", "title", "year", "genres"]
    assert raw.items.height == 9066
    assert raw.items.filter(title="").height == 5
    assert raw.items.filter(genres="").height == 17
    assert raw.items.filter(item_id="1").row(0) == (
        "1",
        "Toy Story",
        "1995",
        "Adventure Animation Children Comedy Fantasy",
    )
    assert sorted(raw.interactions["rating"].unique()) == [k / 2 for k in range(1, 11)]
