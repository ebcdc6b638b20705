"""Tests ExitRecommender without a Trainer: scores of packed batches, the loss over processes, checkpoints.

Prompts are characters (`world.Letters`); weights are random and ten times the usual size, so that attention is far
from uniform and an answer that leaks moves the logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor
from world import Letters, dense_mask, read_split, streams_without_retrieved

from project.data.batch import Batch, pack
from project.data.protocol import Protocol
from project.data.stream import Streams, Window
from project.errors import CheckpointError, ConfigError, NotFittedError
from project.model.backbone import Backbone
from project.model.heads import START
from project.model.module import ExitRecommender, LoraSettings, exit_loss
from project.model.sharding import shared_mesh
from research.packing import prompts_of

Make = Callable[..., ExitRecommender]
EXITS = [1, 3]


class Answers(Letters):
    name_or_path = "letters"
    unk_token_id = None


@pytest.fixture(scope="module")
def streams(tiny_logs: Path) -> Streams:
    """Test targets with all readable rows; every 25 instants are made one, so that many rows tie."""
    found = streams_without_retrieved(
        read_split(tiny_logs, Protocol(minimum_history=1)), "test"
    )
    return replace(found, timestamp=found.timestamp // 25)


@pytest.fixture
def make(tiny_config: Callable[..., Any]) -> Make:
    """Makes a module over a three-layer random backbone, the same weights every time; without dropout."""

    def module(
        exit_layers: list[int] = EXITS, backbone: str = "letters", **settings: Any
    ) -> ExitRecommender:
        torch.manual_seed(0)
        settings = {"freeze_embeddings": False} | settings
        made = ExitRecommender(backbone, exit_layers, answers=["n", "y"], **settings)
        backbone = Backbone.from_config(
            tiny_config(vocab_size=256), num_layers=exit_layers[-1]
        )
        made.set_backbone(backbone, Answers())
        made.train(False)
        return made

    return module


def scored(module: ExitRecommender, batch: Batch) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(batch)
    return logits


def alone(streams: Streams, stream: int, window: Window) -> list[Batch]:
    """Each target of a window and its strictly earlier rows, in a batch of their own."""
    first, last = streams.offsets[stream : stream + 2].tolist()
    time, batches = streams.timestamp[first:last], []
    for position in range(window.first, window.last):
        if streams.target[first + position]:
            earlier = [p for p in window.positions.tolist() if time[p] < time[position]]
            stop = earlier[-1] + 1 if earlier else window.start
            batches.append(
                pack(
                    streams, [(stream, Window(window.start, stop, position, position + 1))]
                )
            )
    return batches


def test_packed_equals_alone(make: Make, streams: Streams) -> None:
    """Every exit gives a target packed among other users and ties the logit that it has in a batch of its own."""
    module, windows = make(), streams.evaluation(300)[:6]
    assert len({s for s, _ in windows}) == 6
    packed = scored(module, pack(streams, windows))
    each = [scored(module, batch) for s, w in windows for batch in alone(streams, s, w)]
    torch.testing.assert_close(packed, torch.cat(each), atol=1e-4, rtol=0)
    assert (
        packed.std(dim=0).min() > 0.02
    )  # logits differ between prompts, so the equality above is no accident


def test_the_unseen_changes_nothing(make: Make, streams: Streams) -> None:
    """Other users' tokens, tied rows, later rows and the own answer can all change: the target's logits do not."""
    module = make()
    batch = pack(streams, streams.evaluation(300)[:12])
    layout, tied_targets = batch.layout, 0
    visible = dense_mask(layout)[0]
    before = scored(module, batch)
    for i, slot in enumerate(batch.slots.tolist()):
        changed = torch.where(visible[slot], batch.tokens, (batch.tokens + 1) % 256)
        after = scored(module, replace(batch, tokens=changed))
        torch.testing.assert_close(after[i], before[i], atol=1e-5, rtol=0)
        group = (layout.sequence == layout.sequence[0, slot]) & (
            layout.group == layout.group[0, slot]
        )
        tied_targets += int(group.sum() > (layout.segment == layout.segment[0, slot]).sum())
    assert tied_targets > 10


def test_untrained_module_is_the_language_model(
    make: Make, tiny_config: Callable[..., Any], streams: Streams, tmp_path: Path
) -> None:
    """Without ties, before training: the deepest exit is START times transformers' own logit(y) - logit(n).

    Without a leading space an answer's token is the one as it stands.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config(vocab_size=256))
    # ones would hide a norm that is left out
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    model.save_pretrained(tmp_path)
    module = ExitRecommender("letters", EXITS, answers=["n", "y"])
    module.set_backbone(Backbone.from_pretrained(tmp_path), Answers())
    untied = replace(streams, timestamp=np.arange(len(streams.row_id), dtype=np.float64))
    windows = untied.evaluation(300)[:4]
    found = scored(module, pack(untied, windows))[:, len(EXITS) - 1]
    with torch.no_grad():
        last = [
            model(torch.from_numpy(prompt)[None]).logits[0, -1]
            for s, w in windows
            for prompt in prompts_of(untied, s, w)
        ]
    expected = [x[ord("y")] - x[ord("n")] for x in last]
    torch.testing.assert_close(found, START * torch.stack(expected), atol=1e-4, rtol=0)


