"""The YAML of a plan: strict in what it reads, the same bytes for the same plan.

Pure: no torch, no clock, no network, no files: text in, text out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from hybrid.errors import PlanError
from hybrid.scheduler.schedules import SCHEDULES

if TYPE_CHECKING:
    from hybrid.scheduler.plan import Plan

VERSION = 1
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
    if version != VERSION or isinstance(version, bool):
        raise PlanError(
            "unknown plan version", value=version, valid=str(VERSION), where=where, fix="make the plan anew"
        )
    record: _Record = _record(raw, cls, where)
    return record


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


def check_consistent(plan: Plan, *, where: str) -> Plan:
    """Return the plan when its parts agree with one another.

    Raises:
        PlanError: names the part that does not.
    """
    _check_numbers([stage.stage for stage in plan.stages], f"{where}: stages", "stage")
    _check_numbers([edge.from_stage for edge in plan.edges], f"{where}: edges", "from_stage")
    if plan.schedule not in SCHEDULES:
        raise PlanError(
            "no such schedule",
            value=plan.schedule,
            valid=SCHEDULES,
            where=f"{where}: schedule",
            fix="name one of these",
        )
    if plan.num_microbatches < 1:
        raise PlanError(
            "a step needs a microbatch",
            value=plan.num_microbatches,
            valid="1 or more",
            where=f"{where}: num_microbatches",
            fix="mend that value",
        )
    if not plan.stages:
        raise PlanError("a plan needs a stage", where=f"{where}: stages", fix="make the plan anew")
    if len(plan.edges) != len(plan.stages) - 1:
        raise PlanError(
            f"{len(plan.stages)} stages need {len(plan.stages) - 1} edges",
            value=len(plan.edges),
            where=f"{where}: edges",
            fix="make the plan anew",
        )
    first = 0
    for stage in plan.stages:
        place = f"{where}: stages[{stage.stage}]"
        if stage.first_layer != first:
            raise PlanError(
                "first_layer must follow the stage before",
                value=stage.first_layer,
                valid=str(first),
                where=place,
                fix="let the stages hold every layer once, in order",
            )
        if stage.end_layer <= stage.first_layer:
            raise PlanError(
                "a stage needs a layer",
                value=stage.end_layer,
                valid=f"{first + 1} or more",
                where=f"{place}.end_layer",
                fix="move the cut",
            )
        if stage.memory_bytes > stage.memory_limit_bytes:
            raise PlanError(
                f"stage {stage.stage} lacks {stage.memory_bytes - stage.memory_limit_bytes:,} bytes",
                value=stage.memory_bytes,
                valid=f"at most {stage.memory_limit_bytes}",
                where=place,
                fix="give it fewer layers",
            )
        first = stage.end_layer
    if first != plan.num_layers:
        raise PlanError(
            "the stages hold another number of layers than the model",
            value=first,
            valid=str(plan.num_layers),
            where=where,
            fix="mend end_layer of the last stage",
        )
    return plan


def _check_numbers(numbers: Sequence[int], where: str, key: str) -> None:
    for index, number in enumerate(numbers):
        if number != index:
            raise PlanError(
                f"{key} out of order",
                value=number,
                valid=str(index),
                where=f"{where}[{index}]",
                fix="number them 0, 1, 2, …",
            )
