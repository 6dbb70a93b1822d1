"""From a parser's complaint about the job to one sentence: where, what is wrong, what would be right.

Takes pydantic's errors as plain mappings and the job's classes by their `model_fields`, so that pydantic itself
stays in `config.py`. Pure; may import only `errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from hybrid.errors import ConfigError

Key = tuple[int | str, ...]
"""Where a value stands in the job: names of keys, and numbers of a list's entries."""
Place = Callable[[Key], str]
"""Words for a key's place: the file and line, or the command line's override."""

_FACT_OF_TYPE = {
    "int": "not a whole number",
    "float": "not a number",
    "finite_number": "not a finite number",
    "bool": "neither true nor false",
    "string_pattern": "not a usable name",
    "string": "not a text",
    "path": "not a path",
    "model": "not a mapping",
    "tuple": "not a list",
    "literal": "no such choice",
    "greater": "out of range",
    "less": "out of range",
    "too_short": "a list with too few entries",
    "too_long": "a list with too many entries",
    "invalid_key": "a key that is not a text",
}
_BOUNDS = (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most"))


def complaint_of(errors: Sequence[Mapping[str, Any]], root: Any, place: Place) -> ConfigError:
    """Return the first complaint as an error that names key, value and valid ones.

    Args:
        errors: what the parser found, each with `type`, `loc`, `msg`, `input` and maybe `ctx`.
        root: the class of the job.
        place: words for where a key stands.
    """
    first = errors[0]
    key, field = _resolve(first["loc"], root)
    others = len({_resolve(error["loc"], root)[0] for error in errors if error["type"] != "too_short"} - {key})
    more = f" (and {others} more after it)" if others else ""
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, root, more, place)
    if first["type"] == "missing":
        fact = "the key is missing" if isinstance(key[-1], str) else "the list is too short"
        return ConfigError(f"{fact}{more}", valid=_valid(field, {}), where=place(key), fix="add it")
    value = _shown(first.get("input"))
    if first["type"] == "value_error":
        # Ours: a validator's own sentence, which names the valid values itself.
        fact, _, valid = first["msg"].removeprefix("Value error, ").partition("; valid: ")
        return ConfigError(
            f"{fact}{more}",
            value=None if isinstance(first.get("input"), dict) else value,
            valid=valid or None,
            where=place(key),
            fix="change the job",
        )
    close = get_close_matches(str(value), _words(field), n=1)
    return ConfigError(
        f"{_fact(first)}{more}",
        value=value,
        valid=_valid(field, first.get("ctx") or {}),
        where=place(key),
        fix=f"did you mean {close[0]}?" if close else "mend that value",
    )


def close_to(name: str, valid: Sequence[str]) -> str:
    """Return `did you mean …?` where a valid name is close, else what to do without one."""
    close = get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]}?" if close else "rename or remove it"


def _unknown_key(key: Key, root: Any, more: str, place: Place) -> ConfigError:
    _, parent = _resolve(key[:-1], root)
    valid = list(_fields(parent))
    name = str(key[-1])
    return ConfigError(f"unknown key{more}", value=name, valid=valid, where=place(key), fix=close_to(name, valid))


def _resolve(loc: Key, root: Any) -> tuple[Key, Any]:
    """Return the job's key in a parser's location, without the parser's own marks, and what is declared there."""
    key: list[int | str] = []
    here: Any = root
    for index, part in enumerate(loc):
        fields = _fields(here)
        if isinstance(part, int):
            key.append(part)
            here = _entry(here, part)
        elif part in fields:
            key.append(part)
            here = fields[part]
        elif index == len(loc) - 1 and fields:
            key.append(part)  # a key that the job does not know
            here = None
    return tuple(key), here


def _fields(declared: Any) -> Mapping[str, Any]:
    """Return the keys of the mapping that may stand there; none where none may."""
    for cls in _alternatives(declared):
        fields = getattr(cls, "model_fields", None)
        if fields:
            return dict(fields)
    return {}


def _entry(declared: Any, index: int) -> Any:
    """Return what is declared for an entry of a list."""
    for cls in _alternatives(declared):
        if get_origin(cls) is tuple:
            arguments = get_args(cls)
            return arguments[0] if arguments[-1] is ... else arguments[min(index, len(arguments) - 1)]
    return declared


def _alternatives(declared: Any) -> Iterator[Any]:
    """Yield what may stand at a place: the annotation, and each branch of a union or an `Annotated`."""
    annotation = getattr(declared, "annotation", declared)
    yield annotation
    if get_origin(annotation) not in (tuple, Literal):
        for inner in get_args(annotation):
            if not hasattr(inner, "metadata"):
                yield from _alternatives(inner)


def _metadata(declared: Any) -> Iterator[Any]:
    """Yield the constraints of a place, wherever in its annotation they stand."""
    yield from getattr(declared, "metadata", ())
    for cls in _alternatives(declared):
        for item in getattr(cls, "__metadata__", ()):
            yield from getattr(item, "metadata", ())


def _words(declared: Any) -> list[str]:
    return [str(word) for cls in _alternatives(declared) if get_origin(cls) is Literal for word in get_args(cls)]


def _valid(declared: Any, context: Mapping[str, Any]) -> str | None:
    """Return the valid values in words."""
    fields = _fields(declared)
    options = [f"a mapping of {', '.join(fields)}"] if fields else []
    kinds = set(_alternatives(declared))
    found = {key: getattr(item, key) for item in _metadata(declared) for key, _ in _BOUNDS if hasattr(item, key)}
    bounds = " and ".join(f"{words} {_number(found[key])}" for key, words in _BOUNDS if key in found)
    if int in kinds:
        options.append(f"a whole number {bounds}".rstrip())
    elif float in kinds:
        options.append(f"a number {bounds}".rstrip())
    if bool in kinds:
        options += ["true", "false"]
    if Path in kinds:
        options.append("a path")
    if any(get_origin(kind) is tuple for kind in kinds):
        least = context.get("min_length") or next(
            (i.min_length for i in _metadata(declared) if hasattr(i, "min_length")), 0
        )
        options.append(f"a list of {least} or more" if least else "a list")
    if any(hasattr(item, "pattern") for item in _metadata(declared)):
        options.append("1 to 64 letters, digits, dots, hyphens and underscores")
    elif str in kinds:
        options.append("a text")
    options += _words(declared)
    if NoneType in kinds and options:
        options.append("null")
    return " or ".join(options) if options else None


def _number(value: float) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) and value >= 10_000 else f"{value:g}"


def _fact(error: Mapping[str, Any]) -> str:
    kind = str(error["type"])
    for start, fact in _FACT_OF_TYPE.items():
        if kind.startswith(start):
            return fact
    return str(error["msg"])


def _shown(value: object) -> object:
    """Return a value as the message shows it: short, whatever it is."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return value if len(value) <= 80 else f"{value[:77]}..."
    if value is None:
        return "null"
    return value if isinstance(value, bool | int | float) else str(value)
