"""A tiny world: generated logs with structure, a two-layer random LLM and its tokenizer, all on disk."""

from __future__ import annotations

import functools
import os
import shutil

# before torch starts: tiny matrices on many threads cost more than they give, most of all
# beside other processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hypothesis import settings
from world import call, tiny_settings

settings.register_profile(
    "untimed", deadline=None
)  # how long an example takes depends on what else the machine does
settings.load_profile("untimed")

WORDS = "movie about the sea a mountain two friends and one dog in winter night city river"


def write_logs(
    folder: Path, users: int = 30, items: int = 20, rows: int = 500, seed: int = 0
) -> Path:
    """interactions.csv and items.csv: users like items whose hidden factor has the sign of their own."""
    rng = np.random.default_rng(seed)
    mf_user, mf_item = rng.normal(size=users), rng.normal(size=items)
    user, item = rng.integers(0, users, rows), rng.integers(0, items, rows)
    score = mf_user[user] * mf_item[item] + 0.5 * rng.normal(size=rows)
    frame = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in item],
            # many rows share a timestamp
            "timestamp": np.sort(rng.integers(0, rows // 2, rows)),
            "rating": np.clip(np.round(3.5 + 1.5 * score), 1, 5),
        }
    )
    frame = frame.unique(
        ["user_id", "item_id", "timestamp"], keep="first", maintain_order=True
    )
    frame.write_csv(folder / "interactions.csv")
    words = WORDS.split()
    titles = [" ".join(rng.choice(words, size=3)) + f" {i}" for i in range(items)]
    pl.DataFrame(
        {
            "item_id": [f"i{i}" for i in range(items)],
            "title": titles,
            "year": ["1999"] * items,
        }
    ).write_csv(folder / "items.csv")
    return folder


def write_model(
    folder: Path, layers: int = 3, family: str = "llama", **changes: object
) -> Path:
    """A random model with a byte-level tokenizer that knows " yes" and " no"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["all 7 near 3: yes", "all 2 near 9: no", WORDS] * 20, trainer
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    values = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        # the default's 0.02 makes a model that hardly reads its context
        "initializer_range": 0.2,
    }
    model: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(family, **(values | changes))
    model.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a three-layer random model."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of generated logs."""
    return write_logs(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of retrieved features for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache_of_the_session(
    request: pytest.FixtureRequest, session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands in this process use it, and those that they start; real logs and models stay in the user's."""
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("PROJECT_CACHE", str(session_cache))


@pytest.fixture
def tiny_config(tiny_model: Path, tiny_logs: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a YAML file for the tiny world; nested keys can be changed with `**{"data.logs": ...}`."""

    def write(**changes: object) -> Path:
        config: dict[str, object] = tiny_settings(tiny_logs, tiny_model, tmp_path / "runs")
        for key, value in changes.items():
            *parents, last = key.split(".")
            place = config
            for name in parents:
                place = place.setdefault(name, {})  # type: ignore[assignment]
            place[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture
def run(session_cache: Path) -> Callable[..., None]:
    """Runs `python -m project ...` in this process."""
    return functools.partial(call, session_cache)


@pytest.fixture(scope="session")
def fitted_once(
    tiny_model: Path, tiny_logs: Path, session_cache: Path, tmp_path_factory: Any
) -> Path:
    """Folder of one tiny trained run, which tests copy."""
    folder: Path = tmp_path_factory.mktemp("fitted")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_settings(tiny_logs, tiny_model, folder)))
    call(session_cache, "fit", "--config", config)
    return (folder / "tiny" / "latest").resolve()


@pytest.fixture
def fitted(fitted_once: Path, tmp_path: Path) -> Path:
    """Folder of a tiny trained run of the test's own."""
    run = tmp_path / "runs" / "tiny" / fitted_once.name
    shutil.copytree(fitted_once, run)
    (run.parent / "latest").symlink_to(run.name)
    return run


@pytest.fixture
def fails(
    run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that must end with exit code 2; returns what it said."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return call
