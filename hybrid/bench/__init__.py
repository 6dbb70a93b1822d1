"""Benchmarks: what `hybrid bench NAME` measures. A new one is one file and one line in `BENCHES`.

A benchmark is a function `measure(*, quick: bool) -> Result`. Imports no torch; the processes that compute do.
"""

from __future__ import annotations

from collections.abc import Mapping

BENCHES: Mapping[str, tuple[str, str]] = {
    "allreduce": (
        "hybrid.bench.allreduce:measure_allreduce",
        "Sums over two and four processes of this host: our groups and gloo.",
    ),
    "ddp": (
        "hybrid.bench.ddp:measure_ddp",
        "torch's DDP over two processes of this host: the backend hybrid and gloo.",
    ),
    "kernels": (
        "hybrid.bench.kernels:measure_kernels",
        "The CPU kernels against plain torch: time and peak memory.",
    ),
    "p2p": (
        "hybrid.bench.p2p:measure_p2p",
        "Bytes from one process to another: our transports, gloo, and memcpy's ceiling.",
    ),
    "pipeline": (
        "hybrid.bench.pipeline:measure_pipeline",
        "One process, torch's 1F1B and ours side by side; emulated ranks against the simulated step.",
    ),
    "planner": (
        "hybrid.bench.planner:measure_planner",
        "Plans against exhaustive search and against Sailor's published problem; time by chips, kinds and layers.",
    ),
    "schedules": (
        "hybrid.bench.schedules:measure_schedules",
        "Bubble rates against the published ones, and the search against every named schedule.",
    ),
    "simulator": (
        "hybrid.bench.simulator:measure_simulator",
        "Predicted against measured: fifteen GH200 plans, this machine's pipelines; a million chips on paper.",
    ),
}
"""By name: where the benchmark's function is, and what it shows."""

TUNERS: Mapping[str, str] = {"allreduce": "hybrid.bench.tune:tune_allreduce"}
"""By a benchmark's name: what its `--tune` runs instead."""

__all__ = ["BENCHES", "TUNERS"]
