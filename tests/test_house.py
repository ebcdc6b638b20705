"""The plan of the house: no import circles, none upward, a bounded number of settings and of tokens."""

from __future__ import annotations

import ast
import inspect
import io
import subprocess
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = 100
# The aims of the house: 125,000 tokens in the package and 150,000 in the tests.
TOKENS = 150_100
TOKENS_A_LINE = 9.0
TEST_TOKENS = 183_050
FLOORS = (  # from the ground up
    "project errors arrays layout cache results metrics features request",
    "data run run_folder",
    "retrieval exits report tracking",
    "datamodule evaluation compare",
    "model config bundle",
    "engine callbacks",
    "export loading backtest",
    "serve benchmark",
    "trainer",
    "cli api",
    "__main__",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "project").rglob("*.py")
}


def imports() -> dict[str, set[str]]:
    """Module -> modules of this project that it imports anywhere, for types alone included."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] == "project"
            ):
                full = {f"{node.module}.{name.name}" for name in node.names}
                found[module] |= {name if name in MODULES else node.module for name in full}
    return found


def folder(module: str) -> str:
    """Its folder; a file on top is a folder of its own."""
    return module.split(".")[1] if "." in module else module


def test_no_circle_between_files() -> None:
    list(TopologicalSorter(imports()).static_order())


def test_no_circle_between_folders() -> None:
    graph: dict[str, set[str]] = {}
    for module, others in imports().items():
        graph.setdefault(folder(module), set()).update(
            folder(other) for other in others if folder(other) != folder(module)
        )
    list(TopologicalSorter(graph).static_order())


def test_a_circle_would_be_seen() -> None:
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    assert "project.layout" in imports()["project.model.attention"]


def settings() -> set[str]:
    """Everything a user can set in YAML or on the command line: a base class's arguments once, linked keys once.

    A key that only holds others (`data.protocol`) is none.
    """
    from project import callbacks, retrieval
    from project.data import logs, negatives, prompt, protocol
    from project.datamodule import InteractionData
    from project.exits import certificate, plan
    from project.model import module, optim
    from project.retrieval.base import Retriever
    from project.retrieval.candidates import CandidateSettings
    from project.serve.settings import ServeSettings
    from project.trainer import ProjectTrainer

    linked = {"tokenizer", "answers", "numbers", "items", "seed", "bundle"}
    sections = {
        "logs",
        "retriever",
        "protocol",
        "prompt",
        "mf",
        "optim",
        "lora",
        "certificate",
    }
    sections |= {"negatives", "candidates"}
    plain = {
        "self",
        "model",
        "datamodule",
        "ckpt_path",
        "weights_only",
        "dataloaders",
        "return_predictions",
    }
    classes = [
        *(InteractionData, protocol.Protocol, prompt.Prompt, retrieval.MatrixFactorisation),
        *(module.ExitRecommender, optim.OptimSettings, module.LoraSettings),
        *(plan.ExitSettings, callbacks.ResultFiles, CandidateSettings),
        *(
            certificate.CertificateSettings,
            logs.TableLogs,
            logs.RecBoleLogs,
        ),
        negatives.Negatives,
        *(
            retrieval.VectorRetriever,
            retrieval.LightGCN,
            retrieval.TextEncoder,
            retrieval.ItemKNN,
        ),
    ]
    shared = set(inspect.signature(Retriever).parameters)
    found = {f"Retriever.{name}" for name in shared}
    for kind in classes:
        names = set(inspect.signature(kind).parameters) - ({"args", "kwargs"})
        names -= (
            shared
            if issubclass(kind, Retriever)
            else linked
            if kind is not prompt.Prompt
            else set()
        )
        found |= {f"{kind.__name__}.{name}" for name in names - sections}
    found |= {f"serve --{name}" for name in inspect.signature(ServeSettings).parameters}
    for (
        place,
        path,
    ) in MODULES.items():  # arguments of the commands that read no configuration
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        ]
        names = [
            n.args[0]
            for n in calls
            if getattr(n.func, "attr", "") == "add_argument" and n.args
        ]
        found |= {
            f"{place} {name.value}" for name in names if isinstance(name, ast.Constant)
        }
    for command in ("calibrate", "baselines", "benchmark", "predict"):
        names = set(inspect.signature(getattr(ProjectTrainer, command)).parameters) - plain
        found |= {f"{command} --{name}" for name in names - sections}
    found |= {"table FILE", "report RUN", "TableLogs.items"}
    same = {f"RecBoleLogs.{name}" for name in inspect.signature(logs.TableLogs).parameters}
    return found - same  # a base class's


def test_settings_are_few() -> None:
    """YAML keys of every class, the server's options, arguments of every command."""
    assert len(settings()) <= SETTINGS, sorted(settings())


def test_no_import_upward() -> None:
    """What stands in the list below may import what stands left of it, never what stands right of it."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
    upward = {
        (module, other)
        for module, others in imports().items()
        for other in others
        if floor[folder(module)] < floor[folder(other)]
    }
    assert upward == set()


def size(folder: Path) -> tuple[int, int]:
    """Tokens and code lines of a folder's files; docstrings, comments, line ends and indents are no tokens."""
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
    }
    skipped |= {tokenize.ENDMARKER}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tokens = lines = 0
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        strings = set[int]()  # lines of docstrings
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                strings |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
        code = set[int]()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            docstring = token.type == tokenize.STRING and token.start[0] in strings
            if token.type not in skipped and not docstring:
                tokens += 1
                code |= {*range(token.start[0], token.end[0] + 1)}
        lines += len(code)
    return tokens, lines


def test_the_house_is_small_and_its_lines_breathe() -> None:
    """A bound on lines made denser lines, so tokens are bounded, and tokens a line."""
    tokens, lines = size(ROOT / "project")
    assert tokens <= TOKENS
    assert tokens / lines <= TOKENS_A_LINE
    assert size(ROOT / "tests")[0] <= TEST_TOKENS


def test_size_counts_tokens(tmp_path: Path) -> None:
    """`x = 1` has three tokens, `y = x + 1` five; docstring, comment and empty line none."""
    (tmp_path / "a.py").write_text('"""About."""\n\nx = 1  # one\ny = x + 1\n')
    assert size(tmp_path) == (8, 2)


@pytest.mark.slow
def test_the_server_draws_nothing() -> None:
    """Its HTTP process imports neither matplotlib nor the report (jinja2 comes along with transformers)."""
    code = "import sys, project.serve.server; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "fastapi" in done.stdout.split()
    unwanted = ("matplotlib", "project.report", "project.evaluation")
    assert [name for name in done.stdout.split() if name.startswith(unwanted)] == []
