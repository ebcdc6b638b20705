"""`python -m project`: every verb starts here."""

from __future__ import annotations

import sys


def main() -> None:
    """Run one verb; what is wrong with the input is said in one line, without a traceback."""
    from project.errors import ProjectError

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
