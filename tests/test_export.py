"""Tests that an exported run has the run's logits and exits, in a folder that names no place of this machine."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from example_run import results, write_run
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from project.api import open_run
from project.data.prompt import LOWEST_ID
from project.errors import CheckpointError, DataError, NotCalibratedError
from project.exits.plan import ExitPlan
from project.export import (
    export,
    load_exported,
    render_card,
)
from project.layout import Layout
from project.model.backbone import Backbone
from project.report.report import read_run

Run = Callable[..., None]
Config = Callable[..., Path]
LORA = {"rank": 4}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"model.freeze_embeddings": False},
    "frozen embeddings": {"model.freeze_embeddings": True},
    "lora": {"model.lora": LORA, "model.optim": {"learning_rate": 0.01}},
}


def causal(tokens: Tensor) -> Layout:
    """Every token a segment that sees all before it: what a plain causal model does with (B, T) tokens."""
    index = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Layout.build(torch.zeros_like(index), index, index, index >= 0, index)


@torch.no_grad()
def states(backbone: Backbone, tokens: Tensor, layers: list[int]) -> list[Tensor]:
    """Hidden states (B, T, H) after each of these layers."""
    state, start, found = backbone.embed(tokens, causal(tokens)), 0, []
    for layer in layers:
        state, start = backbone.run(state, start, layer), layer
        found.append(state.hidden)
    return found


def saved(plan: ExitPlan) -> bytes:
    """Its state, bit by bit."""
    file = io.BytesIO()
    torch.save(plan.state(), file)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(
    kind: str, run: Run, tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    """Two of three layers, trained and exported: hidden states, heads, exits, exit 0 and tokens are the run's.

    To 1e-6. Where adapters were added to the weights, to 3e-6 of the largest state: W x + B A x and (W + B A) x are
    each that far from the sum in float64.
    """
    run("fit", "--config", tiny_config(**{"model.exit_layers": [1, 2]}, **KINDS[kind]))
    folder, target = tmp_path / "runs" / "tiny" / "latest", tmp_path / "new" / "exported"
    run("export", folder, target)
    opened = open_run(folder, "cpu")  # adapters are beside the weights
    module = opened.model.eval()
    backbone, heads, plans, exit_0 = load_exported(target)
    tokens = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    assert module.backbone is not None
    # ids that transformers' own model does not know
    numbers = torch.arange(LOWEST_ID, LOWEST_ID + 30)[None]
    assert torch.equal(
        backbone.embed_tokens(numbers), module.backbone.embed_tokens(numbers)
    )
    expected, found = (states(t, tokens, [1, 2]) for t in (module.backbone, backbone))
    exact = {
        "atol": 3e-6 * float(expected[-1].abs().max()) if kind == "lora" else 1e-6,
        "rtol": 0,
    }
    for layer, before, after in zip("12", expected, found, strict=True):
        torch.testing.assert_close(after, before, **exact)
        logits, exported = (
            h[layer](s[:, -1]) for h, s in ((module.heads, before), (heads, after))
        )
        torch.testing.assert_close(exported, logits, **exact)

    plain = AutoModel.from_pretrained(target)(tokens, output_hidden_states=True)
    assert len(plain.hidden_states) == 1 + 2
    torch.testing.assert_close(plain.hidden_states[1], expected[0], **exact)
    normed = module.backbone.final_norm(expected[1])
    torch.testing.assert_close(plain.last_hidden_state, normed, **exact)
    base = states(Backbone.from_pretrained(tiny_model, num_layers=2), tokens, [2])[0]
    assert (base - expected[1]).abs().max() > 1e-3  # trained, and that is what was exported

    assert saved(plans.plan) == saved(opened.plan)
    assert exit_0.to_array().tolist() == module.exit_0.tolist()
    one, other = (
        AutoTokenizer.from_pretrained(f).encode("all 7 near 3: yes")
        for f in (target, tiny_model)
    )
    assert one == other
    for path in target.rglob("*.*"):
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path
    assert {p.name for p in target.parent.iterdir()} == {"exported"}


@pytest.mark.slow
def test_refusals_of_a_run(fitted: Path, tmp_path: Path) -> None:
    """A folder that holds something, a config.yaml of another model, a checkpoint without a plan: refused."""
    target, config = tmp_path / "exported", fitted / "config.yaml"
    with pytest.raises(DataError, match="already holds something"):
        export(fitted, fitted)
    saved = config.read_text()
    settings = yaml.safe_load(saved)
    config.write_text(
        yaml.safe_dump(settings | {"model": settings["model"] | {"lora": LORA}})
    )
    with pytest.raises(CheckpointError, match=r"model\.lora"):
        export(fitted, target)
    config.write_text(saved)
    checkpoint = fitted / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    del content["exit_plans"]
    torch.save(content, checkpoint)
    with pytest.raises(NotCalibratedError, match="calibrate"):
        export(fitted, target)
    assert not target.exists()


def test_not_a_run_and_not_exported(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"lacks config\.yaml, bundle/bundle\.json, .*last\.ckpt"
    ):
        export(tmp_path, tmp_path / "new")
    with pytest.raises(DataError, match=r"exit_policy\.ckpt does not exist"):
        load_exported(tmp_path)
    torch.save({"schema_version": 0}, tmp_path / "exit_policy.ckpt")
    with pytest.raises(DataError, match="schema_version 0"):
        load_exported(tmp_path)


BUNDLE = {
    "base_model": "smollm2-135m-instruct",
    "num_layers": 6,
    "exit_layers": [2, 4, 6],
    "answers": [" no", " yes"],
    "interactions": {"/home/somebody/log.csv": "ab12"},
    "retriever": {"class_path": "project.retrieval.LightGCN"},
    "prompt": {"segment": "{title}{vote_number}"},
}


@pytest.mark.parametrize(
    "base", ["smollm2-135m-instruct", "org/model", "/home/somebody/model"]
)
def test_card(base: str, tmp_path: Path) -> None:
    """Its numbers are the test result's, front matter parses, licence and certificate are there, no path is."""
    files = results()
    run = read_run(write_run(tmp_path / "quickstart" / "version_0", files))
    card = render_card(run, BUNDLE | {"base_model": base}, "llama", "consistency")
    about = yaml.safe_load(card.split("---\n")[1])
    assert about.get("base_model") == ("org/model" if base == "org/model" else None)
    assert f"{files['test']['exits'][-1]['auc']:.4f}".removeprefix("0") in card
    assert files["test"]["protocol"]["hash"] in card
    assert files["calibrate"]["certificate"]["reason"] in card
    assert ("Apache-2.0" in card) == (base == "smollm2-135m-instruct")
    assert not any(place in card for place in ("somebody", str(tmp_path)))
