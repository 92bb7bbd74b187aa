"""`python -m pujax.report RUN_DIR` makes a run's curves and page anew, of its files alone."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when the report is written, 1 with a message when the run can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m pujax.report", description="Make a run's curves.png and report.html anew."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    directory = parser.parse_args(arguments).run

    from pujax.evaluation.page import write

    try:
        print(write(directory))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
