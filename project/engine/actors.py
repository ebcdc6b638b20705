"""`predict --engine ray`: Ray Data reads requests, actors score them as `predict --engine early_exit` does.

All requests of a user are in one part, by a hash, so they share what the engine keeps of the user's history. An actor
scores a part and writes its file whole or not at all; a part that is there stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.data.parts import by_part
from project.data.requests import parse_requests, requests_path
from project.datamodule import InteractionData
from project.engine.predict import Run, open_calibrated, print_counts, with_room
from project.errors import ConfigError
from project.model.module import ExitRecommender
from project.run import sha256_of, table_about

PART_BYTES = 2**24  # of requests; a part is what a stop costs an actor at most
LEAST_PARTS = 16


def run_actors(
    trainer: L.Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
) -> Path:
    """Score data.requests, a file or a folder of Parquet files; write scores/predict-ray/part-*.parquet.

    The trainer's devices, on all its nodes, say how many actors there are and whether each has a GPU.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "predict --engine ray needs Ray Data, which is not installed; install the extra, from a checkout: "
            "pip install -e '.[ray]'."
        )
    # 1. The run, the requests, and which parts of them it has scored before.
    run, folder, about = open_calibrated(trainer, model, data, checkpoint, "ray")
    source = data.requests_file
    files = sorted(Path(source).glob("*.parquet")) if source else []
    files = files or [requests_path(source)]
    parts = max(LEAST_PARTS, sum(file.stat().st_size for file in files) // PART_BYTES)
    names = [str(file) for file in files]
    sums = [sha256_of(Path(file)) for file in (str(checkpoint), *names)]
    about["made_of"] = hashlib.sha256(" ".join([str(parts), *sums]).encode()).hexdigest()
    done = set[int]()
    for file in folder.glob("part-*.parquet"):
        if table_about(file).items() >= about.items():
            done.add(int(file.stem.removeprefix("part-")))
        else:
            file.unlink()  # of another checkpoint, or of other requests
    # 2. Requests, cut by part, without those of finished parts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    import ray

    ray.init(ignore_reinit_error=True, include_dashboard=False)
    cut = folder / ".requests"
    if files[0].suffix == ".parquet":
        rows = ray.data.read_parquet(names)
    # latin-1 keeps bytes as they are, so that a line that is no UTF-8 is invalid alone
    else:
        rows = ray.data.read_text(names, encoding="latin-1")
    for left in folder.glob(".*"):  # by a call that was stopped
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    cut_by_part: Any = by_part  # Ray's types know functions of one argument
    lines = rows.map_batches(
        cut_by_part, batch_format="pyarrow", fn_kwargs={"parts": parts, "done": done}
    )
    lines.write_parquet(str(cut), partition_cols=["part"])
    todo = sorted(int(path.name.removeprefix("part=")) for path in cut.glob("part=*"))
    # 3. Actors, each with a copy of model and data; a block of the dataset is one part.
    counts = Counter[str]()
    if todo:
        held = ray.put((model, data, run.plan, run.lists))
        device = trainer.strategy.root_device.type
        scored = ray.data.from_items(
            [{"part": part} for part in todo], override_num_blocks=len(todo)
        ).map_batches(
            Scorer,
            fn_constructor_args=(held, device, Path(str(source)), cut, about),
            compute=ray.data.ActorPoolStrategy(size=trainer.world_size),
            batch_size=1,
            num_gpus=int(device == "cuda"),
        )
        for row in scored.iter_rows():
            counts.update(row)
    shutil.rmtree(cut, ignore_errors=True)
    print_counts(counts, folder)
    return folder


class Scorer:
    """Holds an open run; scores the parts that lie in the folder `cut`, and writes their files beside it."""

    def __init__(
        self, held: Any, device: str, source: Path, cut: Path, about: dict[str, str]
    ) -> None:
        import ray

        model, *held = ray.get(held)
        self.run = Run(model.to(device), *held)
        self.source = source
        self.cut = cut
        self.about = about

    def __call__(self, rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Score a part in the order of users and lines; what was counted, as one row."""
        part = int(rows["part"][0])
        files = [*(self.cut / f"part={part}").glob("*.parquet")]
        table = pl.read_parquet(files, glob=False).sort("user", "line")
        lines = (line.encode("latin-1") for line in table["line"])
        placed = (
            (f"part {part}, request {number}", line)
            for number, line in enumerate(lines, start=1)
        )
        data = self.run.data
        requests = with_room(
            parse_requests(placed, self.source, data.split.interactions), data
        )
        path = self.cut.parent / f"part-{part:05}.parquet"
        counts = self.run.write(requests, path, self.about)
        return {name: np.array([count]) for name, count in counts.items()}
