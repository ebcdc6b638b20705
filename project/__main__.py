"""`python -m project`: every command starts here."""

from __future__ import annotations

import logging
import sys
import warnings

# between libraries: a user cannot act on them
QUIET_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)`",
    "`torch.jit",
    ".*jsonargparse",
    "The dirpath has changed",
)

OTHER_COMMANDS = {
    "table": "print result files as Markdown tables",
    "report": "one document of a run's results",
    "compare": "two runs on the same rows",
    "export": "a run as a Hugging Face folder",
    "serve": "scores of a run over HTTP",
    "refit": "a served run again, on its log and the events since",
}


def run(arguments: list[str]) -> None:
    """Run the command that the arguments begin with; those without a model import none."""
    match arguments:
        case ["table", *rest]:
            from project.report.tables import print_tables

            print_tables(rest)
        case ["report", *rest]:
            from project.report.report import run_report

            run_report(rest)
        case ["compare", *rest]:
            from project.compare import run_compare

            run_compare(rest)
        case ["export", *rest]:
            from project.export import run_export

            run_export(rest)
        case ["serve", *rest]:
            from project.serve.server import run_serve

            run_serve(rest)
        case ["refit", *rest]:
            from project.serve.refit import run_refit

            run_refit(rest)
        case _:
            from project.cli import ProjectCLI

            ProjectCLI(OTHER_COMMANDS)


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
