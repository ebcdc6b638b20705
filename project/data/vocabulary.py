"""Context and users' attributes as tokens of prompts: an id has a digit for each column, which a backbone embeds.

Digit 0 is a value that is missing, or that train has too rarely for a vector of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from project.arrays import F64, I64
from project.data.ragged import Ragged
from project.features import Term

FIRST_KNOT, LAST_KNOT = -4.0, 4.0  # numbers beyond are clamped to these
KNOTS = 9  # one at every whole number
STEPS_A_UNIT = 10  # a number, standardised as exit 0 does, is rounded to .1
STEPS = int(LAST_KNOT - FIRST_KNOT) * STEPS_A_UNIT + 1
FIRST_CONTEXT_ID = -(2**57)  # ids from here down; those of numbers and items are above
MOST = (
    2**56
)  # values of a token: eight numbers or nine categories; more columns take another token
TOKENS = 64  # tokens of all columns at most
LOWEST_CONTEXT_ID = FIRST_CONTEXT_ID - MOST * TOKENS


class Vocabulary:
    """Columns that prompts show in a token: a category's frequent values, or how a number is standardised.

    `rows` are trained vectors, one after the other for each column: that of digit 0, then one of each value, or one of
    each knot. A number's vector lies on the line between the two nearest knots.
    """

    def __init__(self, terms: Sequence[Sequence[Any]] = ()) -> None:
        # prompts say missing and rare in one
        self.terms = [term for given in terms if (term := Term(*given)).kind != "missing"]
        self._columns = dict[str, list[Term]]()
        for term in self.terms:
            self._columns.setdefault(term.column, []).append(term)
        vectors = list(map(_vectors, self._columns.values()))  # by column
        # (digits of all columns, rows): what a digit takes of each vector
        self.shares: F64 = block_diag(*vectors)
        self.rows = self.shares.shape[1]
        # (4, columns): token, what one digit counts in its code, digits, and the first row of `shares`
        places = list[tuple[int, int, int, int]]()
        token = -1
        unit = MOST
        first = 0
        prefix = ""
        for column, digits in zip(self._columns, map(len, vectors), strict=True):
            if unit * digits > MOST or not column.startswith(prefix):
                token += 1
                unit = 1
            places.append((token, unit, digits, first))
            unit *= digits
            first += digits
            prefix = column.partition(".")[0]
        self.layout: I64 = np.array(places, dtype=np.int64).T

    def names(self) -> list[tuple[str, str, float | None]]:
        """What each of `rows` is of: column, kind, and the value or knot; None where that is missing or rare."""
        found = list[tuple[str, str, float | None]]()
        for column, terms in self._columns.items():
            kind = terms[0].kind
            values = [term.value for term in terms] if kind == "is" else range(KNOTS)
            found += [(column, kind, value) for value in (None, *values)]
        return found

    def tokens(self, prefix: str, values: Mapping[str, F64], n: int) -> list[Ragged]:
        """For n rows one of each token with columns of a prefix; a column that `values` lacks is missing."""
        missing = np.full(n, np.nan)
        found = dict[int, I64]()  # by token, ids (n,)
        for (column, terms), (token, unit, *_) in zip(
            self._columns.items(), self.layout.T.tolist(), strict=True
        ):
            if not column.startswith(prefix):
                continue
            value = values.get(column, missing)
            if terms[0].kind == "is":
                is_value = value[:, None] == np.array([term.value for term in terms])
                digit = np.where(is_value.any(1), 1 + is_value.argmax(1), 0)
            else:
                number = terms[0].scaled(value).clip(FIRST_KNOT, LAST_KNOT) - FIRST_KNOT
                digit = np.nan_to_num(1 + np.rint(number * STEPS_A_UNIT)).astype(np.int64)
            ids = found.get(token, FIRST_CONTEXT_ID - np.full(n, token))
            found[token] = ids - digit * (unit * TOKENS)
        return [Ragged(ids, np.arange(n + 1)) for ids in found.values()]


def _vectors(terms: Sequence[Term]) -> F64:
    """(digits, vectors) of a column: what a digit takes of each of its vectors."""
    if terms[0].kind == "is":
        return np.eye(1 + len(terms))
    place = np.arange(STEPS) / STEPS_A_UNIT
    found = np.zeros((1 + STEPS, 1 + KNOTS))
    found[0, 0] = 1
    # 1 at the value's own knot, linear to 0 at the next
    found[1:, 1:] = (1 - np.abs(place[:, None] - np.arange(KNOTS))).clip(min=0)
    return found
