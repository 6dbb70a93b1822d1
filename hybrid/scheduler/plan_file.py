"""The YAML of a plan: strict in what it reads, the same bytes for the same plan.

Pure: no torch, no clock, no network, no files: text in, text out.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from hybrid.errors import PlanError

VERSION = 2
_Record = TypeVar("_Record")


def dump(record: Any) -> str:
    """Return a record of plain fields, tuples and records as YAML, with the format's version first."""
    return yaml.safe_dump({"version": VERSION, **plain(record)}, sort_keys=False)


def plain(value: Any) -> Any:
    """Return dataclasses as mappings and tuples as lists, all the way down."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def load(text: str, cls: type[_Record], *, where: str) -> _Record:
    """Return the record of `cls` in a YAML text.

    Raises:
        PlanError: no YAML, another version, or a key that is unknown, missing or of the wrong type.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise PlanError("not YAML", where=f"{where}{line}", fix="mend it or make the plan anew") from None
    if not isinstance(raw, dict):
        raise PlanError("not a mapping", value=type(raw).__name__, where=where, fix="make the plan anew")
    version = raw.pop("version", None)
    if version not in (1, VERSION) or isinstance(version, bool):
        raise PlanError(
            "unknown plan version", value=version, valid=f"{VERSION}, or 1", where=where, fix="make the plan anew"
        )
    record: _Record = _record(_of_version_1(raw) if version == 1 else raw, cls, where)
    return record


_REPLICA_KEYS_1 = ("schedule", "num_microbatches", "microbatch", "step_s", "idle_share", "stages", "edges")
"""Where version 1 had them at the top: it knew one replica with one rank a stage."""


def _of_version_1(old: dict[Any, Any]) -> dict[Any, Any]:
    """Return version 1's keys where version 2 has them; what is wrong in them is left for the reader to find."""
    replica: dict[Any, Any] = {"replica": 0, "order": [], "first_sample": 0}
    replica |= {key: old[key] for key in _REPLICA_KEYS_1 if key in old}
    for key, convert in (("stages", _stage_of_version_1), ("edges", _edge_of_version_1)):
        if isinstance(replica.get(key), list):
            replica[key] = [convert(one) if isinstance(one, dict) else one for one in replica[key]]
    kept = {key: value for key, value in old.items() if key not in _REPLICA_KEYS_1 or key in ("step_s", "idle_share")}
    count, size = old.get("num_microbatches"), old.get("microbatch")
    kept["global_batch"] = count * size if isinstance(count, int) and isinstance(size, int) else 0
    return kept | {"objective": "throughput", "gradient_codec": "none", "replicas": [replica]}


def _stage_of_version_1(old: dict[Any, Any]) -> dict[Any, Any]:
    new = {"tensor_parallel": 1, "width": 1, "recompute": False, **old}
    if "rank" in new:
        new["ranks"] = [new.pop("rank")]
    if isinstance(new.get("backward_s"), int | float):
        new["weight_gradient_s"] = new["backward_s"] / 2
    return new


def _edge_of_version_1(old: dict[Any, Any]) -> dict[Any, Any]:
    return {"codec": "none", **old}


def _record(raw: object, cls: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise PlanError("not a mapping", value=raw, where=where, fix="write its keys and values")
    names = [field.name for field in fields(cls)]
    for key in raw:
        if key not in names:
            raise PlanError("unknown key", value=key, valid=names, where=where, fix="rename or remove it")
    hints = get_type_hints(cls)
    values = {}
    for name in names:
        if name not in raw:
            raise PlanError(f"key {name!r} is missing", where=where, fix="add it or make the plan anew")
        values[name] = _value(raw[name], hints[name], f"{where}: {name}")
    return cls(**values)


def _value(raw: object, hint: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(raw, list):
            raise PlanError("not a list", value=raw, where=where, fix="write a list")
        return tuple(_value(item, get_args(hint)[0], f"{where}[{index}]") for index, item in enumerate(raw))
    if is_dataclass(hint):
        return _record(raw, hint, where)
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw)
    if type(raw) is not hint:
        raise PlanError(f"not {_ARTICLE[hint]}", value=raw, where=where, fix="mend that value")
    if isinstance(raw, int | float) and not (math.isfinite(raw) and raw >= 0):
        raise PlanError("not zero or more", value=raw, where=where, fix="mend that value")
    return raw


_ARTICLE = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
