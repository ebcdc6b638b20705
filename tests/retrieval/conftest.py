"""Small random logs, and a retriever whose item table is sensitive to every edge it was given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.data.protocol import FOLDS, ROLES, SPLITS, Interactions, Protocol, SplitInteractions
from project.retrieval import VectorRetriever
from project.retrieval.base import Edges, FloatArray, Retriever
from project.retrieval.walk import WalkRows, fit_snapshots, walk

NUM_USERS, NUM_ITEMS = 12, 9


class CoLikes(VectorRetriever):
    """An item's vector counts which items its likers liked: any edge too many changes it."""

    def item_table(self, edges: Edges, block: int) -> FloatArray:
        likes = np.zeros((self._num_users, self._items.height), np.float32)
        np.add.at(likes, (edges.user, edges.item), edges.label.astype(np.float32))
        table: FloatArray = likes.T @ likes
        return table


def make_log(seed: int, rows: int = 150, users: int = NUM_USERS, items: int = NUM_ITEMS) -> pl.DataFrame:
    """Few users, items and seconds, so that ties and repeated ratings are common."""
    random = np.random.default_rng(seed)
    table = pl.DataFrame(
        {
            "user": random.integers(0, users, rows).astype(np.int32),
            "item": random.integers(0, items, rows).astype(np.int32),
            "timestamp": random.integers(0, rows // 2, rows).astype(np.float64),
            "label": random.integers(0, 2, rows).astype(np.int8),
        }
    )
    return (
        table.unique(["user", "item", "timestamp"], keep="first", maintain_order=True)
        .sort("timestamp", "user", "item")
        .with_columns(row_id=pl.int_range(pl.len(), dtype=pl.Int64))
    )


def items_table(items: int = NUM_ITEMS) -> pl.DataFrame:
    return pl.DataFrame(
        {"item": np.arange(items, dtype=np.int32), "title": [f"title {i}" for i in range(items)]}
    )


def make_split(
    rows: pl.DataFrame, codes: np.ndarray, users: int = NUM_USERS, items: int = NUM_ITEMS
) -> SplitInteractions:
    """A split log from rows and split codes 0, 1, 2, without the protocol's work."""
    split = pl.Series([SPLITS[code] for code in codes], dtype=pl.Enum(SPLITS))
    table = rows.with_columns(
        split=split, fold=pl.lit(None, pl.Enum(FOLDS)), role=pl.lit("target", pl.Enum(ROLES)), hist=pl.lit(0)
    )
    user_table = pl.DataFrame({"user": np.arange(users, dtype=np.int32)})
    log = Interactions(rows, user_table, items_table(items), {"log.csv": "0" * 64})
    digest = str(abs(hash((rows.write_csv(), tuple(codes)))))
    return SplitInteractions(log, table, Protocol(), {}, digest)


def retrieved(
    rows: pl.DataFrame, retriever: Retriever, cuts: np.ndarray, silent: tuple[int, ...] = ()
) -> pl.DataFrame:
    """Retrieved features of all rows under fixed cuts; rows with a `silent` row_id are asked about but otherwise
    absent.
    """
    absent = rows["row_id"].is_in(silent)
    snapshots = fit_snapshots(rows.filter(~absent), retriever, NUM_USERS, items_table(), cuts)
    log = WalkRows.from_log(rows)
    present = ~absent.to_numpy()
    flagged = WalkRows(**{**vars(log), "rater": present, "own": present})
    return walk(flagged, retriever, items_table(), cuts, snapshots.fitted)


@pytest.fixture
def log_of() -> Callable[..., pl.DataFrame]:
    return make_log


@pytest.fixture
def split_of() -> Callable[..., SplitInteractions]:
    return make_split


@pytest.fixture
def items_of() -> Callable[..., pl.DataFrame]:
    return items_table


@pytest.fixture
def retrieved_of() -> Callable[..., pl.DataFrame]:
    return retrieved


@pytest.fixture
def without_neighbours() -> pl.DataFrame:
    """Two rows of an retrieved features table: an item liked 3 of 4 times, a user who liked 1 of 2, nobody asked."""
    columns = {
        "row_id": [0, 1],
        "item_rate": [0.75, 0.75],
        "item_count": [4, 4],
        "user_rate": [0.5, 0.5],
        "user_count": [2, 2],
        "vote": [None, None],
        "neighbour_count": [0, 0],
        "similarities": [[], []],
        "answers": [[], []],
    }
    lists = {"similarities": pl.List(pl.Float32), "answers": pl.List(pl.Int8)}
    return pl.DataFrame(columns, schema_overrides={"vote": pl.Float32, **lists})


@pytest.fixture
def co_likes() -> CoLikes:
    return CoLikes(neighbours=4)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer BERT whose tokenizer adds [CLS] and [SEP], as sentence encoders' do."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {word: code for code, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=ends
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder
