"""What is wrong with a command line, a YAML file or a log is one clear error before the first batch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from project.cli import check_command
from project.datamodule import InteractionData
from project.errors import ConfigError
from project.run import read_yaml

Run = Callable[..., None]
Config = Callable[..., Path]
Line = Callable[..., str]
Change = Callable[[pl.DataFrame], pl.DataFrame]
LOGS = "data.logs.init_args.interactions"


@pytest.fixture
def line_of(fails: Line) -> Line:
    """Runs a command that must end with one line; returns the line."""

    def call(*arguments: object) -> str:
        said = fails(*arguments)
        lines = [line for line in said.splitlines() if line.startswith("ConfigError: ")]
        assert lines == said.splitlines()[-1:]
        return lines[0]

    return call


@pytest.fixture
def no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that needs no data comes before the features of the log are made, which may take hours."""

    def made(self: InteractionData) -> None:
        raise AssertionError("features were made")

    monkeypatch.setattr(InteractionData, "retrieved", property(made))


FILES = {
    "typo": (
        "exits:\n  max_auc_dropp: 0.1\n",
        "exits.max_auc_dropp is no key*max_auc_drop?",
    ),
    "value": ("model:\n  lora:\n    rank: x\n", "model.lora.rank: *'int'*x"),
    "inside a class": (
        "data:\n  retriever:\n    class_path: project.retrieval.ItemKNN\n    init_args: {neighbours: few}\n",
        "data.retriever.neighbours: *'int'*few",
    ),
    "no class": (
        "exits:\n  criterion: project.exits.Criterio\n",
        "exits.criterion: *'Criterio' (did you mean Criterion?)",
    ),
    "no module": (
        "data:\n  logs: project.data.log.TableLogs\n",
        "data.logs: *'log' (did you mean logs?)",
    ),
    "no path": (
        "data:\n  retriever: LightGNC\n",
        "data.retriever: *LightGNC (did you mean LightGCN?)",
    ),
    "no head": (
        "model:\n  head: project.model.heads.Exithead\n",
        "'Exithead' (did you mean ExitHead?)",
    ),
    "syntax": (
        "exits:\n  criterion: broken.Mine\n",
        "exits.criterion: invalid syntax (broken.py, line 1)",
    ),
    "dependency": (
        "exits:\n  criterion: needy.Mine\n",
        "exits.criterion: No module named 'nosuchlib'",
    ),
    "abstract": (
        "data:\n  retriever: half.Mine\n",
        "data.retriever: half.Mine has no method select",
    ),
    "abstract or null": (
        "exits:\n  criterion: half.Rule\n",
        "exits.criterion: half.Rule has no method confidence",
    ),
    "choice": (
        "data:\n  protocol: {split: globaltime}\n",
        "data.protocol.split: *global_time*globaltime",
    ),
    "seed": ("seed_everything: -1\n", "seed_everything is -1"),
    # unions of types bury this; it is this package's own
    "mf": ("data:\n  mf:\n    dim: 0\n", "ConfigError: data.mf.dim is 0"),
}


@pytest.mark.parametrize(("text", "words"), FILES.values(), ids=FILES)
def test_a_file(
    line_of: Line,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    words: str,
) -> None:
    """A mistake in a file names the key and the reason; no usage and no traceback stand around it."""
    base = tiny_config()
    monkeypatch.chdir(tmp_path)
    Path("over.yaml").write_text(text)
    Path("broken.py").write_text("class Mine(:\n")
    Path("needy.py").write_text("import nosuchlib\n")
    half = "class Mine(Retriever):\n    def begin(self, *a): pass\nclass Rule(Criterion): pass\n"
    imports = (
        "from project.exits import Criterion\nfrom project.retrieval import Retriever\n"
    )
    Path("half.py").write_text(imports + half)
    monkeypatch.syspath_prepend(tmp_path)
    said = line_of("fit", "--config", base, "--config", "over.yaml")
    assert re.search(".*".join(map(re.escape, words.split("*"))), said), said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exits:\n\talpha: 1\n", "line 2, column 1"),
        (
            "model:\n  a: 1\ndata: {}\nmodel:\n  a: 2\n",
            "line 4, column 1: the key model stands twice",
        ),
        ("model: {a: {b: 1, c: 2, b: 3}}\n", "line 1, column 25: the key b stands twice"),
        ("- a\n", "holds list"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "cannot be read as YAML"),
        # a merged key may be said again
        ("a: &base {x: 1}\nb: {<<: *base, x: 2}\nc: {x: 1}\n", None),
    ],
)
def test_yaml_that_is_no_configuration(
    tmp_path: Path, text: str, words: str | None
) -> None:
    file = tmp_path / "over.yaml"
    file.write_text(text)
    if words is None:
        read_yaml(file)
        return
    with pytest.raises(ConfigError, match=re.escape(str(file))) as error:
        read_yaml(file)
    assert words in str(error.value)


