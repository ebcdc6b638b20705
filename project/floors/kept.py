"""Floors that take too long for fit: the verb `floors` keeps their scores, `fit`, `validate` and `test` find them.

Unusual here: one rule says what stands in a result. Beside the floors that are made on the spot it has all floors that
`floors` made before under just this hash: of the protocol, of the numbers that floors read of the evidence, of the
retriever, the seed and the floors' own settings. Nothing is trained to complete it, and another hash's floors are
never taken. So `best_floor` and `floor_difference` may change once `floors --peers true` has run; the result names
what it found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from project.artefacts import table_about, write_table
from project.counting import FEATURES
from project.data.splits import SPLITS, SplitInteractions
from project.floors.peers import LIBRARY, peer_floors, peer_settings, peers_installed
from project.floors.quick import Floor, evidence_features, train_labels
from project.floors.slow import LAST_ROWS, GraphSource, more_floors
from project.retrieval.cache import cached_folder, content_key

if TYPE_CHECKING:
    from project.data.datamodule import InteractionData

Kind = Literal["more", "peers"]
Evidence = Mapping[str, pl.DataFrame]

FORMAT = 1  # raise it when the same settings would give other scores
FILE = "scores.parquet"


@dataclass(frozen=True)
class KeptFloors:
    """The slower floors of one log under one protocol: `more` of project.floors.slow, `peers` of project.floors.peers.

    Peers belong to a version of torch-rechub: those of the installed one are found, or where none is installed those
    that were made last.

    Attributes:
        split: The log under its protocol.
        evidence: Evidence table of each split.
        source: Of LightGCN's item vectors; its cache_dir is where floors are kept, in floor_scores.
        seed: Of matrix factorisation and networks.
    """

    split: SplitInteractions
    evidence: Evidence
    source: GraphSource
    seed: int

    @classmethod
    def of(cls, data: InteractionData) -> KeptFloors:
        """Those of a run's data."""
        return cls(
            data.split,
            data.evidence,
            GraphSource(data.retriever, data.block_rows, data.cache_dir),
            data.seed,
        )

    def make(self, kind: Kind) -> list[Floor]:
        """Floors of a kind, scores of valid and test: those kept, or made now and kept whole or not at all."""
        return _read(cached_folder(self._parent, self._content(kind), partial(self._write, kind)))

    def find(self, splits: Sequence[str] = SPLITS, kinds: Sequence[Kind] = ("more", "peers")) -> list[Floor]:
        """Floors that were made before, scores of `splits` alone; none is made.

        Args:
            splits: Splits that may be read.
            kinds: Which, in this order.
        """
        found = [floor for kind in kinds for folder in self._kept(kind) for floor in _read(folder)]
        asked = pl.col("split").is_in(list(splits))
        return [Floor(floor.name, floor.scores.filter(asked), floor.chosen) for floor in found]

    @property
    def _parent(self) -> Path:
        return self.source.cache_dir / "floor_scores"

    def _kept(self, kind: Kind) -> list[Path]:
        """The folder of a kind's scores, or none."""
        known = kind == "more" or peers_installed()
        contents = [self._content(kind, library) for library in ([None] if known else self._libraries())]
        folders = [self._parent / content_key(content) for content in contents]
        return [folder for folder in folders if folder.exists()][:1]

    def _libraries(self) -> list[str]:
        """Versions of torch-rechub that have trained kept peers, of any log, the last first."""
        files = sorted(
            self._parent.glob("*/content.json"), key=lambda file: file.stat().st_mtime, reverse=True
        )
        settings = [json.loads(file.read_text(encoding="utf-8"))["settings"] for file in files]
        return list(dict.fromkeys(found[LIBRARY] for found in settings if LIBRARY in found))

    def _content(self, kind: Kind, library: str | None = None) -> dict[str, Any]:
        """Everything the scores of a kind depend on; of peers also torch-rechub's version, None: the installed one."""
        return {
            "floors": kind,
            "made_by": FORMAT,
            "files": self.split.interactions.files,
            "protocol": self.split.hash,
            "evidence": self._evidence_digest,
            "seed": self.seed,
            "settings": peer_settings(library) if kind == "peers" else self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "last_rows": LAST_ROWS,
            "lightgcn": self.source.lightgcn.settings(),
            "retriever": self.source.retriever.settings(),
            "block_rows": self.source.block_rows,
        }

    @cached_property
    def _evidence_digest(self) -> str:
        """Of the counting features, which are all that floors read of the evidence, bit by bit."""
        base = float(train_labels(self.split.rows).mean())
        digest = hashlib.sha256(json.dumps(FEATURES).encode())
        for name in SPLITS:
            digest.update(evidence_features(self.split.rows, self.evidence, name, base).tobytes())
        return digest.hexdigest()[:16]

    def _write(self, kind: Kind, folder: Path) -> None:
        if kind == "more":
            floors = more_floors(self.split, self.evidence, self.source, seed=self.seed)
        else:
            floors = peer_floors(self.split, self.evidence, seed=self.seed)
        table = pl.concat(
            [floor.scores.select(pl.lit(floor.name).alias("floor"), pl.all()) for floor in floors]
        )
        chosen = {floor.name: floor.chosen for floor in floors}
        write_table(folder / FILE, table, {"chosen": json.dumps(chosen)})


def _read(folder: Path) -> list[Floor]:
    chosen = json.loads(table_about(folder / FILE)["chosen"])
    scores = pl.read_parquet(folder / FILE, glob=False)
    return [
        Floor(name, scores.filter(pl.col("floor") == name).drop("floor"), chosen[name]) for name in chosen
    ]
