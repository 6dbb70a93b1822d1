"""Link sharing: messages that occupy an interface at the same time get a fair share of it each.

Pure. Processor sharing per interface; a message that occupies two takes the slower one's pace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_S = 1e-15


@dataclass(frozen=True, slots=True)
class Load:
    """One message: when it starts, what it occupies, and for how long alone."""

    start_s: float
    busy_s: float
    interfaces: tuple[str, ...]


def shared_seconds(loads: Sequence[Load]) -> list[float]:
    """Return how long each message occupies its interfaces, others on the same ones included.

    A message that shares an interface with n - 1 others moves at 1/n of its pace, n being the most on any of its
    interfaces.

    Cost:
        O(n log n) for messages that never meet; each start and each end looks at the messages under way.
    """
    order = sorted(
        (i for i, load in enumerate(loads) if load.interfaces and load.busy_s > 0), key=lambda i: loads[i].start_s
    )
    took = [load.busy_s for load in loads]
    left: dict[int, float] = {}
    users: dict[str, int] = {}
    now_s = 0.0
    place = 0
    while place < len(order) or left:
        next_start = loads[order[place]].start_s if place < len(order) else float("inf")
        pace = {i: 1.0 / max(users[name] for name in loads[i].interfaces) for i in left}
        next_end = min((now_s + left[i] / pace[i] for i in left), default=float("inf"))
        until_s = min(next_start, next_end)
        for i in left:
            left[i] -= (until_s - now_s) * pace[i]
        now_s = until_s
        if next_end <= next_start:
            for i in [i for i in left if left[i] <= _LEAST_S * max(1.0, now_s) + 1e-12 * loads[i].busy_s]:
                took[i] = now_s - loads[i].start_s
                del left[i]
                _count(users, loads[i].interfaces, -1)
        else:
            i = order[place]
            place += 1
            left[i] = loads[i].busy_s
            _count(users, loads[i].interfaces, 1)
    return took


def _count(users: dict[str, int], names: tuple[str, ...], change: int) -> None:
    for name in names:
        users[name] = users.get(name, 0) + change
