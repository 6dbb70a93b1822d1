"""`hybrid bench p2p`: bytes from one process to another on this host: our transports, gloo, and memcpy's ceiling.

Every arm runs in the same two processes, in turn, size by size; a figure is the median over the turns, and a ratio the
median of the turns' own ratios. One way is a stream of messages into two posted buffers in turn, timed by the
receiver; latency is half a round trip. Imports no torch.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hybrid.bench.messages import Make
from hybrid.bench.processes import Team
from hybrid.bench.result import Result, Row
from hybrid.bench.wire_messages import Copy, MeetAll, OpenNodes, PingPong, Stream
from hybrid.transports import VARIANTS

KIB, MIB = 1 << 10, 1 << 20
T = TypeVar("T")
_REPLY_S = 120.0
_NAMES = ("rank_0", "rank_1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and how often."""

    sizes: tuple[int, ...] = (4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    turns: int = 9
    burst_bytes: int = 128 * MIB
    """What one stream moves at the least, in three messages or more and no more than `most_messages`."""
    most_messages: int = 2000
    round_trips: int = 500

    def count(self, size_bytes: int) -> int:
        """Return how many messages a stream has."""
        return max(3, min(self.most_messages, self.burst_bytes // size_bytes))


QUICK = Settings(sizes=(4 * KIB, MIB, 16 * MIB, 64 * MIB), turns=5, burst_bytes=64 * MIB, round_trips=300)
FULL = Settings()
Times = dict[tuple[str, str, int], list[float]]
"""(what, arm, bytes) to bytes a second, or seconds, by turn."""


def transports() -> tuple[str, ...]:
    """Return the transports that join two processes."""
    return tuple(name for name in VARIANTS if name != "inproc")


def measure_p2p(*, quick: bool) -> Result:
    """Measure everything; see `docs/benchmarks.md`.

    Raises:
        WorkerFailed: a process failed or was silent.
    """
    settings = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder, open_team(2, settings.sizes, folder) as team:
        times = _run(team, settings)
    return _result(settings, times)


def open_team(num_ranks: int, sizes: tuple[int, ...], folder: str) -> Team:
    """Return the processes, all joined with all over every transport and gloo."""
    token, store = secrets.token_hex(16), str(Path(folder) / "store")
    names = [f"rank_{rank}" for rank in range(num_ranks)]
    arguments = {"num_ranks": num_ranks, "store": store, "token": token, "largest_bytes": max(sizes)}
    makers = {
        name: Make(target="hybrid.bench.wire_rank:WireRank", arguments={"rank": rank, **arguments})
        for rank, name in enumerate(names)
    }
    team = Team(makers, timeout_s=_REPLY_S, preload=("hybrid.bench.wire_rank",))
    try:
        addresses = team.ask_all(names, OpenNodes(transports=transports()))
        team.ask_all(names, MeetAll(addresses_of_rank=tuple(addresses)))
    except BaseException:
        team.close()
        raise
    return team


def arms() -> tuple[str, ...]:
    """Return what is compared; `shm-lent` reads each message in the ring, a byte a page, instead of copying it out."""
    return ("memcpy", "gloo", "shm-lent", *transports())


def _run(team: Team, settings: Settings) -> Times:
    times: Times = defaultdict(list)
    for size_bytes in settings.sizes:
        count = settings.count(size_bytes)
        for turn in range(settings.turns + 1):
            for arm in rotated(arms(), turn):
                rate = count * size_bytes / _seconds(team, arm, size_bytes, count)
                if turn:  # the first turn warms up
                    times["one way", arm, size_bytes].append(rate)
    smallest = min(settings.sizes)
    for turn in range(settings.turns + 1):
        for arm in rotated(arms()[1:], turn):
            message = PingPong(arm=arm, size_bytes=smallest, count=settings.round_trips)
            seconds = team.ask(dict.fromkeys(_NAMES, message))["rank_0"]
            if turn:
                times["latency", arm, smallest].append(seconds)
    return times


def _seconds(team: Team, arm: str, size_bytes: int, count: int) -> float:
    if arm == "memcpy":
        return float(team.ask({"rank_1": Copy(size_bytes=size_bytes, count=count)})["rank_1"])
    message = Stream(arm=arm, size_bytes=size_bytes, count=count)
    return float(team.ask(dict.fromkeys(_NAMES, message))["rank_1"])


def rotated(arms: tuple[T, ...], turn: int) -> tuple[T, ...]:
    """Return the arms in the order of a turn: each is first in turn."""
    start = turn % len(arms)
    return arms[start:] + arms[:start]


def _result(settings: Settings, times: Times) -> Result:
    def ratio(arm: str, other: str, size_bytes: int) -> float:
        pairs = zip(times["one way", arm, size_bytes], times["one way", other, size_bytes], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    rows = list(_rows(times, ratio))
    summary, goals = {}, {}
    if "shm" in VARIANTS:
        summary["shm_vs_memcpy_16mib"] = ratio("shm", "memcpy", 16 * MIB)
        summary["shm_lent_vs_memcpy_16mib"] = ratio("shm-lent", "memcpy", 16 * MIB)
        summary["shm_latency_us_4kib"] = 1e6 * statistics.median(times["latency", "shm", 4 * KIB])
    summary["zmq_vs_gloo_16mib"] = ratio("zmq-tcp", "gloo", 16 * MIB)
    goals["shm_latency_us_4kib"] = 60.0
    return Result(
        rows=rows,
        summary=summary,
        shown=list(_shown(settings, times)),
        goals={name: goal for name, goal in goals.items() if name in summary},
        floors={name: floor for name, floor in {"shm_vs_memcpy_16mib": 0.7}.items() if name in summary},
    )


def _rows(times: Times, ratio: Callable[[str, str, int], float]) -> Iterator[Row]:
    for (what, arm, size_bytes), values in times.items():
        row: dict[str, str | float | int] = {
            "what": what,
            "arm": arm,
            "size_bytes": size_bytes,
            "turns": len(values),
            "median": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "unit": "bytes/s" if what == "one way" else "s",
        }
        if what == "one way":
            row["vs_memcpy"] = ratio(arm, "memcpy", size_bytes)
            row["vs_gloo"] = ratio(arm, "gloo", size_bytes)
        yield row


def _shown(settings: Settings, times: Times) -> Iterator[Mapping[str, str]]:
    for arm in arms():
        latency = times.get(("latency", arm, min(settings.sizes)))
        line = {"GB/s one way": arm}
        for size_bytes in settings.sizes:
            line[shown_size(size_bytes)] = f"{statistics.median(times['one way', arm, size_bytes]) / 1e9:.2f}"
        line[f"µs at {shown_size(min(settings.sizes))}"] = f"{1e6 * statistics.median(latency):.0f}" if latency else ""
        yield line


def shown_size(size_bytes: int) -> str:
    """Return a size for people."""
    return f"{size_bytes // MIB} MiB" if size_bytes >= MIB else f"{size_bytes // KIB} KiB"
