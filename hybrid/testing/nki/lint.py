"""A linter of the Python subset that NKI kernels may use.

It reads the source of a kernel and of the functions that it calls (which NKI inlines). What the vendor's pages forbid
by name is `documented`; constructs that the language guide never shows are refused as `python-subset`: our caution.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from hybrid.testing.nki.refusal import NkiRefused, rules

_NOT_SHOWN = (
    ast.Try,
    ast.Lambda,
    ast.Yield,
    ast.YieldFrom,
    ast.Await,
    ast.AsyncFunctionDef,
    ast.AsyncFor,
    ast.AsyncWith,
    ast.Global,
    ast.Nonlocal,
    ast.Set,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.NamedExpr,
    ast.Match,
    ast.Delete,
)
_JIT_REMOVED = {"mode", "platform_target"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One breach of the subset."""

    rule: str
    where: str
    fact: str


def lint_file(path: Path) -> list[Finding]:
    """Return the findings of a file: its imports, its functions decorated with `nki.jit`, and their helpers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        Finding(rule="neuronxcc-namespace", where=f"{path.name}:{node.lineno}", fact="an import of neuronxcc")
        for node in tree.body
        if _imports_neuronxcc(node)
    ]
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    todo = [f for f in functions.values() if any(_is_jit(d) for d in f.decorator_list)]
    seen: set[str] = set()
    while todo:
        function = todo.pop()
        if function.name not in seen:
            seen.add(function.name)
            found += lint_tree(function, path.name)
            todo += [functions[name] for name in _called_names(function) if name in functions]
    return found


def check_function(function: Callable[..., Any]) -> None:
    """Refuse a kernel whose source, or whose helpers', leaves the subset.

    Raises:
        NkiRefused: by the first finding's rule.
    """
    todo: list[object] = [function]
    seen: set[object] = set()
    while todo:
        one = todo.pop()
        if one in seen or not isinstance(one, FunctionType):
            continue
        seen.add(one)
        findings, called = _lint_code(one.__code__, one.__code__.co_filename)
        for finding in findings:
            raise NkiRefused(finding.rule, finding.fact, where=finding.where, fix=rules()[finding.rule].says)
        cells = dict(zip(one.__code__.co_freevars, one.__closure__ or (), strict=True))
        todo += [cells[name].cell_contents if name in cells else one.__globals__.get(name) for name in called]


@cache
def _lint_code(code: CodeType, file: str) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    """Return the findings of one function and the names that it calls; `file` tells equal functions apart."""
    tree = _tree_of(code)
    if tree is None:
        return (), ()
    return tuple(lint_tree(tree, Path(file).name, code.co_firstlineno - 1)), tuple(_called_names(tree))


def _tree_of(code: CodeType) -> ast.FunctionDef | None:
    try:
        source = textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        # A function without source (typed at a prompt) cannot be linted; it is interpreted all the same.
        return None
    body = ast.parse(source).body[0]
    return body if isinstance(body, ast.FunctionDef) else None


def lint_tree(function: ast.FunctionDef, file: str, first_line: int = 0) -> list[Finding]:
    """Return the findings of one function's syntax tree."""
    return [
        Finding(rule=rule, where=f"{file}:{first_line + line}", fact=f"{function.name}: {fact}")
        for rule, line, fact in _breaches(function)
    ]


def _breaches(function: ast.FunctionDef) -> Iterator[tuple[str, int, str]]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call):
            for keyword in decorator.keywords:
                if keyword.arg in _JIT_REMOVED:
                    yield "jit-arguments", decorator.lineno, f"nki.jit({keyword.arg}=)"
    yield from _signature(function)
    for node in _body(function):
        line = getattr(node, "lineno", function.lineno)
        if isinstance(node, ast.FunctionDef):
            yield from _signature(node)
        elif isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            yield "is-operator", line, "`is` or `is not`"
        elif isinstance(node, _NOT_SHOWN):
            yield "python-subset", line, f"{type(node).__name__.lower()} is not in the language guide"
        elif isinstance(node, ast.Dict) and not all(_is_text(key) for key in node.keys):
            yield "dict-keys", line, "a dictionary with keys that are not strings"
        elif isinstance(node, ast.ClassDef) and [_last_name(base) for base in node.bases] not in (
            ["NKIObject"],
            ["Enum"],
        ):
            yield "class-base", line, f"class {node.name}"
        elif _imports_neuronxcc(node):
            yield "neuronxcc-namespace", line, "an import of neuronxcc"


def _signature(function: ast.FunctionDef) -> Iterator[tuple[str, int, str]]:
    arguments = function.args
    if arguments.kwonlyargs:
        yield "keyword-only", function.lineno, f"keyword-only {arguments.kwonlyargs[0].arg}"
    for default in arguments.defaults:
        if isinstance(default, ast.List):
            yield "list-argument", default.lineno, "a list as default"
        elif isinstance(default, ast.Dict | ast.Set):
            yield "unhashable-argument", default.lineno, "a default that is not hashable"


def _is_text(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and isinstance(key.value, str)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_jit(decorator: ast.expr) -> bool:
    return _last_name(decorator.func if isinstance(decorator, ast.Call) else decorator) == "jit"


def _imports_neuronxcc(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == "neuronxcc"
    return isinstance(node, ast.Import) and any(a.name.split(".")[0] == "neuronxcc" for a in node.names)


def _body(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield the nodes of the body; decorators run in plain Python, before NKI."""
    for statement in function.body:
        yield from ast.walk(statement)


def _called_names(function: ast.FunctionDef) -> list[str]:
    return [n.func.id for n in _body(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
