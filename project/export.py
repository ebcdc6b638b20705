"""Writes a run as a Hugging Face folder (backbone, heads, exit plan, feature baseline, model card) and reads it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml  # type: ignore[import-untyped]  # as in project.run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from project.bundle import ITEM_VECTORS
from project.config import open_run
from project.data.download import SOURCES
from project.data.prompt import NUMBERS as KINDS
from project.data.prompt import RATING_SCALE, shows_numbers
from project.engine.predict import load_run
from project.errors import DataError
from project.exits.plan import CHECKPOINT_KEY, Plans
from project.features import FeatureBaseline, Term
from project.model.attention import SEGMENTS
from project.model.backbone import Backbone
from project.model.heads import ExitHead
from project.model.module import ExitRecommender
from project.report.report import Run, read_run
from project.report.tables import render
from project.run import SCHEMA_VERSION, SEEN, own_version, read_checkpoint, read_config

USAGE = "python -m project export RUN_FOLDER NEW_FOLDER"
NEEDED = ("config.yaml", "bundle/bundle.json", "bundle/tokenizer", "checkpoints/last.ckpt")
POLICY = "exit_policy.ckpt"  # exit plans and exit 0: tensors and plain values
HEADS = "heads.safetensors"
NUMBERS = "numbers.safetensors"
# what a backbone's embedding has beside the words, by its name in the state
LEARNED = ("numbers", "context", "projection", "moments")
_AUTO: Any = AutoModel  # its constructors are not typed

CARD = """\
---
library_name: exitrec
{hub}tags: [recommendation, early-exit, {family}]
---

# {name}

The first {layers} layers of {base}, fine-tuned to predict from an interaction history and retrieved features whether \
a user likes a candidate ({yes}) or not ({no}), with prediction heads after layers {exits} and a calibrated exit \
policy (`{criterion}`). Written by exitrec {version}, which has the prompts, the retrieval and the early-exit \
engine.{numbers}

## Load it

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(folder)  # the backbone; its last norm is the base model's, the heads have their own
tokenizer = AutoTokenizer.from_pretrained(folder)

from project.export import load_exported  # of exitrec, which must be installed

