"""Vectors of numbers lie on lines between knots; words keep theirs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from project.data.prompt import BYTE, LOWEST_ID, NUMBERS, SPAN, STEPS, STEPS_A_UNIT
from project.model.backbone import FIRST_KNOT, KNOTS, LAST_KNOT, NumberEmbedding


@pytest.fixture
def embedding() -> NumberEmbedding:
    """Twenty words of eight numbers each."""
    torch.manual_seed(0)
    return NumberEmbedding(nn.Embedding(20, 8))


def an_id(kind: int, value: float) -> int:
    """Of a number, by the definition in project.data.prompt."""
    return -(1 + round((value + SPAN) * STEPS_A_UNIT)) * BYTE**kind


def test_words_keep_their_vectors() -> None:
    """The table is the same tensor, frozen or not."""
    for frozen in (False, True):
        words = nn.Embedding(20, 8).requires_grad_(not frozen)
        found = NumberEmbedding(words)
        ids = torch.arange(20).view(4, 5)
        assert torch.equal(found(ids), words(ids))
        assert found.weight.data_ptr() == words.weight.data_ptr()
        assert found.weight.requires_grad is not frozen
        assert found.numbers.requires_grad


@pytest.mark.parametrize("kind", range(len(NUMBERS)))
def test_knots_and_lines(kind: int, embedding: NumberEmbedding) -> None:
    """At whole log-odds a knot, half-way the mean of two, a quarter in between, and beyond the last the last."""
    knots = embedding.numbers[kind]
    for place in range(KNOTS):
        value = FIRST_KNOT + place
        assert torch.allclose(embedding(torch.tensor(an_id(kind, value))), knots[place], atol=1e-6)
        if place + 1 < KNOTS:
            line = torch.lerp(knots[place], knots[place + 1], 0.25)
            assert torch.allclose(embedding(torch.tensor(an_id(kind, value + 0.25))), line, atol=1e-5)
    for value, knot in ((-SPAN, 0), (SPAN, -1)):
        assert abs(value) > max(-FIRST_KNOT, LAST_KNOT)
        assert torch.allclose(embedding(torch.tensor(an_id(kind, value))), knots[knot], atol=1e-6)


def test_several_numbers_are_summed(embedding: NumberEmbedding) -> None:
    """The id of all numbers is the sum of theirs, its vector the sum of theirs; the lowest has every highest value."""
    ids = [an_id(0, -1.3), an_id(2, 0.0), an_id(len(NUMBERS) - 1, 5.0)]
    apart = embedding(torch.tensor(ids)).sum(0)
    torch.testing.assert_close(embedding(torch.tensor(sum(ids))), apart)
    torch.testing.assert_close(embedding(torch.tensor(LOWEST_ID)), embedding.numbers[:, -1].sum(0))


def test_all_steps_have_vectors(embedding: NumberEmbedding) -> None:
    """Of the last number, and none beyond the last step."""
    ids = -torch.arange(1, STEPS + 1) * BYTE ** (len(NUMBERS) - 1)
    found = embedding(ids)
    assert found.isfinite().all()
    assert torch.equal(found[0], embedding.numbers[-1, 0])
    assert torch.equal(found[-1], embedding.numbers[-1, -1])


def test_gradients_reach_what_was_read(embedding: NumberEmbedding) -> None:
    """A number moves its two knots by their shares, a word its row, and nothing else; no number: zeros, not None."""
    embedding(torch.tensor([3, an_id(1, 0.25)])).sum().backward()  # type: ignore[no-untyped-call]
    numbers, words = embedding.numbers.grad, embedding.weight.grad
    assert numbers is not None
    assert words is not None
    expected = torch.zeros(len(NUMBERS), KNOTS)
    expected[1, 4:6] = torch.tensor([0.75, 0.25])
    torch.testing.assert_close(numbers.mean(-1), expected)
    assert words[3].eq(1).all()
    embedding.zero_grad()
    embedding(torch.tensor([3])).sum().backward()  # type: ignore[no-untyped-call]
    assert embedding.numbers.grad is not None
