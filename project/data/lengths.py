"""Lengths: what cannot stand in a window is refused before anybody waits for it.

Unusual here: items are measured before there is evidence, each field of it as one token, so that a title which only
test or a request would show is refused before training. Streams are measured exactly, once they are tokenised.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl

from project.data.prompts import PromptEncoder
from project.data.requests import Refused, Requests
from project.data.splits import SplitInteractions
from project.data.streams import Streams
from project.errors import ConfigError, DataError

_FIX = (
    "Shorten what is long in data.prompt.segment, for example {title:.40}, leave a field out, or raise "
    "data.context_tokens (and data.batch_tokens)."
)


def check_items(encoder: PromptEncoder, items: pl.DataFrame, context_tokens: int) -> None:
    """Raise `ConfigError` if the segment of an item has no room in a window.

    Args:
        encoder: Made for the items.
        items: The items table.
        context_tokens: Capacity of a window.
    """
    lengths = len(encoder.instruction) + encoder.least_lengths()
    long = lengths > context_tokens
    if long.any():
        raise ConfigError(
            f"{_said(items['item_id'][int(lengths.argmax())], int(lengths.max()), context_tokens)} "
            f"({long.sum():,} of {len(items):,} items are too long). {_FIX}"
        )


def check_streams(streams: Streams, split: SplitInteractions, context_tokens: int) -> None:
    """Raise `ConfigError` if a segment has no room in a window.

    Args:
        streams: Of rows of the log.
        split: The log.
        context_tokens: Capacity of a window.
    """
    every = streams.tokens.lengths
    lengths = every[-1] + every[:-1]
    if lengths.max(initial=0) <= context_tokens:
        return
    longest = int(lengths.argmax())
    if streams.row_id[longest] < 0:
        raise ConfigError(
            f"A list of what similar users liked (data.prompt.similar) has {lengths[longest]:,} tokens, the "
            f"instruction included, but data.context_tokens is {context_tokens:,}. Lower "
            "data.retriever.init_args.similar_items, or raise data.context_tokens (and data.batch_tokens)."
        )
    item = split.rows.filter(pl.col("row_id") == streams.row_id[longest])["item"][0]
    item_id = split.interactions.items["item_id"][item]
    raise ConfigError(f"{_said(item_id, int(lengths[longest]), context_tokens)}. {_FIX}")


def without_long(requests: Requests, encoder: PromptEncoder, context_tokens: int) -> Requests:
    """Requests whose items all have room in a window; the others are refused, each alone.

    Args:
        requests: What is asked.
        encoder: Made for `requests.items`.
        context_tokens: Capacity of a window.

    Raises:
        DataError: None is left.
    """
    lengths = len(encoder.instruction) + encoder.least_lengths()
    if lengths.max(initial=0) <= context_tokens:
        return requests
    count = len(requests.requests) + len(requests.refused)
    places = np.setdiff1d(np.arange(count), [r.place for r in requests.refused])
    kept, refused = [], list(requests.refused)
    for place, request in zip(places.tolist(), requests.requests, strict=True):
        named = [*request.candidates, *(item for item, _, _ in request.history)]
        long = [item for item in named if lengths[requests.codes[item]] > context_tokens]
        if not long:
            kept.append(request)
            continue
        said = _said(long[0], int(lengths[requests.codes[long[0]]]), context_tokens)
        error = f"request {request.request_id!r}: {said}. Give it a shorter title."
        refused.append(Refused(place, request.request_id, request.candidates, error))
    if not kept:
        raise DataError(f"{refused[-1].error} None of the {count} requests (data.requests) can be scored.")
    return replace(requests, requests=kept, refused=tuple(sorted(refused, key=lambda r: r.place)))


def _said(item_id: str, tokens: int, context_tokens: int) -> str:
    return (
        f"The prompt of item {item_id!r} alone has {tokens:,} tokens (instruction, segment and answer), but "
        f"data.context_tokens is {context_tokens:,}"
    )
