"""NkiRefused: what the interpreter and the linter raise, by the name of a rule.

The rules themselves (what each says, where it is documented, or that it is our own caution) are data in `rules.yaml`.
Pure apart from reading that file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NoReturn

import yaml

from hybrid.errors import DeviceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing that NKI kernels may not do."""

    name: str
    says: str
    basis: str
    """`documented`, `conservative` (the documents leave it open) or `subset` (a limit of the interpreter)."""
    source: str


@cache
def rules() -> dict[str, Rule]:
    """Return every rule by its name."""
    text = files(__package__).joinpath("rules.yaml").read_text(encoding="utf-8")
    return {name: Rule(name=name, **row) for name, row in yaml.safe_load(text).items()}


class NkiRefused(DeviceError):
    """A kernel does what NKI, or this interpreter of its subset, does not allow; `rule` names it."""

    def __init__(
        self,
        rule: str,
        fact: str,
        *,
        value: object = None,
        valid: str | Iterable[object] | None = None,
        fix: str | None = None,
        where: str | None = None,
    ) -> None:
        self.rule = rule
        super().__init__(fact, value=value, valid=valid, fix=fix, where=where)

    def _sentence(self) -> str:
        return f"[{self.rule}] {super()._sentence()}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.rule, self.fact, self.value, self.valid, self.fix, self.where))


def _rebuild(rule: str, fact: str, value: object, valid: str | None, fix: str | None, where: str | None) -> NkiRefused:
    return NkiRefused(rule, fact, value=value, valid=valid, fix=fix, where=where)


def refuse(
    rule: str,
    fact: str,
    *,
    value: object = None,
    valid: str | Iterable[object] | None = None,
    fix: str | None = None,
) -> NoReturn:
    """Raise NkiRefused; without a `fix` the rule's own sentence tells what is right."""
    row = rules()[rule]
    raise NkiRefused(rule, fact, value=value, valid=valid, fix=fix or row.says)
