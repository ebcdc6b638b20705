"""Verbs that need data but no training loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from lightning.pytorch import Trainer
from rich.console import Console

from project.ablations.table import render_ablation
from project.artefacts import (
    read_result,
    replace_file,
    result_head,
    run_of_checkpoint,
    table_about,
    write_json,
)
from project.benchmark.table import render_benchmark
from project.callbacks.exit_calibration import exit_calibration_of
from project.data.identity import check_reads
from project.errors import ConfigError
from project.evaluation.compare import render_comparison
from project.evaluation.slices import floor_scores_of, slice_rows
from project.floors.kept import KeptFloors
from project.floors.peers import LEFT_OUT, peers_installed
from project.floors.quick import best_floor, fit_floors, floor_rows
from project.headlines import render_headlines
from project.model.checkpoint import check_origin
from project.model.heads import heads_digest
from project.ranking.table import render_rank
from project.tables import exits_table, render_exits, render_stage_seconds

if TYPE_CHECKING:
    from project.data.datamodule import InteractionData
    from project.model.module import ExitRecommender

TABLE = re.compile(
    r"(?P<start><!-- table (?P<files>\S+(?: \S+)*?) -->)\n.*?(?P<end><!-- end of table -->)", re.DOTALL
)


def run_floors(data: InteractionData, folder: Path, peers: bool = False) -> dict[str, Any]:
    """Score all floors on validation and test, also those that are too slow for fit, and write results/floors.json.

    The slower ones are kept: under the same hash they are not made again, and fit, validate and test find them.

    Args:
        data: Logs, protocol and evidence.
        folder: Run folder of the result file.
        peers: Also train and score the networks of `project.floors.peers`, where the extra is installed; those that
            were trained before are shown without asking.
    """
    if peers and not peers_installed():
        print(LEFT_OUT)
    split, kept = data.split, KeptFloors.of(data)
    networks = kept.find(kinds=("peers",))
    if peers and peers_installed():
        with data.clock.stage("peers"):
            networks = kept.make("peers")
    with data.clock.stage("floors"):
        floors = [*fit_floors(split.rows, data.evidence), *kept.make("more"), *networks]
        rows = floor_rows(floors, split.rows)
        best = best_floor(floors, split.rows)
        slices = [
            found
            for part in (("valid", "tune"), ("test", None))
            for found in slice_rows(split.rows, floor_scores_of(floors, split.rows, *part), *part)
        ]
    result = result_head("floors", split.manifest, str(folder / "config.yaml"), data.seed)
    result |= {"floors": rows, "best_floor": best.name if best else None, "slices": slices}
    result["stage_seconds"] = {k: round(v, 1) for k, v in data.clock.seconds.items()}
    path = write_json(folder / "results" / "floors.json", result)
    Console(width=120).print(exits_table(result, "test"), f"written: {path}")
    return result


def run_calibrate(
    trainer: Trainer, model: ExitRecommender, data: InteractionData, ckpt_path: str | None, rescore: bool
) -> dict[str, Any]:
    """Calibrate the exits of a trained checkpoint and write the plan into it.

    Args:
        trainer: Has the callback ExitCalibration.
        model: The checkpoint's configuration.
        data: Logs whose validation is used.
        ckpt_path: The checkpoint.
        rescore: Score validation anew even where the run's score table fits.

    Raises:
        ConfigError: Without a checkpoint.
        CheckpointError: If the checkpoint has other exit layers than the configuration.
    """
    if ckpt_path is None:
        raise ConfigError(
            "calibrate needs --ckpt_path, a trained run's checkpoint; found none. `fit` writes one."
        )
    callback, folder = exit_calibration_of(trainer), run_of_checkpoint(ckpt_path)
    table = folder / "scores" / "valid.parquet"
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    wanted = {"heads": heads_digest(checkpoint["state_dict"]), "protocol": data.split.hash}
    known = table_about(table) if table.exists() else {}
    if rescore or any(known.get(key) != value for key, value in wanted.items()):
        trainer.validate(model, datamodule=data, ckpt_path=ckpt_path, verbose=False, weights_only=True)
        scores = model.scores
        assert scores is not None
    else:
        check_origin(checkpoint, model.exit_layers, model.backbone)
        check_reads(checkpoint.get("reads"), data)
        model.prior.copy_(checkpoint["state_dict"]["prior"])
        scores = pl.read_parquet(table)
    result = callback.calibrate(trainer, model, data, scores, folder)
    if trainer.is_global_zero:
        callback.write_into(Path(ckpt_path))
        said = [result["certificate"]["words"], (result["certified"] or {}).get("words")]
        Console(width=120).print(*filter(None, said), f"written: {ckpt_path}", sep="\n")
    return result


def print_tables(arguments: list[str]) -> None:
    """`table FILE... [--brief] [--stages]` prints result files as Markdown, each a table; `--beside` makes one of them.

    `table --into README.md` renews a document's tables.

    Args:
        arguments: Result files, --brief for the floors that matter most, --stages for where the time went, --beside
            for a row a file; or --into and a document.
    """
    if arguments[:1] == ["--into"]:
        document = Path(*arguments[1:2])
        if not document.is_file():
            raise ConfigError(
                f"table --into needs a Markdown file to renew; found {' '.join(arguments[1:]) or 'none'}."
            )
        text = fill_tables(document.read_text(encoding="utf-8"), document.parent)
        replace_file(document, lambda part: part.write_text(text, encoding="utf-8"))
        return
    names = [a for a in arguments if not a.startswith("--")]
    if unknown := set(arguments) - {*names, "--brief", "--stages", "--beside"}:
        raise ConfigError(
            f"table knows --brief, --stages, --beside and --into; found {' '.join(sorted(unknown))}."
        )
    if not names:
        raise ConfigError(
            "table needs result files, such as runs/quickstart/latest/results/test.json, or --into and a document; "
            "found none."
        )
    if "--beside" in arguments:
        print(render_headlines({name: read_result(Path(name)) for name in names}))
        return
    for name in names:
        result = read_result(Path(name))
        print(f"### {result['verb']}\n\n{_rendered(result, '--brief' in arguments)}")
        if "--stages" in arguments and "stage_seconds" in result:
            print(render_stage_seconds(result))


def fill_tables(text: str, folder: Path) -> str:
    """The document with every `<!-- table FILE -->...<!-- end of table -->` made anew from its result file.

    Where a marker names several files, they stand beside each other, a row each; --brief before the file's name is as
    in `print_tables`.

    Args:
        text: Markdown.
        folder: What the names of result files are relative to.
    """

    def block(found: re.Match[str]) -> str:
        names = found["files"].split()
        results = {name: read_result(folder / name) for name in names if name != "--brief"}
        first, *more = results.values()
        text = render_headlines(results) if more else _rendered(first, "--brief" in names)
        return f"{found['start']}\n{text}{found['end']}"

    return TABLE.sub(block, text)


def _rendered(result: dict[str, Any], brief: bool = False) -> str:
    renderers = {
        "benchmark": render_benchmark,
        "rank": render_rank,
        "ablate": render_ablation,
        "compare": render_comparison,
    }
    if result["verb"] in renderers:
        return renderers[result["verb"]](result)
    return render_exits(result, brief=brief)
