"""pujax's own functions as their files have them: importing one brings jax, which takes seconds."""

import __future__

import ast
import builtins
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_LIGHT = frozenset({"pujax.errors", "pujax.records", "pujax.schemas"})
"""Modules of pujax by whose functions settings are checked, and which import no jax."""

_CHECK = re.compile(r"_?check_\w+|require|one_of")
"""What a check is called: one of those modules', or of the same file, with an underscore."""

_ONE_AT_A_TIME = threading.Lock()
"""Python 3.11 counts the depth of a syntax tree for all threads together, and fails with two."""


def source_of(module: str) -> str:
    """The text of a module of pujax; nothing of one that there is not, or from elsewhere."""
    file = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py")
    try:
        known = module.startswith("pujax.") and file.is_file()
    except OSError:  # a name too long for one
        known = False
    return file.read_text(encoding="utf-8") if known else ""


def names_in(module: str) -> list[str]:
    """What a module of pujax defines or imports, as its file says; its own functions first."""
    body = _parsed(module).body
    made = [each.name for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef)]
    for each in body:
        if isinstance(each, ast.Import | ast.ImportFrom):
            made += [(name.asname or name.name).partition(".")[0] for name in each.names]
        elif isinstance(each, ast.Assign | ast.AnnAssign):
            made += sorted(set().union(*map(_set, ast.walk(each))))
    return made


def stand_in(target: str) -> Callable[..., None] | None:
    """A function that takes what the function `target` takes, and does nothing but its checks.

    Those are what stands at its beginning and holds its settings alone, those after the `*`,
    against what they may be; it raises what they raise. A setting is annotated as there, by
    `Callable` where that is an alias of pujax's. None where the file has no such function.
    """
    module, _, name = target.rpartition(".")
    tree = _parsed(module)
    function = next((each for each in tree.body if _is_function(each, re.escape(name))), None)
    if not isinstance(function, ast.FunctionDef):
        return None
    light = [each for each in tree.body if _is_light(each) or _is_function(each, "_check_.*")]
    whole = ast.Module([*light, _cut(function, light)], [])
    known: dict[str, Any] = {}
    with _ONE_AT_A_TIME:
        # Annotations stay text: they name what isn't here.
        how = f"the checks of {target}", "exec", __future__.annotations.compiler_flag
        exec(compile(whole, *how, dont_inherit=True), known)
        made = known[name]
        names = _Names(known)
        for each in function.args.kwonlyargs:
            if each.annotation is not None:
                said = compile(ast.Expression(each.annotation), target, "eval")
                made.__annotations__[each.arg] = eval(said, {}, names)
    return made


class _Names(dict[str, Any]):
    """What annotations name; what is not known here are aliases of function types."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Callable[..., Any])


@functools.cache
def _parsed(module: str) -> ast.Module:
    with _ONE_AT_A_TIME:
        return ast.parse(source_of(module))


def _is_function(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and re.fullmatch(name, node.name) is not None


def _is_light(node: ast.stmt) -> bool:
    """Whether a statement of a file imports Python's own or such a module, or sets constants."""
    if isinstance(node, ast.Import):
        return all(each.name.partition(".")[0] in sys.stdlib_module_names for each in node.names)
    if isinstance(node, ast.ImportFrom):
        module = node.module or ""
        return module in _LIGHT or module.partition(".")[0] in sys.stdlib_module_names
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        return _is_constant(node.value)
    return False


_PLAIN = (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.UnaryOp, ast.unaryop, ast.Load)


def _is_constant(node: ast.expr) -> bool:
    """Whether it is made of literals and of Python's own types, as `(str, type(None))` is."""
    return all(
        isinstance(each, _PLAIN)
        or (isinstance(each, ast.Name) and isinstance(getattr(builtins, each.id, None), type))
        or (isinstance(each, ast.Call) and ast.unparse(each) == "type(None)")
        for each in ast.walk(node)
    )


def _cut(function: ast.FunctionDef, light: list[ast.stmt]) -> ast.FunctionDef:
    """The function without annotations, with its checks alone; a default beyond those is `...`.

    A check of a setting that has such a default is made where the setting is given.
    """
    given = function.args
    known = {name for each in light for node in ast.walk(each) for name in _set(node)}
    first = {each.arg for each in (*given.posonlyargs, *given.args)}

    def default(value: ast.expr | None) -> Any:
        plain = value is None or _is_constant(value)
        return value if plain or (isinstance(value, ast.Name) and value.id in known) else _UNKNOWN

    arguments = ast.arguments(
        posonlyargs=[ast.arg(each.arg) for each in given.posonlyargs],
        args=[ast.arg(each.arg) for each in given.args],
        kwonlyargs=[ast.arg(each.arg) for each in given.kwonlyargs],
        kw_defaults=[default(value) for value in given.kw_defaults],
        defaults=[_UNKNOWN for _ in given.defaults],
    )
    unknown = {
        each.arg
        for each, value in zip(given.kwonlyargs, arguments.kw_defaults, strict=True)
        if value is _UNKNOWN
    }
    checks = [_where_given(check, unknown) for check in _checks(function.body, first)]
    body = [*checks, ast.Pass()]
    made = ast.FunctionDef(function.name, arguments, body, [])
    return ast.fix_missing_locations(made)


_UNKNOWN = ast.Constant(...)


def _set(node: ast.AST) -> set[str]:
    """The name that a node of an assignment's sets, if it does."""
    return {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()


def _checks(body: list[ast.stmt], first: set[str]) -> Iterator[ast.stmt]:
    """The checks that a function begins with, none of which looks at its `first` arguments."""
    for each in body:
        if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
            continue  # the docstring
        if not _is_check(each) or first & {n.id for n in ast.walk(each) if isinstance(n, ast.Name)}:
            return
        yield each


def _where_given(check: ast.stmt, unknown: set[str]) -> ast.stmt:
    """The check, made where none of the `unknown` settings in it is `...`."""
    named = sorted(unknown & {n.id for n in ast.walk(check) if isinstance(n, ast.Name)})
    if not named:
        return check
    told = " and ".join(f"{name} is not ..." for name in named)
    return ast.If(ast.parse(told, mode="eval").body, [check], [])


def _is_check(node: ast.stmt) -> bool:
    if isinstance(node, ast.For):
        return all(map(_is_check, node.body))
    call = node.value if isinstance(node, ast.Expr) else None
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and _CHECK.fullmatch(call.func.id) is not None
    )
