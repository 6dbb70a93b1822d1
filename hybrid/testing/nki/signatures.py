"""The names and parameters of the public NKI API, as data, and what conforms to them.

The table holds facts only (`signatures.yaml` says where and when they were read). Pure apart from reading it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

_MODULES = {"nl": "language", "nisa": "isa", "nki": "nki"}
"""The customary import names and their sections of the table."""


@cache
def signature_table() -> dict[str, Any]:
    """Return the table: per module, each function's parameters, and the names of values."""
    loaded: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("signatures.yaml").read_text(encoding="utf-8"))
    return loaded


def documented_parameters(module: str, function: str) -> list[str] | None:
    """Return a function's parameters (`x=` where x has a default), or None where it is not documented."""
    found: list[str] | None = signature_table()[module].get(function)
    return found


def parameters_of(function: Callable[..., object]) -> list[str]:
    """Return a Python function's parameters in the table's notation."""
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        shown.append(f"{stars}{parameter.name}{'' if parameter.default is parameter.empty else '='}")
    return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Nonconformance:
    """A use of a name or a parameter that the table does not have."""

    where: str
    rule: str
    """`unknown-name` or `unknown-parameter`."""
    what: str


def check_source(path: Path) -> list[Nonconformance]:
    """Return every use of `nl.…`, `nisa.…` and `nki.…` in a file that the table does not know."""
    found: list[Nonconformance] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in _MODULES:
            found += _check_name(path, node, _MODULES[node.value.id])
        if isinstance(node, ast.Call):
            found += _check_call(path, node)
    return found


def _check_name(path: Path, node: ast.Attribute, section: str) -> list[Nonconformance]:
    table = signature_table()
    if node.attr in table[section] or node.attr in table.get(f"{section}_values", ()):
        return []
    where = f"{path.name}:{node.lineno}"
    return [Nonconformance(where=where, rule="unknown-name", what=f"{section}.{node.attr}")]


def _check_call(path: Path, node: ast.Call) -> list[Nonconformance]:
    called = node.func
    if not (isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)):
        return []
    section = _MODULES.get(called.value.id)
    known = documented_parameters(section, called.attr) if section else None
    if known is None:
        return []
    names = [parameter.rstrip("=") for parameter in known]
    where = f"{path.name}:{node.lineno}"
    unknown = [k.arg for k in node.keywords if k.arg is not None and k.arg not in names]
    found = [
        Nonconformance(where=where, rule="unknown-parameter", what=f"{section}.{called.attr}({name}=)")
        for name in unknown
    ]
    given = set(names[: len(node.args)]) | {k.arg for k in node.keywords}
    missing = [p for p in known if not p.endswith("=") and p not in given]
    if missing and not any(k.arg is None for k in node.keywords):
        what = f"{section}.{called.attr} without {', '.join(missing)}"
        found.append(Nonconformance(where=where, rule="unknown-parameter", what=what))
    return found
