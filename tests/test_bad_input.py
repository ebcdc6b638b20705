"""Bad input through the command line: one clear error before the first batch, naming what, where and the fix.

Readers, splits, backbone and heads test their own errors; here is what a person sees who runs the main job.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

Run = Callable[..., None]
Config = Callable[..., Path]

LOGS = "data.logs.init_args.interactions"


def log_with(folder: Path, logs: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> str:
    path = folder / "changed.csv"
    change(pl.read_csv(logs / "interactions.csv")).write_csv(path)
    return str(path)


CASES: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], list[str]]] = {
    "empty": (lambda t: t.clear(), ["changed.csv", "no data rows"]),
    "missing column": (lambda t: t.rename({"user_id": "who"}), ["changed.csv", "user_id", "who", "columns"]),
    "not a number": (
        lambda t: t.with_columns(
            rating=pl.when(pl.int_range(pl.len()) == 6).then(pl.lit("good")).otherwise("rating")
        ),
        ["changed.csv", "row 7", "rating", "good"],
    ),
    "duplicates": (
        lambda t: pl.concat([t, t.head(1)]),
        ["duplicate", "data.protocol.duplicates", "first or last"],
    ),
    "unknown item": (
        lambda t: t.with_columns(
            item_id=pl.when(pl.int_range(pl.len()) == 2).then(pl.lit("i99")).otherwise("item_id")
        ),
        ["i99", "row 3", "items"],
    ),
    "one class": (lambda t: t.with_columns(rating=pl.lit(5)), ["labels are 1", "data.protocol.label"]),
}


@pytest.mark.parametrize("case", CASES)
def test_logs(
    case: str, fails: Callable[..., str], tiny_config: Config, tiny_logs: Path, tmp_path: Path
) -> None:
    """Each defect of a log names the file, the place and the YAML key or action that mends it."""
    change, words = CASES[case]
    path = log_with(tmp_path, tiny_logs, change)
    said = fails("baselines", "--config", tiny_config(**{LOGS: path}))
    missing = [w for w in words if w not in said.replace("\n", " ")]
    assert not missing, said


def test_missing_file(fails: Callable[..., str], tiny_config: Config, tmp_path: Path) -> None:
    """A log that is not there is named, and no run's folder is left behind."""
    assert "absent.csv" in fails("baselines", "--config", tiny_config(**{LOGS: "absent.csv"}))
    assert not list(tmp_path.glob("runs/tiny/*"))


def test_empty_split(fails: Callable[..., str], tiny_config: Config) -> None:
    """A cut that leaves a split empty says which and what to change."""
    said = fails("baselines", "--config", tiny_config(**{"data.protocol.shares": [0.9, 0.1, 0.0]}))
    assert "test" in said
    assert "data.protocol" in said


def test_unknown_key(fails: Callable[..., str], tiny_config: Config) -> None:
    """A typing error in YAML is not ignored, nor is an abbreviated option."""
    assert "lerning_rate" in fails("fit", "--config", tiny_config(**{"model.optim": {"lerning_rate": 1.0}}))
    assert "max_epoch" in fails("fit", "--config", tiny_config(), "--trainer.max_epoch", 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.exit_layers": [1, 9]}, ["model.exit_layers ends at 9", "3 layers"]),
        ({"model.exit_layers": [3, 1]}, ["model.exit_layers", "ascending"]),
        ({"data.context_tokens": 4096}, ["data.context_tokens", "data.batch_tokens"]),
        ({"data.prompt": {"answers": [" no", " indubitably"]}}, ["data.prompt.answers", "indubitably"]),
        (
            {"data.prompt": {"segment": "{title} by {director}:"}},
            ["data.prompt.segment", "director", "title"],
        ),
        ({"data.prompt": {"segment": "{title!r}:"}}, ["data.prompt.segment", "{title!r}", "{title:.40}"]),
        ({"data.prompt": {"segment": "{title} {mf_percent}:"}}, ["data.mf is null", "item_columns"]),
        ({"data.context_tokens": 10}, ["data.context_tokens is 10", "20 of 20 items", "{title:.40}"]),
        (
            {"data.context_tokens": 8192, "data.batch_tokens": 8192},
            ["data.context_tokens is 8192", "at most 4096"],
        ),
        ({"data.num_workers": -1}, ["data.num_workers is -1"]),
        ({"model.backbone": "/nowhere/model"}, ["/nowhere/model"]),
    ],
)
def test_configuration(
    changes: dict[str, object], words: list[str], fails: Callable[..., str], tiny_config: Config
) -> None:
    """A value that cannot work names its key before anything is trained."""
    said = fails("fit", "--config", tiny_config(**changes))
    missing = [w for w in words if w not in said.replace("\n", " ")]
    assert not missing, said


def test_unsupported_family(
    fails: Callable[..., str], tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    """A model of a family that would be computed wrongly is refused by name."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model, folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    said = fails("fit", "--config", tiny_config(**{"model.backbone": str(folder)}))
    assert "gpt2" in said
    assert "llama" in said


@pytest.mark.slow
def test_checkpoint_of_other_exits(
    run: Run, fails: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """A checkpoint with other exit layers than the configuration is refused, both named."""
    run("fit", "--config", tiny_config(**{"trainer.limit_train_batches": 1}))
    checkpoint = tmp_path / "runs" / "tiny" / "latest" / "checkpoints" / "last.ckpt"
    other = tiny_config(**{"model.exit_layers": [2, 3]})
    said = fails("test", "--config", other, "--ckpt_path", checkpoint)
    assert "[1, 3]" in said
    assert "[2, 3]" in said
