"""What is wrong with a command line or a YAML file is one line: the key, the reason, the nearest key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from project.cli import check_command, check_yaml, one_line, project_error_in
from project.errors import ConfigError

Run = Callable[..., None]
Config = Callable[..., Path]


@pytest.fixture
def line_of(fails: Callable[..., str]) -> Callable[..., str]:
    """Runs a command that must end with one line; returns the line."""

    def call(*arguments: object) -> str:
        said = fails(*arguments)
        lines = [line for line in said.splitlines() if line.startswith("ConfigError: ")]
        assert lines == said.splitlines()[-1:]
        return lines[0]

    return call


FILES = {
    "typo": ("exits:\n  max_auc_dropp: 0.1\n", "exits.max_auc_dropp is no key*max_auc_drop?"),
    "argument": ("model:\n  lora:\n    rnk: 3\n", "model.lora.rnk is no key*rank?"),
    "value": ("model:\n  lora:\n    rank: x\n", "model.lora.rank: *'int'*x"),
    "choice": ("exits:\n  stream: luke\n", "exits.stream: *'cold', 'warm'*luke"),
    "inside a class": (
        "data:\n  retriever:\n    class_path: project.retrieval.ItemKNN\n    init_args: {neighbours: few}\n",
        "data.retriever.neighbours: *'int'*few",
    ),
    "no module": ("exits:\n  criterion: nosuch.Mine\n", "exits.criterion: No module named 'nosuch'"),
    "no class": (
        "exits:\n  criterion: project.exits.Mine\n",
        "exits.criterion: module 'project.exits' has no attribute 'Mine'",
    ),
    "syntax": ("exits:\n  criterion: broken.Mine\n", "exits.criterion: invalid syntax (broken.py, line 1)"),
    "dependency": ("exits:\n  criterion: needy.Mine\n", "exits.criterion: No module named 'nosuchlib'"),
    "other class": ("exits:\n  criterion: pathlib.Path\n", "exits.criterion: *not*a subclass of Criterion"),
    "abstract": (
        "data:\n  retriever: half.Mine\n",
        "data.retriever: *half.Mine is abstract: it lacks select",
    ),
    "seed": ("seed_everything: -1\n", "seed_everything is -1; expected 0 to 4294967295"),
    "huge seed": ("seed_everything: 4294967296\n", "seed_everything is 4294967296; expected 0 to 4294967295"),
    "rate": (
        "model:\n  optim: {learning_rate: 1.0e+10}\n",
        "model.optim.learning_rate is 10000000000.0; *0 to 1",
    ),
    # unions of types bury these; they are this package's own
    "mf": ("data:\n  factorisation:\n    dim: 0\n", "ConfigError: data.mf.dim is 0; expected 1 or more"),
}


@pytest.mark.parametrize(("text", "words"), FILES.values(), ids=FILES)
def test_a_file(
    line_of: Callable[..., str],
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
    Path("half.py").write_text(
        "from project.retrieval import Retriever\nclass Mine(Retriever):\n    def begin(self, *a): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    said = line_of("fit", "--config", base, "--config", "over.yaml")
    at = 0
    for part in words.split("*"):
        at = said.index(part, at)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exits:\n\tmax_cost: 1\n", "line 2, column 1: found character"),
        ("model:\n  a: 1\ndata: {}\nmodel:\n  a: 2\n", "line 4, column 1: the key model stands twice"),
        ("model: {a: {b: 1, c: 2, b: 3}}\n", "line 1, column 25: the key b stands twice"),
        ("- a\n", "holds list; expected keys and values"),
        ("", "holds NoneType"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    """Syntax, repeated keys and endless nesting are found before anything else, with file, line and column."""
    file = tmp_path / "over.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        check_yaml(file)
    assert f"{file}" in str(error.value)
    assert words in str(error.value)


def test_merged_keys_are_not_repeated_ones(tmp_path: Path) -> None:
    """YAML's `<<` gives defaults that a mapping may say again."""
    file = tmp_path / "over.yaml"
    file.write_text("a: &base {x: 1}\nb: {<<: *base, x: 2}\nc: {x: 1}\n")
    check_yaml(file)


def test_a_missing_file(line_of: Callable[..., str]) -> None:
    """It is named as it was given."""
    assert "--config absent.yaml does not exist" in line_of("fit", "--config", "absent.yaml")


def test_commands() -> None:
    """An unknown command names the nearest and all others; options before the command are left to the parser."""
    commands = ["fit", "test", "table"]
    with pytest.raises(ConfigError, match=r"did you mean table\?\); expected one of fit, test, table"):
        check_command(["tabel"], commands)
    with pytest.raises(ConfigError, match=r"needs a command; expected one of fit, test, table"):
        check_command([], commands)
    check_command(["--config", "a.yaml", "fit"], commands)
    check_command(["table"], commands)


def test_help_names_every_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Those without a configuration too."""
    from project.__main__ import OTHER_COMMANDS

    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    words = capsys.readouterr().out.replace("(", " ").split()
    assert {"fit", "rank", *OTHER_COMMANDS} <= set(words)


def test_unknown_words_come_through() -> None:
    """What another version of jsonargparse says is kept, in one line; what is missing says how to give it."""
    assert str(one_line("something\n  new", [])) == "something; new"
    said = str(one_line("Parser key \"a.b\":\n  Expected a <class 'str'>. Got value: None", []))
    assert said.startswith("a.b: Expected")
    assert "--config FILE" in said
    said = str(one_line("unrecognized arguments: --trainer.max_epoch 3", ["trainer.max_epochs"]))
    assert said == "trainer.max_epoch is no key of the configuration (did you mean trainer.max_epochs?)."


def test_a_buried_error_is_found() -> None:
    """Through causes and contexts, however deep; nothing else is taken for one of ours."""
    ours = ConfigError("x")
    try:
        try:
            raise ours
        except ConfigError as error:
            raise ValueError from error
    except ValueError as error:
        buried = TypeError()
        buried.__context__ = error
    assert project_error_in(buried) is ours
    assert project_error_in(ValueError()) is None
