"""Opens a run that is calibrated: for Python, and for the server."""

from __future__ import annotations

from pathlib import Path

import torch

from project import config
from project.engine.predict import Run, load_run
from project.export import POLICY, give_exported


def open_run(folder: str | Path, device: str | None = None) -> Run:
    """Open a calibrated run's folder, or one that `export` wrote; `device` None: a GPU where there is one."""
    folder = Path(folder)
    model, data = config.open_run(folder)
    # an exported folder holds its weights; a run's checkpoint lies on top of the base model
    if (folder / POLICY).exists():
        if not model.items:  # the base model is not needed
            data.tokenizer_name = str(folder)
        plans = give_exported(model, folder)
    else:
        plans = load_run(
            model,
            data.tokenizer,
            folder / "checkpoints" / "last.ckpt",
            data,
            compared=False,
        )
    # features: from the run's bundle, where the cache lacks them
    data.prepare_data()
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Run(model, data, plans.plan, plans.lists, plans.certificate, folder)
