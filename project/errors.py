"""Errors a user can act on.

Every message names what was found, where (file, row, column or YAML key), what was expected and what fixes it.
`python -m project` prints these without a traceback; everything else is a bug and keeps its traceback.
"""

from collections.abc import Sequence
from difflib import get_close_matches


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """A hint in brackets, or nothing."""
    found = get_close_matches(word, words, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


class ProjectError(Exception):
    """Base of all errors that are about input, not about this code."""

    def __str__(self) -> str:
        """The message; control characters out of the input are escaped, so that they do not reach a terminal."""
        return "".join(
            c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in super().__str__()
        )


class DataError(ProjectError):
    """Logs, items, splits or requests are not usable as they are."""


class ConfigError(ProjectError):
    """A YAML key has a value that cannot work."""


class SourceError(ProjectError):
    """A known data set or model could not be fetched, or is not what its checksum says."""


class CheckpointError(ProjectError):
    """A checkpoint does not belong to the configuration it was given with."""


class NotFittedError(ProjectError):
    """A model is asked for scores before it was trained."""


class NotCalibratedError(ProjectError):
    """Exits are asked for before thresholds were calibrated."""
