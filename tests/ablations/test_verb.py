"""The verb: what is trained and what is taken again, with a `fit` that only writes files; and once in earnest."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from example_variant import write_variant

from project.ablations import runs, verb
from project.ablations.runs import FINISHED, FitFailed, exit_status
from project.ablations.settings import Variant, read_list
from project.artefacts import write_json

ROOT = Path(__file__).parents[2]
LISTS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))


class Trainer:
    """Stands for `fit`: writes a run, or fails for the names it is told to."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.failing: set[str] = set()
        self.protocols: dict[str, str] = {}

    def fit(self, variant: Variant, folder: Path) -> Path:
        self.trained.append(variant.name)
        if variant.name in self.failing:
            raise FitFailed("ConfigError: no")
        run = folder / f"version_{len(list(folder.glob('version_*')))}"
        write_variant(run, seed=len(self.trained), protocol=self.protocols.get(variant.name, "same"))
        write_json(run / FINISHED, variant.definition())
        return run


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """In a folder of its own, with `losses.yaml`: base, linear, sqrt."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("{}\n")
    write_list("losses", ["linear", "sqrt"])
    found = Trainer()
    monkeypatch.setattr(verb, "fit", found.fit)
    return found


def write_list(name: str, weights: list[str]) -> None:
    rows = [{"name": "base"}, *({"name": w, "overrides": {"model.loss.weights": w}} for w in weights)]
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "steps": 5, "rows": rows}))


def table(name: str = "losses") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(f"results/ablation-{name}.json").read_text())
    return content


def test_resumes(trainer: Trainer) -> None:
    """A second call trains nothing and makes the same table; with other steps all is trained, nothing overwritten."""
    verb.run_ablate(["losses.yaml"])
    first = table()
    assert trainer.trained == ["base", "linear", "sqrt"]
    assert [row["name"] for row in first["rows"]] == trainer.trained
    assert first["rows"][1]["result"] == "runs/ablation-losses/linear/version_0/results/fit.json"
    assert first["rows"][1]["exits"][-1]["difference"]["auc"]["value"] != 0
    assert Path("results/ablation-losses.md").read_text().startswith("| variant | exit |")
    verb.run_ablate(["losses.yaml"])
    assert (trainer.trained, table()) == (["base", "linear", "sqrt"], first)
    verb.run_ablate(["losses.yaml", "--steps", "6"])
    assert trainer.trained == ["base", "linear", "sqrt"] * 2
    assert table()["steps"] == 6
    assert table()["rows"][1]["result"] == "runs/ablation-losses/linear/version_1/results/fit.json"
    verb.run_ablate(["losses.yaml"])
    assert (len(trainer.trained), table()) == (6, first)


def test_lists_share_runs(trainer: Trainer) -> None:
    """What another list has trained, word for word the same, is not trained again: the base above all."""
    verb.run_ablate(["losses.yaml"])
    write_list("more", ["sqrt", "inverse"])
    verb.run_ablate(["more.yaml"])
    assert trainer.trained == ["base", "linear", "sqrt", "inverse"]
    assert [row["result"].split("/")[1] for row in table("more")["rows"]] == [
        "ablation-losses", "ablation-losses", "ablation-more"
    ]  # fmt: skip


def test_a_failure_is_reported(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest goes on, the table says what failed, the verb ends with status 1, and the next call tries it again."""
    trainer.failing = {"linear"}
    with pytest.raises(SystemExit) as stopped:
        verb.run_ablate(["losses.yaml"])
    assert stopped.value.code == 1
    assert [row.get("error") for row in table()["rows"]] == [None, "failed: ConfigError: no", None]
    assert "losses 2/3 linear: failed: ConfigError: no" in capsys.readouterr().out
    trainer.failing = set()
    verb.run_ablate(["losses.yaml"])
    assert trainer.trained == ["base", "linear", "sqrt", "linear"]
    assert not any("error" in row for row in table()["rows"])


def test_without_the_base(trainer: Trainer) -> None:
    """Where the base failed the others have numbers, and no difference to something that is not the base."""
    trainer.failing = {"base"}
    with pytest.raises(SystemExit):
        verb.run_ablate(["losses.yaml"])
    assert all("difference" not in head for row in table()["rows"][1:] for head in row["exits"])
    trainer.failing = {"base", "linear", "sqrt"}
    with pytest.raises(SystemExit):
        verb.run_ablate(["losses.yaml", "--steps", "9"])
    assert table()["steps"] == 5  # nothing has numbers: no table


def test_other_protocol(trainer: Trainer) -> None:
    """A run of another protocol is named, and has no numbers in this table."""
    trainer.protocols = {"linear": "other"}
    verb.run_ablate(["losses.yaml"])
    rows = table()["rows"]
    assert "protocol hash is other, the others' same" in rows[1]["error"]
    assert "exits" not in rows[1]
    assert rows[2]["exits"]


def test_an_unfinished_run_is_not_taken(trainer: Trainer) -> None:
    """A run without its score table, or without the mark that it ended well, is trained again."""
    verb.run_ablate(["losses.yaml"])
    (Path("runs/ablation-losses/linear/version_0") / FINISHED).unlink()
    Path("runs/ablation-losses/sqrt/version_0/scores/valid.parquet").unlink()
    verb.run_ablate(["losses.yaml"])
    assert trainer.trained == ["base", "linear", "sqrt", "linear", "sqrt"]


