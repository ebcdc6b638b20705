"""Templates of prompts: which fields one names, and the pieces that a segment is put together from.

Unusual here: a template of segments is cut where evidence stands. Text and item fields between two such places are one
piece, since they are the same wherever an item stands and are tokenised once. Of Python's formats an item field knows
the length alone, {title:.40}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import NamedTuple

from project.data.numbers import NUMBERS, fields_together
from project.errors import ConfigError

_AT_MOST = re.compile(r"\.[1-9]\d{0,5}")  # a format that shortens
_NO_NAME = re.compile(r"\d*|.*[.\[\]].*")  # what Python would not look up as one word


class _Field(NamedTuple):
    """A field of a template, as {name!conversion:spec}."""

    name: str
    spec: str = ""
    conversion: str | None = None

    def __str__(self) -> str:
        conversion = f"!{self.conversion}" if self.conversion else ""
        return "{" + self.name + conversion + (f":{self.spec}" if self.spec else "") + "}"


def tells_numbers(segment: str | None) -> bool:
    """Whether a template of segments has a field that is a learned token (see `project.data.numbers`); None: it has."""
    return segment is None or any(fields_together(name) for name in field_names(segment))


def field_names(template: str) -> list[str]:
    """Fields of a template in order; of one that is malformed none, since `PromptEncoder` will say so."""
    try:
        return [field.name for _, field in _parsed(template, "template") if field is not None]
    except ConfigError:
        return []


def default_segment(columns: Sequence[str], numbers: Sequence[str]) -> str:
    """A template of segments: item columns, then all numbers in one token.

    Args:
        columns: Columns of the items table; those that a template cannot name are left out.
        numbers: Of `project.data.numbers.NUMBERS`.
    """
    named = [name for name in columns if not _NO_NAME.fullmatch(name)]
    return ", ".join(f"{{{name}}}" for name in named) + f"{{{'+'.join(numbers)}}}"


def check_similar(template: str) -> None:
    """Raise `ConfigError` for a template of similar users' lists that has not the one field {titles}."""
    fields = [field.name for _, field in _parsed(template, "data.prompt.similar") if field is not None]
    if fields != ["titles"]:
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
        ConfigError: If it is malformed, empty, or has a field that nobody knows, that two know, or in a format.
    """
    worded = list(evidence_fields)
    own = [name for name in item_fields if not _NO_NAME.fullmatch(name)]
    parts: list[tuple[str, str]] = []

    def add_static(text: str) -> None:
        if parts and parts[-1][0] == "static":
            parts[-1] = ("static", parts[-1][1] + text)
        elif text:
            parts.append(("static", text))

    for literal, field in _parsed(template, "data.prompt.segment"):
        add_static(literal.replace("{", "{{").replace("}", "}}"))
        if field is None:
            continue
        name = field.name
        if name not in [*own, *worded] and not fields_together(name):
            raise ConfigError(
                f"data.prompt.segment names the field {{{name}}}, which nobody knows. Item fields here: "
                f"{', '.join(own)}; evidence fields: {', '.join([*worded, *NUMBERS])}; several "
                "numbers in one token, each once, as {item_number+taste_number}."
            )
        _check_field(field, name in own, name in worded or name in NUMBERS)
        if name in own:
            add_static(str(field))
        else:
            parts.append(("evidence" if name in worded else "number", name))
    if not parts:
        raise ConfigError(
            "data.prompt.segment is empty: a segment needs at least one token before its answer."
        )
    return parts


def _check_field(field: _Field, own: bool, evidence: bool) -> None:
    """Refuse a field that is both the items' own and evidence, and formats that are not for it."""
    if own and evidence:
        raise ConfigError(
            f"data.prompt.segment names the field {{{field.name}}}, which is evidence and also a column of your items. "
            "Give the column another name, for example data.logs.init_args.item_columns: "
            f"{{my_{field.name}: {field.name}}}."
        )
    if field.conversion or (field.spec and not (own and _AT_MOST.fullmatch(field.spec))):
        expected = f"{{{field.name}}}"
        expected += f", or {{{field.name}:.40}} for at most 40 characters of it" if own else " alone"
        raise ConfigError(f"data.prompt.segment has the field {field}; expected {expected}.")


def _parsed(template: str, key: str) -> list[tuple[str, _Field | None]]:
    """(text, field behind it) pairs."""
    try:
        return [
            (literal, None if name is None else _Field(name, spec or "", conversion))
            for literal, name, spec, conversion in Formatter().parse(template)
        ]
    except ValueError as error:
        raise ConfigError(f"{key} {template!r} is not a template: {error}.") from error
