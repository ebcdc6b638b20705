"""Makes a tiny random model with four exits, random requests, and the scores of each candidate by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import AutoConfig

from project.data.prompt import BYTE, NUMBERS
from project.data.ragged import Ragged
from project.engine import PreparedRequest, StreamTokens
from project.exits.calibration import Calibration
from project.exits.criteria import Criterion, HeadOutputs, Ratio
from project.exits.plan import ExitPlan
from project.layout import Layout
from project.model.backbone import Backbone
from project.model.module import ExitRecommender, LoraSettings, add_lora

LAYERS, EXITS, VOCABULARY, FEATURES = 5, [1, 2, 3, 5], 64, 3


class _Answers:
    """A tokenizer that knows two words."""

    name_or_path, unk_token_id = "two words", None

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
    ) -> list[int]:
        return [{"no": 1, "yes": 2}.get(text.strip().lower(), 3)]


@dataclass
class World:
    """A module, requests and the raw outputs of every candidate at every head, computed one by one.

    `outputs[i]` has exit 0 first; logits as a score table keeps them: float32 numbers in float64.
    """

    module: ExitRecommender
    requests: list[PreparedRequest]
    outputs: list[HeadOutputs]

    def plan(self, criterion: Criterion, quantile: float, exit_0: bool = True) -> ExitPlan:
        """A plan whose thresholds let this share of all candidates leave at each exit they reach."""
        exits = tuple(self.module.exit_layers)
        layers = (0, *exits) if exit_0 else exits
        slopes = torch.linspace(1.2, 0.8, len(layers), dtype=torch.float64)
        values = torch.stack([slopes, 0.3 * slopes * exit_0, slopes - 1], dim=1)
        values[0, 1] = 0
        calibration = Calibration(layers, values)
        first = 0 if exit_0 else 1
        together = HeadOutputs(
            layers,
            calibration.apply(torch.cat([o.logits for o in self.outputs])[:, first:]),
            torch.cat([o.retrieved for o in self.outputs]),
        )
        # on other logits than the rows': a quantile of the rows' own confidence would lie
        # on one of them
        noise = torch.randn(
            together.logits.shape, generator=torch.Generator().manual_seed(0)
        ).double()
        criterion.fit(replace(together, logits=together.logits + 0.1 * noise))
        thresholds = []
        for head in range(len(layers) - 1):
            confidence = criterion.confidence(together.until(head))
            finite = confidence[confidence.isfinite()]
            thresholds.append(_between(finite, quantile) if len(finite) else torch.inf)
        limits = torch.tensor([*thresholds, -torch.inf], dtype=torch.float64)
        return ExitPlan(calibration, criterion, limits)

    def calibrated(self, plan: ExitPlan, request: int) -> HeadOutputs:
        """Calibrated outputs of one request's candidates."""
        raw, first = self.outputs[request], 0 if plan.exit_0 else 1
        return plan.calibrated(
            HeadOutputs(raw.layers[first:], raw.logits[:, first:], raw.retrieved)
        )


def _between(confidence: torch.Tensor, share: float) -> float:
    """A threshold in the widest gap near a quantile: at a row's own confidence rounding would decide."""
    ordered = confidence.sort(descending=True).values
    k = min(max(round(share * len(ordered)), 3), len(ordered) - 3)
    gaps = ordered[k - 3 : k + 2] - ordered[k - 2 : k + 3]
    best = k - 3 + int(gaps.argmax())
    return float((ordered[best] + ordered[best + 1]) / 2)


def with_thresholds(plan: ExitPlan, thresholds: Sequence[float]) -> ExitPlan:
    """The same calibration, and the most probable class's chance against other thresholds."""
    limits = torch.tensor(thresholds, dtype=torch.float64)
    return replace(plan, criterion=Ratio(), thresholds=limits)


