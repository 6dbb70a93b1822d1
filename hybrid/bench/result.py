"""What every benchmark returns, and the one JSON object that `hybrid bench NAME --json` prints. No torch."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import psutil

Value: TypeAlias = "str | int | float | bool | Sequence[Value] | Mapping[str, Value] | None"
Row: TypeAlias = "Mapping[str, Value]"

_PACKAGES = ("hybrid-runtime", "torch", "pyzmq", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a benchmark measured."""

    rows: Sequence[Row]
    """Every measurement, and the medians."""
    summary: Mapping[str, float]
    """Name to finite number; the names of a benchmark never change with the machine."""
    shown: Sequence[Mapping[str, str]] = ()
    """The same for people: lines of a table, the same columns in each."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """What a number of the summary should not exceed."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """What a number of the summary should not fall below."""

    def __post_init__(self) -> None:
        for name, value in self.summary.items():
            assert math.isfinite(value), f"{name} is {value}"


def to_json(result: Result, machine: Mapping[str, Value], date: str) -> str:
    """Return the contract's object: `machine`, `date`, `rows`, `summary`, on one line."""
    fields = {
        "machine": machine,
        "date": date,
        "rows": [dict(row) for row in result.rows],
        "summary": dict(result.summary),
    }
    return json.dumps(fields, allow_nan=False)


def now() -> str:
    """Return the date and time, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine_facts() -> dict[str, Value]:
    """Return what a figure must be read with: hardware, software, and how busy the machine is now."""
    return {
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "accelerators": "none used: everything ran on the host's cores",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
