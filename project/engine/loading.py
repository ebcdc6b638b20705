"""From a run's checkpoint to an engine: weights and exit plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from project.artefacts import read_checkpoint
from project.callbacks.exit_calibration import ExitCalibration
from project.data.identity import check_reads
from project.data.sources import resolve_model
from project.errors import NotCalibratedError
from project.exits.plan import Plans
from project.model.trunk import Trunk

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender


def load_run(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    judged: bool = True,
) -> Plans:
    """Give a module the weights of a calibrated run; returns its exit plans.

    Args:
        model: Made from the run's configuration; gets its trunk here if it has none.
        tokenizer: Of the backbone.
        checkpoint: The run's checkpoint.
        data: What will be scored, which must be what the run was trained to read; None: nothing will.
        judged: Whether scores will be judged by the log's labels, see `check_reads`.

    Raises:
        CheckpointError: The checkpoint was made for another configuration.
        NotCalibratedError: It has no exit plan.
    """
    plans = plans_of(load_weights(model, tokenizer, checkpoint, data, judged))
    if plans is None:
        raise NotCalibratedError(
            "this checkpoint has no calibrated exits. Run `python -m project calibrate --config RUN/config.yaml "
            "--ckpt_path RUN/checkpoints/last.ckpt`."
        )
    return plans


def plans_of(checkpoint: Mapping[str, Any]) -> Plans | None:
    """The exit plans in a loaded checkpoint; None where the run was never calibrated."""
    calibration = ExitCalibration()
    calibration.load_state_dict(checkpoint.get("callbacks", {}).get(calibration.state_key, {}))
    return calibration.found


def load_weights(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    judged: bool = True,
) -> dict[str, Any]:
    """Give a module the weights of a run, calibrated or not; returns the checkpoint. Arguments as in `load_run`.

    Raises:
        CheckpointError: The checkpoint was made for another configuration.
    """
    content = read_checkpoint(checkpoint)
    if data is not None:
        check_reads(content.get("reads"), data, judged)
    if model.trunk is None:
        trunk = Trunk.from_pretrained(resolve_model(model.backbone), num_layers=model.depth)
        model.set_trunk(trunk, tokenizer)
    model.on_load_checkpoint(content)
    model.load_state_dict(content["state_dict"], strict=False)  # on_load_checkpoint was stricter
    return content
