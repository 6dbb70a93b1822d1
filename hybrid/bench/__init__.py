"""Benchmarks: what `hybrid bench NAME` measures. A new one is one file and one line in `BENCHES`.

A benchmark is a function `measure(*, quick: bool) -> Result`. Imports no torch; the processes that compute do.
"""

from __future__ import annotations

from collections.abc import Mapping

BENCHES: Mapping[str, str] = {
    "pipeline": "hybrid.bench.pipeline:measure_pipeline",
    "simulator": "hybrid.bench.simulator:measure_simulator",
}
"""Where each benchmark's function is, by name."""

__all__ = ["BENCHES"]
