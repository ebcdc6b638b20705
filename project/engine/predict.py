"""A calibrated run that is open: scores requests, for Python and for `predict --engine early_exit`."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import polars as pl
from rich.console import Console

from project.data.context import values_of
from project.data.download import resolve_model
from project.data.prompt import NUMBERS
from project.data.requests import (
    Catalogue,
    InvalidRequest,
    Requests,
    read_requests,
    request_of,
    some_usable,
    without_long,
)
from project.datamodule import InteractionData, check_reads
from project.engine.cache import StreamCache
from project.engine.decisions import ListExits
from project.engine.engine import Engine
from project.engine.requests import prepare_requests
from project.errors import ConfigError, DataError, NotCalibratedError, NotFittedError
from project.exits.plan import ExitPlan, Plans, plans_of
from project.exits.ranking import Lists
from project.model.backbone import Backbone
from project.model.heads import heads_digest
from project.model.module import ExitRecommender
from project.request import RankRequest, Scored, id_of
from project.run import (
    Checkpoint,
    read_checkpoint,
    replace_file,
    run_of_checkpoint,
    table_about,
)
from project.run_folder import tag_of

# a row a candidate
TABLE = {
    "request_id": pl.String,
    "candidate_index": pl.Int64,
    "item_id": pl.String,
    "exit_layer": pl.Int64,
    "adaptive_logit": pl.Float32,
    "probability": pl.Float32,
    "error": pl.String,
}
PART = 50_000  # candidates that are in memory at a time, 4.6 KB each


def load_weights(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    compared: bool = True,
) -> Checkpoint:
    """Give a module the weights of a run, calibrated or not; returns the checkpoint.

    `data` is what will be scored: it must be what the run was trained to read, and if scores are `compared` with
    labels of the log, their rows must be unseen (`check_reads`). A module without a backbone gets one.
    """
    content = read_checkpoint(checkpoint)
    # 1. what will be scored is what the run was trained to read
    if data is not None:
        check_reads(content.get("reads"), data, "validate" if compared else "predict")
    # 2. a backbone, then the weights that training has changed
    if model.backbone is None:
        backbone = Backbone.from_pretrained(
            resolve_model(model.backbone_name), num_layers=model.depth
        )
        numbers = content["state_dict"].get("backbone.embed_tokens.numbers", ())
        model.ratings = len(numbers) > len(NUMBERS)
        model.set_backbone(backbone, tokenizer)
    model.on_load_checkpoint(content)
    # on_load_checkpoint was stricter
    model.load_state_dict(content["state_dict"], strict=False)
    return content


def load_run(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    compared: bool = True,
) -> Plans:
    """`load_weights` of a calibrated run; returns its exit plans."""
    plans = plans_of(load_weights(model, tokenizer, checkpoint, data, compared))
    if plans is None:
        raise NotCalibratedError(
            "this checkpoint has no calibrated exits. Run `python -m project calibrate --config RUN/config.yaml "
            "--ckpt_path RUN/checkpoints/last.ckpt`."
        )
    return plans


def scores_of_run(run: Path, split: str, model: ExitRecommender) -> pl.DataFrame | None:
    """A run's score table of a split; None where there is none of these weights."""
    path = run / "scores" / f"{split}.parquet"
    digest = heads_digest(model.state_dict())
    if not path.is_file() or table_about(path).get("heads") != digest:
        return None
    return pl.read_parquet(path, glob=False)


