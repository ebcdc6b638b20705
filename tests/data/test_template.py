"""Templates of prompts: cut where evidence stands, and nowhere else."""

from __future__ import annotations

import pytest

from project.data.template import field_names, split_template

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
                ("evidence", "item_rate"),
                ("static", "/10 near"),
                ("evidence", "vote"),
            ],
        ),
        (
            "{item_number+vote_number}{{{title}}}",
            [("number", "item_number+vote_number"), ("static", "{{{title}}}")],
        ),
    ],
)
def test_pieces(template: str, pieces: list[tuple[str, str]]) -> None:
    """Text and item fields between two places of evidence are one piece; braces that are text stay text."""
    assert split_template(template, ITEM_FIELDS, WORDED) == pieces


def test_fields() -> None:
    """In order, as often as they stand there; a template that is malformed has none here."""
    assert field_names("{title} {vote}{title}") == ["title", "vote", "title"]
    assert field_names("{title") == []
