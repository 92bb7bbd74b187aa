"""`python -m pujax.evaluate RUN_DIR` prints a run's table again.

With `--model PATH --name NAME` it first evaluates another model on the run's held-out prompts and
puts it beside the run's own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 when the table is printed, 1 with a message when something can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m pujax.evaluate", description="Print a run's held-out evaluation."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--model", metavar="PATH", help="evaluate this model too: as model.path")
    parser.add_argument("--name", help="what to call it in the table")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.name is None):
        parser.error("--model and --name go together")

    from rich.console import Console

    from pujax.errors import StoreError
    from pujax.evaluation.results import load_all, save
    from pujax.evaluation.tables import table
    from pujax.run.heldout import evaluate_other

    try:
        if options.model is not None:
            save(evaluate_other(options.run, options.model, options.name), options.run)
        evaluations = load_all(options.run)
        if not evaluations:
            raise FileNotFoundError(f"{options.run} has no eval-*.jsonl: is it a run's directory?")
        shown = table(evaluations)
    except (OSError, StoreError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
