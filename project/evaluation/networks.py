"""CTR networks as baselines: DeepFM, DCN-v2 and DIN, trained on the same rows; optional."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
import torch
from rich.progress import Progress
from torch import Tensor, nn

from project.arrays import F64, I64
from project.cache import cached_folder, content_key
from project.data.protocol import SPLITS, SplitInteractions
from project.errors import DataError
from project.evaluation.baselines import (
    Baseline,
    baseline_scores,
    targets_of,
    targets_table,
    train_labels,
)
from project.features import FEATURES, Term, feature_matrix, fit_terms
from project.metrics import auc
from project.retrieval.lightgcn import one_thread
from project.retrieval.past import WalkRows, queries_by_user
from project.run import table_about, write_table

if TYPE_CHECKING:
    from project.datamodule import InteractionData

Table = dict[str, Tensor]

NETWORKS = ("deepfm", "dcn_v2", "din")
IDS = ("user", "item")
HISTORY = ("liked", "disliked")
SCALED = "scaled"
NO_ROW = -1  # item and answer of a place where the user has no earlier row
PADDING = 0  # code of no row; its vector is 0
UNKNOWN = 1  # code of an id that train targets lack
FIRST = 2  # code of the first known id

BINS = 32
HISTORY_ROWS = 20  # the user's latest strictly earlier rows, which DIN sees
# an attribute is its first so many words: three genres are three words, a year is one
ATTRIBUTE_WORDS = 8
LAYERS: dict[str, Any] = {"dims": [64, 32], "dropout": 0.2}
CROSSES = 2
ATTENTION_LAYERS = [16]
BATCH_ROWS = 1024
SCORED_ROWS = 4096  # in one call; the scores do not depend on it
LEARNING_RATE = 1e-3
EPOCHS = 10
# epochs without a better AUC on `select` before training ends; the best epoch's weights are
# kept
PATIENCE = 2
HIDDEN_SHARE = 0.2  # of rows whose user, and of rows whose item, is hidden in a step

LEFT_OUT = (
    "DeepFM, DCN-v2 and DIN are left out: torch-rechub is not installed (from a checkout: "
    "pip install -e '.[networks]')."
)


# What is chosen on `tune`: size of a vector, and Adam's weight decay. Everything else is
# fixed above.
GRID = ((8, 1e-4), (8, 1e-3), (16, 1e-4), (16, 1e-3))


@dataclass(frozen=True)
class NetworkFeatures:
    """What makes a log's rows the networks' features, fitted on train targets."""

    base: float  # share of likes among train targets, to which rates of few rows shrink
    # field -> the ids that have a code, ascending; FIRST is the code of the first
    known: dict[str, I64]
    # attribute field -> codes (items, ATTRIBUTE_WORDS) by item code, PADDING at the end
    words: dict[str, I64]
    terms: tuple[Term, ...]  # numbers and rates of context, features beside `FEATURES`
    edges: list[F64]  # one array a feature: inner edges of its bins
    mean: F64  # (F,) of the train targets' features
    scale: F64  # their standard deviation, 1 where that is 0

    @classmethod
    def fit(
        cls,
        rows: pl.DataFrame,
        items: pl.DataFrame,
        retrieved: Mapping[str, pl.DataFrame],
        kinds: Mapping[str, str],
    ) -> NetworkFeatures:
        """From train's targets among `rows`, train's retrieved features and the catalogue with its attributes.

        `kinds` is number or category, by column of context and users' attributes.
        """
        base = float(train_labels(rows).mean())
        table = targets_table(rows, retrieved, "train")
        # categories have vectors
        terms = tuple(t for t in fit_terms(table, kinds, base) if t.kind != "is")
        numbers = feature_matrix(table, base, terms)
        train = targets_of(rows, "train")
        known = {name: np.unique(codes_of(train, name)) for name in IDS}
        for column, kind in kinds.items():
            if kind == "category":
                known[column] = np.unique(codes_of(table, column))
        # a constant's deviation may come out as a rounding error
        scale = np.where(np.ptp(numbers, axis=0) > 0, numbers.std(axis=0), 1.0)
        shares = np.linspace(0, 1, BINS + 1)[1:-1]
        edges = [np.unique(np.quantile(column, shares)) for column in numbers.T]
        words = _attribute_words(items, known["item"])
        return cls(base, known, words, terms, edges, numbers.mean(axis=0), scale)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of codes of each field that has one vector a row: ids and bins."""
        ids = {field_of(name): FIRST + len(known) for name, known in self.known.items()}
        return ids | {
            name: len(edges) + 1 for name, edges in zip(self.names, self.edges, strict=True)
        }

    @property
    def names(self) -> list[str]:
        """(F,) of the features: names of a network's parts, so without a point."""
        return [*FEATURES, *(f"term_{k}" for k in range(len(self.terms)))]

    @property
    def word_sizes(self) -> dict[str, int]:
        """Number of codes of each attribute."""
        return {name: int(codes.max()) + 1 for name, codes in self.words.items()}

    def table(
        self, rows: pl.DataFrame, retrieved: Mapping[str, pl.DataFrame], split: str
    ) -> Table:
        """Features of a split's n targets, in the order of `rows`.

        Field -> (n,) codes of ids and bins, (n, ATTRIBUTE_WORDS) of attributes, (n, HISTORY_ROWS) item codes of
        `liked` and `disliked` (PADDING elsewhere), and `scaled` (n, F) Float32.
        """
        targets = targets_of(rows, split)
        table = targets_table(rows, retrieved, split)
        numbers = feature_matrix(table, self.base, self.terms)
        item = codes_of(targets, "item")
        codes = {
            field_of(name): self._codes(
                name, codes_of(targets if name in IDS else table, name)
            )
            for name in self.known
        }
        codes |= {name: words[item] for name, words in self.words.items()}
        for name, edges, column in zip(self.names, self.edges, numbers.T, strict=True):
            codes[name] = np.searchsorted(edges, column, side="right")
        items, answers = earlier_rows(rows, split, HISTORY_ROWS)
        for name, answer in zip(HISTORY, (1, 0), strict=True):
            codes[name] = np.where(answers == answer, self._codes("item", items), PADDING)
        scaled = torch.from_numpy((numbers - self.mean) / self.scale).float()
        fields = {name: torch.from_numpy(values) for name, values in codes.items()}
        return fields | {SCALED: scaled}

    def _codes(self, name: str, ids: I64) -> I64:
        known = self.known[name]
        found = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        return np.where(known[found] == ids, FIRST + found, UNKNOWN)