def test_a_process_that_fails(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed process says last is the error, its output is in fit.log, and no run counts as finished."""
    script = "import sys; print('a'); print('ConfigError: model.x'); print('  is 3'); sys.exit(2)"

    def start(command: list[str], output: IO[str]) -> int:
        assert command[1:4] == ["-m", "project", "fit"]
        assert command[-1] == "runs/ablation-losses/linear/variant.yaml"
        return exit_status([sys.executable, "-c", script], output)

    monkeypatch.setattr(runs, "exit_status", start)
    variant = Variant("linear", (Path("base.yaml"),), {"trainer": {"limit_train_batches": 5}})
    folder = Path("runs/ablation-losses/linear")
    with pytest.raises(FitFailed, match=r"^ConfigError: model\.x is 3 \(exit status 2; .*fit\.log\)"):
        runs.fit(variant, folder)
    said = yaml.safe_load((folder / "variant.yaml").read_text())
    assert said["trainer"]["limit_train_batches"] == 5
    assert said["trainer"]["logger"][0]["init_args"] == {"save_dir": "runs/ablation-losses", "name": "linear"}
    assert runs.finished_run(variant, folder) is None


def test_a_file_that_changes_meanwhile(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is marked with what it was started with; where its files say something else in the end, it is no row."""

    def start(command: list[str], output: IO[str]) -> int:
        write_variant(Path("runs/ablation-losses/linear/version_0"))
        Path("runs/ablation-losses/linear/latest").symlink_to("version_0")
        Path("base.yaml").write_text("trainer: {max_epochs: 2}\n")
        return 0

    monkeypatch.setattr(runs, "exit_status", start)
    variant = read_list(Path("losses.yaml")).variants[1]
    with pytest.raises(FitFailed, match="a file that defines linear was changed while it trained"):
        runs.fit(variant, Path("runs/ablation-losses/linear"))
    assert not Path("runs/ablation-losses/linear/version_0", FINISHED).exists()


def test_sigterm_ends_the_training(tmp_path: Path) -> None:
    """A child that sleeps is ended and waited for; then the signal goes on, as status 143, to whoever handled it."""
    log = tmp_path / "fit.log"
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"

    def signal_when_started() -> None:
        while not log.read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def not_handled(*_: object) -> None:
        raise AssertionError("exit_status did not handle SIGTERM")

    before = signal.signal(signal.SIGTERM, not_handled)
    try:
        with log.open("w") as output:
            threading.Thread(target=signal_when_started, daemon=True).start()
            with pytest.raises(SystemExit) as stopped:
                exit_status([sys.executable, "-c", script], output)
        assert signal.getsignal(signal.SIGTERM) is not_handled
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.slow
def test_in_earnest(
    run: Callable[..., None],
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    session_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Base, a variant with every switch on, and a mistake over the tiny world, through the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    switches = {
        "model.loss.distill": {"temperature": 2.0},
        "model.loss.gradient_equilibrium": True,
        "model.loss.pairwise": 0.5,
        "model.layer_dropout": 0.3,
        "model.lora.rank": 2,
        "data.prompt.anonymise_titles": True,
        "data.prompt.evidence": "candidates",
    }
    rows = [
        {"name": "base"},
        {"name": "all", "overlays": [str(ROOT / "configs/overlays/lora.yaml")], "overrides": switches},
        {"name": "mistake", "overrides": {"model.loss.weights": "none"}},
    ]
    Path("tiny.yaml").write_text(yaml.safe_dump({"base": str(tiny_config()), "steps": 2, "rows": rows}))
    with pytest.raises(SystemExit):
        run("ablate", "tiny.yaml")
    base, other, mistake = table("tiny")["rows"]
    assert "weights" in mistake["error"]
    assert [head["layer"] for head in other["exits"]] == [1, 3]
    assert other["exits"][-1]["difference"]["auc"]["value"] != 0
    saved = yaml.safe_load(Path(other["config"]).read_text())
    assert saved["model"]["loss"]["distill"] == {"weight": 1.0, "temperature": 2.0}
    assert saved["model"]["lora"]["rank"] == 2
    assert saved["trainer"]["limit_train_batches"] == 2
    assert base["protocol_hash"] == other["protocol_hash"]
    assert not list(Path("runs").rglob("test.json"))  # test was never read


@pytest.mark.slow
@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_shipped_lists(
    path: Path,
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Every variant of every shipped list parses, and its overrides arrive; no two variants are the same."""
    monkeypatch.chdir(ROOT)
    variants = verb.read_list(path).variants
    definitions = [json.dumps(v.definition(), sort_keys=True) for v in variants]
    assert len(set(definitions)) == len(definitions)
    for variant in variants:
        overlay = tmp_path / "variant.yaml"
        overlay.write_text(runs._overlay(variant, Path("runs/ablation-x") / variant.name))
        configs = [word for file in (*variant.configs, overlay) for word in ("--config", file)]
        with pytest.raises(SystemExit) as stopped:
            run("fit", *configs, "--print_config")
        assert stopped.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        _arrived(variant.overrides, config)
        assert config["trainer"]["logger"][0]["init_args"]["name"] == variant.name


def _arrived(said: dict[str, Any], config: Any) -> None:
    for key, value in said.items():
        if isinstance(value, dict):
            _arrived(value, config[key])
        else:
            assert config[key] == value
