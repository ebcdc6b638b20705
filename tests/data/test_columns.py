from datetime import UTC, date, datetime, timedelta, timezone

import polars as pl
import pytest

from project.data.tables import finite_number, ids, plain_text, refuse, seconds
from project.errors import DataError

MAY_2 = 86_400 * (365 + 31 + 28 + 31 + 30 + 1)  # seconds from 1970 to 1971-05-02


@pytest.mark.parametrize(
    "text",
    [
        "1971-05-02",
        "1971-05-02T00:00:00",
        "1971-05-02T00:00:00Z",
        "1971-05-02 02:00:00+02:00",
        f" {MAY_2}.0 ",
    ],
)
def test_timestamp_texts_of_one_moment_are_equal(text: str) -> None:
    """A timestamp may be a number or an ISO date; without a zone it is UTC."""
    assert finite_number(pl.Series("timestamp", [text]), "f", "c").to_list() == [MAY_2]


@pytest.mark.parametrize(
    "moment",
    [
        date(1971, 5, 2),
        datetime(1971, 5, 2),
        datetime(1971, 5, 2, tzinfo=UTC),
        datetime(1971, 5, 2, 2, tzinfo=timezone(timedelta(hours=2))),
    ],
)
def test_timestamp_types_of_one_moment_are_equal(moment: date) -> None:
    """Typed date columns become the same seconds, whatever their zone."""
    assert finite_number(pl.Series("timestamp", [moment]), "f", "c").to_list() == [MAY_2]


def test_fractions_of_a_second_survive() -> None:
    """Milliseconds are kept: they order interactions."""
    assert finite_number(pl.Series("timestamp", ["1970-01-01T00:00:01.250"]), "f", "c").to_list() == [1.25]


@pytest.mark.parametrize("value", ["four", "NaN", "inf", "-inf", None])
@pytest.mark.parametrize("name", ["rating", "timestamp"])
def test_what_is_not_a_finite_number_names_its_place(name: str, value: str | None) -> None:
    """The message has file, data row from 1, the file's own column name, the value and how many there are."""
    with pytest.raises(DataError) as caught:
        finite_number(pl.Series(name, ["1", value, value]), "log.csv", "theirs")
    message = str(caught.value)
    assert message.startswith("log.csv, row 2: column theirs is ")
    assert (repr(value) if value else "empty") in message
    assert "2 of 3 rows" in message


def test_a_date_is_not_a_rating() -> None:
    """Only a timestamp may be an ISO date, or a typed one."""
    with pytest.raises(DataError, match="'2024-01-01'"):
        finite_number(pl.Series("rating", ["2024-01-01"]), "f", "c")
    with pytest.raises(DataError, match="f: column c has the type Date; expected numbers"):
        finite_number(pl.Series("rating", [date(2024, 1, 1)]), "f", "c")


@pytest.mark.parametrize("kind", [pl.Categorical, pl.Enum(["4", "1971-05-02"])])
def test_categories_are_read_as_their_text(kind: pl.DataType) -> None:
    """A rating or timestamp that was stored as categories is what its words say."""
    assert finite_number(pl.Series("rating", ["4"], kind), "f", "c").to_list() == [4]
    assert finite_number(pl.Series("timestamp", ["4", "1971-05-02"], kind), "f", "c").to_list() == [4, MAY_2]


def test_a_label_may_be_true_or_false() -> None:
    """As text in any case, or typed; a rating may not."""
    assert finite_number(pl.Series("label", ["True", " false", "1"]), "f", "c").to_list() == [1, 0, 1]
    assert finite_number(pl.Series("label", [True, False]), "f", "c").to_list() == [1, 0]
    with pytest.raises(DataError, match="column c is 'yes'; expected 0 or 1, or true or false"):
        finite_number(pl.Series("label", ["1", "yes"]), "f", "c")
    with pytest.raises(DataError, match="expected a finite number"):
        finite_number(pl.Series("rating", ["true"]), "f", "c")


def test_empty_values_stay_where_they_may() -> None:
    """An optional number may be missing, not wrong; rows are still counted from the first."""
    assert finite_number(pl.Series("rating", [None, 4]), "f", "c", optional=True).to_list() == [None, 4]
    with pytest.raises(DataError, match=r"row 2: column c is 'x'.* 1 of 2 rows"):
        finite_number(pl.Series("rating", [None, "x"]), "f", "c", optional=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pl.Series("item_id", [{"a": 1}]), "the type Struct"),
        (pl.Series("item_id", [b"\xff"]), "the type Binary"),
    ],
)
def test_types_that_are_no_value_are_refused(values: pl.Series, words: str) -> None:
    """One line instead of polars' own error, for text and for numbers."""
    with pytest.raises(DataError, match=f"f: column c has {words}.*expected text or numbers"):
        ids(values, "f", "c")
    with pytest.raises(DataError, match=r"f: column c has the type .*; expected numbers"):
        finite_number(values, "f", "c")


@pytest.mark.parametrize("value", ["", "  ", None])
def test_empty_text_is_refused(value: str | None) -> None:
    """An id or title that is empty or blank is an error at its row."""
    with pytest.raises(DataError, match=r"f, row 2: column c is empty \(1 such rows\)"):
        ids(pl.Series("title", ["a", value]), "f", "c")


def test_integer_ids_become_text() -> None:
    """Typed integer ids read as their digits."""
    assert ids(pl.Series("user_id", [7, 12]), "f", "c").to_list() == ["7", "12"]


def test_lists_become_text_and_structs_are_refused() -> None:
    """A list attribute is joined; a nested one is an error that names the column."""
    assert plain_text(pl.Series("genres", [["Comedy", "Drama"], []]), "f", "genres").to_list() == [
        "Comedy, Drama",
        "",
    ]
    for nested in ([{"a": 1}], [[["a"]]]):
        with pytest.raises(DataError, match="column genres has the type"):
            plain_text(pl.Series("genres", nested), "f", "genres")


def test_values_outside_the_allowed_ones_are_refused_and_null_is_not() -> None:
    """The first wrong value is named with the allowed ones."""
    refuse(pl.Series("split", ["a", None]), ["a"], "f", "c")
    with pytest.raises(DataError, match=r"f, row 3: column c is 'x' \(2 such rows\); allowed are a, b\."):
        refuse(pl.Series("split", ["a", None, "x", "y"]), ["a", "b"], "f", "c")


NOW = 1_715_938_200.0


def test_milliseconds_become_seconds() -> None:
    """A whole column of them; as seconds it would lie after the year 5138."""
    assert seconds(pl.Series([NOW * 1000, NOW * 1000 + 500]), "f", "c").to_list() == [NOW, NOW + 0.5]
    assert seconds(pl.Series([0.0, NOW]), "f", "c").to_list() == [0.0, NOW]


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (
            [NOW, NOW + 1, NOW * 1000],
            "f: column c mixes .* row 1 is 1715938200, row 3 is 1715938200000 \\(1 of 3",
        ),
    ],
)
def test_times_that_are_no_seconds_are_refused(times: list[float], words: str) -> None:
    """The rows are named."""
    with pytest.raises(DataError, match=words):
        seconds(pl.Series(times), "f", "c")
