"""transformers' own forward beside our full depth: `python -m research.library RUN OUT [CANDIDATES]`.

The weights are the same, one row a candidate, padded: two common ways to serve.

`Pointwise` puts every candidate behind its own copy of the history; `SharedPrefix` computes the history's keys and
values once and expands them over the candidates. Both read a history as one causal text. Our rule hides labels of one
second from each other, so there their logits differ a little from ours.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache

from project.data.requests import catalogue_requests
from project.engine.decisions import static_exits
from project.engine.engine import Engine
from project.engine.predict import Run
from project.engine.requests import PreparedRequest, Scored, prepare_requests
from project.loading import open_run
from project.model.module import ExitRecommender
from project.report.tables import render
from project.run import result_head, write_json

REQUESTS, ROUNDS = 4, 3
ABOUT = (
    "Seconds of our full depth over those of transformers' own forward on the same requests of test in turns, the "
    "history not cached: median of the rounds."
)
# most tokens of a batch of prompts, padding included; one prompt may have more
BATCH_TOKENS = 16_384


def library_model(module: ExitRecommender) -> Any:
    """The library's own base model on the module's weights, without its final norm (heads have one of their own)."""
    backbone = module.backbone
    assert backbone is not None
    factory: Any = AutoModel  # its constructors are not typed
    with torch.device("meta"):
        model = factory.from_config(deepcopy(backbone.config), attn_implementation="sdpa")
    model.layers.load_state_dict(backbone.layers.state_dict(), assign=True)
    model.embed_tokens = backbone.embed_tokens
    model.rotary_emb = backbone.rotary_emb
    model.norm = nn.Identity()
    # the argument was renamed in transformers 5.24
    names = inspect.signature(model.forward).parameters
    model.cache_argument = "cache" if "cache" in names else "past_key_values"
    return model.eval()


class Library:
    """Scores requests by the library's model and the deepest head; subclasses make batches of a request."""

    def __init__(self, module: ExitRecommender) -> None:
        self._model = library_model(module)
        self._depth = module.depth
        self._head = module.heads[str(module.depth)].eval()

    @torch.inference_mode()
    def score(self, requests: Sequence[PreparedRequest]) -> list[Scored]:
        """Raw logits of the deepest head."""
        scores = list[Scored]()
        for request in requests:
            logits, tokens = self._request(request)
            layers = np.full(len(request), self._depth, dtype=np.int64)
            found = torch.cat(logits).double().cpu().numpy()
            scores.append(Scored(request.request_id, found, layers, tokens * self._depth))
        return scores

    def _request(self, request: PreparedRequest) -> tuple[list[Tensor], int]:
        """Logits in batches, and the tokens that ran."""
        raise NotImplementedError

    def _logits(
        self, rows: list[Tensor], prefix: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> Tensor:
        """Logits (n,) at the last position of each row, behind a prefix's keys and values by layer."""
        tokens, mask, last = padded(rows, self._model.device)
        given: dict[str, Any] = {"use_cache": bool(prefix)}
        if prefix:
            cache = DynamicCache(config=self._model.config)
            n = len(rows)
            for index, (keys, values) in enumerate(prefix):
                cache.update(
                    keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), index
                )
            given[self._model.cache_argument] = cache
            mask = torch.cat([mask.new_ones(n, prefix[0][0].shape[2]), mask], dim=1)
        hidden = self._model(
            input_ids=tokens, attention_mask=mask, **given
        ).last_hidden_state
        logits: Tensor = self._head(
            hidden[torch.arange(len(last), device=hidden.device), last]
        )
        return logits


class Pointwise(Library):
    """One prompt per candidate, padded to the longest."""

    def _request(self, request: PreparedRequest) -> tuple[list[Tensor], int]:
        history = request.stream.tokens
        prompts = [
            np.concatenate([history, request.candidates[k]]) for k in range(len(request))
        ]
        at_once = max(1, BATCH_TOKENS // max(map(len, prompts)))
        rows = [torch.from_numpy(prompt) for prompt in prompts]
        logits = [self._logits(rows[k : k + at_once]) for k in range(0, len(rows), at_once)]
        return logits, sum(map(len, prompts))


class SharedPrefix(Library):
    """The history's keys and values once, expanded over the candidates, which follow as a padded batch.

    `cached` keeps the keys and values of every user's history between requests.
    """

    def __init__(self, module: ExitRecommender, cached: bool = False) -> None:
        super().__init__(module)
        self._cached = cached
        self._kept: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}

    def _request(self, request: PreparedRequest) -> tuple[list[Tensor], int]:
        prefix = self._kept.get(request.user)
        spent = len(request.candidates.values)
        if prefix is None:
            cache = DynamicCache(config=self._model.config)
            tokens = torch.from_numpy(request.stream.tokens)[None].to(self._model.device)
            self._model(
                input_ids=tokens, use_cache=True, **{self._model.cache_argument: cache}
            )
            layers: Any = cache.layers
            prefix = [(layer.keys, layer.values) for layer in layers]
            spent += len(request.stream)
        if self._cached:
            self._kept[request.user] = prefix
        rows = [torch.from_numpy(request.candidates[k]) for k in range(len(request))]
        return [self._logits(rows, prefix)], spent


def padded(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (n, T) padded on the right, their mask (n, T), and where each row ends (n,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
    return tokens.to(device), mask.to(device), (lengths - 1).to(device)


def speeds(
    opened: Run, number: int, candidates: int, others: Mapping[str, Library]
) -> tuple[dict[str, float], int]:
    """Seconds of our full depth over each runner's, the median of rounds, "engine" included; and how many requests.

    At most `number` requests of test with so many candidates, the same for all.
    """
    # 1. all on the same requests
    model = opened.model
    data = opened.data
    drawn = catalogue_requests(data.split, "test", number, candidates, data.seed)
    requests = prepare_requests(model, data, drawn.requests)
    engine = Engine(model, static_exits(opened.plan, model.depth))
    runners: dict[str, Engine | Library] = {"engine": engine, **others}
    # 2. rounds, one request at a time
    seconds = {name: np.zeros(ROUNDS) for name in runners}
    for k in range(ROUNDS):
        for request in requests:
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.score([request])
                seconds[name][k] += time.perf_counter() - start
    found = {
        name: float(np.median(seconds["engine"] / spent)) for name, spent in seconds.items()
    }
    return found, len(requests)


def measure(run: Path, candidates: int) -> dict[str, Any]:
    """The result of a calibrated run without adapters, which the library's class has not."""
    opened = open_run(run)
    model = opened.model
    data = opened.data
    others = {
        "prompt per candidate": Pointwise(model),
        "history shared": SharedPrefix(model),
    }
    found, count = speeds(opened, REQUESTS, candidates, others)
    head = result_head("study", data.split.manifest, str(run / "config.yaml"), data.seed)
    rows = [
        {"forward": name, "candidates": candidates, "requests": count, "speed": speed}
        for name, speed in found.items()
    ]
    return {**head, "rows": rows, "about": ABOUT}


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 64)
    print(render(found), write_json(Path(sys.argv[2]), found), sep="\n")
