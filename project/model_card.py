"""The model card of an exported run: what it is, what it measured, how to load it, what it is not for.

Unusual here: no number is typed or computed; all are read from the run's result files, in the report's own words and
tables, so a card cannot say more than the report does. Paths of the machine that trained are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from project.artefacts import own_version
from project.data.sources import SOURCES
from project.data.template import tells_numbers
from project.report.run import Run
from project.report.tables import render

LOADING = """\
```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(folder)  # the trunk; its last norm is the base model's, the heads have their own
tokenizer = AutoTokenizer.from_pretrained(folder)

from project.export import load_exported  # of exitrec, which must be installed

trunk, heads, plan = load_exported(folder)
```"""


def render_card(run: Run, bundle: Mapping[str, Any], family: str, criterion: str) -> str:
    """README.md of an exported folder.

    Args:
        run: The run's result files.
        bundle: Content of bundle.json.
        family: The trunk's model_type.
        criterion: Name of the criterion that decides.
    """
    base = _base_name(bundle["base_model"])
    sections = {
        f"# {run.name}": [_opening(bundle, base, criterion)],
        "## Load it": [LOADING],
        "## What it measured": _measured(run),
        "## Data": [_data(run, bundle)],
        "## Limits": [_limits()],
        "## Licence": [_licence(bundle["base_model"], base)],
    }
    text = "\n\n".join(part for title, body in sections.items() for part in (title, *body) if part)
    return f"{_metadata(bundle['base_model'], family)}\n{text}\n"


def _metadata(base_model: str, family: str) -> str:
    """The hub's front matter; a base model is named where it is one of the hub's."""
    lines = ["---", "library_name: exitrec"]
    if (
        base_model not in SOURCES
        and base_model.count("/") == 1
        and not Path(base_model).expanduser().exists()
    ):
        lines.append(f"base_model: {base_model}")
    return "\n".join([*lines, f"tags: [recommendation, early-exit, {family}]", "---", ""])


def _base_name(base_model: str) -> str:
    """A folder's own name: where it lay is nobody's business."""
    path = Path(base_model).expanduser()
    return path.name if path.is_absolute() or path.is_dir() else base_model


def _opening(bundle: Mapping[str, Any], base: str, criterion: str) -> str:
    exits = ", ".join(map(str, bundle["exit_layers"]))
    no, yes = (repr(answer.strip()) for answer in bundle["answers"])
    return (
        f"The first {bundle['num_layers']} layers of {base}, fine-tuned to predict from an interaction history and "
        f"retrieved evidence whether a user likes a candidate ({yes}) or not ({no}), with prediction heads after "
        f"layers {exits} and a calibrated exit policy (`{criterion}`). Written by exitrec {own_version()}, which "
        "has the prompts, the retrieval and the early-exit engine."
        + (
            " Evidence in prompts is learned tokens with ids below zero, which `load_exported` knows and the model "
            "alone does not."
            if tells_numbers(bundle["prompt"]["segment"])
            else ""
        )
    )


def _measured(run: Run) -> list[str]:
    parts = [render(run.reported | {"certificate": _certificate(run)})]
    if run.split != "test":
        parts.append("Test was not read; the numbers are of the rows that calibration was fitted on.")
    return parts


def _certificate(run: Run) -> Any:
    return run.reported.get("certificate") or run.calibrate.get("certificate")


def _data(run: Run, bundle: Mapping[str, Any]) -> str:
    files = "\n".join(
        f"* `{Path(name).name}`, SHA-256 {digest}" for name, digest in bundle["interactions"].items()
    )
    retriever = bundle["retriever"]["class_path"]
    return f"Evidence by `{retriever}`. Logs, which are not included:\n\n{files}"


def _limits() -> str:
    return (
        "Scores are of one log and its protocol; other users, items or times were not measured. The policy holds for "
        "the prompts and the retriever that it was calibrated with. What a log prefers, a model that is fitted to it "
        "prefers too. Not made for decisions about people."
    )


def _licence(base_model: str, base: str) -> str:
    known = SOURCES[base_model].licence if base_model in SOURCES else f"See the licence of {base}."
    return f"The weights are derived from the base model's, whose licence applies. {known} The logs have their own."
