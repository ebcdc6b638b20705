"""RunBundle: everything a trained run needs beside its checkpoint, in one folder of the run.

`bundle/` holds the protocol's manifest, the items table, the tokenizer, evidence and snapshots of retriever and
factorisation, and bundle.json, which names the base model and the logs by checksum.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from project.artefacts import SCHEMA_VERSION, own_version, write_json, write_table
from project.callbacks.run_folder import data_of, run_folder
from project.data.prompts import item_columns
from project.retrieval.evidence import evidence_folder
from project.retrieval.factorisation import taste_folder
from project.retrieval.own_text import text_folder

if TYPE_CHECKING:
    from project.model.module import ExitRecommender


class RunBundle(pl.Callback):
    """Writes bundle/ into the run folder when training starts.

    Args:
        enabled: Whether to write it; predict from a moved run needs it.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the bundle."""
        if not self.enabled:
            return
        data = data_of(trainer)
        module = cast("ExitRecommender", pl_module)
        folder = run_folder(trainer) / "bundle"
        folder.mkdir(parents=True, exist_ok=True)
        split = data.split
        data.tokenizer.save_pretrained(folder / "tokenizer")
        write_table(folder / "items.parquet", split.interactions.items)
        write_json(folder / "protocol.json", split.manifest)
        evidence = evidence_folder(split, data.retriever, data.refits, data.cache_dir)
        made = {"evidence": evidence, "text": text_folder(split, data.cache_dir)}
        if data.taste is not None:
            made["taste"] = taste_folder(split, data.taste, data.refits, data.cache_dir)
        for name, source in made.items():
            shutil.copytree(source, folder / name / source.name, dirs_exist_ok=True)
        write_json(
            folder / "bundle.json",
            {
                "schema_version": SCHEMA_VERSION,
                "version": own_version(),
                "base_model": module.backbone,
                "num_layers": module.depth,
                "exit_layers": module.exit_layers,
                "answers": module.answers,
                "interactions": split.interactions.files,
                "protocol": {"name": split.manifest["name"], "hash": split.hash},
                "retriever": data.retriever.settings(),
                "evidence": f"evidence/{evidence.name}",
                "taste": None if data.taste is None else asdict(data.taste),
                "prompt": vars(data.prompt),
                "item_columns": dict(
                    zip(
                        ("shown", "not_shown"),
                        item_columns(data.prompt, split.interactions.items),
                        strict=True,
                    )
                ),
            },
        )
