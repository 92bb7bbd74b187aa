"""`pujax COMMAND`, or `python -m pujax COMMAND`: any of the commands beside this file."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

from pujax import __version__
from pujax.config.streams import hold
from pujax.errors import ConfigError

COMMANDS = (
    "train",
    "adapt",
    "collect",
    "generate",
    "chat",
    "serve",
    "export",
    "evaluate",
    "report",
    "benchmark",
)


def main() -> None:
    """Run the command that the first argument names, or list them all."""
    hold("pujax")
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"pujax {name}", *sys.argv[2:]]
        sys.exit(importlib.import_module(f"pujax.{name}").main())
    if name == "--version":
        print(f"pujax {__version__}")
        return
    if name == "--completion":
        print(_completion(sys.argv[2:]), end="")
        return
    listed = "\n".join(f"  {command:<10} {_purpose(command)}" for command in COMMANDS)
    if name not in ("--help", "-h"):
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f", did you mean {near[0]}?" if near else ";"
        sys.exit(f"pujax: no command {name!r}{meant} there are\n{listed}")
    print(f"pujax COMMAND KEY=VALUE ...   (pujax COMMAND --help shows its settings)\n\n{listed}")
    print("\npujax --completion bash, or zsh, prints what that shell is to complete")


def _completion(shell: list[str]) -> str:
    """The script for the shell that is named; it knows every command's settings."""
    from pujax.config.completion import script

    for command in COMMANDS:
        importlib.import_module(f"pujax.{command}")
    try:
        return script(" ".join(shell), COMMANDS)
    except ConfigError as error:
        sys.exit(f"pujax: {error}")


def _purpose(command: str) -> str:
    """What a command's docstring says of it, read without importing it."""
    text = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
    return first.partition("`: ")[2] or first


if __name__ == "__main__":
    main()
