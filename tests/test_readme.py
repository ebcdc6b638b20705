"""README says nothing that is not so: its example is read, its tables come from result files, its paths exist."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest
import yaml

from project.data.logs import TableLogs
from project.data.protocol import Protocol, apply_protocol, build_interactions
from project.report.tables import TABLE, fill_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str, first: str) -> str:
    """The fenced block of a language that begins with `first`."""
    parts = README.split("```")[1::2]
    return next(p.partition("\n")[2] for p in parts if p.startswith(f"{language}\n{first}"))


def test_own_logs_in_ten_rows(tmp_path: Path) -> None:
    """The ten rows: one of history; of the others those with a past are targets: 3 train, 2 valid, 2 test."""
    (tmp_path / "logs.csv").write_text(block("", "member,product"))
    names = pl.DataFrame({"product": ["p1", "p2", "p3", "p4"], "name": ["One", "Two", "Three", "Four"]})
    names.write_csv(tmp_path / "products.csv")
    data = yaml.safe_load(block("yaml", "data:"))["data"]
    files = {key: str(tmp_path / data["logs"]["init_args"].pop(key)) for key in ("interactions", "items")}
    protocol = Protocol(**data["protocol"])
    logs = TableLogs(**files, **data["logs"]["init_args"])
    split = apply_protocol(build_interactions(logs.read(), protocol), protocol)
    assert len(split.rows) == 10
    assert split.manifest["counts"] == {"train": 3, "valid": 2, "test": 2}


def test_tables_are_from_result_files() -> None:
    """Every table between markers is what its result file renders to, and no other tables have numbers."""
    assert "<!-- table results/quickstart/test.json -->" in README
    for document in (ROOT / "README.md", ROOT / "results" / "README.md"):
        text = document.read_text()
        assert fill_tables(text, document.parent) == text
        assert not re.search(r"^\|.*\d", TABLE.sub("", text), re.MULTILINE), document


def test_every_result_file_is_said_something_about() -> None:
    """No JSON file or picture in results/ that neither README nor results/README names."""
    results = ROOT / "results"
    named = set(re.findall(r"(?<!RUN/)results/(\S+?\.(?:json|png))", README))
    named |= set(re.findall(r"[\w/-]+\.(?:json|png)", (results / "README.md").read_text()))
    kept = {str(p.relative_to(results)) for p in results.rglob("*.*") if p.suffix in (".json", ".png")}
    assert kept == named


def test_tree_is_complete() -> None:
    """Every package of `project/` is in the annotated tree, and every folder of the repository that is not hidden."""
    tree = block("", "project/\n").splitlines()
    inside = {line.split()[0] for line in tree if line.startswith(" ") and line.split()[0].endswith("/")}
    assert inside == {f"{p.parent.name}/" for p in (ROOT / "project").glob("*/__init__.py")}
    top = {line.split()[0] for line in tree if not line.startswith(" ")}
    assert top == {"project/", "configs/", "notebooks/", "docs/", "tests/", "results/", "research/"}
    assert "`leave` in `project/exits/policy.py`" in README
    assert (ROOT / "project/exits/policy.py").read_text().count("\ndef leave(") == 1


def test_paths_exist() -> None:
    """The annotated tree, configurations and pictures that README names are there."""
    tree = block("", "project/\n").splitlines()
    inside, named = "", []
    for line in tree:
        name = line.split()[0]
        if not line.startswith(" "):
            inside = name if name.endswith("/") else ""
            named.append(name)
        else:
            named.append(inside + name)
    named += re.findall(r"\]\((results/[^)]+)\)", README)
    named += re.findall(r"configs/\S+?\.yaml", README)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_commands_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `python -m project COMMAND` of README, CONTRIBUTING and results/README is a command."""
    from project.cli import ProjectCLI

    text = "".join(
        (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "results/README.md")
    )
    known = {*ProjectCLI.subcommands(), "table", "report", "export", "compare"}
    used = set(re.findall(r"python -m project (\w+)", text))
    assert used <= known, used - known
    assert {"fit", "test", "baselines", "calibrate", "report"} <= used
