"""Python begins with this in the commands that tests start: as without torch, which none needs.

Where it is there, for the parity tests, transformers imports it, which takes as long as all else.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class Torchless(PathFinder):
    """Python's own way to find a package, which does not find this one."""

    @classmethod
    def find_spec(cls, fullname: str, *arguments: Any, **named: Any) -> ModuleSpec | None:
        """The package's, unless it is torch."""
        return None if fullname == "torch" else PathFinder.find_spec(fullname, *arguments, **named)


sys.meta_path[:] = [Torchless if finder is PathFinder else finder for finder in sys.meta_path]