def field_of(column: str) -> str:
    """The name of a column among a network's parts, which has no point."""
    return column.replace(".", "_")


def codes_of(table: pl.DataFrame, column: str) -> I64:
    """(n,) of a category or of ids, -1 where it is missing."""
    return table[column].fill_null(-1).to_numpy().astype(np.int64)


def _attribute_words(items: pl.DataFrame, known: I64) -> dict[str, I64]:
    """Codes of each attribute's words; words of no known item, and attributes without others, are left out."""
    found = {}
    attributes = [
        name for name in items.columns if name not in ("item", "item_id", "title")
    ]
    for number, attribute in enumerate(attributes):
        lists = [
            text.replace("|", " ").split()[:ATTRIBUTE_WORDS] for text in items[attribute]
        ]
        vocabulary = sorted({word for item in known.tolist() for word in lists[item]})
        code = {word: FIRST + k for k, word in enumerate(vocabulary)}
        table = np.full((len(lists), ATTRIBUTE_WORDS), PADDING)
        for item, words in enumerate(lists):
            seen = [code[word] for word in words if word in code]
            table[item, : len(seen)] = seen
        if vocabulary:
            found[f"attribute_{number}"] = table
    return found


def earlier_rows(rows: pl.DataFrame, split: str, last: int) -> tuple[I64, I64]:
    """Items and answers (targets, last) of the last rows before each target of a split, oldest first.

    Rows of later splits are not read; of one second the later in the log's order come last. NO_ROW stands in the first
    places where there are fewer.
    """
    later = SPLITS[SPLITS.index(split) + 1 :]
    readable = rows.filter(~pl.col("split").cast(pl.String).is_in(later))
    is_target = (readable["role"] == "target") & (readable["split"] == split)
    log = replace(WalkRows.from_log(readable), query=is_target.to_numpy())
    # positions in `log`; the last is not read
    place = np.full((readable.height, last), NO_ROW)
    for queries, own, earlier in queries_by_user(log):
        padded = np.append(np.full(last, NO_ROW), own)
        place[queries] = padded[earlier[:, None] + np.arange(last)]
    place = place[log.query]  # (targets, last)
    items, answers = (
        np.where(place == NO_ROW, NO_ROW, x[place]) for x in (log.item, log.label)
    )
    return items, answers


