"""What a run reads: the protocol's rows, the prompt's wording, the evidence in it. A checkpoint keeps it.

Unusual here: weights do not show what they were trained to read, so without this a checkpoint would score other
prompts, or rows that it was trained on, and the result would stand in its run's folder as if it were its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from project.errors import CheckpointError

if TYPE_CHECKING:
    from project.datamodule import InteractionData


def reads_of(data: InteractionData) -> dict[str, Any]:
    """What a checkpoint keeps: `protocol` (its hash), and by YAML key what the model reads beside the logs.

    Args:
        data: Of the run.
    """
    retriever = data.retriever.settings()
    retriever.pop("source", None)  # of one's own code a comment may change
    found = {
        "protocol": data.split.hash,
        "data.prompt": asdict(data.prompt),
        "data.retriever": retriever,
        "data.refits": data.refits,
        "data.taste": None if data.taste is None else asdict(data.taste),
    }
    # only what JSON knows: a checkpoint holds no objects
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def check_reads(kept: Mapping[str, Any] | None, data: InteractionData, judged: bool = True) -> None:
    """Refuse to score with a checkpoint that was trained to read something else.

    Args:
        kept: Of the checkpoint; None: it is from before this was kept, and nothing is known.
        data: What it would read now.
        judged: Whether its scores will be judged by the log's labels; requests may come from a log that has grown.

    Raises:
        CheckpointError: Names the key that differs.
    """
    if kept is None:
        return
    if "data.block_rows" in kept:
        raise CheckpointError(
            f"the checkpoint's retriever was fitted every {kept['data.block_rows']} rows (data.block_rows of an "
            f"earlier version); now it is fitted data.refits ({data.refits}) times. Train a run of its own."
        )
    now = reads_of(data)
    protocol = now.pop("protocol")
    for key in now:
        if differs := _difference(key, kept[key], now[key]):
            name, trained, given = differs
            raise CheckpointError(
                f"{name} is {given!r}, but the checkpoint was trained with {trained!r}. Use the config.yaml beside the "
                "checkpoint's folder, or train a run of its own."
            )
    if judged and kept["protocol"] != protocol:
        raise CheckpointError(
            f"the checkpoint was trained under the protocol hash {kept['protocol']}, this configuration gives "
            f"{protocol}: data.protocol, data.logs or their files differ, and rows that it was trained on could "
            "be among those that are scored. Use the config.yaml beside the checkpoint's folder, or train a run of its "
            "own."
        )


def _difference(key: str, trained: Any, given: Any) -> tuple[str, Any, Any] | None:
    """The first entry that differs, with both values; what only one side knows came with another version."""
    if isinstance(trained, dict) and isinstance(given, dict):
        found = (_difference(f"{key}.{k}", trained[k], given[k]) for k in trained if k in given)
        return next(filter(None, found), None)
    return (key, trained, given) if trained != given else None