@dataclass(eq=False)
class Run:
    """A calibrated run, opened: scores requests by its exit plan, lists by its margins. One thread at a time.

    Args:
        model: With the run's weights.
        data: The run's log, protocol and prompt.
        plan: Who leaves where.
        lists: Who leaves where the best `top_n` are asked for.
        certificate: What a result file says of the plan's promise; None where there is none.
        folder: Where the run lies.
    """

    # `score` and `score_after_log` are the Python API; `write` is the command `predict
    # --engine early_exit`

    model: ExitRecommender
    data: InteractionData
    plan: ExitPlan
    lists: Lists
    certificate: Any = None
    folder: Path = Path()

    @cached_property
    def engine(self) -> Engine:
        """Runs layers, and keeps users' histories between calls."""
        decision = ListExits(self.plan, self.lists, self.model.device)
        return Engine(self.model, decision, StreamCache())

    def score(
        self, requests: pl.DataFrame | RankRequest | Sequence[RankRequest]
    ) -> pl.DataFrame:
        """Scores of requests at a time of their own: strictly earlier rows of the log are read, no others.

        Args:
            requests: A table with a row a request: user_id, candidates (a list of item ids) and time (seconds), and
                request_id and top_n where it has them; or requests.

        Returns:
            One row a candidate, of the best `top_n` where it is given: request_id, candidate_index, item_id,
            exit_layer, adaptive_logit, probability, error.
        """
        asked = as_requests(requests)
        if timeless := [r.request_id for r in asked if r.time is None]:
            raise DataError(
                f"request {timeless[0]!r} has no time, and would read all of the log, the rows after it included. Give "
                "it a time (seconds since 1970: only strictly earlier rows are read), or call score_after_log."
            )
        return self._table(asked)

    def score_after_log(
        self, requests: pl.DataFrame | RankRequest | Sequence[RankRequest]
    ) -> pl.DataFrame:
        """Scores of requests that read the whole log, as those of today do; never of rows that the log has.

        Otherwise as `score`; the requests have no time.
        """
        return self._table(
            [replace(request, time=None) for request in as_requests(requests)]
        )

    def _table(self, asked: list[RankRequest]) -> pl.DataFrame:
        # 1. one catalogue of all items that requests bring
        log = self.data.split.interactions
        catalogue = Catalogue(log.items)
        resolved = list[RankRequest]()
        for request in asked:
            try:
                values_of(request, log.columns, {})
                resolved.append(catalogue.resolve(request, log.rule))
            except DataError as error:
                raise DataError(f"request {request.request_id!r}: {error}") from None
        requests = with_room(Requests(resolved, catalogue.table()), self.data)
        # 2. their scores
        return pl.concat(self.score_part(requests, part)[0] for part in parts_of(requests))

    def score_part(
        self, requests: Requests, part: Sequence[RankRequest | InvalidRequest]
    ) -> tuple[pl.DataFrame, Counter[str]]:
        """`early_exit_table` of some of the requests, which fit into memory together, and what was counted."""
        # 1. valid requests go through the engine, invalid ones get NaN and their error; the
        # order stays
        usable = [request for request in part if isinstance(request, RankRequest)]
        some = replace(requests, requests=usable, invalid=())
        prepared = prepare_requests(self.model, self.data, some) if usable else []
        scores = iter(self.engine.score(prepared))
        found = [
            Scored.failed(r, r.error) if isinstance(r, InvalidRequest) else next(scores)
            for r in part
        ]
        # 2. what `print_counts` says
        scored = [one for one in found if one.error is None]
        counts = Counter(
            candidates=sum(len(one.logits) for one in scored),
            scored=len(scored),
            invalid=len(found) - len(scored),
            token_layers=sum(one.token_layers for one in found),
            full_depth=sum(one.full_depth_token_layers for one in found),
        )
        return early_exit_table(part, found), counts

    def write(self, requests: Requests, path: Path, about: dict[str, str]) -> Counter[str]:
        """Write the table of requests, which notes what it is `about`; returns what was counted.

        It is made part by part, and is there when all of them are.
        """
        files = list[Path]()  # a part each, in a folder that is removed whatever happens
        counts = Counter[str]()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{path.stem}-", dir=path.parent
        ) as folder:
            for part in parts_of(requests):
                table, counted = self.score_part(requests, part)
                counts.update(counted)
                files.append(Path(folder) / f"{len(files)}.parquet")
                table.write_parquet(files[-1])
            whole = pl.scan_parquet(files)
            replace_file(path, lambda file: whole.sink_parquet(file, metadata=about))
        return counts


def as_requests(
    given: pl.DataFrame | RankRequest | Sequence[RankRequest],
) -> list[RankRequest]:
    """Requests of a table with a row each, as a file has them, or as they are; unnamed ones get their place as name."""
    if isinstance(given, pl.DataFrame):
        found = [
            request_of({"request_id": str(place)} | row)
            for place, row in enumerate(given.to_dicts())
        ]
    else:
        listed = [given] if isinstance(given, RankRequest) else given
        found = [
            replace(r, request_id=r.request_id or str(place))
            for place, r in enumerate(listed)
        ]
    if len({request.request_id for request in found}) < max(len(found), 1):
        raise DataError(
            "found no request, or two of one request_id; expected one at least, each with its own."
        )
    return found


