"""`hybrid bench allreduce`: sums of float32 over 2 and 4 processes of this host: our groups and gloo.

Every arm runs in the same processes, in turn, size by size. A turn's time is the slowest rank's, for one of several
reductions on end; a figure is the median over the turns, and a ratio (gloo's time over ours: larger is better) the
median of the turns' own ratios. Imports no torch.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hybrid.bench.islands import measure_islands, with_islands
from hybrid.bench.p2p import KIB, MIB, open_team, rotated, shown_size, transports
from hybrid.bench.processes import Team
from hybrid.bench.result import Result, Row
from hybrid.bench.wire_messages import Reduce

RANKS = (2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and how often."""

    sizes: tuple[int, ...] = (4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    turns: int = 7
    burst_bytes: int = 64 * MIB
    """What the reductions of one turn hold at the least, in one or more and no more than `most`."""
    most: int = 200
    ranks: tuple[int, ...] = RANKS
    arms: tuple[str, ...] = field(default_factory=lambda: arms())
    islands: bool = True
    """Whether two islands over shaped links are measured too."""

    def count(self, size_bytes: int) -> int:
        """Return how many reductions a turn has."""
        return max(1, min(self.most, self.burst_bytes // size_bytes))


SHORT = ("gloo", "shm-bucket", "shm-plain", "shm", "zmq-tcp", "tcp")
"""The arms of a quick run."""
Times = dict[tuple[int, str, int], list[float]]
"""(ranks, arm, bytes) to seconds by turn."""


def measure_allreduce(*, quick: bool) -> Result:
    """Measure everything; see `docs/benchmarks.md`.

    Raises:
        WorkerFailed: a process failed, was silent, or reduced to something else.
    """
    settings = QUICK if quick else FULL
    times: Times = defaultdict(list)
    for num_ranks in settings.ranks:
        with (
            tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder,
            open_team(num_ranks, settings.sizes, folder) as team,
        ):
            _run(team, settings, num_ranks, times)
    result = _result(settings, times)
    return with_islands(result, measure_islands()) if settings.islands else result


def arms() -> tuple[str, ...]:
    """Return what is compared."""
    return ("gloo", "shm-bucket", "shm-plain", *transports())


QUICK, FULL = Settings(sizes=(4 * KIB, MIB, 64 * MIB), turns=4, arms=SHORT), Settings()


def _run(team: Team, settings: Settings, num_ranks: int, times: Times) -> None:
    names = [f"rank_{rank}" for rank in range(num_ranks)]
    for size_bytes in settings.sizes:
        for turn in range(settings.turns + 1):
            for arm in rotated(settings.arms, turn):
                message = Reduce(arm=arm, size_bytes=size_bytes, count=settings.count(size_bytes))
                seconds = max(team.ask_all(names, message))
                if turn:  # the first turn warms up
                    times[num_ranks, arm, size_bytes].append(seconds)


def _result(settings: Settings, times: Times) -> Result:
    def ratio(num_ranks: int, arm: str, size_bytes: int) -> float:
        ours, gloo = times[num_ranks, arm, size_bytes], times[num_ranks, "gloo", size_bytes]
        return statistics.median(theirs / mine for mine, theirs in zip(ours, gloo, strict=True))

    rows: list[Row] = [
        {
            "ranks": num_ranks,
            "arm": arm,
            "size_bytes": size_bytes,
            "turns": len(values),
            "median_s": statistics.median(values),
            "least_s": min(values),
            "most_s": max(values),
            "gloo_over_this": ratio(num_ranks, arm, size_bytes),
        }
        for (num_ranks, arm, size_bytes), values in times.items()
    ]
    summary = {
        name: ratio(num_ranks, arm, size_bytes)
        for name, (num_ranks, arm, size_bytes, _) in FIGURES.items()
        if (num_ranks, arm, size_bytes) in times
    }
    floors = {name: FIGURES[name][3] for name in summary}
    return Result(rows=rows, summary=summary, shown=list(_shown(settings, times)), floors=floors)


FIGURES: Mapping[str, tuple[int, str, int, float]] = {
    "shm2_vs_gloo_4kib": (2, "shm-bucket", 4 * KIB, 1.0),
    "shm2_vs_gloo_1mib": (2, "shm-bucket", MIB, 4.0),
    "shm2_vs_gloo_64mib": (2, "shm-bucket", 64 * MIB, 4.0),
    "shm4_vs_gloo_64mib": (4, "shm-bucket", 64 * MIB, 4.0),
    "plain2_vs_gloo_64mib": (2, "shm-plain", 64 * MIB, 1.8),
    "tcp2_vs_gloo_64mib": (2, "tcp", 64 * MIB, 1.3),
}
"""The summary: by name (ranks, arm, bytes, floor)."""


def _shown(settings: Settings, times: Times) -> Iterator[Mapping[str, str]]:
    for num_ranks in settings.ranks:
        for arm in settings.arms:
            line = {"ranks": str(num_ranks), "ms": arm}
            for size_bytes in settings.sizes:
                line[shown_size(size_bytes)] = f"{1e3 * statistics.median(times[num_ranks, arm, size_bytes]):.3g}"
            yield line