def random_request(
    rng: np.random.Generator, name: str, segments: int, candidates: int
) -> PreparedRequest:
    """A stream of tied and untied segments after an instruction, candidates of 1 to 6 tokens, numbers among them."""
    lengths = rng.integers(1, 7, 1 + segments)
    group = np.concatenate([[0], 1 + np.cumsum(rng.random(segments) < 0.6)])[: 1 + segments]
    group -= np.concatenate([[0], np.full(segments, group[1] - 1 if segments else 0)])
    lists = Ragged.of([_tokens(rng, n) for n in lengths])
    own = Ragged.of([_tokens(rng, n) for n in rng.integers(1, 7, candidates)])
    return PreparedRequest(
        name,
        StreamTokens.of(lists, group.astype(np.int64)),
        own,
        rng.normal(size=candidates).astype(np.float32).astype(np.float64),
        rng.normal(size=(candidates, FEATURES)),
        name,
    )


def _tokens(rng: np.random.Generator, n: int) -> list[int]:
    """Words, and every fourth token or so a number, whose id is below zero."""
    found = rng.integers(-VOCABULARY // 3, VOCABULARY, n)
    number, step = -found % len(NUMBERS), -found * 10
    return np.where(found < 0, -step * BYTE**number, found).tolist()


def subset(request: PreparedRequest, index: np.ndarray) -> PreparedRequest:
    """The same request with only these candidates, in this order."""
    return replace(
        request,
        candidates=request.candidates.take(index),
        exit_0=request.exit_0[index],
        retrieved=request.retrieved[index],
    )


def alone(
    module: ExitRecommender, request: PreparedRequest, candidate: int
) -> torch.Tensor:
    """Logits of one candidate at every exit by the backbone's own layout and attention: no engine code."""
    stream, own = request.stream, request.candidates[candidate]
    s, n = len(stream), len(own)

    def row(shared: np.ndarray, mine: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([shared, mine]))[None]

    layout = Layout.build(
        sequence=torch.zeros(1, s + n, dtype=torch.int64),
        segment=row(stream.segment, np.full(n, 10_000)),
        group=row(stream.group, np.full(n, 10_000)),
        context=row(np.ones(s, dtype=bool), np.zeros(n, dtype=bool)),
        position=row(stream.position, s + np.arange(n)),
    )
    assert module.backbone is not None
    state, start, logits = module.backbone.embed(row(stream.tokens, own), layout), 0, []
    for layer in module.exit_layers:
        state, start = module.backbone.run(state, start, layer), layer
        logits.append(module.heads[str(layer)](state.hidden[0, -1:]))
    return torch.cat(logits)


def raw_outputs(module: ExitRecommender, request: PreparedRequest) -> HeadOutputs:
    """All candidates of a request, one by one."""
    found = [alone(module, request, c) for c in range(len(request))]
    exits = module.exit_layers
    logits = torch.stack(found) if found else torch.zeros(0, len(exits))
    exit_0 = torch.from_numpy(request.exit_0)[:, None]
    return HeadOutputs(
        (0, *exits),
        torch.cat([exit_0, logits.double()], dim=1),
        torch.from_numpy(request.retrieved),
    )


def make_module(
    seed: int = 0,
    family: str = "llama",
    exits: Sequence[int] = EXITS,
) -> ExitRecommender:
    """Five layers whose attention is far from uniform, heads that differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        pad_token_id=None,
        no_rope_layer_interval=3,  # of SmolLM3: an exit reads a layer without rotary positions
        initializer_range=0.2,
    )
    module = ExitRecommender("none", list(exits), numbers=True)
    module.set_backbone(Backbone.from_config(config), _Answers())
    for head in module.heads.values():
        torch.nn.init.normal_(head.linear.weight, std=0.2)
    return module.eval()


def make_adapted(std: float) -> ExitRecommender:
    """The same with LoRA adapters of rank 2, whose second factor has this standard deviation."""
    module = make_module()
    assert module.backbone is not None
    add_lora(module.backbone, LoraSettings(rank=2))
    for name, weights in module.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=std)
    return module.eval()