backbone, heads, plans, exit_0 = load_exported(folder)
```

`python -m project serve --run FOLDER` serves it where the log's files are, by the names in config.yaml.

## What it measured

{measured}

## Data

Retrieved features by `{retriever}`. Logs, which are not included:

{files}

## Limits

Scores are of one log and its protocol; other users, items or times were not measured. The policy holds for the \
prompts and the retriever that it was calibrated with. What a log prefers, a model that is fitted to it prefers too. \
Not made for decisions about people.

## Licence

The weights are derived from the base model's, whose licence applies. {licence} The logs have their own.
"""
WITH_NUMBERS = (
    " Retrieved features in prompts, and items where their text is one token, are learned tokens with ids below zero. "
    "`load_exported` knows them, items as far as the log has them; the model alone does not."
)
NOT_TESTED = (
    "\n\nTest was not read; the numbers are of the rows that calibration was fitted on."
)


def render_card(run: Run, bundle: Mapping[str, Any], family: str, criterion: str) -> str:
    """README.md of an exported folder, from a run's results, its bundle.json and the backbone's model_type."""
    base_model = bundle["base_model"]
    path = Path(base_model).expanduser()
    on_hub = base_model not in SOURCES and base_model.count("/") == 1 and not path.exists()
    # no path of this machine
    base = path.name if path.is_absolute() or path.is_dir() else base_model
    no, yes = (repr(answer.strip()) for answer in bundle["answers"])
    files = (
        f"* `{Path(name).name}`, SHA-256 {digest}"
        for name, digest in bundle["interactions"].items()
    )
    return CARD.format(
        hub=f"base_model: {base_model}\n" if on_hub else "",
        family=family,
        name=run.name,
        layers=bundle["num_layers"],
        base=base,
        yes=yes,
        no=no,
        exits=", ".join(map(str, bundle["exit_layers"])),
        criterion=criterion,
        version=own_version(),
        numbers=WITH_NUMBERS if shows_numbers(bundle["prompt"]["segment"]) else "",
        measured=render(run.reported) + (NOT_TESTED if run.split != "test" else ""),
        retriever=bundle["retriever"]["class_path"],
        files="\n".join(files),
        licence=SOURCES[base_model].licence
        if base_model in SOURCES
        else f"See the licence of {base}.",
    )


def run_export(arguments: Sequence[str]) -> Path:
    """The command: export a run folder into a folder that does not exist yet or is empty; print its path."""
    parser = argparse.ArgumentParser(
        "python -m project export", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of a calibrated run")
    parser.add_argument(
        "folder", type=Path, help="folder that does not exist yet or is empty"
    )
    given = parser.parse_args(arguments)
    folder = export(given.run, given.folder)
    print(f"written: {folder}")
    return folder


def export(run: Path, folder: Path) -> Path:
    """Write a calibrated run's last checkpoint as a Hugging Face folder; whole or not at all."""
    # 1. refuse what is not a run, and a folder that is in use
    missing = [name for name in NEEDED if not (run / name).exists()]
    if missing:
        raise DataError(
            f"{run} lacks {', '.join(missing)}; expected the folder of a run that `fit` wrote, such as "
            "runs/quickstart/latest."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} already holds something; expected a new or an empty folder. Choose another name."
        )
    # 2. the run: its model, exit plan and results
    bundle = json.loads((run / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    results = read_run(run)
    module, data = open_run(run)
    plans = load_run(module.eval(), data.tokenizer, run / "checkpoints" / "last.ckpt")
    if foreign := [k for k, head in module.heads.items() if type(head) is not ExitHead]:
        raise DataError(
            f"{run} has heads of a class of its own at layers {', '.join(foreign)}; export knows ExitHead alone."
        )
    baseline, backbone = module.feature_baseline(), module.backbone
    assert backbone is not None
    policy = {
        "schema_version": SCHEMA_VERSION,
        "exit_layers": bundle["exit_layers"],
        "exit_0": torch.from_numpy(baseline.to_array()),
        "exit_0_terms": [list(term) for term in baseline.terms],
        CHECKPOINT_KEY: plans.state(),
    }
    # 3. all files under a temporary name, then one renaming
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent
    ) as scratch:
        part = Path(scratch) / folder.name
        shutil.copytree(run / "bundle" / "tokenizer", part)
        state = _merged(backbone)
        _save_backbone(backbone, state, part)
        save_file(
            {k: v.contiguous() for k, v in module.heads.state_dict().items()}, part / HEADS
        )
        learned = {
            name: values
            for name in LEARNED
            if (values := state.get(f"embed_tokens.{name}")) is not None
        }
        if learned:
            items = load_file(run / "bundle" / ITEM_VECTORS) if module.items else {}
            save_file(learned | items, part / NUMBERS)
        torch.save(policy, part / POLICY)
        (part / "config.yaml").write_text(_served(run, bundle), encoding="utf-8")
        scale = run / "bundle" / RATING_SCALE
        if scale.exists():
            (part / "bundle").mkdir()
            shutil.copy(scale, part / "bundle")
        if (run / SEEN).exists():
            shutil.copy(run / SEEN, part)
        card = render_card(
            results, bundle, backbone.config.model_type, plans.plan.criterion_name
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        os.replace(part, folder)
    return folder


def _served(run: Path, bundle: Mapping[str, Any]) -> str:
    """What `serve` needs of config.yaml; of absolute paths to logs and models the name is left."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(part) for key, part in value.items()}
        return (
            Path(value).name
            if isinstance(value, str) and Path(value).is_absolute()
            else value
        )

    config = read_config(run)
    data = config["data"] | {"requests": None, "bundle": None}
    data |= {key: named(data[key]) for key in ("logs", "retriever") if key in data}
    kept = {
        "seed_everything": config.get("seed_everything", 0),
        "model": {
            "backbone": named(bundle["base_model"]),
            "exit_layers": bundle["exit_layers"],
        },
        "data": data,
        "trainer": {"precision": config.get("trainer", {}).get("precision")},
    }
    if "exits" in config:  # names the criterion's class
        kept["exits"] = config["exits"]
    return str(yaml.safe_dump(kept, sort_keys=False))


def _merged(backbone: Backbone) -> dict[str, Tensor]:
    """Weights by name, adapters merged in place."""
    for layer in list(backbone.modules()):
        if hasattr(layer, "base_layer"):
            layer.merge()  # type: ignore[operator]  # peft's
    return {
        name.replace(".base_layer.", "."): weights
        for name, weights in backbone.state_dict().items()
        if ".lora_" not in name
    }


def _save_backbone(backbone: Backbone, state: Mapping[str, Tensor], folder: Path) -> None:
    """config.json and model.safetensors of a headless model."""
    state = {
        name.replace("final_norm.", "norm."): weights
        for name, weights in state.items()
        if name.removeprefix("embed_tokens.") not in LEARNED
    }
    with torch.device("meta"):  # only its names: the weights are the backbone's
        model = _AUTO.from_config(deepcopy(backbone.config), attn_implementation="sdpa")
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)


class Exported(NamedTuple):
    """Backbone, heads and exit plans of an exported folder, on the CPU, in eval mode.

    `heads` are `ExitHead` by layer, keys as text. Exit 0 gives logits of features, before the backbone runs.
    """

    backbone: Backbone
    heads: nn.ModuleDict
    plans: Plans
    exit_0: FeatureBaseline


def load_exported(folder: str | Path) -> Exported:
    """Backbone, heads, exit plans and exit 0 of a folder that `export` wrote."""
    # 1. the backbone's layers
    folder = Path(folder)
    policy_file = folder / POLICY
    if not policy_file.is_file():
        raise DataError(
            f"{policy_file} does not exist; expected a folder that `{USAGE}` wrote."
        )
    policy = read_checkpoint(policy_file)
    if policy["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"{policy_file} has schema_version {policy['schema_version']}; this version reads {SCHEMA_VERSION}. "
            "Export the run again."
        )
    model, info = _AUTO.from_pretrained(
        folder, attn_implementation=SEGMENTS, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} weights of the backbone, among them {missing[:3]}; the copy is not "
            "complete. Copy or export it again."
        )
    # 2. the backbone; its LM head is empty, because the exit heads are loaded and not made
    # from it
    backbone = Backbone(
        SimpleNamespace(
            config=model.config,
            model=model,
            lm_head=SimpleNamespace(weight=torch.empty(0)),
        )
    )
    backbone.release_lm_head()
    if (folder / NUMBERS).exists():
        learned = load_file(folder / NUMBERS)
        rated = (0, 0) if len(learned["numbers"]) > len(KINDS) else None
        backbone.learn("items" in learned, rated)
        if "items" in learned:
            backbone.embed_tokens.know(learned.pop("items"))
        state = {f"embed_tokens.{name}": values for name, values in learned.items()}
        backbone.load_state_dict(state, strict=False)
    # 3. the heads
    direction = torch.zeros(model.config.hidden_size)
    heads = nn.ModuleDict(
        {str(k): ExitHead(backbone.final_norm, direction) for k in policy["exit_layers"]}
    )
    heads.load_state_dict(load_file(folder / HEADS))
    terms = tuple(Term(*term) for term in policy["exit_0_terms"])
    return Exported(
        backbone.eval(),
        heads.eval(),
        Plans.from_state(policy[CHECKPOINT_KEY]),
        FeatureBaseline.from_array(policy["exit_0"], terms),
    )


def give_exported(module: ExitRecommender, folder: Path) -> Plans:
    """Give a module without weights those of a folder that `export` wrote; its plans."""
    module.backbone, module.heads, plans, exit_0 = load_exported(folder)
    module.know_exit_0({"exit_0_terms": exit_0.terms})
    module.exit_0.copy_(torch.from_numpy(exit_0.to_array()))
    return plans
