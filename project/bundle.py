"""The bundle of a run: what predict, serve and export need of the data, so that a run can be moved."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from project.data.prompt import RATING_SCALE
from project.run import replace_file, write_json, write_table

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

ITEM_VECTORS = "item_vectors.safetensors"  # frozen vectors of {item_text}


def write_bundle(module: ExitRecommender, data: InteractionData, folder: Path) -> None:
    """Write tokenizer, items, protocol and retrieved features of a run, and bundle.json, which describes them."""
    # 1. what requests are read with: tokenizer, items, protocol
    split = data.split
    folder.mkdir(parents=True, exist_ok=True)
    data.tokenizer.save_pretrained(folder / "tokenizer")
    write_table(folder / "items.parquet", split.interactions.items)
    write_json(folder / "protocol.json", split.manifest)
    # 2. features and what was fitted for them, under their names in the cache
    made = data.features.folders()
    for name, source in made.items():
        shutil.copytree(source, folder / name / source.name, dirs_exist_ok=True)
    if module.items:
        vectors = {"items": torch.from_numpy(data.item_vectors())}
        replace_file(folder / ITEM_VECTORS, lambda part: save_file(vectors, part))
    if data.rating_scale is not None:
        write_json(folder / RATING_SCALE, asdict(data.rating_scale))
    # 3. what describes the run without its config.yaml
    write_json(
        folder / "bundle.json",
        {
            "base_model": module.backbone_name,
            "num_layers": module.depth,
            "exit_layers": module.exit_layers,
            "answers": module.answers,
            "interactions": split.interactions.files,
            "protocol": {"name": split.manifest["name"], "hash": split.hash},
            "retriever": data.retriever.settings(),
            "retrieved": f"retrieved/{made['retrieved'].name}",
            "prompt": vars(data.prompt),
        },
    )
