"""`python -m project`: every verb starts here."""

from __future__ import annotations

import logging
import sys
import warnings

# of libraries among themselves: nothing a user could act on
QUIET_WARNINGS = (r"`isinstance\(treespec, LeafSpec\)`", "`torch.jit", ".*jsonargparse")


def main() -> None:
    """Run one verb; what is wrong with the input is said in one line, without a traceback."""
    from project.errors import ProjectError

    if not sys.warnoptions:  # python -W and the tests' own ledger come first
        for message in QUIET_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
    advertising = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertising.addFilter(lambda record: "litlogger" not in record.getMessage())
    try:
        if sys.argv[1:2] == ["table"]:
            from project.verbs import print_tables

            print_tables(sys.argv[2:])
        else:
            from project.cli import ProjectCLI

            ProjectCLI()
    except ProjectError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
