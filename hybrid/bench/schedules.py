"""`hybrid bench schedules`: bubble rates on paper; see `hybrid.scheduler.bench_schedules`, which is pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

from hybrid.bench.result import Result, Row
from hybrid.scheduler.bench_schedules import bench_schedules


def measure_schedules(*, quick: bool) -> Result:
    """Return every setting's bubble rate, ours beside the published one."""
    rows, summary = bench_schedules(clock=time.perf_counter, quick=quick)
    return Result(
        rows=[cast(Row, row) for row in rows],
        summary=summary,
        shown=[_line(row) for row in rows if row.get("published") is not None],
        goals={
            "published_max_abs_diff": 0.00005,
            "auto_over_zb1p_max": 1.0,
            "auto_over_zb2p_max": 1.0,
            "unequal_auto_over_best_named_max": 1.0,
        },
    )


def _line(row: Mapping[str, object]) -> Mapping[str, str]:
    return {key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in row.items()}
