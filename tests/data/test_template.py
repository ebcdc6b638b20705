"""Templates of prompts: cut where retrieved features stands, and nowhere else."""

from __future__ import annotations

import pytest

from project.data.prompt import field_names, split_template
from project.errors import ConfigError

ITEM_FIELDS = ["title", "year"]
WORDED = ["item_rate", "vote"]


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        ("{title} ({year}):", [("static", "{title} ({year}):")]),
        (
            "{title} all{item_rate}/10 near{vote}",
            [
                ("static", "{title} all"),
                ("retrieved", "item_rate"),
                ("static", "/10 near"),
                ("retrieved", "vote"),
            ],
        ),
        (
            "{item_number+vote_number}{{{title}}}",
            [("number", "item_number+vote_number"), ("static", "{{{title}}}")],
        ),
        ("{title:.40} {vote}", [("static", "{title:.40} "), ("retrieved", "vote")]),
    ],
)
def test_pieces(template: str, pieces: list[tuple[str, str]]) -> None:
    """Text and item fields between two places of retrieved features are one piece; braces that are text stay text."""
    assert split_template(template, ITEM_FIELDS, WORDED) == pieces


def test_fields() -> None:
    """In order, as often as they stand there; a template that is malformed has none here."""
    assert field_names("{title} {vote}{title}") == ["title", "vote", "title"]
    assert field_names("{title") == []
    assert field_names("{title:.40}{vote!r}") == ["title", "vote"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{title!r}",
            r"has the field {title!r}; expected {title}, or {title:\.40} for at most 40 characters",
        ),
        *(
            (f"{{title:{spec}}}", r"expected {title}, or {title:\.40}")
            for spec in (".0", ">9", "9", "9.9", ".3s", "." + 20 * "9")
        ),
        ("{vote:.1}", r"has the field {vote:\.1}; expected {vote} alone"),
        ("{item_number:.1}", "expected {item_number} alone"),
        (
            "{a.b}",
            "field {a.b}, which is unknown. Item fields here: title, year, mf, vote_number;",
        ),
        ("{x[1]}", "which is unknown"),
        ("{7}", "which is unknown"),
        ("{mf}", "a retrieved feature and also a column of your items.*item_columns: {my_mf: mf}"),
        ("{vote_number}", "a retrieved feature and also a column of your items"),
    ],
)
def test_fields_that_cannot_be_filled(template: str, words: str) -> None:
    """Formats but a length, names that Python takes apart, and names that mean two things."""
    fields = [*ITEM_FIELDS, "mf", "vote_number", "a.b", "x[1]", "7"]
    with pytest.raises(ConfigError, match=words):
        split_template(template, fields, [*WORDED, "mf"])


def test_a_column_may_have_the_name_of_retrieved_that_is_not_told() -> None:
    """Only what the template names matters."""
    assert split_template("{title}", ["title", "vote"], WORDED) == [("static", "{title}")]
