"""Templates of prompts: which fields one names, and the pieces that a segment is put together from.

Unusual here: a template of segments is cut where evidence stands. Text and item fields between two such places are one
piece, since they are the same wherever an item stands and are tokenised once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import Formatter

from project.data.numbers import NUMBERS, fields_together
from project.errors import ConfigError


def tells_numbers(segment: str) -> bool:
    """Whether a template of segments has a field that is a learned token (see `project.data.numbers`)."""
    return any(fields_together(name) for name in field_names(segment))


def field_names(template: str) -> list[str]:
    """Fields of a template in order; of one that is malformed none, since `PromptEncoder` will say so."""
    try:
        return [name for _, name in _parsed(template, "template") if name is not None]
    except ConfigError:
        return []


def check_similar(template: str) -> None:
    """Raise `ConfigError` for a template of similar users' lists that has not the one field {titles}."""
    if [name for _, name in _parsed(template, "data.prompt.similar") if name is not None] != ["titles"]:
        raise ConfigError(
            f"data.prompt.similar is {template!r}: expected a template with the one field {{titles}}, for example "
            '"Similar users liked: {titles}\\n", or null for prompts without such lists.'
        )


def split_template(
    template: str, item_fields: Sequence[str], evidence_fields: Iterable[str]
) -> list[tuple[str, str]]:
    """The pieces of a template of segments.

    Args:
        template: The wording, with fields in braces.
        item_fields: Columns of the items table that it may name.
        evidence_fields: Evidence that it may tell as text.

    Returns:
        ("static", text with item fields), ("evidence", name) and ("number", name) pieces; no two static ones in a row.

    Raises:
        ConfigError: If it is malformed, empty, or names a field that nobody knows.
    """
    worded = list(evidence_fields)
    parts: list[tuple[str, str]] = []

    def add_static(text: str) -> None:
        if parts and parts[-1][0] == "static":
            parts[-1] = ("static", parts[-1][1] + text)
        elif text:
            parts.append(("static", text))

    for literal, name in _parsed(template, "data.prompt.segment"):
        add_static(literal.replace("{", "{{").replace("}", "}}"))
        if name is None:
            continue
        if name in item_fields:
            add_static("{" + name + "}")
        elif name in worded:
            parts.append(("evidence", name))
        elif fields_together(name):
            parts.append(("number", name))
        else:
            raise ConfigError(
                f"data.prompt.segment names the field {{{name}}}, which nobody knows. Item fields here: "
                f"{', '.join(item_fields)}; evidence fields: {', '.join([*worded, *NUMBERS])}; several "
                "numbers in one token, each once, as {item_number+taste_number}."
            )
    if not parts:
        raise ConfigError(
            "data.prompt.segment is empty: a segment needs at least one token before its answer."
        )
    return parts


def _parsed(template: str, key: str) -> list[tuple[str, str | None]]:
    try:
        return [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(f"{key} {template!r} is not a template: {error}.") from error
