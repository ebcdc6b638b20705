"""Published dumps in their true form: what can be read is read, what cannot is counted and its first row named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from project.data.logs import RawLogs, checked
from project.data.protocol import Protocol, apply_protocol, build_interactions
from project.data.readers import REVIEW, AmazonReviews, BookCrossing
from project.errors import DataError

IDS = ("user_id", "item_id", "timestamp", "rating", "source_row")
IMAGES = ";".join(f'"http://images.amazon.com/images/P/1.0{size}.jpg"' for size in "123")
COLUMNS = '"ISBN";"Book-Title";"Book-Author";"Year-Of-Publication";"Publisher"'
COLUMNS += ";" + ";".join(f'"Image-URL-{size}"' for size in "SML")
BOOKS = r"""COLUMNS
"0393045218";"The Mummies of Urumchi; a story";"E. J. W. Barber";"1999";"W. W. Norton &amp; Company";IMAGES
"0425176428";"Said \"Étienne\"";"Robert Cowley";"0";"Berkley";IMAGES
"078946697X";"DK Readers: Creating the X-Men (Level 4)\";Michael Teitelbaum";"2000";"DK Publishing Inc";IMAGES
"0393045218";"The Mummies of Urumchi again";"E. J. W. Barber";"1999";"Norton";IMAGES
""".replace("IMAGES", IMAGES).replace("COLUMNS", COLUMNS)
RATINGS = '''"User-ID";"ISBN";"Book-Rating"
"276725";"0393045218";"0"
"276726";"0425176428";"5"
"276726";"0393045218";"9"
"276727";"078946697X";"8"
"276727";"0425176428"
"276727";"0425176428";"good"
'''  # fmt: skip


@pytest.fixture
def book_crossing(tmp_path: Path) -> Path:
    (tmp_path / "BX-Books.csv").write_bytes(BOOKS.encode("latin-1"))
    (tmp_path / "BX-Book-Ratings.csv").write_bytes(
        RATINGS.replace("\n", "\r\n").encode("latin-1")
    )
    return tmp_path


def test_book_crossing(book_crossing: Path) -> None:
    """Six ratings less one without a field, one that is no number and one of a book whose row is broken: three."""
    raw = checked(BookCrossing(str(book_crossing)).read())
    assert raw.interactions.select(IDS).rows() == [
        ("276725", "0393045218", None, 0, 1),
        ("276726", "0425176428", None, 5, 2),
        ("276726", "0393045218", None, 9, 3),
    ]
    assert raw.items.rows() == [
        (
            "0393045218",
            "The Mummies of Urumchi; a story",
            "E. J. W. Barber",
            "1999",
            "W. W. Norton & Company",
        ),
        ("0425176428", 'Said "Étienne"', "Robert Cowley", "", "Berkley"),
    ]
    assert list(raw.files) == ["BX-Book-Ratings.csv", "BX-Books.csv"]
    assert raw.left_out == (
        "BX-Book-Ratings.csv: 1 rows left out, the first is row 5: it does not have 3 fields",
        "BX-Book-Ratings.csv: 1 rows left out, the first is row 6: its rating is no number",
        "BX-Books.csv: 1 rows left out, the first is row 3: it does not have 8 fields",
        "BX-Books.csv: 1 rows left out, the first is row 4: it lists an item again",
        "BX-Book-Ratings.csv: 1 rows left out, the first is row 4: its item is not in BX-Books.csv",
    )


def test_what_a_reader_leaves_out_is_in_the_manifest(tmp_path: Path) -> None:
    """Rating 0 is the protocol's to drop: of 60 rows, a sixth."""
    lines = [f'"{i % 7}";"{i}";"{2 * (i % 6)}"' for i in range(60)]
    (tmp_path / "BX-Book-Ratings.csv").write_text(
        "\n".join([RATINGS.splitlines()[0], *lines, "broken"])
    )
    books = [f'"{i}";"Title {i}";"";"0";"";{IMAGES}' for i in range(60)]
    (tmp_path / "BX-Books.csv").write_text("\n".join([COLUMNS, *books]))
    protocol = Protocol(
        split="random", label="rating > 5", drop_ratings=[0], shares=[0.5, 0.3, 0.2]
    )
    manifest = apply_protocol(
        build_interactions(BookCrossing(str(tmp_path)).read(), protocol), protocol
    ).manifest
    assert (manifest["rows"], manifest["dropped"]) == (50, 10)
    words = "BX-Book-Ratings.csv: 1 rows left out, the first is row 61: it does not have 3 fields"
    assert manifest["left_out"] == [words]


REVIEW_2014 = {
    "reviewerID": "A1", "asin": "0000031852", "reviewerName": "J. \"Mac\" O'Neil", "helpful": [2, 3], "overall": 5.0,
    "unixReviewTime": 1252800000,
}  # fmt: skip
META_2014 = {
    "asin": "0000031852", "title": "Girls' Tutu &amp; Skirt", "price": 3.17, "brand": "Coxlures",
    "related": {"also_bought": ["B00JHONN1S"]}, "categories": [["Beauty", "Skin Care"], ["Beauty", "Gifts"]],
}  # fmt: skip
REVIEW_2018 = {
    "overall": 4.0,
    "verified": True,
    "reviewerID": "A1",
    "asin": "0000031852",
    "unixReviewTime": 1514764800,
}
META_2018 = {
    "category": ["Beauty", "Skin Care"], "title": "Girls' Tutu &amp;\n Skirt", "brand": "Coxlures",
    "asin": "0000031852",
}  # fmt: skip
REVIEW_2023 = {
    "rating": 3.0, "title": "ok", "asin": "B00VARIANT", "parent_asin": "0000031852", "user_id": "A1",
    "timestamp": 1588687728923,
}  # fmt: skip
META_2023 = {
    "title": "Girls' Tutu & Skirt", "price": None, "store": "Coxlures", "categories": ["Beauty", "Skin Care"],
    "details": {}, "parent_asin": "0000031852",
}  # fmt: skip


