"""Two islands of two ranks on one machine, a shaped link for each rank between them: our group of islands and gloo.

Namespaces and veth pairs of 1 Gb/s each (`netns`). Every arm runs in the same four processes, in turn; a turn's time
is the slowest rank's, a figure the median over the turns, a ratio the median of the turns' own. Imports no torch.

The bound: with two islands each must send every byte of its sum, or the other's result would lack it, over all its
links at once and while it receives as much::

    bound_s = bytes / (links x payload rate of one link, one way)
            = 2 x bytes / (sum of the links' bandwidth, both ways)

`payload rate` is the shaped rate less Ethernet's, IP's and TCP's headers (`netns.FRAME_SHARE`). What the ciphers, our
own records and the chunks at both ends cost is ours, and so is the time inside the islands that does not overlap.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid.bench.messages import Make
from hybrid.bench.netns import Islands, open_islands, why_not
from hybrid.bench.p2p import MIB, rotated
from hybrid.bench.processes import Team
from hybrid.bench.result import Result, Row
from hybrid.bench.wire_messages import MeetAll, OpenNodes, Reduce, Stream

RANKS_OF_ISLAND = ((0, 1), (2, 3))
SHARE_OF_ARM: Mapping[str, float] = {"islands-bf16": 0.5, "islands-fp8": 0.25, "tcp stream": 2.0}
"""The bound of each arm, in float32's over both links; the FP8 codec's scales are not counted."""
Times = dict[str, list[float]]
"""Seconds by arm and turn."""
FLOORS: Mapping[str, float] = {"islands_vs_bound": 0.9, "islands_vs_gloo": 1.0}
_REPLY_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured over which links, and how often."""

    arms: tuple[str, ...]
    size_bytes: int = 64 * MIB
    bits_per_s: float = 1e9
    turns: int = 5


FAST = Settings(arms=("gloo", "flat", "islands"))
SLOW = Settings(arms=("islands", "islands-bf16", "islands-fp8"), size_bytes=32 * MIB, bits_per_s=2e8, turns=3)
"""For the codecs: four ranks on few cores must have time to encode, or their cores are measured and not the link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came out; `reason` says why nothing did."""

    summary: Mapping[str, float]
    rows: Sequence[Row] = ()
    shown: Sequence[Mapping[str, str]] = ()
    reason: str | None = None


def measure_islands(fast: Settings = FAST, slow: Settings = SLOW) -> Measured:
    """Measure everything, or return why this machine cannot.

    Raises:
        WorkerFailed: a process failed, was silent, or reduced to something else.
    """
    reason = why_not()
    if reason is not None:
        return Measured(summary={}, reason=f"no islands on this machine: {reason}")
    parts = [_measure(settings) for settings in (fast, slow)]
    return Measured(
        summary=_summary(*parts[0]),
        rows=[row for settings, part in zip((fast, slow), parts, strict=True) for row in _rows(settings, *part)],
        shown=[line for settings, part in zip((fast, slow), parts, strict=True) for line in _shown(settings, *part)],
    )


