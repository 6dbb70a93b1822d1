"""`hybrid bench ddp`: torch's DDP on two processes of this host, on the backend `hybrid` and on gloo, side by side.

Both wrap the same model in the same processes and take steps in turn; a third arm takes the step without exchanging
gradients. A turn's time is the slowest rank's; a ratio (gloo's time over ours: larger is better) is the median of the
turns' own. Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from hybrid.bench.ddp_rank import ARMS, time_steps
from hybrid.bench.result import Result, Row
from hybrid.testing.rank_processes import RankProcesses

WIDTHS = (256, 1024, 2048)
"""Of the model's four layers: 1, 16 and 64 MiB of gradients."""
_RANKS = 2
_TIMEOUT_S = 300.0


def measure_ddp(*, quick: bool) -> Result:
    """Measure everything; see `docs/distributed.md`.

    Raises:
        WorkerFailed: a process failed.
    """
    turns = 7 if quick else 25
    with RankProcesses(_RANKS) as ranks:
        times = {
            width: _slowest(ranks.run(time_steps, ranks.new_store(), width, turns, timeout_s=_TIMEOUT_S))
            for width in WIDTHS
        }
    rows = [_row(width, arm, times[width]) for width in WIDTHS for arm in ARMS]
    summary = {
        f"ddp2_step_vs_gloo_{_gradient_mib(width):.0f}mib": _ratio(times[width]["gloo"], times[width]["hybrid"])
        for width in WIDTHS
    }
    shown = [
        {
            "gradients": f"{_gradient_mib(width):.0f} MiB",
            **{f"{arm}, ms": f"{1e3 * statistics.median(times[width][arm]):.1f}" for arm in ARMS},
            "gloo / hybrid": f"{_ratio(times[width]['gloo'], times[width]['hybrid']):.2f}",
        }
        for width in WIDTHS
    ]
    return Result(rows=rows, summary=summary, shown=shown, floors=dict.fromkeys(summary, 1.0))


def _gradient_mib(width: int) -> float:
    return 4 * width * width * 4 / 2**20


def _slowest(of_ranks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Return each turn's slowest rank, by arm."""
    return {arm: [max(turn) for turn in zip(*(found[arm] for found in of_ranks), strict=True)] for arm in ARMS}


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def _row(width: int, arm: str, times: Mapping[str, Sequence[float]]) -> Row:
    return {
        "ranks": _RANKS,
        "arm": arm,
        "gradient_bytes": 4 * width * width * 4,
        "turns": len(times[arm]),
        "median_s": statistics.median(times[arm]),
        "least_s": min(times[arm]),
        "most_s": max(times[arm]),
    }