def amazon(
    folder: Path,
    reviews: list[Any],
    metadata: list[Any],
    write: Callable[[Any], str] = json.dumps,
    suffix: str = ".json.gz",
) -> RawLogs:
    """What is read of these lines; texts are written as they are."""
    paths = [folder / f"{name}{suffix}" for name in ("reviews", "meta")]
    for path, records in zip(paths, (reviews, metadata), strict=True):
        text = "".join((r if isinstance(r, str) else write(r)) + "\n" for r in records)
        path.write_bytes(
            gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode()
        )
    return checked(AmazonReviews(*map(str, paths)).read())


@pytest.mark.parametrize(
    ("review", "metadata", "write", "suffix", "time", "rating", "category"),
    [
        (
            REVIEW_2014,
            META_2014,
            repr,
            ".json.gz",
            1252800000,
            5,
            "Beauty, Skin Care, Gifts",
        ),
        (
            REVIEW_2014,
            META_2014,
            json.dumps,
            ".json",
            1252800000,
            5,
            "Beauty, Skin Care, Gifts",
        ),
        (
            REVIEW_2018,
            META_2018,
            json.dumps,
            ".json.gz",
            1514764800,
            4,
            "Beauty, Skin Care",
        ),
        (
            REVIEW_2023,
            META_2023,
            json.dumps,
            ".jsonl",
            1588687728.923,
            3,
            "Beauty, Skin Care",
        ),
    ],
    ids=["2014 literals", "2014", "2018", "2023"],
)
def test_every_edition_of_amazon_reviews(
    review: Any,
    metadata: Any,
    write: Any,
    suffix: str,
    time: float,
    rating: float,
    category: str,
    tmp_path: Path,
) -> None:
    """One form for all; milliseconds are seconds, lists are texts, a title is one line without entities."""
    raw = amazon(tmp_path, [review], [metadata], write, suffix)
    assert raw.interactions.select(IDS).rows() == [("A1", "0000031852", time, rating, 1)]
    expected = {
        "item_id": "0000031852",
        "title": "Girls' Tutu & Skirt",
        "brand": "Coxlures",
        "category": category,
    }
    assert raw.items.rows(named=True) == [expected]
    assert raw.left_out == ()
    assert set(raw.not_read) == set(review) - {
        name for names in REVIEW.values() for name in names
    }


def test_lines_of_amazon_that_are_left_out(tmp_path: Path) -> None:
    """Of nine lines three are reviews; of three by one user of one item the earliest stays. Nothing is executed."""
    of = REVIEW_2018.__or__
    reviews = [
        of({"unixReviewTime": 30}),
        of({"unixReviewTime": 10, "overall": 1.0}),
        of({"unixReviewTime": 20}),
        '{"overall": 5.0, "reviewerID": "A2", ',
        "[1, 2]",
        f"open({str(tmp_path / 'made')!r}, 'w')",
        of({"reviewerID": "A2", "overall": None}),
        of({"reviewerID": "A3", "overall": "many"}),
        of({"reviewerID": "A4", "asin": "B0"}),
    ]
    items = [
        META_2018,
        META_2018 | {"title": "Other"},
        META_2018 | {"asin": "B0", "title": "var t = getTime();"},
    ]
    raw = amazon(tmp_path, reviews, items)
    assert raw.interactions.select(IDS).rows() == [("A1", "0000031852", 10, 1, 2)]
    assert raw.items.height == 1
    assert not (tmp_path / "made").exists()
    assert [
        line.replace(" rows left out, the first is row", "") for line in raw.left_out
    ] == [
        "reviews.json.gz: 3 4: it is no object",
        "reviews.json.gz: 1 7: it has no overall or rating",
        "reviews.json.gz: 1 8: its time or rating is no number",
        "reviews.json.gz: 2 1: a later review of the same item by the same user",
        "meta.json.gz: 1 3: its title is a script",
        "meta.json.gz: 1 2: it lists an item again",
        "reviews.json.gz: 1 9: its item is not in meta.json.gz",
    ]


def test_files_that_are_no_dump(tmp_path: Path, book_crossing: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/BX-Book-Ratings\.csv does not exist"):
        BookCrossing(str(tmp_path / "nowhere")).read()
    with pytest.raises(DataError, match=r"nothing\.json does not exist"):
        AmazonReviews(str(tmp_path / "nothing.json"), "meta.json").read()
    with pytest.raises(
        DataError,
        match=r"reviews\.json\.gz: no row has reviewerID or user_id, .*first has stars",
    ):
        amazon(tmp_path, [{"stars": 5}], [META_2014])
    (book_crossing / "BX-Books.csv").write_text(
        BOOKS.replace("ISBN", "Number"), encoding="latin-1"
    )
    with pytest.raises(
        DataError, match=r"BX-Books\.csv: no row has ISBN; the first has Number, Book-Title"
    ):
        BookCrossing(str(book_crossing)).read()
