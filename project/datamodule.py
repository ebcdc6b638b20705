"""DataModule: from logs to batches, with the retriever's retrieved features in between.

Everything slow happens once, on one process, in `prepare_data` and is cached by content; `setup` reads the caches. All
checks of the input are made here, before the first batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import polars as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from project.arrays import F32, F64
from project.cache import default_cache, restore
from project.data.batch import (
    EvaluationSampler,
    PackedLoader,
    StageClock,
    TrainSampler,
)
from project.data.download import resolve_model
from project.data.logs import Logs
from project.data.prompt import (
    RATING_SCALE,
    Prompt,
    PromptEncoder,
    RatingScale,
    field_showing,
    item_columns,
    shows_items,
    shows_numbers,
    with_segment,
)
from project.data.protocol import (
    Protocol,
    SplitInteractions,
    apply_protocol,
    build_interactions,
)
from project.data.requests import (
    Requests,
    check_items,
    check_streams,
    read_requests,
    request_streams,
    some_usable,
    without_long,
)
from project.data.stream import Streams, build_streams
from project.errors import CheckpointError, ConfigError, DataError, ProjectError
from project.features import feature_matrix
from project.retrieval import (
    LightGCN,
    MatrixFactorisation,
    RetrievedFeatures,
    Retriever,
)
from project.retrieval.base import failures_named
from project.retrieval.candidates import CandidateFinder, CandidateSettings
from project.retrieval.lightgcn import VectorRetriever
from project.retrieval.online import FeatureIndex, can_be_indexed
from project.retrieval.rates import ContextRates
from project.retrieval.text import MAX_TOKENS, MeanPooling, encode_once, item_texts
from project.run import label_rule

DEFAULT_PROTOCOL = Protocol()
DEFAULT_PROMPT = Prompt()
DEFAULT_RETRIEVER = LightGCN(item_neighbours=30)
DEFAULT_MF = MatrixFactorisation()
DEFAULT_CANDIDATES = CandidateSettings()
ITEM_LAYERS = 6  # of the backbone, which embed items' texts


class InteractionData(L.LightningDataModule):
    """Interaction logs combined with retrieved neighbours, as packed prompts.

    Args:
        logs: Where interactions and items come from: a class of project.data.logs and its arguments.
        retriever: Finds similar users for a candidate: a class of project.retrieval and its arguments.
        protocol: Label rule, split, minimum history and folds; its hash stands beside every number.
        prompt: The wording of prompts.
        tokenizer: Tokenizer of the backbone; set by model.backbone.
        context_tokens: Capacity of a history window in tokens. The instruction and any one segment must fit.
        batch_tokens: Tokens of a batch on one process.
        refits: Equal shares of the log; retriever and factorisation are fitted before each but the first, on all rows
            before it.
        mf: Matrix factorisation behind the retrieved features `mf`, the chance of a like by the user's own earlier
            answers, for prompts, exit 0 and baselines, and `mf_rating`, the same of ratings, for the latter two; null
            leaves both out.
        requests: JSONL or Parquet file of requests, for predict; a line is {"request_id": "r1", "user_id": "196",
            "time": 880000000, "candidates": ["242", "302"]}, or, instead of a user of the log, {"request_id": "r2",
            "history": [{"item_id": "242", "label": 1, "time": 880000000}], "candidates": ["302"]}.
        bundle: Folder of a run's bundle, whose retrieved features save refitting the retriever; set by ckpt_path.
        seed: Order and cuts of training windows; set by seed_everything.
        serving_values: Context column -> value that requests have which do not say it, such as {position: 1}: for
            columns that are only known once the page is made.
        candidates: What recommendations are chosen from: how many items of a user, and of which source.
    """

    def __init__(
        self,
        logs: Logs,
        retriever: Retriever = DEFAULT_RETRIEVER,
        protocol: Protocol = DEFAULT_PROTOCOL,
        prompt: Prompt = DEFAULT_PROMPT,
        tokenizer: str = "smollm2-135m-instruct",
        context_tokens: int = 1024,
        batch_tokens: int = 4096,
        refits: int = 10,
        mf: MatrixFactorisation | None = DEFAULT_MF,
        requests: str | None = None,
        bundle: str | None = None,
        seed: int = 0,
        serving_values: dict[str, str | float] | None = None,
        candidates: CandidateSettings = DEFAULT_CANDIDATES,
    ) -> None:
        super().__init__()
        if not 1 <= context_tokens <= batch_tokens:
            raise ConfigError(
                f"data.context_tokens is {context_tokens} and data.batch_tokens is {batch_tokens}: expected "
                "1 <= context_tokens <= batch_tokens, since a batch holds at least one full window."
            )
        if (prompt.similar is None) != (retriever.similar_every == 0):
            raise ConfigError(
                f"data.prompt.similar is {prompt.similar!r}, but the similar_every of data.retriever "
                f"({type(retriever).__name__}) is {retriever.similar_every}: expected a template and a number above 0, "
                "or null and 0. Only retrievers that compare users, such as LightGCN, can make lists for it."
            )
        retriever.check()
        _check_shown(prompt, retriever, mf)
        self.logs = logs
        self.retriever = retriever
        self.mf = mf
        self.protocol = protocol
        self.wording = prompt  # `prompt` is with the default segment
        self.tokenizer_name = tokenizer
        self.context_tokens = context_tokens
        self.batch_tokens = batch_tokens
        self.refits = refits
        self.serving_values = serving_values
        self.candidates = candidates
        self.requests_file = requests
        self.seed = seed
        self.cache_dir = default_cache()
        self.bundle = bundle
        self.clock = StageClock()
        # for the log and for results; known with the retrieved features
        self.warnings: list[str] = []
        self.requests: Requests | None = None  # of stage predict
        # a row each candidate, in their order
        self.candidate_retrieved: pl.DataFrame | None = None
        self._given: Requests | None = None
        self._streams: dict[str, Streams] = {}

    @cached_property
    def split(self) -> SplitInteractions:
        """The interactions with their split, fold and role."""
        with self.clock.stage("read logs"):
            try:
                raw = self.logs.read()
            except ProjectError:
                raise
            except Exception as error:
                reader = type(self.logs).__name__
                raise DataError(
                    f"data.logs: {reader}.read failed: {type(error).__name__}: {error}"
                ) from error
            log = build_interactions(raw, self.protocol)
            if self.bundle is not None:
                log = replace(log, rule=label_rule(Path(self.bundle).parent))
            split = apply_protocol(log, self.protocol)
            for line in split.warnings:
                rank_zero_info(line)
            return split

    @property
    def features(self) -> RetrievedFeatures:
        """The retrieved features of the log and of requests."""
        return RetrievedFeatures(
            self.split, self.retriever, self.refits, self.cache_dir, self.mf
        )

    @cached_property
    def retrieved(self) -> dict[str, pl.DataFrame]:
        """Retrieved features tables by split."""
        features = self.features
        with self.clock.stage("retrieve"), failures_named(self.retriever):
            if self.bundle is not None:
                for name in ("retrieved", "mf", "text"):
                    restore(Path(self.bundle) / name, self.cache_dir / name)
            tables = features.tables()
        dead = features.warnings(tables)
        for line in dead:
            rank_zero_warn(line, category=UserWarning)
        self.warnings = [*self.split.warnings, *dead]
        return tables

    @cached_property
    def rates(self) -> ContextRates:
        """Context of requests and its as-of rates; empty where the log has no such columns."""
        return ContextRates(self.split, self.serving_values)

    @cached_property
    def _index(self) -> FeatureIndex:
        """Answers requests that lie after the log, and bring no history, without another walk."""
        return self.features.index()

    def candidate_finder(self, before: float = np.inf) -> CandidateFinder:
        """Finds candidates as of a second; by default as of now, after the log."""
        snapshots = self.features.snapshots()
        return CandidateFinder(self.split, snapshots, self.candidates, before)

    def targets(self, split: str) -> pl.DataFrame:
        """The rows of a split that are scored."""
        return self.split.rows.filter(role="target", split=split)

    def retrieved_of(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Retrieved features of rows of one split, in their order, as that split reads it."""
        splits = rows["split"].cast(pl.String).unique().to_list()
        assert len(splits) <= 1, splits
        table = self.retrieved[splits[0] if splits else "train"]
        return rows.select("row_id").join(
            table, on="row_id", how="left", maintain_order="left"
        )

    def features_of(self, scores: pl.DataFrame, base: float) -> F64:
        """Features (n, F) of the rows of a score table, of one split or of the requests at hand.

        `base` is train's share of likes, to which rates of few rows shrink.
        """
        if scores["row_id"].null_count():  # candidates of requests are no rows of the log
            assert self.candidate_retrieved is not None
            return feature_matrix(self.candidate_retrieved, base)
        return feature_matrix(
            self.retrieved_of(self.split.rows[scores["row_id"].to_numpy()]), base
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        with self.clock.stage("fetch model"):
            folder = resolve_model(self.tokenizer_name)
        try:
            return AutoTokenizer.from_pretrained(folder)
        # of transformers, many lines about other causes
        except (OSError, ValueError, TypeError):
            raise ConfigError(
                f"model.backbone is {self.tokenizer_name!r}, which has no tokenizer that can be read; expected a "
                "model's folder with tokenizer.json. Save the tokenizer there, too."
            ) from None

    @cached_property
    def prompt(self) -> Prompt:
        """The wording of prompts, with the default segment where data.prompt.segment is null."""
        numbers = ["mf_number"] if self.mf is not None else []
        numbers += ["item_similarity_number"] if self.retriever.item_neighbours else []
        return with_segment(
            self.wording, self.tokenizer, self.split.interactions.items, numbers
        )

    @cached_property
    def rating_scale(self) -> RatingScale | None:
        """Where histories show ratings, by train's: the log has more than two, and prompts have learned tokens."""
        if self.bundle is not None:  # as in training, whatever the log is now
            file = Path(self.bundle) / RATING_SCALE
            if not file.is_file():
                return None
            return RatingScale(**json.loads(file.read_text(encoding="utf-8")))
        segment = self.prompt.segment
        ratings = self.split.train_ratings
        if not ratings.size or not (shows_numbers(segment) or shows_items(segment)):
            return None
        return RatingScale(float(ratings.mean()), float(ratings.std()))

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Makes segments of rows."""
        items = self.split.interactions.items
        encoder = PromptEncoder(self.tokenizer, self.prompt, items, self.rating_scale)
        shown, hidden = item_columns(self.prompt, items)
        note = f"; not shown: {', '.join(hidden)} (data.prompt.segment)" if hidden else ""
        rank_zero_info(f"Prompts show of each item: {', '.join(shown) or 'nothing'}{note}")
        if (
            self.requests_file is None and self._given is None
        ):  # a request with a long item is invalid by itself
            check_items(encoder, items, self.context_tokens)
        return encoder

    def encoder_of(self, requests: Requests) -> PromptEncoder:
        """The same with the items that requests bring."""
        known = self.split.interactions.items.height
        return self.encoder.with_items(requests.items[known:])

    def item_encoder(self) -> MeanPooling:
        """The backbone's first layers, which embed items' texts; not kept, since it holds a model once it has read."""
        return MeanPooling(self.tokenizer_name, MAX_TOKENS, ITEM_LAYERS)

    @cached_property
    def _known_vectors(self) -> F32:
        """Of the log's items; every validation reads them."""
        with self.clock.stage("embed items"):
            return encode_once(
                self.item_encoder(),
                item_texts(self.split.interactions.items),
                self.cache_dir,
            )

    def item_vectors(self) -> F32:
        """Frozen vectors (items, d) of the texts of all items, those that only requests know last."""
        known = self._known_vectors
        new = [] if self.requests is None else item_texts(self.requests.items[len(known) :])
        return np.concatenate([known, self.item_encoder().encode(new)]) if new else known

    def streams(self, split: str) -> Streams:
        """All users' streams as of `split`, with its targets."""
        if split not in self._streams:
            # made before the clock of this stage starts
            retrieved = self.retrieved[split]
            encoder = self.encoder
            with self.clock.stage("tokenise"):
                streams = build_streams(self.split.rows, retrieved, split, encoder)
            check_streams(streams, self.context_tokens)
            self._streams[split] = streams
        return self._streams[split]

    def prepare_data(self) -> None:
        """Download, read, split, retrieve: once on a machine; the results are cached."""
        # a wrong wording is an error before somebody waits for retrieved features
        _ = self.encoder
        _ = self.retrieved

    def setup(self, stage: str) -> None:
        """Tokenise what the stage (fit, validate, test or predict) needs."""
        for split in {
            "fit": ("train", "valid"),
            "validate": ("valid",),
            "test": ("test",),
        }.get(stage, ()):
            self.streams(split)
        if stage == "predict":
            requests = self._given or read_requests(
                self.requests_file, self.split.interactions
            )
            encoder = self.encoder_of(requests)
            self.requests = some_usable(
                without_long(requests, encoder, self.context_tokens)
            )
            for invalid in self.requests.invalid:
                line = f"request {invalid.request_id!r} is not scored: {invalid.error}"
                rank_zero_warn(line, category=UserWarning)
            self._streams["predict"] = request_streams(
                self.requests, self.split, self.retrieved["test"], encoder, self._retrieve
            )

    def give_requests(self, requests: Requests) -> None:
        """Score these at stage predict, instead of the file data.requests."""
        self._given = requests

    def _retrieve(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Retrieved features of rows that are not in the logs."""
        assert self.requests is not None
        own = ~rows["candidate"].to_numpy()
        catalogue = self.requests.items
        now = not own.any() and rows["timestamp"].min() > self.split.latest  # type: ignore[operator]
        if now and can_be_indexed(self.retriever):
            found = [
                self._index.retrieved(
                    user, part["item"].to_numpy(), None, catalogue, time
                ).table()
                for (_, user, time), part in rows.group_by(
                    "stream", "user", "timestamp", maintain_order=True
                )
            ]
            table = pl.concat(found)
            if self.retriever.similar_every:  # lists are of rows of the log
                table = table.with_columns(similar_after=pl.lit(None, pl.List(pl.Int32)))
        else:
            table = self.features.of_requests(rows, catalogue)
        of_request = [self.rates.values(r) for r in self.requests.requests]
        values = {}
        for name in self.rates.columns:
            # a history that a request brings has no context
            values[name] = np.full(rows.height, np.nan)
            values[name][~own] = np.concatenate([of[name] for of in of_request])
        context = self.rates.of_requests(
            values,
            rows["item"].to_numpy().astype(np.int64),
            np.where(own, np.inf, rows["timestamp"].to_numpy()),
            catalogue,
        )
        table = table.hstack(pl.DataFrame(context, nan_to_null=True))
        self.candidate_retrieved = table.filter(~own)
        return table

    def _training(self) -> TrainSampler:
        return TrainSampler(
            self.streams("train"),
            self.context_tokens,
            self.batch_tokens,
            self.seed,
            *self._ranks,
        )

    @property
    def _ranks(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def train_batches(self) -> int:
        """Batches of an epoch on this process; starts no loader."""
        return len(self._training())

    def train_dataloader(self) -> PackedLoader:
        """Packed windows of all users, cut and shuffled anew each epoch."""
        return PackedLoader(self.streams("train"), self._training())

    def _evaluation(self, split: str) -> PackedLoader:
        streams = self.streams(split)
        sampler = EvaluationSampler(
            streams, self.context_tokens, self.batch_tokens, *self._ranks
        )
        return PackedLoader(streams, sampler)

    def val_dataloader(self) -> PackedLoader:
        """Every validation target once."""
        return self._evaluation("valid")

    def test_dataloader(self) -> PackedLoader:
        """Every test target once."""
        return self._evaluation("test")

    def predict_dataloader(self) -> PackedLoader:
        """Every candidate of every request once."""
        return self._evaluation("predict")


def _check_shown(
    prompt: Prompt, retriever: Retriever, mf: MatrixFactorisation | None
) -> None:
    """Refuse a prompt that shows a retrieved feature which nothing in this run computes."""
    # a retriever that cannot compare items shows "not known" instead, as NoRetriever does
    # of votes
    compares = not isinstance(retriever, VectorRetriever) or retriever.item_neighbours > 0
    for column, computed, problem in (
        ("mf", mf is not None, "data.mf is null: expected for example {dim: 8}"),
        ("item_similarity", compares, "the retriever's item_neighbours is 0: expected 30"),
    ):
        field = field_showing(prompt, column)
        if field is not None and not computed:
            raise ConfigError(
                f"data.prompt.segment {prompt.segment!r} shows {field}, but {problem}; or leave the field out. "
                "A column of your items needs another name than a retrieved feature's (TableLogs: item_columns)."
            )


def reads_of(data: InteractionData) -> dict[str, Any]:
    """What a checkpoint keeps: `protocol` (its hash), and by YAML key what the model reads beside the logs."""
    retriever = data.retriever.settings()
    retriever.pop("source", None)  # of one's own code a comment may change
    found = {
        "protocol": data.split.hash,
        "data.prompt": asdict(data.prompt),
        "data.retriever": retriever,
        "data.refits": data.refits,
        "data.mf": None if data.mf is None else asdict(data.mf),
    }
    # what JSON knows: a checkpoint holds no objects
    return dict(json.loads(json.dumps(found, default=str)))


def check_reads(
    kept: Mapping[str, Any] | None, data: InteractionData, command: str = "validate"
) -> None:
    """Refuse to score with a checkpoint that was trained to read something else than `data`.

    Args:
        kept: `reads_of` its training; None: it was saved outside of a fit, and nothing is known.
        data: What it would read now.
        command: What it scores. For predict the log may have grown; for test, too, where every test row is later than
            all that it was trained, chosen and calibrated on, `until`.
    """
    if kept is None:
        return
    now = reads_of(data)
    protocol = now.pop("protocol")
    fix = "Use the config.yaml beside the checkpoint's folder, or train a run of its own."
    for key in now:
        if differs := _difference(key, kept.get(key), now[key]):
            name, trained, given = differs
            raise CheckpointError(
                f"{name} is {given!r}, but the checkpoint was trained with {trained!r}. {fix}"
            )
    if command == "predict" or kept["protocol"] == protocol:
        return
    if command == "test" and data.split.manifest["times"]:
        earliest: Any = data.split.rows.filter(split="test")["timestamp"].min()
        if earliest > kept.get("until", np.inf):
            return
    raise CheckpointError(
        f"the checkpoint was trained under the protocol hash {kept['protocol']}, this configuration gives "
        f"{protocol}: data.protocol, data.logs or their files differ, and rows that it was trained on could "
        f"be among those that are scored. {fix}"
    )


def _difference(key: str, trained: Any, given: Any) -> tuple[str, Any, Any] | None:
    """The first entry that differs, with both values; what only one of them knows came with another version."""
    if isinstance(trained, dict) and isinstance(given, dict):
        found = (
            _difference(f"{key}.{k}", trained[k], given[k]) for k in trained if k in given
        )
        return next(filter(None, found), None)
    return (key, trained, given) if trained != given else None