def open_calibrated(
    trainer: L.Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    engine: str = "early_exit",
) -> tuple[Run, Path, dict[str, str]]:
    """Open a run of `model`; returns it, where its table goes (without an ending), and what notes the table's origin.

    The tag of result files is the trainer's.
    """
    if checkpoint is None:
        raise NotFittedError(
            f"predict --engine {engine} needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` makes one."
        )
    if trainer.world_size > 1 and engine != "ray":
        raise ConfigError(
            f"predict --engine {engine} runs in one process, found {trainer.world_size}; expected trainer.devices 1. "
            "Split data.requests into files, and run each with --results.tag of its own, or use --engine ray."
        )
    data.prepare_data()
    plans = load_run(model, data.tokenizer, checkpoint, data, compared=False)
    folder = run_of_checkpoint(checkpoint)
    place = folder / "scores" / f"predict-{engine}{tag_of(trainer)}"
    about = {"heads": heads_digest(model.state_dict()), "protocol": data.split.hash}
    run = Run(model, data, plans.plan, plans.lists, plans.certificate, folder)
    return run, place, about


def run_early_exit(
    trainer: L.Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
) -> Path:
    """Score data.requests with the engine and the run's exit plan; write scores/predict-early_exit.parquet.

    The trainer says where to run, and the tag of result files.
    """
    run, place, about = open_calibrated(trainer, model, data, checkpoint)
    requests = some_usable(
        with_room(read_requests(data.requests_file, data.split.interactions), data)
    )
    model.to(trainer.strategy.root_device)
    path = place.with_name(f"{place.name}.parquet")
    counts = run.write(requests, path, about)
    print_counts(counts, path)
    return path


def with_room(requests: Requests, data: InteractionData) -> Requests:
    """The same requests; those whose prompts are too long are invalid."""
    return without_long(requests, data.encoder_of(requests), data.context_tokens)


def print_counts(counts: Mapping[str, int], path: Path) -> None:
    """Say what was scored, and where it is."""
    invalid = counts["invalid"]
    refused = f", {invalid} invalid (see the column error)" if invalid else ""
    Console().print(
        f"{counts['candidates']} candidates of {counts['scored']} requests scored{refused}, with "
        f"{counts['token_layers']:,} token-layers of {counts['full_depth']:,}: {path}"
    )


def parts_of(requests: Requests) -> Iterator[list[RankRequest | InvalidRequest]]:
    """All requests in their order, cut behind the one that reaches PART candidates."""
    invalid = {r.place: r for r in requests.invalid}
    usable = iter(requests.requests)
    part = list[RankRequest | InvalidRequest]()
    size = 0  # candidates of the part
    for place in range(len(requests.requests) + len(invalid)):
        part.append(invalid.get(place) or next(usable))
        size += len(part[-1].candidates)
        if size >= PART:
            yield part
            part = []
            size = 0
    if part:
        yield part


def early_exit_table(
    asked: Sequence[RankRequest | InvalidRequest], scored: Sequence[Scored]
) -> pl.DataFrame:
    """One row a candidate, in the order of the requests; one row for an invalid request that has no candidate.

    Of a request with `top_n` these are the best so many, in its order. What could not be scored has
    NaN, exit layer -1 and an error.
    """
    rows = list[tuple[Any, ...]]()
    for request, one in zip(asked, scored, strict=True):
        items = map(id_of, request.candidates)
        values = zip(
            items,
            *(x.tolist() for x in (one.exit_layers, one.logits, one.probabilities)),
            strict=True,
        )
        made = [(one.request_id, k, *row, one.error) for k, row in enumerate(values)]
        if isinstance(request, RankRequest) and request.top_n is not None:
            made = [made[k] for k in sorted(one.best_first(request.top_n))]
        rows += made
        if not request.candidates:
            rows.append((one.request_id, None, None, -1, np.nan, np.nan, one.error))
    return pl.DataFrame(rows, TABLE, orient="row")
