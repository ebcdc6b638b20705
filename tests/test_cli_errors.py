"""What is wrong with a command line or a YAML file is one line: the key, its file, what was expected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from project.cli_errors import check_verb, one_line, project_error_in
from project.errors import ConfigError

Run = Callable[..., None]
Config = Callable[..., Path]


@pytest.fixture
def line_of(fails: Callable[..., str]) -> Callable[..., str]:
    """Runs a verb that must end with one line; returns the line."""

    def call(*arguments: object) -> str:
        said = fails(*arguments)
        assert "usage" not in said
        lines = [line for line in said.splitlines() if line.startswith("ConfigError: ")]
        assert lines == said.splitlines()[-1:]
        return lines[0]

    return call


FILES = {
    "typo": ("exits:\n  max_auc_dropp: 0.1\n", "exits.max_auc_dropp in over.yaml is no key*max_auc_drop?"),
    "argument": ("model:\n  lora:\n    rnk: 3\n", "model.lora.rnk in over.yaml is no argument*rank?"),
    "value": ("model:\n  lora:\n    rank: x\n", "model.lora.rank in over.yaml is x; expected a whole number"),
    "choice": ("exits:\n  stream: luke\n", "exits.stream in over.yaml is luke; expected cold or warm"),
    "criterion": (
        "exits:\n  criterion: ratio\n",
        "exits.criterion*is ratio; expected a class*project.exits.Ratio,",
    ),
    "retriever": (
        "data:\n  retriever: knn\n",
        "data.retriever*is knn; expected a class*project.retrieval.ItemKNN",
    ),
    "inside a class": (
        "data:\n  retriever:\n    class_path: project.retrieval.ItemKNN\n    init_args: {neighbours: few}\n",
        "data.retriever.neighbours in over.yaml is few; expected a whole number",
    ),
    "syntax": (
        "exits:\n  criterion: broken.Mine\n",
        "over.yaml is broken.Mine: invalid syntax (broken.py, line 1)",
    ),
    "dependency": (
        "exits:\n  criterion: needy.Mine\n",
        "over.yaml is needy.Mine: No module named 'nosuchlib'",
    ),
    "other class": ("exits:\n  criterion: pathlib.Path\n", "is pathlib.Path: *not*a subclass of Criterion"),
    "no settings": (
        "data:\n  taste: 3\n",
        "data.taste in over.yaml is 3; expected the keys of Taste or null",
    ),
    "in a union": (
        "data:\n  taste:\n    dim: x\n",
        "data.taste.dim in over.yaml is x; expected a whole number.",
    ),
    "tab": ("exits:\n\tmax_cost: 1\n", "over.yaml, line 2, column 1, is not YAML*Indent with spaces"),
    "list": ("- a\n", "over.yaml holds a list"),
    # unions of types bury these; they are this package's own
    "taste": ("data:\n  taste:\n    dim: 0\n", "ConfigError: data.taste.dim is 0; expected 1 or more"),
    "lora": ("model:\n  lora:\n    alpha: -1\n", "ConfigError: model.lora.alpha is -1.0; expected"),
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
    """A mistake in the second file names that file, the key, and what fits there; no usage stands around it."""
    base = tiny_config()
    monkeypatch.chdir(tmp_path)
    Path("over.yaml").write_text(text)
    Path("broken.py").write_text("class Mine(:\n")
    Path("needy.py").write_text("import nosuchlib\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = line_of("fit", "--config", base, "--config", "over.yaml")
    at = 0
    for part in words.split("*"):
        at = said.index(part, at)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--trainer.max_epoch", "3"],
            "trainer.max_epoch is no key of the configuration (did you mean trainer.max_epochs?)",
        ),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs is x; expected a whole number or null"),
        (["--data.retriever.neighbour", "3"], "did you mean neighbours?"),
        (["--data.retriever.neighbours", "few"], "data.retriever.neighbours is few; expected a whole number"),
        (["--data.taste", "{dim: x}"], "data.taste.dim is x; expected a whole number"),
    ],
)
def test_the_command_line(
    line_of: Callable[..., str], tiny_config: Config, given: list[str], words: str
) -> None:
    """A mistake on the command line blames no file, although the file says the key too."""
    retriever = {"class_path": "project.retrieval.LightGCN", "init_args": {"neighbours": 3}}
    config = tiny_config(**{"trainer.max_epochs": 1, "data.retriever": retriever, "data.taste": {"dim": 2}})
    said = line_of("fit", "--config", config, *given)
    assert words in said
    assert "config.yaml" not in said


def test_verbs() -> None:
    """An unknown verb names the nearest and all others; options before the verb are left to the parser."""
    verbs = ["fit", "test", "table"]
    with pytest.raises(
        ConfigError, match=r"tabel is no verb \(did you mean table\?\); expected one of fit, test, table"
    ):
        check_verb(["tabel"], verbs)
    with pytest.raises(ConfigError, match=r"needs a verb; expected one of fit, test, table"):
        check_verb([], verbs)
    check_verb(["--config", "a.yaml", "fit"], verbs)
    check_verb(["table"], verbs)


def test_help_names_every_verb(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Those without a configuration too."""
    from project.__main__ import OTHER_VERBS

    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    words = capsys.readouterr().out.replace("(", " ").split()
    assert {"fit", "rank", "table", "report", "ablate", "compare", "export"} <= set(words)
    assert len(OTHER_VERBS) == 5


def test_unknown_words_come_through() -> None:
    """What another version of jsonargparse says is kept, in one line; what is missing says how to give it."""
    assert str(one_line("something\n  new", [], [])) == "something new"
    said = one_line("Parser key \"a.b\":\n  Expected a <class 'str'>. Got value: None", ["fit"], [])
    assert str(said) == "a.b is not set; expected text: give --config FILE, such as configs/quickstart.yaml."


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