def test_a_missing_file_and_an_unknown_command(line_of: Line) -> None:
    assert "absent.yaml" in line_of("fit", "--config", "absent.yaml")
    assert "--config FILE" in line_of("fit")
    said = line_of("fit", "--config=exitrec:quikstart")
    assert "(did you mean quickstart?)" in said
    assert "overlays/bf16" in said
    with pytest.raises(ConfigError, match=r"did you mean table\?"):
        check_command(["tabel"], ["fit", "test", "table"])
    check_command(["--config", "a.yaml", "fit"], ["fit"])


def at_row(row: int, **values: str) -> Change:
    """Other values in one row, counted from 1."""
    here = pl.int_range(pl.len()) == row - 1
    return lambda t: t.with_columns(
        **{
            name: pl.when(here).then(pl.lit(value)).otherwise(name)
            for name, value in values.items()
        }
    )


CASES: dict[str, tuple[Change, list[str]]] = {
    "missing column": (
        lambda t: t.rename({"user_id": "who"}),
        ["changed.csv", "user_id", "who", "columns"],
    ),
    "not a number": (at_row(7, rating="good"), ["changed.csv", "row 7", "rating", "good"]),
    "unknown item": (at_row(3, item_id="i99"), ["i99", "row 3", "items"]),
    "one class": (
        lambda t: t.with_columns(rating=pl.lit(5)),
        ["have label 1", "data.protocol.label"],
    ),
}


@pytest.mark.parametrize(("change", "words"), CASES.values(), ids=CASES)
def test_logs(
    change: Change,
    words: list[str],
    fails: Line,
    tiny_config: Config,
    tiny_logs: Path,
    tmp_path: Path,
) -> None:
    """Each defect of a log names the file, the place and the YAML key or action that mends it."""
    path = tmp_path / "changed.csv"
    change(pl.read_csv(tiny_logs / "interactions.csv")).write_csv(path)
    said = fails("baselines", "--config", tiny_config(**{LOGS: str(path)}))
    assert not [w for w in words if w not in said.replace("\n", " ")], said


def test_missing_file(fails: Line, tiny_config: Config, tmp_path: Path) -> None:
    assert "absent.csv" in fails(
        "baselines", "--config", tiny_config(**{LOGS: "absent.csv"})
    )
    assert not list(tmp_path.glob("runs/tiny/*"))


def test_an_option_is_not_abbreviated(fails: Line, tiny_config: Config) -> None:
    assert "max_epoch" in fails("fit", "--config", tiny_config(), "--trainer.max_epoch", 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.protocol.shares": [0.9, 0.1, 0.0]}, ["test", "data.protocol"]),
        ({"model.exit_layers": [1, 9]}, ["model.exit_layers ends at 9", "3 layers"]),
        ({"data.context_tokens": 4096}, ["data.context_tokens", "data.batch_tokens"]),
        (
            {"data.prompt": {"segment": "{title} by {director}:"}},
            ["data.prompt.segment", "director"],
        ),
        ({"data.prompt": {"segment": "{title!r}:"}}, ["data.prompt.segment", "{title!r}"]),
        ({"data.context_tokens": 10}, ["data.context_tokens is 10", "20 of 20 items"]),
        ({"model.backbone": "/nowhere/model"}, ["/nowhere/model"]),
        ({"exits.certificate": {"epsilon": 7}}, ["epsilon", "expected"]),
    ],
)
@pytest.mark.usefixtures("no_features")
def test_configuration(
    changes: dict[str, object], words: list[str], fails: Line, tiny_config: Config
) -> None:
    """A value that cannot work names its key before anything is trained."""
    said = fails("fit", "--config", tiny_config(**changes))
    assert not [w for w in words if w not in said.replace("\n", " ")], said


@pytest.mark.usefixtures("no_features")
def test_a_folder_that_is_no_usable_model(
    fails: Line, tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    """Another family; no tokenizer: one line of each."""
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model, folder)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2)
    ).save_pretrained(folder)
    assert "gpt2" in fails(
        "fit", "--config", tiny_config(**{"model.backbone": str(folder)})
    )
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    said = fails(
        "fit", "--config", tiny_config(**{"model.backbone": str(folder)})
    ).splitlines()
    assert said[-1].startswith(
        f"ConfigError: model.backbone is {str(folder)!r}, which has no tokenizer"
    )
    assert len([line for line in said if "rror" in line]) == 1


@pytest.mark.slow
def test_a_checkpoint_of_another_run(
    run: Run,
    fails: Line,
    tiny_config: Config,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Other exits, and another protocol's, whose train could hold this test's rows."""
    run("fit", "--config", tiny_config(**{"trainer.limit_train_batches": 1}))
    checkpoint = tmp_path / "runs" / "tiny" / "latest" / "checkpoints" / "last.ckpt"
    request.getfixturevalue("no_features")
    other = tiny_config(**{"model.exit_layers": [2, 3]})
    said = fails("test", "--config", other, "--ckpt_path", checkpoint)
    assert "[1, 3]" in said
    assert "[2, 3]" in said
    other = tiny_config(**{"data.protocol.shares": [0.5, 0.1, 0.4]})
    assert "protocol hash" in fails("test", "--config", other, "--ckpt_path", checkpoint)
