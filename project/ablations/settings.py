"""An ablation list: a base configuration and its variants, as a YAML file says them.

Unusual here: what a variant was trained with is its *definition*, the parsed YAML of all its files and its overrides,
not their names. A finished run is recognised by it, so the base is trained once for all lists that share it, and a
variant whose YAML has changed is trained again.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # as in project.export

from project.errors import ConfigError

LIST_KEYS = {"base", "steps", "rows"}
ROW_KEYS = {"name", "overlays", "overrides"}
EXAMPLE = (
    "base: configs/quickstart.yaml, steps: 60, rows: [{name: base}, {name: linear, "
    "overrides: {model.loss.weights: linear}}, {name: lora, overlays: [configs/overlays/lora.yaml]}]"
)


@dataclass(frozen=True)
class Variant:
    """One row of an ablation list.

    Attributes:
        name: Folder of its runs and its name in the table.
        configs: The base and its overlays, in the order in which they are given to `fit`.
        overrides: Nested YAML on top of them, the number of steps included.
    """

    name: str
    configs: tuple[Path, ...]
    overrides: dict[str, Any]

    def definition(self) -> dict[str, Any]:
        """All that the variant says, as JSON reads it back: equal for equal trainings."""
        said = {"configs": [_load(path) for path in self.configs], "overrides": self.overrides}
        definition: dict[str, Any] = json.loads(json.dumps(said, default=str))
        return definition


@dataclass(frozen=True)
class AblationList:
    """A list of variants.

    Attributes:
        file: The YAML file.
        variants: The first one is the base that the others are compared with.
    """

    file: Path
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        """losses, of configs/ablations/losses.yaml."""
        return self.file.stem


def read_list(file: Path, steps: int | None = None) -> AblationList:
    """Read and check an ablation list.

    Args:
        file: YAML with `base` (a configuration), `steps` (batches that each variant is trained on; null: as the
            configuration says) and `rows`, each with `name` and maybe `overlays` (files) and `overrides` (dotted key:
            value). Paths are relative to the working directory, as on the command line.
        steps: Instead of the list's `steps`.

    Raises:
        ConfigError: A missing file, a key that nobody knows, a name twice.
    """
    content = _load(file)
    if not isinstance(content, dict) or set(content) - LIST_KEYS or not {"base", "rows"} <= set(content):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{file}: found {found}; expected the keys base, steps, rows, as in {EXAMPLE}.")
    rows = content["rows"]
    if not isinstance(rows, list) or len(rows) < 2:
        raise ConfigError(
            f"{file}: rows is {rows!r}; expected the base and at least one more, as in {EXAMPLE}."
        )
    steps = content.get("steps") if steps is None else steps
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"{file}: steps is {steps!r}; expected a number of batches, 1 or more, or null.")
    trainer = {} if steps is None else {"trainer": {"max_epochs": 1, "limit_train_batches": steps}}
    variants = tuple(
        _variant(row, f"{file}, rows[{i}]", content["base"], trainer) for i, row in enumerate(rows)
    )
    twice = [name for name, count in Counter(v.name for v in variants).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{file}: the name {twice[0]!r} stands twice in rows; each needs a folder of its own."
        )
    return AblationList(file, variants)


def _variant(row: Any, where: str, base: str, trainer: dict[str, Any]) -> Variant:
    if not isinstance(row, dict) or set(row) - ROW_KEYS or not isinstance(row.get("name"), str):
        raise ConfigError(
            f"{where}: found {row!r}; expected name, and maybe overlays and overrides: {EXAMPLE}."
        )
    if row["name"] != Path(row["name"]).name or row["name"].startswith("."):
        raise ConfigError(
            f"{where}: name is {row['name']!r}; expected the name of a folder, without slashes."
        )
    overlays, overrides = row.get("overlays") or [], row.get("overrides") or {}
    if not isinstance(overlays, list) or not isinstance(overrides, dict):
        raise ConfigError(
            f"{where}: overlays is {overlays!r} and overrides {overrides!r}; expected a list of files and a mapping."
        )
    configs = tuple(Path(str(name)) for name in (base, *overlays))
    for path in configs:
        if not path.is_file():
            raise ConfigError(f"{where}: {path} does not exist; paths are relative to the working directory.")
    nested: dict[str, Any] = {key: dict(value) for key, value in trainer.items()}
    for key, value in overrides.items():
        _place(nested, str(key), value, where)
    return Variant(row["name"], configs, nested)


def _place(nested: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key."""
    *parents, last = key.split(".")
    place: Any = nested
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{where}: overrides says {key} and also a value for {name}; say one of them.")
    if isinstance(place.get(last), dict):
        raise ConfigError(f"{where}: overrides says {key} and also keys below it; say one of them.")
    place[last] = value


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected YAML, such as configs/ablations/losses.yaml.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