def _measure(settings: Settings) -> tuple[Times, float]:
    """Return each arm's seconds by turn, and the bound."""
    num_links = len(RANKS_OF_ISLAND[0])
    times: Times = defaultdict(list)
    with (
        open_islands(num_links=num_links, bits_per_s=settings.bits_per_s) as islands,
        tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder,
        _open_team(islands, settings, str(Path(folder) / "store")) as team,
    ):
        for arm in settings.arms:
            team.ask_all(_names(), Reduce(arm=arm, size_bytes=settings.size_bytes, count=1))  # warms up
        for turn in range(settings.turns):
            for arm in rotated(settings.arms, turn):
                message = Reduce(arm=arm, size_bytes=settings.size_bytes, count=1)
                times[arm].append(max(team.ask_all(_names(), message)))
        stream = Stream(arm="tcp", size_bytes=settings.size_bytes // 4, count=2)
        stream_s = max(seconds for seconds in team.ask_all(_names(), stream) if seconds is not None)
        times["tcp stream"] = [stream_s / (stream.count / 4)]
        return times, bound_s(settings.size_bytes, num_links, islands)


def bound_s(size_bytes: int, num_links: int, islands: Islands) -> float:
    """Return the seconds that no all-reduce of float32 over two islands can be faster than; see the module."""
    return size_bytes / (num_links * islands.payload_bytes_per_s)


def _names() -> list[str]:
    return [f"rank_{rank}" for island in RANKS_OF_ISLAND for rank in island]


def _open_team(islands: Islands, settings: Settings, store: str) -> Team:
    token = secrets.token_hex(16)
    makers = {
        f"rank_{rank}": Make(
            target="hybrid.bench.islands_rank:IslandRank",
            arguments={
                "rank": rank,
                "namespace": islands.namespaces[side],
                "host": islands.addresses[side][place],
                "islands": RANKS_OF_ISLAND,
                "store": store,
                "token": token,
                "size_bytes": settings.size_bytes,
            },
        )
        for side, island in enumerate(RANKS_OF_ISLAND)
        for place, rank in enumerate(island)
    }
    team = Team(makers, timeout_s=_REPLY_S, preload=("hybrid.bench.islands_rank",))
    try:
        addresses = team.ask_all(_names(), OpenNodes(transports=("tcp", "shm")))
        team.ask_all(_names(), MeetAll(addresses_of_rank=tuple(addresses)))
    except BaseException:
        team.close()
        raise
    return team


def _summary(times: Times, least_s: float) -> Mapping[str, float]:
    ours = statistics.median(times["islands"])
    return {
        "islands_vs_bound": least_s / ours,
        "islands_vs_gloo": _against(times, "islands", "gloo"),
    }


def _rows(settings: Settings, times: Times, least_s: float) -> Iterator[Row]:
    for arm, values in times.items():
        median_s = statistics.median(values)
        yield {
            "ranks": "1 + 1, one link" if arm == "tcp stream" else "2 + 2",
            "arm": arm,
            "size_bytes": settings.size_bytes,
            "bits_per_s": settings.bits_per_s,
            "turns": len(values),
            "median_s": median_s,
            "bound_s": _bound_of(arm, least_s),
            "bound_over_this": _bound_of(arm, least_s) / median_s,
        }


def _shown(settings: Settings, times: Times, least_s: float) -> Iterator[Mapping[str, str]]:
    for arm, values in times.items():
        median_s = statistics.median(values)
        yield {
            "islands 2 + 2": arm,
            "Mb/s a link": f"{settings.bits_per_s / 1e6:.0f}",
            "MiB": f"{settings.size_bytes / MIB:.0f}",
            "ms": f"{1e3 * median_s:.0f}",
            "bound ms": f"{1e3 * _bound_of(arm, least_s):.0f}",
            "of the bound": f"{_bound_of(arm, least_s) / median_s:.2f}",
        }


def _bound_of(arm: str, least_s: float) -> float:
    return least_s * SHARE_OF_ARM.get(arm, 1.0)


def _against(times: Times, arm: str, other: str) -> float:
    return statistics.median(theirs / ours for ours, theirs in zip(times[arm], times[other], strict=True))


def with_islands(result: Result, measured: Measured) -> Result:
    """Return the all-reduce benchmark's result with the islands' rows, figures and lines; or the reason for none."""
    columns = list(result.shown[0]) if result.shown else ["ranks", "ms"]
    empty = dict.fromkeys(columns, "")
    lines = [
        empty
        | {"ranks": "2 + 2", "ms": f"{line['islands 2 + 2']}, {line['Mb/s a link']} Mb/s"}
        | {columns[-1]: _cell(line)}
        for line in measured.shown
    ]
    if measured.reason is not None:
        lines = [empty | {"ranks": "2 + 2", "ms": f"skipped: {measured.reason}"}]
    rows = measured.rows or [{"ranks": "2 + 2", "arm": "islands", "skipped": measured.reason}]
    return Result(
        rows=[*result.rows, *rows],
        summary={**result.summary, **measured.summary},
        shown=[*result.shown, *lines],
        goals=result.goals,
        floors={**result.floors, **{name: FLOORS[name] for name in measured.summary}},
    )


def _arm(line: Mapping[str, str]) -> str:
    return f"{line['islands 2 + 2']}, {line['Mb/s a link']} Mb/s"


def _cell(line: Mapping[str, str]) -> str:
    return f"{line['ms']} ({line['MiB']} MiB; bound {line['bound ms']})"


def main() -> None:
    """Print the table, for who wants this part alone: `python -m hybrid.bench.islands`."""
    measured = measure_islands()
    if measured.reason is not None:
        print(measured.reason)
    for line in measured.shown:
        print("  ".join(f"{name}: {value}" for name, value in line.items()))
    print(dict(measured.summary))


if __name__ == "__main__":
    main()
