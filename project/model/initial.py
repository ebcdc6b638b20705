"""Starts a fit from the weights of another run, which must not have been trained on rows that this one scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from project.data.protocol import SplitInteractions
from project.errors import CheckpointError, ConfigError
from project.run import Checkpoint, read_checkpoint

TRUSTED = "trusted:"
EMBEDDINGS = "backbone.embed_tokens."
NUMBERS = f"{EMBEDDINGS}numbers"
# buffers that every run makes of its own rows
OWN = {"chosen_exit", "exit_0"}


def read_until(split: SplitInteractions, *parts: str) -> float:
    """Time of the last row of these parts; infinity where the log has no times."""
    last: Any = split.rows.filter(pl.col("split").is_in(parts))["timestamp"].max()
    return float(last) if split.manifest["times"] else inf


def read_initial(
    initial: str, exit_layers: Sequence[int], backbone: str, split: SplitInteractions
) -> Checkpoint:
    """The checkpoint of the run `initial`; an error where a fit on this split cannot start from it.

    `trusted:RUN` leaves out the comparison of times.
    """
    # 1. the run's checkpoint, of the same backbone and depth
    file = Path(initial.removeprefix(TRUSTED)) / "checkpoints" / "last.ckpt"
    if not file.is_file():
        raise ConfigError(
            f"model.initial is {initial}, but {file} does not exist; expected the folder of a run that `fit` wrote."
        )
    content = read_checkpoint(file, mmap=True)
    check_origin(content, exit_layers, backbone)
    # 2. all that is scored is later than all that it was trained on; without times nothing is known to be
    until = content.get("trained_until", inf)
    scored = split.rows.filter(pl.col("split").is_in(["valid", "test"]))
    earliest: Any = scored["timestamp"].min()
    first = float(earliest) if split.manifest["times"] else -inf
    if until >= first and not initial.startswith(TRUSTED):
        raise ConfigError(
            f"model.initial is {initial}, which may have been trained on rows that this run scores: its last train row "
            f"is of {until:.15g}, the first row of validation and test of {first:.15g} (infinite: a log without times, "
            "or a run that does not say). Expected a log and a data.protocol whose validation begins later. If you "
            f"know that it has not seen them, write {TRUSTED}{initial}."
        )
    return content


@torch.no_grad()
def copy_weights(
    content: Checkpoint, state: Mapping[str, Tensor], frozen: set[str]
) -> None:
    """Write a checkpoint's weights into a module's state; learned tokens that the checkpoint lacks stay as they are.

    Args:
        content: The checkpoint.
        state: The module's tensors by name.
        frozen: Names of those that are not trained, which a checkpoint leaves to the base model.
    """
    # 1. the same weights are trained; learned tokens and words may come and go with the prompt
    saved = {k: v for k, v in content["state_dict"].items() if k not in OWN}
    trained = set(state) - frozen - OWN
    others = {name for name in trained ^ set(saved) if not name.startswith(EMBEDDINGS)}
    # words that were trained there and are frozen here would be missing in this run's checkpoint
    others |= set(saved) & frozen
    if others:
        raise CheckpointError(
            f"model.initial trained other weights, among them {sorted(others)[:3]} ({len(others)} in all): its "
            "model.lora, model.head or model.freeze_embeddings differs. Use those of its config.yaml."
        )
    # 2. by name
    for name in trained & set(saved):
        if name == NUMBERS:
            # the kinds in their order; ratings are last, and not in every log
            kinds = min(len(saved[name]), len(state[name]))
            state[name][:kinds].copy_(saved[name][:kinds])
        else:
            state[name].copy_(saved[name])


def check_origin(
    checkpoint: Mapping[str, Any], exit_layers: Sequence[int], backbone: str
) -> None:
    """Refuse a checkpoint whose exit layers or base model are not these, the configuration's."""
    saved = checkpoint.get("hyper_parameters", {})
    for key, mine in (("exit_layers", exit_layers), ("backbone", backbone)):
        if saved.get(key) != mine:
            raise CheckpointError(
                f"the checkpoint was trained with model.{key} = {saved.get(key)}, the configuration has {mine}. "
                "Use the config.yaml beside the checkpoint's folder."
            )
