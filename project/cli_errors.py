"""What is wrong with a command line or a YAML file, in one line: the key, its file, what fits there.

Unusual: jsonargparse finds the mistakes and says them over many lines after the whole usage. Its words are read here:
what another version of it words differently still comes through, only longer.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # as in project.export

from project.errors import ConfigError, ProjectError

CLASSES = {
    "exits.criterion": ("project.exits", "Criterion"),
    "exits.compare": ("project.exits", "Criterion"),
    "data.retriever": ("project.retrieval", "Retriever"),
}
UNKNOWN = re.compile(r"does not accept (?:option|nested key) '([^']+)'|unrecognized arguments: --([^\s=]+)")
INSIDE = re.compile(r"class_path '([^']+)':\s*(?:Option|Key) '([^']+)' is not")
KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)', re.DOTALL)
EXPECTED = re.compile(r"Expected an? (?:<class '([^']+)'>|typing\.(Literal\[.*?\]))")
GIVEN = re.compile(r"(?:Given|Got) value: (.*)|Expected a path but (\S+) either")
NO_CLASS = re.compile(r"import path string: |No module named '([^']+)'|module '[^']+' has no attribute")
SETTINGS = re.compile(r"Not a valid subclass of (\w+)")
NOISE = re.compile(
    r"Expected a path but|Does not validate against|Subtypes:|Errors:|Given value|Subclass types expect|"
    r"a class path \(str|a dict |Problem with given class_path|$"
)


def project_error_in(error: BaseException) -> ProjectError | None:
    """The error of this package that another one was raised from: unions of types bury them."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ProjectError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def check_verb(arguments: Sequence[str], verbs: Sequence[str]) -> None:
    """Refuse a first word that is no verb.

    Args:
        arguments: Of the command line.
        verbs: All there are.

    Raises:
        ConfigError: It names all verbs and the nearest.
    """
    if not arguments:
        raise ConfigError(
            f"python -m project needs a verb; expected one of {', '.join(verbs)}. Or try --help."
        )
    if not arguments[0].startswith("-") and arguments[0] not in verbs:
        near = _near(arguments[0], verbs)
        raise ConfigError(f"{arguments[0]} is no verb{near}; expected one of {', '.join(verbs)}.")


def one_line(message: str, arguments: Sequence[str], keys: Iterable[str]) -> ConfigError:
    """What jsonargparse says, in our words where they are shorter.

    Args:
        message: Its error.
        arguments: Of the command line, where --config names files.
        keys: All keys that there are.
    """
    try:
        said = _Said(arguments)
    except ConfigError as error:  # a file that is no YAML: jsonargparse does not say which
        return error
    if found := UNKNOWN.search(message):
        key = found[1] or found[2]
        return ConfigError(f"{key}{said.place(key)} is no key of the configuration{_near(key, keys)}.")
    if not (found := KEY.search(message)):
        return ConfigError(" ".join(message.split()))
    key, why = found[1], found[2]
    if inside := INSIDE.search(why):
        place, near = said.place(f"{key}.{inside[2]}"), _near(inside[2], _arguments(inside[1]))
        return ConfigError(f"{key}.{inside[2]}{place} is no argument of {inside[1]}{near}.")
    while found := KEY.search(why):  # an attribute, or one of several types
        key, why = found[1] if found[1].startswith(f"{key}.") else f"{key}.{found[1]}", found[2]
        why = why.partition("Expected a <class 'NoneType'>\n  Given")[0]  # what follows is about the whole
    return ConfigError(_said_of(key, said.place(key), why, bool(said.files)))


def _said_of(key: str, place: str, why: str, files: bool) -> str:
    """What is wrong with the value of a key."""
    given = GIVEN.search(why)
    value = next(filter(None, given.groups()), "") if given else ""
    lines = [line.strip().lstrip("- ") for line in why.splitlines()]
    reasons = [line for line in lines if not NOISE.match(line)]
    kinds = [found for line in reasons if (found := EXPECTED.match(line))]
    others = [line for line in reasons if not EXPECTED.match(line)]
    if value == "None" and not others:
        hint = "" if files else ": give --config FILE, such as configs/quickstart.yaml"
        return f"{key} is not set; expected {_words(kinds)}{hint}."
    is_value = f"{key}{place} is {value}" if value else f"{key}{place}"
    if not others:
        return f"{is_value}; expected {_words(kinds)}."
    text = "; ".join(others)
    if key in CLASSES and (lacks := NO_CLASS.search(text)) and _is_of(lacks[1], value):
        known = ", ".join(_classes(*CLASSES[key]))
        return f"{is_value}; expected a class: {known}, or one of your own."
    if settings := SETTINGS.fullmatch(text):
        return f"{is_value}; expected the keys of {settings[1]}{' or null' if kinds else ''}."
    return f"{is_value}: {text}."


def _is_of(module: str | None, path: str) -> bool:
    """Whether it is the class path itself that cannot be found, and not something that its module imports."""
    return module is None or f"{path}.".startswith(f"{module}.")


class _Said:
    """What the command line and its files say.

    Raises:
        ConfigError: A file is not YAML, or no keys and values.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        pairs = zip(["", *arguments], [*arguments, ""], strict=True)
        named = [
            value if name in ("--config", "-c") else name.removeprefix("--config=")
            for name, value in pairs
            if name in ("--config", "-c") or name.startswith("--config=")
        ]
        self._options = {name[2:].partition("=")[0] for name in arguments if name.startswith("--")}
        self.files = {name: _read(name) for name in named if os.path.isfile(name)}

    def place(self, key: str) -> str:
        """Where a key stands, in words; the command line goes before files, later files before earlier ones."""
        *parents, last = key.split(".")
        spellings = [key, ".".join([*parents, "init_args", last])]
        if any(f"{one}.".startswith(f"{option}.") for one in spellings for option in self._options):
            return ""
        found = [
            name for name, content in self.files.items() if any(_says(content, one) for one in spellings)
        ]
        return f" in {found[-1]}" if found else ""


def _read(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
        tab = " Indent with spaces, not with tabs." if "\\t" in str(error.problem) else ""
        raise ConfigError(f"{file}{where} is not YAML: {error.problem}.{tab}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{file} holds {found}; expected keys and values.")
    return content


def _says(content: Any, key: str) -> bool:
    if not isinstance(content, dict):
        return False
    first, _, rest = key.partition(".")
    return key in content or (first in content and (not rest or _says(content[first], rest)))


def _words(kinds: Iterable[re.Match[str]]) -> str:
    """Types as one says them."""
    names = {
        "NoneType": "null", "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false",
        "dict": "keys and values", "list": "a list",
    }  # fmt: skip
    literal = (("Literal[", ""), ("]", ""), ("'", ""), (", ", " or "))
    said = []
    for kind in kinds:
        word = names.get(kind[1], kind[1]) if kind[1] else kind[2]
        for old, new in literal if kind[2] else ():
            word = word.replace(old, new)
        said.append(word)
    return " or ".join(dict.fromkeys(said)) or "another value"


def _near(word: str, words: Iterable[str]) -> str:
    found = get_close_matches(word, list(words), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):  # a class inside a class, for example
        return []


def _classes(package: str, base: str) -> list[str]:
    """Class paths of what a package has of a kind."""
    module = import_module(package)
    found = [(name, getattr(module, name)) for name in module.__all__]
    kind = getattr(module, base)
    return [
        f"{package}.{name}"
        for name, other in found
        if inspect.isclass(other) and issubclass(other, kind) and not inspect.isabstract(other)
    ]
