"""A catalog file as checked rows: YAML read, keys and provenance checked, one file laid over another.

Knows which columns a row may have and which units stand in their names; what the rows mean is
`catalog.py`'s. May import only `errors`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from hybrid.errors import FleetError

try:
    # libyaml reads the shipped file ten times faster; PyYAML is sometimes built without it.
    from yaml import CSafeLoader as _SafeLoader
except ImportError:
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

CONFIDENCES = ("vendor", "secondary", "weak", "announced", "assumed")
FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4")
PRICE_KINDS = ("on_demand", "capacity_block")

_PROVENANCE = ("source", "date", "confidence", "confidence_of", "notes")
COLUMNS_OF_SECTION: Mapping[str, tuple[str, ...]] = {
    "chips": (
        *("title", "aliases", "vendor", "family", "generation", "announced", "memory_gib", "memory_gb"),
        *("hbm_tb_per_s", "tflops", "fp8_max", "scale_up_gb_per_s", "scale_up_pair_share", "power_w"),
        *("cores", "ray_resource", "ray_units_per_chip", "ray_accelerator_types", *_PROVENANCE),
    ),
    "systems": (
        *("aliases", "chip", "num_chips", "instance_type", "num_instances", "memory_gib", "memory_gb"),
        *("total_hbm_tb_per_s", "total_pflops", "total_scale_up_tb_per_s", "scale_up_gb_per_s"),
        *("scale_up_pair_share", "scale_out_gbit_per_s", "power_w", *_PROVENANCE),
    ),
    "prices": ("usd_per_hour", *_PROVENANCE),
    "link_defaults": ("gb_per_s", "latency_us", *_PROVENANCE),
}
_DATE = re.compile(r"\d{4}-(0[1-9]|1[0-2])(-\d{2})?")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
# Two ways to write one fact: a row laid over another drops the older way.
_SAME_FACT = ({"memory_gib", "memory_gb"},)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the catalog, not yet interpreted; each reader names file, row and key when it refuses."""

    where: str
    name: str
    columns: Mapping[str, Any]

    def text(self, key: str, default: str | None = None) -> str:
        """Return a column of text."""
        value = self._value(key, default)
        if not isinstance(value, str) or not value.strip():
            raise self.refusal(key, "is not text", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a column of several words; empty where it is left out."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(key, "is not a list of words", value)
        return tuple(value)

    def flag(self, key: str) -> bool:
        """Return a yes or no column; no where it is left out."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise self.refusal(key, "is neither true nor false", value, valid=("true", "false"))
        return value

    def number(self, key: str, scale: float = 1.0) -> float:
        """Return a positive number, multiplied by `scale` (the unit in the column's name)."""
        return self._scaled(key, self._value(key, None), scale)

    def optional_number(self, key: str, scale: float = 1.0) -> float | None:
        """Return a positive number, or None where the column is left out or null."""
        return None if self.columns.get(key) is None else self.number(key, scale)

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(key, "is not a positive whole number", value)
        return value

    def formats(self, key: str, scale: float) -> dict[str, float]:
        """Return a column of peaks by number format; empty where it is left out."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self.refusal(key, "is not a mapping of formats to peaks", value, valid=FORMATS)
        for name in value:
            if name not in FORMATS:
                raise self.refusal(key, "names an unknown number format", name, valid=FORMATS)
        return {name: self._scaled(f"{key}.{name}", value[name], scale) for name in FORMATS if name in value}

    def optional_memory_bytes(self) -> int | None:
        """Return `memory_gib` (2**30 bytes) or `memory_gb` (10**9 bytes); None where neither is given."""
        binary, decimal = self.optional_number("memory_gib", 2**30), self.optional_number("memory_gb", 10**9)
        if binary is not None and decimal is not None:
            fix = "keep the one that the source gives"
            raise FleetError("memory is given both in GiB and in GB", where=self.where, fix=fix)
        given = binary if binary is not None else decimal
        return None if given is None else round(given)

    def confidence_of(self) -> dict[str, str]:
        """Return the columns whose confidence differs from the row's."""
        value = self._value("confidence_of", {})
        if not isinstance(value, dict):
            raise self.refusal("confidence_of", "is not a mapping of columns to confidences", value)
        for key, confidence in value.items():
            if str(key).split(".")[0] not in self.columns:
                raise self.refusal("confidence_of", "names a column that the row lacks", key, self.columns)
            if confidence not in CONFIDENCES:
                raise self.refusal(f"confidence_of.{key}", "is no confidence", confidence, CONFIDENCES)
        return dict(value)

    def refusal(self, key: str, fact: str, value: object, valid: Iterable[object] | None = None) -> FleetError:
        """Return the error that names file, row, key, value and the valid ones."""
        fix = "mend that column; docs/catalog.md lists the columns and their units"
        return FleetError(f"{key} {fact}", value=value, valid=valid, where=f"{self.where}.{key}", fix=fix)

    def _value(self, key: str, default: object) -> Any:
        value = self.columns.get(key)
        if value is not None:
            return value
        if default is None:
            fix = f"give the row its {key}; docs/catalog.md says what it means"
            raise FleetError(f"row has no {key}", where=self.where, valid=f"a row with {key}", fix=fix)
        return default

    def _scaled(self, key: str, value: object, scale: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            # YAML 1.1 reads 1e9 as text: a number with an exponent needs a point and a sign, 1.0e+9.
            raise self.refusal(key, "is not a number", value)
        if not math.isfinite(value) or value <= 0:
            raise self.refusal(key, "is not a positive number", value, valid=("more than 0",))
        scaled = float(value) * scale
        # 2.9 TB/s is 2,900,000,000,000 bytes a second, not that plus the dust of a binary fraction.
        return float(round(scaled)) if scale >= 1e6 else scaled


Rows = dict[str, dict[str, Row]]
"""Section to name to row; a price is named `system/kind`."""


class _NoDoubles(_SafeLoader):
    """Refuses a key that a mapping holds twice, which YAML would let the later one win silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_catalog_file(text: str, *, file: str) -> Rows:
    """Return a catalog file's rows, each with known columns and with source, date and confidence.

    Raises:
        FleetError: no YAML, a doubled or unknown key, a row without source, date or confidence;
            names file, row and key.
    """
    try:
        raw = yaml.load(text, Loader=_NoDoubles)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where, fact = f"{file}, line {mark.line + 1}" if mark else file, f"catalog is not YAML: {problem or error}"
        raise FleetError(fact, where=where, fix="mend that line") from None
    sections = _mapping(raw, file)
    _check_known(sections, COLUMNS_OF_SECTION, file, "section")
    return {section: _rows_of(section, sections.get(section) or {}, file) for section in COLUMNS_OF_SECTION}


def lay_over(base: Rows, upper: Rows) -> Rows:
    """Return `base` with the rows of `upper` laid over it, column by column.

    Columns that the upper row leaves out keep the base row's number, and its confidence.
    """
    laid: Rows = {}
    for section, below in base.items():
        above = upper[section]
        laid[section] = below | {name: _laid(below[name], row) if name in below else row for name, row in above.items()}
    return laid


def _laid(under: Row, over: Row) -> Row:
    replaced = set(over.columns) | {key for pair in _SAME_FACT if pair & set(over.columns) for key in pair}
    kept = {key: value for key, value in under.columns.items() if key not in replaced}
    columns = kept | dict(over.columns)
    below = under.confidence_of()
    own = {key: below.get(key, under.columns["confidence"]) for key in kept if key not in _PROVENANCE}
    if isinstance(over.columns.get("tflops"), dict) and isinstance(under.columns.get("tflops"), dict):
        columns["tflops"] = under.columns["tflops"] | over.columns["tflops"]
        peaks = set(under.columns["tflops"]) - set(over.columns["tflops"])
        fallback = below.get("tflops", under.columns["confidence"])
        own |= {f"tflops.{peak}": below.get(f"tflops.{peak}", fallback) for peak in peaks}
    differing = {key: value for key, value in own.items() if value != columns["confidence"]}
    columns["confidence_of"] = differing | over.confidence_of()
    columns["source"] = f"{over.columns['source']}; other columns: {under.columns['source']}"
    return Row(where=over.where, name=over.name, columns=columns)


def _rows_of(section: str, raw: object, file: str) -> dict[str, Row]:
    """Return a section's rows; prices lie one level deeper and are named `system/kind`."""
    rows: dict[str, Row] = {}
    for name, columns in _mapping(raw, f"{file}: {section}").items():
        where = f"{file}: {section}.{name}"
        if section != "prices":
            rows[name] = _row(section, name, columns, where)
            continue
        kinds = _mapping(columns, where)
        _check_known(kinds, PRICE_KINDS, where, "kind of price")
        for kind, price in kinds.items():
            rows[f"{name}/{kind}"] = _row(section, f"{name}/{kind}", price, f"{where}.{kind}")
    return rows


def _row(section: str, name: str, raw: object, where: str) -> Row:
    columns = _mapping(raw, where)
    _check_known(columns, COLUMNS_OF_SECTION[section], where, "column")
    if section in ("chips", "systems") and not _NAME.fullmatch(name):
        valid = "lower-case letters, digits, dots and hyphens, at most 63"
        fix = "rename the row"
        raise FleetError("row's name is not usable", value=name, valid=valid, where=where, fix=fix)
    if columns.get("date") is not None:
        # YAML reads 2026-11-21 as a date, 2026-11 as text.
        columns = columns | {"date": str(columns["date"])}
    row = Row(where=where, name=name, columns=columns)
    row.text("source")
    if not _DATE.fullmatch(row.text("date")):
        raise row.refusal("date", "is no date", row.columns["date"], valid=("2026-11", "2026-11-21"))
    if row.text("confidence") not in CONFIDENCES:
        raise row.refusal("confidence", "is no confidence", row.columns["confidence"], valid=CONFIDENCES)
    row.confidence_of()
    return row


def _mapping(raw: object, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        fix = "see docs/catalog.md for the form of a file"
        raise FleetError("no mapping of names to values", where=where, fix=fix)
    return raw


def _check_known(given: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    for key in given:
        if key not in known:
            fix = "rename or remove it"
            raise FleetError(f"unknown {what}", value=key, valid=known, where=where, fix=fix)
