import re

import numpy as np
import pytest

from project.data import anonymous
from project.data.anonymous import anonymous_titles
from project.errors import ConfigError


def test_names_are_stable() -> None:
    """An item's name does not change with the items that are added later, nor with the order before it. Golden."""
    ids = [f"i{k}" for k in range(2000)]
    names = anonymous_titles(ids)
    assert anonymous_titles([*ids, "new"])[:2000] == names
    assert anonymous_titles(["i0"]) == names[:1]
    assert anonymous_titles(ids[:3]) == names[:3]
    assert all(re.fullmatch(r"item \d{6}", name) for name in names)


def test_names_are_different_and_say_nothing() -> None:
    """No two items share a name (of 20,000 hashes of six digits some 200 collide), and numbers do not follow order."""
    names = anonymous_titles([str(k) for k in range(20_000)])
    assert len(set(names)) == 20_000
    numbers = np.array([int(name.split()[1]) for name in names])
    assert abs(np.corrcoef(numbers, np.arange(20_000))[0, 1]) < 0.03  # four standard errors


def test_too_many_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """More items than names are refused, with the key."""
    monkeypatch.setattr(anonymous, "MOST", 2)
    with pytest.raises(ConfigError, match=r"data\.prompt\.anonymise_titles.*3 items"):
        anonymous_titles(["a", "b", "c"])