def trained_by(
    module: ExitRecommender, batches: list[Batch], targets: int
) -> dict[str, Tensor]:
    """Gradients after one step of len(batches) processes, averaged over them as DDP does."""
    world = len(batches)
    strategy = SimpleNamespace(reduce=lambda value, reduce_op: torch.tensor(float(targets)))
    module.trainer = SimpleNamespace(world_size=world, strategy=strategy)  # type: ignore[assignment]
    module.log = lambda *arguments, **settings: None  # type: ignore[method-assign]
    module.zero_grad()
    for batch in batches:
        (module.training_step(batch, 0) / world).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_two_processes_train_as_one(make: Make, streams: Streams) -> None:
    """Uneven halves of a batch on two processes, averaged, give the gradient of the whole batch on one."""
    module = make()
    windows = streams.evaluation(300)[:6]
    parts = [pack(streams, windows[:1]), pack(streams, windows[1:])]
    whole = pack(streams, windows)
    sizes = [len(p.label) for p in parts]
    assert sizes[0] != sizes[1]
    together = trained_by(module, parts, sum(sizes))
    expected = trained_by(module, [whole], sum(sizes))
    assert together.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(together[name], gradient, atol=1e-5, rtol=1e-4)
    # normalised by each process's own targets instead, the gradient would be another
    naive = [trained_by(module, [p], len(p.label)) for p in parts]
    head = "heads.3.linear.weight"
    assert not torch.allclose(
        (naive[0][head] + naive[1][head]) / 2, expected[head], rtol=1e-3
    )


def saved(module: ExitRecommender, folder: Path) -> dict[str, Any]:
    """The parts of a Lightning checkpoint that are the module's, through a file and back."""
    checkpoint = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "a.ckpt")
    loaded: dict[str, Any] = torch.load(folder / "a.ckpt", weights_only=True)
    return loaded


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"freeze_embeddings": False}, {"backbone.final_norm.weight"}),
        (
            {"freeze_embeddings": True},
            {"backbone.final_norm.weight", "backbone.embed_tokens.weight"},
        ),
        ({"lora": LoraSettings(rank=2)}, None),
    ],
    ids=["full", "frozen embeddings", "lora"],
)
def test_checkpoint_comes_back(
    make: Make,
    streams: Streams,
    tmp_path: Path,
    settings: dict[str, Any],
    left_out: set[str] | None,
) -> None:
    """Trained weights, the chosen exit and exit 0 come back from a checkpoint that holds nothing frozen."""
    module, batch = make(**settings), pack(streams, streams.evaluation(300)[:3])
    untrained = scored(module, batch)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    module.chosen_exit.fill_(3)
    module.exit_0.copy_(torch.arange(len(module.exit_0)))
    expected = scored(module, batch)
    checkpoint = saved(module, tmp_path)
    frozen = set(module.state_dict()) - set(checkpoint["state_dict"])
    if left_out is None:  # LoRA: adapters and heads alone
        kept = {
            n
            for n in checkpoint["state_dict"]
            if "lora" not in n and not n.startswith("heads.")
        }
        assert {"chosen_exit", "exit_0"} <= kept <= {n for n, _ in module.named_buffers()}
    else:
        assert frozen == left_out
    other = make(**settings)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"], strict=other.strict_loading)
    assert torch.equal(scored(other, batch), expected)
    assert int(other.chosen_exit) == 3
    assert other.feature_baseline().to_array().tolist() == list(range(len(other.exit_0)))
    assert not torch.allclose(untrained, expected, atol=1e-3)


