"""Measures which algorithm is the fastest on the links at hand, and makes rows of a table of it.

Every rank calls it at once; all get the same rows, since the slowest rank's times decide. May import only torch,
`errors`, `transports` (its base) and this folder.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid.collectives.algorithms import ALGORITHMS
from hybrid.collectives.base import Group, ReduceOp, Work
from hybrid.collectives.choose import DEFAULT_TABLE, Choice, Row
from hybrid.collectives.transport_group import TransportGroup
from hybrid.transports.base import Transport

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
SEGMENT_BYTES = (128 << 10, 512 << 10, 2 << 20)
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce")
_WAIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One measured choice."""

    operation: str
    size_bytes: int
    choice: Choice
    median_s: float
    """Of the slowest rank's times."""


def measure_table(
    edges: Mapping[int, Transport],
    rank: int,
    size: int,
    *,
    link: str,
    operations: Sequence[str] = OPERATIONS,
    sizes: Sequence[int] = SIZES,
    segments: Sequence[int] = SEGMENT_BYTES,
    turns: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Row], list[Timing]]:
    """Return the best rows for groups of up to `size` members over `link`, and what they were chosen from.

    Put the rows before those of `DEFAULT_TABLE`, smaller groups first; see `save_table`.

    Args:
        edges: this rank's transport to every other, by position; all other work over them waits meanwhile.
        rank: this one's position.
    """
    timings = []
    steering = _group(edges, rank, size, "tune: steering", DEFAULT_TABLE)
    try:
        for number, (operation, size_bytes, choice) in enumerate(_cases(operations, sizes, segments)):
            table = (Row(operation=operation, choice=choice), *DEFAULT_TABLE)
            group = _group(edges, rank, size, f"tune: {number}", table)
            try:
                times = _times(group, operation, size_bytes, turns, clock)
            finally:
                steering.all_reduce(times, ReduceOp.MAX).wait(_WAIT_S)
                group.close()
            median_s = statistics.median(times.tolist())
            timings.append(Timing(operation=operation, size_bytes=size_bytes, choice=choice, median_s=median_s))
    finally:
        steering.close()
    return best_rows(timings, link=link, size=size), timings


def best_rows(timings: Sequence[Timing], *, link: str, size: int) -> list[Row]:
    """Return a row for each run of sizes with the same best choice; a row holds to half-way (geometrically) to the
    next.
    """
    rows: list[Row] = []
    for operation in dict.fromkeys(timing.operation for timing in timings):
        sizes = sorted({timing.size_bytes for timing in timings if timing.operation == operation})
        best = [_best(timings, operation, size_bytes) for size_bytes in sizes]
        for at, choice in enumerate(best):
            border = int((sizes[at] * sizes[at + 1]) ** 0.5) if at + 1 < len(sizes) else None
            row = Row(operation=operation, choice=choice, link=link, max_bytes=border, max_size=size)
            if rows and rows[-1].operation == operation and rows[-1].choice == choice:
                rows[-1] = replace(rows[-1], max_bytes=border)
            else:
                rows.append(row)
    return rows


def _best(timings: Sequence[Timing], operation: str, size_bytes: int) -> Choice:
    found = [timing for timing in timings if (timing.operation, timing.size_bytes) == (operation, size_bytes)]
    return min(found, key=lambda timing: timing.median_s).choice


def _cases(
    operations: Sequence[str], sizes: Sequence[int], segments: Sequence[int]
) -> Iterator[tuple[str, int, Choice]]:
    for operation in operations:
        for size_bytes in sizes:
            for algorithm in ALGORITHMS[operation]:
                # A message that is not cut is the same whatever the segment.
                kept = [segment for segment in segments if segment < size_bytes] or [max(segments)]
                for segment in kept:
                    yield operation, size_bytes, Choice(algorithm=algorithm, segment_bytes=segment)


def _times(group: Group, operation: str, size_bytes: int, turns: int, clock: Callable[[], float]) -> Tensor:
    x = torch.zeros(size_bytes // 4)
    parts = list(torch.zeros(group.size, -(-len(x) // group.size)))
    calls: dict[str, Callable[[], Work]] = {
        "all_reduce": lambda: group.all_reduce(x),
        "reduce_scatter": lambda: group.reduce_scatter(parts[group.rank], parts),
        "all_gather": lambda: group.all_gather(parts, parts[group.rank]),
        "broadcast": lambda: group.broadcast(x, 0),
        "reduce": lambda: group.reduce(x, 0),
    }
    times = torch.zeros(turns, dtype=torch.float64)
    calls[operation]().wait(_WAIT_S)  # touches the memory and fills the caches of programs
    for turn in range(turns):
        group.barrier().wait(_WAIT_S)
        began_s = clock()
        calls[operation]().wait(_WAIT_S)
        times[turn] = clock() - began_s
    return times


def _group(edges: Mapping[int, Transport], rank: int, size: int, name: str, table: Sequence[Row]) -> Group:
    return TransportGroup(rank=rank, ranks=range(size), edges=edges, name=name, timeout_s=_WAIT_S, table=table)
