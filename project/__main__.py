"""`python -m project`: every command starts here."""

from __future__ import annotations

import logging
import sys
import warnings
from pkgutil import resolve_name

# between libraries: a user cannot act on them
QUIET_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)`",
    "`torch.jit",
    ".*jsonargparse",
    "The dirpath has changed",
)

# commands that read no configuration: what runs each, imported only then, and what it does
OTHER_COMMANDS = {
    "table": (
        "project.report.tables:print_tables",
        "print result files as Markdown tables",
    ),
    "report": ("project.report.report:run_report", "one document of a run's results"),
    "compare": ("project.compare:run_compare", "two runs on the same rows"),
    "backtest": (
        "project.backtest:run_backtest",
        "refitted or not, through time",
    ),
    "export": ("project.export:run_export", "a run as a Hugging Face folder"),
    "serve": ("project.serve.server:run_serve", "scores of a run over HTTP"),
    "refit": (
        "project.serve.refit:run_refit",
        "a served run again, on its log and the events since",
    ),
}


def run(arguments: list[str]) -> None:
    """Run the command that the arguments begin with; those without a model import none."""
    command = arguments[0] if arguments else ""
    if command in OTHER_COMMANDS:
        resolve_name(OTHER_COMMANDS[command][0])(arguments[1:])
        return
    from project.cli import ProjectCLI

    ProjectCLI(arguments, {name: about for name, (_, about) in OTHER_COMMANDS.items()})


def main() -> None:
    """Run one command; an error about the input is printed in one line, without a traceback."""
    from project.errors import ProjectError

    if not sys.warnoptions:  # python -W and the tests' own ledger come first
        for message in QUIET_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
    advertising = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertising.addFilter(lambda record: "litlogger" not in record.getMessage())
    try:
        run(sys.argv[1:])
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