def build_network(name: str, features: NetworkFeatures, embedding: int) -> nn.Module:
    """A network of torch-rechub on these fields, with vectors of size `embedding`.

    * deepfm, Guo et al. 2017, arXiv 1703.04247: a factorisation machine and a deep net on the same vectors.
    * dcn_v2, Wang et al. 2021, arXiv 2008.13535: cross layers with full matrices beside a deep net.
    * din, Zhou et al. 2018, arXiv 1706.06978: the candidate attends to what the user liked and to what they disliked
      apart, each with weights of its own, over its own item vectors. A place without a row holds the vector 0.
    """
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
    from torch_rechub.models.ranking import DIN, DCNv2, DeepFM

    def sequence(field: str, size: int, **settings: Any) -> Any:
        return SequenceFeature(field, size, embedding, padding_idx=PADDING, **settings)

    first = "item" if name == "din" else "user"
    sizes = dict(sorted(features.sizes.items(), key=lambda field: field[0] != first))
    fields = [
        *(
            SparseFeature(
                n, k, embedding, padding_idx=None if n in features.names else PADDING
            )
            for n, k in sizes.items()
        ),
        *(sequence(n, k, pooling="mean") for n, k in features.word_sizes.items()),
    ]
    scaled = DenseFeature(SCALED, embed_dim=len(features.names))
    network: Any
    match name:
        case "deepfm":
            network = DeepFM([*fields, scaled], fields, LAYERS)
        case "dcn_v2":
            network = DCNv2([*fields, scaled], CROSSES, LAYERS, use_low_rank_mixture=False)
        case _:
            size = sizes["item"]
            history = [
                sequence(n, size, pooling="concat", shared_with="item") for n in HISTORY
            ]
            # one target a history
            again = SparseFeature("item", size, embedding, padding_idx=PADDING)
            network = DIN(
                fields[1:], history, [fields[0], again], LAYERS, {"dims": ATTENTION_LAYERS}
            )
    assert isinstance(network, nn.Module)
    return network


class Labelled(NamedTuple):
    """Features (field -> (n, ...)) and labels (n,) Float32 of the same rows."""

    table: Table
    labels: Tensor


