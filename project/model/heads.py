"""Defines exit heads, which turn a hidden state at some depth into the logit of the answer.

A head starts as a share of the language model's own answer, logit(yes) - logit(no). Autocast is off in a head: bfloat16
has 128 steps between powers of two, and scores that tie cost AUC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from project.errors import ConfigError

START = 0.2
"""Share of the language model's own answer that a head starts with.

The whole answer is far too sure at shallow layers, where a log loss of 3 spoils the first steps of training.
"""


class ExitHead(nn.Module):
    """Own norm, since hidden states below the last layer have another scale than the final norm expects; one logit.

    The norm starts as a copy of the LM's final `norm`, the weights as START times `direction` (H,), see
    `Backbone.answer_direction`, the bias at 0.
    """

    def __init__(self, norm: nn.Module, direction: Tensor) -> None:
        super().__init__()
        # the backbone's is frozen
        self.norm = deepcopy(norm).float().requires_grad_(True)
        self.linear = nn.Linear(direction.numel(), 1)
        with torch.no_grad():
            # so an untrained head says START times what the language model says
            self.linear.weight.copy_(START * direction[None])
            self.linear.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """(n,) float32 logits of hidden states (n, H) at answer slots."""
        # see the header: float32 whatever the backbone computes in
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = self.linear(self.norm(hidden.to(self.linear.weight.dtype)))
            return logits.squeeze(-1).float()


def heads_digest(state: Mapping[str, Tensor]) -> str:
    """16 hex digits of the heads in a module's state: which heads made a score table.

    If the state is sharded, all processes must call this.
    """
    digest = hashlib.sha256()
    for name in sorted(n for n in state if n.startswith("heads.")):
        weights = state[name].detach()
        # a shard on this process says nothing about the others'
        whole = weights.full_tensor() if isinstance(weights, DTensor) else weights
        digest.update(name.encode() + whole.cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Token ids of the answers no and yes: every spelling that is a single token, the text as it stands first.

    Spellings are the text as it stands, then as given, lower case, capitalised and upper case, with and without a
    leading space. A single token that has no leading space stands alone: templates of chats ask for that one.
    """
    found = list[list[int]]()
    for answer in answers:
        word = answer.strip()
        cases = [word, word.lower(), word.capitalize(), word.upper()]
        spellings = [answer, *(" " + case for case in cases), *cases]
        ids = [
            tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings
        ]
        # a spelling of several tokens has no row of its own in the LM head
        single = [i[0] for i in ids if len(i) == 1 and i[0] != tokenizer.unk_token_id]
        if not single:
            raise ConfigError(
                f"data.prompt.answers: the tokenizer {tokenizer.name_or_path!r} has no single token for "
                f"{answer!r} (tried {', '.join(map(repr, dict.fromkeys(spellings)))}); "
                "choose a shorter or more common word."
            )
        if answer == word and len(ids[0]) == 1:
            single = single[:1]
        found.append(list(dict.fromkeys(single)))
    no, yes = found
    # a token on both sides would cancel out in the direction
    shared = sorted(set(no) & set(yes))
    if shared:
        raise ConfigError(
            f"data.prompt.answers is {list(answers)!r}: both have the token {shared[0]} of the tokenizer "
            f"{tokenizer.name_or_path!r}; expected two answers that differ by more than case and spaces."
        )
    return no, yes
