"""Matrix factorisation: what is stationary at its minimum, and what vectors find that biases cannot."""

from __future__ import annotations

import numpy as np

from project.metrics import auc
from project.retrieval.factorisation import Factorisation


def fitted(vector_penalty: float = 1.0, iterations: int = 500, stretch: int = 1):
    """Labels are the product of a factorisation and a kind; fitted on the first 1,500 of 2,000 rows. Logits of all
    rows.
    """
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, 2000), rng.integers(0, 20, 2000)
    mf, kind = rng.choice([-1, 1], 30), rng.choice([-1, 1], 20)
    label = (rng.random(2000) < 1 / (1 + np.exp(-2 * mf[user] * kind[item]))).astype(int)
    train = np.arange(2000) < 1500
    codes = stretch * user + stretch - 1
    model = Factorisation.fit(codes[train], item[train], label[train], 4, 2.0, vector_penalty, iterations)
    dot = (model.user_vectors[user] * model.item_vectors[item]).sum(1)
    logits = model.offset + model.user_bias[user] + model.item_bias[item] + dot
    return model, logits, (user, item, label, train)


def test_biases_are_stationary():
    """At the minimum penalty * b = sum of (label - p) over its rows, for each user and each item."""
    model, logits, (user, item, label, train) = fitted()
    left = label - 1 / (1 + np.exp(-logits))
    for codes, bias in ((user, model.user_bias), (item, model.item_bias)):
        pull = np.bincount(codes[train], left[train])
        np.testing.assert_allclose(2.0 * bias, pull, atol=0.05)
        assert np.abs(pull).max() > 1


def test_vectors_find_what_biases_cannot():
    """With vectors held at 0 held-out AUC is near .5, else > .8."""
    found = []
    for penalty in (1.0, 1e6):
        _, logits, (_, _, label, train) = fitted(vector_penalty=penalty)
        found.append(auc(logits[~train], label[~train]))
    assert found[0] > 0.8
    assert found[1] < 0.6


def test_how_codes_are_numbered_does_not_matter():
    """Fitting is deterministic and only the order of codes draws vectors: users 6, 13, 20 ... give the same logits."""
    first, again = fitted(iterations=20), fitted(iterations=20, stretch=7)
    np.testing.assert_array_equal(first[1], again[1])
    assert again[0].users[:3].tolist() == [6, 13, 20]
