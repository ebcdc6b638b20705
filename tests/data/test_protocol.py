import polars as pl
import pytest

from project.data.protocol import Protocol, label_expression
from project.errors import ConfigError


@pytest.mark.parametrize(
    ("rule", "labels"),
    [
        ("rating > 3", [0, 0, 1]),
        ("rating >= 3", [0, 1, 1]),
        ("rating<3", [1, 0, 0]),
        (" rating <= 3.0 ", [1, 1, 0]),
        ("rating == 3", [0, 1, 0]),
    ],
)
def test_label_rules(rule: str, labels: list[int]) -> None:
    """Each operator on the ratings 2, 3 and 4."""
    ratings = pl.DataFrame({"rating": [2.0, 3.0, 4.0]})
    assert ratings.select(label_expression(rule)).to_series().to_list() == labels


@pytest.mark.parametrize(
    "rule", ["", "rating", "stars > 3", "rating => 3", "rating > three", "rating > nan", "rating > 3 or 4"]
)
def test_unreadable_label_rule_names_the_key(rule: str) -> None:
    """A rule that cannot be read is quoted, with its YAML key and the right form."""
    with pytest.raises(ConfigError, match=r'data\.protocol\.label: .*"rating > 3"'):
        Protocol(label=rule).check()


@pytest.mark.parametrize("key", ["shares", "fold_shares"])
@pytest.mark.parametrize("shares", [[0.8, 0.1], [0.8, 0.1, 0.2], [1.2, -0.1, -0.1], []])
def test_shares_that_cannot_work_are_refused(key: str, shares: list[float]) -> None:
    """Three shares, none negative, sum 1."""
    with pytest.raises(ConfigError, match=rf"data\.protocol\.{key} is .*expected 3 shares"):
        Protocol(**{key: shares}).check()  # type: ignore[arg-type]


def test_shares_that_sum_to_one_only_in_decimal_pass() -> None:
    """.7 + .1 + .2 is not exactly 1 in binary, and is fine."""
    Protocol(shares=[0.7, 0.1, 0.2]).check()


@pytest.mark.parametrize("fold_shares", [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
def test_every_fold_is_needed(fold_shares: list[float]) -> None:
    """A fold without users would be found out after training."""
    with pytest.raises(ConfigError, match=r"data\.protocol\.fold_shares is .*of fold_shares none 0"):
        Protocol(fold_shares=fold_shares).check()


@pytest.mark.parametrize("key", ["minimum_history", "seed"])
def test_negative_numbers_are_refused(key: str) -> None:
    """minimum_history counts rows; NumPy knows no negative seed."""
    with pytest.raises(ConfigError, match=rf"{key} is -1"):
        Protocol(**{key: -1}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        (Protocol(), "global_time-80-10-10"),
        (Protocol(minimum_history=5), "global_time-80-10-10-h5"),
        (Protocol(split="user_time", shares=[0.7, 0.05, 0.25]), "user_time-70-5-25"),
        (Protocol(split="random", seed=3), "random-80-10-10-seed3"),
        (Protocol(split="leave_last", minimum_history=1), "leave_last-h1"),
        (Protocol(split="given"), "given"),
        (Protocol(name="mine", minimum_history=5), "mine"),
    ],
)
def test_name_is_made_from_what_matters(protocol: Protocol, name: str) -> None:
    """Derived names show split, shares, seed and minimum history where they apply; a given name stays."""
    assert protocol.resolved_name() == name