def train(
    network: nn.Module, rows: Labelled, select: Labelled, weight_decay: float, seed: int
) -> int:
    """Train in place until the AUC on `select` stops rising; returns the epoch (from 1) whose weights were kept."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(
        network.parameters(), LEARNING_RATE, weight_decay=weight_decay
    )
    best, best_epoch, kept = -1.0, 0, network.state_dict()
    with one_thread():
        for epoch in range(1, EPOCHS + 1):
            network.train()
            order = torch.randperm(len(rows.labels), generator=generator)
            # chunks of equal size: batch normalisation cannot take a last batch of one row
            for batch in order.tensor_split(-(-len(order) // BATCH_ROWS)):
                table = {name: values[batch] for name, values in rows.table.items()}
                for name in IDS:
                    hidden = torch.rand(len(batch), generator=generator) < HIDDEN_SHARE
                    table[name] = table[name].masked_fill(hidden, UNKNOWN)
                optimizer.zero_grad()
                loss = nn.functional.binary_cross_entropy(
                    network(table), rows.labels[batch]
                )
                torch.autograd.backward(loss)
                optimizer.step()
            value = auc(score(network, select.table), select.labels.numpy()) or 0.0
            if value > best:
                best, best_epoch, kept = value, epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= PATIENCE:
                break
    network.load_state_dict(kept)
    return best_epoch


def score(network: nn.Module, table: Table) -> F64:
    """Logits (n,) of a table; the network gives probabilities, which stay 1e-7 from 0 and 1."""
    network.eval()
    firsts = range(0, len(table[SCALED]), SCORED_ROWS)
    with torch.no_grad():
        parts = [
            network({n: v[k : k + SCORED_ROWS] for n, v in table.items()}) for k in firsts
        ]
    probability = torch.cat([torch.zeros(0), *parts]).double()
    logits: F64 = torch.logit(probability, eps=1e-7).numpy()
    return logits


def networks_installed() -> bool:
    """Whether the extra `networks` is installed."""
    return find_spec("torch_rechub") is not None


def network_baselines(
    split: SplitInteractions,
    retrieved: Mapping[str, pl.DataFrame],
    seed: int = 0,
    grid: Sequence[tuple[int, float]] = GRID,
) -> list[Baseline]:
    """Train on train targets, choose on valid's fold `tune` (the first of equals), score targets of valid and test.

    One baseline a network, with the chosen point and the number of epochs in `chosen`. DataError where valid's fold
    select or tune lacks a class.
    """
    # 1. features of all splits
    rows = split.rows
    log = split.interactions
    features = NetworkFeatures.fit(rows, log.items, retrieved, log.columns)
    tables = {s: features.table(rows, retrieved, s) for s in SPLITS}
    fitted = Labelled(tables["train"], _labels(targets_of(rows, "train")))
    select, tune = (_fold(rows, tables["valid"], fold) for fold in ("select", "tune"))
    # 2. of each network every grid point is trained, and the best on tune is kept
    found = []
    with Progress(transient=True) as progress:
        for name in NETWORKS:
            tried = []
            for embedding, decay in progress.track(grid, description=name):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    network = build_network(name, features, embedding)
                    epochs = train(network, fitted, select, decay, seed)
                value = auc(score(network, tune.table), tune.labels.numpy())
                assert value is not None  # _fold has checked both classes
                point = {"embedding": embedding, "weight_decay": decay, "epochs": epochs}
                tried.append((value, network, point))
            _, network, chosen = max(tried, key=lambda made: made[0])
            logits = {s: score(network, tables[s]) for s in ("valid", "test")}
            found.append(Baseline(name, baseline_scores(rows, logits), chosen))
    return found


def _fold(rows: pl.DataFrame, valid: Table, fold: str) -> Labelled:
    """Targets of one fold of valid; DataError where a class is missing."""
    inside = torch.from_numpy((targets_of(rows, "valid")["fold"] == fold).to_numpy().copy())
    labels = _labels(targets_of(rows, "valid", fold))
    if not 0 < labels.sum() < len(labels):
        raise DataError(
            f"networks stop training on valid's fold select and are chosen on its fold tune: {fold} has {len(labels)} "
            f"targets, {int(labels.sum())} of them liked, expected both classes. Give validation a larger share "
            "(data.protocol.shares), or run baselines without --networks true."
        )
    return Labelled({name: values[inside] for name, values in valid.items()}, labels)


def _labels(targets: pl.DataFrame) -> Tensor:
    return torch.from_numpy(targets["label"].to_numpy().astype("float32"))


FORMAT = 3  # raise it when the same data would give other scores
FILE = "scores.parquet"


def trained_networks(data: InteractionData) -> list[Baseline]:
    """The networks of these data, scores of valid and test: from the cache, else trained now and kept there."""

    def write(folder: Path) -> None:
        baselines = network_baselines(data.split, data.retrieved, seed=data.seed)
        tables = [
            b.scores.select(pl.lit(b.name).alias("baseline"), pl.all()) for b in baselines
        ]
        chosen = {b.name: b.chosen for b in baselines}
        write_table(folder / FILE, pl.concat(tables), {"chosen": json.dumps(chosen)})

    cached_folder(data.cache_dir / "baseline_scores", _content(data), write)
    return kept_networks(data)


def kept_networks(data: InteractionData) -> list[Baseline]:
    """The networks that were trained before, scores of valid and test; none is trained."""
    folder = data.cache_dir / "baseline_scores" / content_key(_content(data))
    if not folder.exists():
        return []
    chosen = json.loads(table_about(folder / FILE)["chosen"])
    scores = pl.read_parquet(folder / FILE, glob=False)
    return [
        Baseline(name, scores.filter(baseline=name).drop("baseline"), point)
        for name, point in chosen.items()
    ]


def _content(data: InteractionData) -> dict[str, Any]:
    """Everything the scores depend on; FORMAT stands for what this file does."""
    return {
        "made_by": FORMAT,
        "files": data.split.interactions.files,
        "protocol": data.split.hash,
        "features": {kind: made.name for kind, made in data.features.folders().items()},
        "seed": data.seed,
    }
