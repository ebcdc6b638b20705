"""Calibration: maximum likelihood per head, with exit 0 and without, and the bound on slopes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from project.exits.calibration import MINIMUM_SLOPE, fit_calibration
from project.metrics import auc

LAYERS = (0, 4, 8)


def heads(n=3000, seed=0):
    """Three heads of logits that all know something, each in a part of its own, and labels."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    logits = parts.cumsum(dim=1) * torch.tensor([1.0, 0.5, 3.0]) + torch.tensor(
        [0.0, 2.0, -5.0]
    )
    chance = torch.sigmoid(0.7 * parts.sum(dim=1) - 0.4)
    return logits, (torch.rand(n, generator=generator, dtype=torch.float64) < chance).long()


def test_without_prior_equals_sklearn_and_keeps_auc():
    """Per head the unpenalised logistic regression of scikit-learn, and exactly the head's own AUC."""
    logits, labels = heads()
    calibration = fit_calibration(logits, labels, LAYERS, exit_0=False)
    scores = calibration.apply(logits)
    for k in range(3):
        reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
            logits[:, [k]], labels
        )
        expected = [reference.coef_[0, 0], 0.0, reference.intercept_[0]]
        assert calibration.values[k].tolist() == pytest.approx(expected, abs=1e-5)
        assert auc(scores[:, k], labels) == auc(logits[:, k], labels)


def test_with_prior_equals_sklearn():
    """Exit 0 has b = 0; deeper heads equal the unpenalised logistic regression on both logits."""
    logits, labels = heads()
    values = fit_calibration(logits, labels, LAYERS, exit_0=True).values
    assert values[0, 1] == 0
    for k in (1, 2):
        reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
            logits[:, [k, 0]], labels
        )
        assert values[k].tolist() == pytest.approx(
            [*reference.coef_[0], *reference.intercept_], abs=1e-5
        )


def test_slopes_stay_positive():
    """A head that ranks backwards gets the least slope, and the offset and exit 0 that are best beside it."""
    logits, labels = heads()
    logits[:, 2] = -logits[:, 2]
    values = fit_calibration(logits, labels, LAYERS, exit_0=True).values
    assert values[2, 0] == pytest.approx(MINIMUM_SLOPE)
    rest = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, [0]], labels)
    assert float(values[2, 1]) == pytest.approx(rest.coef_[0, 0], rel=0.02)


def test_a_perfect_head_stays_finite():
    """A head that separates the classes has no maximum likelihood; the ridge keeps it finite and its AUC 1."""
    labels = torch.arange(100) % 2
    logits = torch.stack(
        [labels * 2.0 - 1 + 0.001 * torch.arange(100), torch.randn(100)], dim=1
    )
    calibration = fit_calibration(logits, labels, (2, 4), exit_0=False)
    assert calibration.values.isfinite().all()
    assert auc(calibration.apply(logits)[:, 0], labels) == 1


def test_scale_of_the_logits_does_not_matter():
    """Logits 100 times as large and shifted give the same calibrated scores (slopes stay above their bound)."""
    logits, labels = heads()
    expected = fit_calibration(logits, labels, LAYERS, exit_0=True).apply(logits)
    moved = logits * 100 + 50
    torch.testing.assert_close(
        fit_calibration(moved, labels, LAYERS, exit_0=True).apply(moved), expected
    )


def test_applies_head_by_head():
    """The first heads alone (what an engine has) get the scores that they get among all, in their own type."""
    logits, labels = heads()
    calibration = fit_calibration(logits, labels, LAYERS, exit_0=True)
    assert torch.equal(calibration.apply(logits[:, :2]), calibration.apply(logits)[:, :2])
    assert calibration.apply(logits.float()).dtype == torch.float32
