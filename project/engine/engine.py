"""The engine: scores requests in stages of the trunk, and what has left does not run.

Unusual here: static depth and full depth are the same loop with a decision that is known beforehand (`static_exits`),
so it meets no head, no transfer and no gather on its way: the fastest packed path, and what speed is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from project.engine.batch import EngineBatch
from project.engine.decisions import Decision
from project.engine.packed import packed
from project.engine.parts import Parts
from project.engine.prepared import PreparedRequest
from project.engine.rotary import RotaryTable
from project.engine.scored import Scored, Scores
from project.engine.stream_cache import StreamCache
from project.errors import ConfigError

if TYPE_CHECKING:
    from project.model.module import ExitRecommender


# From so many tokens on, an exit's layer runs at answer positions first: who leaves saves the rest of the layer,
# who stays pays its fixed part twice. If half of the candidates leave, break-even is that part, in tokens, over .39.
# On a CPU, packed float32 layers of SmolLM2-135M: their weights take as long to read as 24 tokens to multiply (218
# GFLOP/s, 18 GB/s in results/whole_trunk_alone/benchmark.json), so 62. Elsewhere launches decide; not measured.
READ_TOKENS, READ_TOKENS_ELSEWHERE = 64, 4096


class Engine:
    """Scores prepared requests with a module whose exits somebody decides about.

    The module is put into eval mode. On a CPU the engine packs the trunk's weights (`packed`), which is a second copy
    of them; engines share it if each is given the same module whose trunk is packed already. Use one engine from one
    thread at a time.

    Args:
        module: With its trunk and heads.
        decision: Who leaves where.
        cache: Keeps users' streams between requests; None runs every stream anew.
        batch_tokens: Tokens of a batch at most; one request may be more.
        read_tokens: Where candidates may leave and so many tokens run, the exit's layer is read at answer positions
            before it runs whole; None: 64 on a CPU, 4,096 elsewhere. Moves scores by rounding only.

    Raises:
        ConfigError: The decision is about exits that the module does not have.
    """

    def __init__(
        self,
        module: ExitRecommender,
        decision: Decision,
        cache: StreamCache | None = None,
        batch_tokens: int = 16_384,
        read_tokens: float | None = None,
    ) -> None:
        assert module.trunk is not None
        unknown = set(decision.layers) - {0, *module.exit_layers}
        if unknown:
            raise ConfigError(
                f"the exits to decide about are at layers {decision.layers}, but the model has {module.exit_layers}; "
                "run the verb calibrate with this checkpoint"
            )
        self.cache, self.batch_tokens = cache, batch_tokens
        trunk, heads = packed(module.trunk.eval()), module.heads.eval()
        if read_tokens is None:
            on_cpu = trunk.embed_tokens.weight.device.type == "cpu"
            read_tokens = READ_TOKENS if on_cpu else READ_TOKENS_ELSEWHERE
        self._parts = Parts(trunk, heads, decision, cache, RotaryTable(trunk), read_tokens)
        self._vocabulary = trunk.vocabulary

    @torch.inference_mode()
    def score(self, requests: Sequence[PreparedRequest]) -> Scores:
        """Score requests; one that is unusable gets an error of its own and costs the others nothing.

        Args:
            requests: In any order, several of one user included.
        """
        found: dict[int, Scored] = {}
        usable = list[int]()
        for i, request in enumerate(requests):
            error = request.trouble(self._vocabulary)
            if error is None and len(request):
                usable.append(i)
            else:
                nothing = np.full(len(request), np.nan), np.full(len(request), -1)
                found[i] = Scored(request.request_id, *nothing, error=error)
        scores = Scores([])
        for members in self._batches(requests, usable):
            batch = EngineBatch(self._parts, [requests[i] for i in members], scores)
            found.update(zip(members, batch.run(), strict=True))
        scores.requests = [found[i] for i in range(len(requests))]
        return scores

    def _batches(self, requests: Sequence[PreparedRequest], usable: list[int]) -> Iterator[list[int]]:
        """In their order; with a cache, requests of one user go one after the other: the later reads the earlier."""
        members, users, tokens = list[int](), set[object](), 0
        for i in usable:
            request = requests[i]
            size = len(request.stream) + len(request.candidates.values)
            again = self.cache is not None and request.user is not None and request.user in users
            if members and (again or tokens + size > self.batch_tokens):
                yield members
                members, users, tokens = [], set(), 0
            members.append(i)
            users.add(request.user)
            tokens += size
        if members:
            yield members
