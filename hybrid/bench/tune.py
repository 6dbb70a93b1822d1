"""`hybrid bench allreduce --tune`: which algorithm and segment is fastest, by link, ranks and bytes; prints table rows.

Every choice runs in the same processes in turn; a figure is the median over the turns of the slowest rank's time. What
it prints are rows for `hybrid.collectives.choose`, for this machine. Imports no torch.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hybrid.bench.p2p import KIB, MIB, open_team, rotated, shown_size, transports
from hybrid.bench.processes import Team
from hybrid.bench.result import Result, Row
from hybrid.bench.wire_messages import ReduceBy
from hybrid.collectives.algorithms import ALGORITHMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is tried, and how often."""

    sizes: tuple[int, ...] = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
    segments: tuple[int, ...] = (256 * KIB, MIB, 4 * MIB)
    ranks: tuple[int, ...] = (2, 4)
    turns: int = 5
    burst_bytes: int = 16 * MIB
    most: int = 50

    def count(self, size_bytes: int) -> int:
        """Return how many reductions a turn has."""
        return max(1, min(self.most, self.burst_bytes // size_bytes))

    def choices(self, size_bytes: int, num_ranks: int) -> Iterator[tuple[str, int]]:
        """Yield algorithm and segment; a segment as long as the tensor stands for all longer ones."""
        longest = min((each for each in self.segments if each >= size_bytes), default=self.segments[-1])
        for algorithm in ALGORITHMS["all_reduce"]:
            if size_bytes > MIB and algorithm in ("exchange", "doubling") and num_ranks > 2:
                continue  # they send every rank's whole tensor to all: never the fastest here
            yield from ((algorithm, segment) for segment in self.segments if segment <= longest)


QUICK, FULL = Settings(sizes=(4 * KIB, 64 * KIB, MIB), segments=(MIB,), turns=3, most=20), Settings()
Times = dict[tuple[str, int, int, str, int], list[float]]
"""(link, ranks, bytes, algorithm, segment) to seconds by turn."""


def tune_allreduce(*, quick: bool) -> Result:
    """Measure every choice; see `docs/benchmarks.md`.

    Raises:
        WorkerFailed: a process failed or was silent.
    """
    settings = QUICK if quick else FULL
    times: Times = defaultdict(list)
    for num_ranks in settings.ranks:
        with (
            tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder,
            open_team(num_ranks, settings.sizes, folder) as team,
        ):
            for link in transports():
                _run(team, settings, link, num_ranks, times)
    return result_of(times)


def _run(team: Team, settings: Settings, link: str, num_ranks: int, times: Times) -> None:
    names = [f"rank_{rank}" for rank in range(num_ranks)]
    for size_bytes in settings.sizes:
        choices = tuple(settings.choices(size_bytes, num_ranks))
        for turn in range(settings.turns + 1):
            for algorithm, segment_bytes in rotated(choices, turn):
                message = ReduceBy(
                    link=link,
                    algorithm=algorithm,
                    segment_bytes=segment_bytes,
                    size_bytes=size_bytes,
                    count=settings.count(size_bytes),
                )
                seconds = max(team.ask_all(names, message))
                if turn:  # the first turn warms up
                    times[link, num_ranks, size_bytes, algorithm, segment_bytes].append(seconds)


def result_of(times: Times) -> Result:
    """Return every figure, and for people the best of each size as a row of the table."""
    medians = {key: statistics.median(values) for key, values in times.items()}
    rows: list[Row] = [
        {
            "link": link,
            "ranks": num_ranks,
            "size_bytes": size_bytes,
            "algorithm": algorithm,
            "segment_bytes": segment_bytes,
            "turns": len(times[link, num_ranks, size_bytes, algorithm, segment_bytes]),
            "median_s": seconds,
        }
        for (link, num_ranks, size_bytes, algorithm, segment_bytes), seconds in medians.items()
    ]
    return Result(rows=rows, summary={}, shown=list(_shown(medians)))


def _shown(medians: Mapping[tuple[str, int, int, str, int], float]) -> Iterator[Mapping[str, str]]:
    for link, num_ranks, size_bytes in dict.fromkeys(key[:3] for key in medians):
        of_size = {key[3:]: s for key, s in medians.items() if key[:3] == (link, num_ranks, size_bytes)}
        algorithm, segment_bytes = min(of_size, key=lambda choice: of_size[choice])
        scope = f'link="{link}", max_size={num_ranks}, max_bytes={size_bytes}'
        choice = f'Choice(algorithm="{algorithm}", segment_bytes={segment_bytes})'
        yield {
            "row": f'Row(operation="all_reduce", {scope}, choice={choice})',
            "bytes": shown_size(size_bytes),
            "ms": f"{1e3 * of_size[algorithm, segment_bytes]:.3g}",
            "slowest": f"{1e3 * max(of_size.values()):.3g}",
        }
