"""Names that say nothing: "item 483920" instead of a title, to tell what an LLM reads from what it has memorised.

Unusual here: the number is a salted hash of the item's id, so it is the same in every run, split and request, an item
that is added later changes nobody's name, and the order of the catalogue (often by date of release) is not in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from project.errors import ConfigError

DIGITS = 6
MOST = 500_000
"""Items that can be named: half of all numbers, so that an item whose number is taken soon finds a free one."""


def anonymous_titles(item_ids: Sequence[str]) -> list[str]:
    """A name for every item, all different.

    Args:
        item_ids: Ids of the items table, in its order; items that requests add come last.

    Raises:
        ConfigError: If there are more than `MOST` items.
    """
    if len(item_ids) > MOST:
        raise ConfigError(
            f"data.prompt.anonymise_titles is true and there are {len(item_ids):,} items; names of {DIGITS} digits are "
            f"enough for {MOST:,}. Use fewer items."
        )
    taken: set[int] = set()
    names = []
    for item_id in item_ids:
        digest = hashlib.sha256(f"anonymous title of {item_id}".encode()).digest()
        number = int.from_bytes(digest[:8], "big") % 10**DIGITS
        while number in taken:
            number = (number + 1) % 10**DIGITS
        taken.add(number)
        names.append(f"item {number:0{DIGITS}d}")
    return names