def test_a_weight_that_the_model_has_not_is_an_error(make: Make, tmp_path: Path) -> None:
    checkpoint = saved(make(), tmp_path)
    checkpoint["state_dict"]["heads.1.unknown"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"heads\.1\.unknown"):
        make().on_load_checkpoint(checkpoint)
    checkpoint["state_dict"]["exit_0"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"another version, whose exit 0"):
        make().on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("trained", "now", "words"),
    [
        ({}, {"exit_layers": [2, 3]}, r"model\.exit_layers.*\[1, 3\].*\[2, 3\]"),
        ({}, {"exit_layers": [1, 2, 3]}, r"model\.exit_layers.*\[1, 3\].*\[1, 2, 3\]"),
        ({}, {"lora": LoraSettings(rank=2)}, r"model\.lora"),
        # frozen then and trained now: missing, not filled with the base model's in silence
        (
            {"freeze_embeddings": True},
            {},
            r"backbone\.embed_tokens\.weight.*model\.freeze_embeddings",
        ),
        # all shapes fit
        ({}, {"backbone": "numbers"}, r"model\.backbone = letters, .* numbers"),
    ],
    ids=["other exits", "more exits", "lora", "frozen then", "backbone"],
)
def test_refuses_another_models_checkpoint(
    make: Make, tmp_path: Path, trained: dict[str, Any], now: dict[str, Any], words: str
) -> None:
    checkpoint = saved(make(**trained), tmp_path)
    with pytest.raises(CheckpointError, match=rf"(?s){words}"):
        make(**now).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("layers", [[], [0, 2], [3, 1], [1, 1, 3]])
def test_refuses_exit_layers(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"model\.exit_layers is .*ascending"):
        ExitRecommender("letters", layers)


def test_refuses_to_score_untrained(make: Make) -> None:
    with pytest.raises(NotFittedError, match=r"never been trained.*--ckpt_path"):
        make().feature_baseline()


def test_processes_that_share_a_model() -> None:
    """One process, or copies, share nothing; Lightning's own ways to cut a model are refused."""
    for copies in (SingleDeviceStrategy(torch.device("cpu")), DDPStrategy()):
        assert shared_mesh(copies) is None
    for cut in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(
            ConfigError, match=rf"is {type(cut).__name__}, .*FullyShardedStrategy"
        ):
            shared_mesh(cut)


def test_loss_by_hand() -> None:
    """Sums over targets, divided by the global number of targets; the mean of the heads."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])  # p = 1/2 and 3/4
    loss, per_head = exit_loss(logits, torch.tensor([1, 0]), 4.0)
    first, second = math.log(2) * 2 / 4, (math.log(4 / 3) + math.log(4)) / 4
    torch.testing.assert_close(per_head, torch.tensor([first, second]))
    assert loss.item() == pytest.approx((first + second) / 2)


def test_no_targets() -> None:
    logits = torch.zeros(0, 2, requires_grad=True)
    loss, _ = exit_loss(logits, torch.zeros(0, dtype=torch.int64), 7)
    loss.backward()
    assert loss.item() == 0
