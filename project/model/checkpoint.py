"""What a checkpoint holds, and whether it is this configuration's.

Unusual here: what is frozen is left out, it comes back from the base model; so Lightning cannot load strictly, and this
is stricter: nothing that is trained may be missing, and nothing may be left over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from project.errors import CheckpointError
from project.model.lora import frozen_names


def leave_out_frozen(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Drop the parameters of `state_dict` that are not trained, in place.

    Args:
        module: Whose state it is.
        checkpoint: About to be written.
    """
    frozen = frozen_names(module)
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}


def drop_retired(checkpoint: dict[str, Any]) -> None:
    """Drop what older versions kept in `state_dict` and nothing reads, in place.

    Args:
        checkpoint: A loaded checkpoint.
    """
    retired = re.compile(r"heads\.\d+\.drift\..*|exit_thresholds|exit_calibration")
    known = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k: v for k, v in known.items() if not retired.fullmatch(k)}


def check_parameters(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks what is trained here, or holds what is unknown here.

    Args:
        module: With its trunk and heads.
        checkpoint: A loaded checkpoint.
    """
    missing = set(module.state_dict()) - set(checkpoint["state_dict"]) - frozen_names(module)
    surplus = set(checkpoint["state_dict"]) - set(module.state_dict())
    if missing or surplus:
        raise CheckpointError(
            f"the checkpoint lacks {sorted(missing)[:3]} and has unknown {sorted(surplus)[:3]} "
            f"({len(missing)} and {len(surplus)} in all): model.lora, "
            "model.freeze_embeddings or the numbers of data.prompt.segment differ from the run that made it. "
            "Use its config.yaml."
        )


def check_origin(checkpoint: Mapping[str, Any], exit_layers: Sequence[int], backbone: str) -> None:
    """Refuse a checkpoint whose exit layers or base model are not this configuration's.

    Args:
        checkpoint: A loaded checkpoint.
        exit_layers: Of the configuration.
        backbone: Of the configuration.
    """
    saved = checkpoint.get("hyper_parameters", {})
    for key, mine in (("exit_layers", exit_layers), ("backbone", backbone)):
        if saved.get(key) != mine:
            raise CheckpointError(
                f"the checkpoint was trained with model.{key} = {saved.get(key)}, the configuration says {mine}. "
                "Use the config.yaml beside the checkpoint's folder."
            )
