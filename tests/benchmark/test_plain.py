"""What transformers does without us scores the same candidates: same weights, same tokens, same logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_engine import LAYERS, make_module, random_request

from project.benchmark.transformers import Pointwise, SharedPrefix, library_model
from project.data.ragged import Ragged
from project.engine import Engine, PreparedRequest, RowExits, StreamTokens
from project.errors import ConfigError
from project.exits.calibration import Calibration
from project.exits.criteria import Ratio
from project.exits.plan import ExitPlan
from project.exits.policy import Policy
from project.model.module import ExitRecommender, LoraSettings

RUNNERS: dict[str, Callable[..., Pointwise | SharedPrefix]] = {
    "pointwise": Pointwise,
    "shared_prefix, cold": SharedPrefix,
    "shared_prefix, warm": lambda module: SharedPrefix(module, cached=True),
}


@pytest.fixture(scope="module")
def module() -> ExitRecommender:
    """Random weights."""
    return make_module()


def untied(rng: np.random.Generator, name: str, segments: int, candidates: int) -> PreparedRequest:
    """A request whose history has one segment a second: there our visibility rule is plain causality."""
    request = random_request(rng, name, segments, candidates)
    lists = Ragged(request.stream.tokens, np.searchsorted(request.stream.segment, np.arange(segments + 2)))
    return replace(request, stream=StreamTokens.of(lists, np.arange(segments + 1)))


def raw_full(module: ExitRecommender) -> Engine:
    """Packed full depth, the deepest head's raw logit."""
    calibration = Calibration((LAYERS,), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    policy = Policy(Ratio(), torch.tensor([-torch.inf], dtype=torch.float64), (LAYERS,))
    return Engine(module, RowExits(ExitPlan(calibration, policy, exit_0=False)))


@pytest.mark.parametrize("name", RUNNERS)
def test_same_logits_as_the_engine(module: ExitRecommender, name: str) -> None:
    """Without ties the library's causal forward and ours agree to 1e-4, for one and many candidates, twice."""
    rng = np.random.default_rng(0)
    requests = [untied(rng, f"r{n}", segments, n) for n, segments in ((1, 5), (7, 3), (70, 4))]
    runner = RUNNERS[name](module)
    for _ in range(2):  # a kept history must not have grown
        found = runner.score(requests).requests
        for ours, theirs in zip(raw_full(module).score(requests).requests, found, strict=True):
            np.testing.assert_allclose(theirs.logits, ours.logits, atol=1e-4)
            assert (theirs.exit_layers == LAYERS).all()


def test_batches_do_not_matter(module: ExitRecommender) -> None:
    """One prompt at a time or all at once: padding is neither read nor scored."""
    request = untied(np.random.default_rng(1), "r", 6, 9)
    logits = [Pointwise(module, size).score([request]).requests[0].logits for size in (1, 10_000)]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_token_layers(module: ExitRecommender) -> None:
    """S stream and O own tokens of n candidates, L layers: (n S + O) L alone, (S + O) L shared, then O L."""
    request = untied(np.random.default_rng(2), "r", 4, 5)
    s, own = len(request.stream), len(request.candidates.values)
    assert Pointwise(module).score([request]).token_layers == (5 * s + own) * LAYERS
    shared = SharedPrefix(module, cached=True)
    assert [shared.score([request]).token_layers for _ in range(2)] == [(s + own) * LAYERS, own * LAYERS]


def test_no_weight_is_copied(module: ExitRecommender) -> None:
    """The library's model computes with the backbone's own tensors, and the backbone keeps its attention."""
    model, backbone = library_model(module), module.backbone
    assert backbone is not None
    mine = dict(backbone.layers.named_parameters())
    for name, weight in model.layers.named_parameters():
        assert weight.data_ptr() == mine[name].data_ptr()
    assert (model.config._attn_implementation, backbone.config._attn_implementation) == ("sdpa", "segments")


def test_adapters_are_refused(module: ExitRecommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA backbone has layers that the library's class does not know."""
    monkeypatch.setattr(module, "lora", LoraSettings())
    with pytest.raises(ConfigError, match=r"model\.lora is set"):
        library_model(module)
