"""How long to wait for a peer, from how long it took before.

Pure but for the history itself, which holds the last waits: no clock, no threads of its own, no network. A wait that
ends well is observed; the next wait's limit follows from the last ones. One number given by the user overrides it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import final

from hybrid.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutRule:
    """How a limit follows from observed waits."""

    initial_s: float = 60.0
    """The limit until `num_needed` waits were observed: the first ones compile, warm up, touch memory."""
    floor_s: float = 5.0
    """Never less: a pause of the machine (a page-out, a checkpoint, a debugger) is no loss."""
    cap_s: float = 600.0
    """Never more."""
    factor: float = 8.0
    """The longest of the last waits times this; a peer that slows down gradually is followed."""
    num_needed: int = 8
    num_kept: int = 64
    """Waits that are remembered; older ones are forgotten, so that one long wait does not stay for ever."""

    def __post_init__(self) -> None:
        if not (0 < self.floor_s <= self.initial_s <= self.cap_s and self.factor >= 1):
            raise ConfigError(
                "a time-out rule's limits are out of order",
                value=f"floor {self.floor_s}, initial {self.initial_s}, cap {self.cap_s}, factor {self.factor}",
                valid="0 < floor <= initial <= cap, and a factor of 1 or more",
            )


def derived_timeout_s(waits_s: Iterable[float], rule: TimeoutRule) -> float:
    """Return the limit of the next wait.

    Args:
        waits_s: observed waits in seconds, newest first.

    Numerics:
        min(cap, max(floor, factor x longest of the newest `num_kept`)); `initial_s` with fewer than `num_needed`. The
        largest value rather than mean and deviation: waits of a pipeline have several modes (a neighbour's forward, a
        whole bubble, an evaluation), and what must not happen is a false alarm in the longest.
    """
    kept = list(islice(waits_s, rule.num_kept))
    if len(kept) < rule.num_needed:
        return rule.initial_s
    return min(rule.cap_s, max(rule.floor_s, rule.factor * max(kept)))


@final
class ArrivalHistory:
    """The waits for one peer, or for one kind of event; any thread may call any method.

    Args:
        fixed_s: the user's own limit; then nothing is derived.
    """

    def __init__(self, rule: TimeoutRule | None = None, *, fixed_s: float | None = None) -> None:
        self._rule = rule or TimeoutRule()
        self._fixed_s = fixed_s
        self._waits_s: deque[float] = deque(maxlen=self._rule.num_kept)
        self._timeout_s = self._rule.initial_s if fixed_s is None else fixed_s
        self._lock = threading.Lock()

    @property
    def timeout_s(self) -> float:
        """The limit of a wait that begins now."""
        return self._timeout_s

    def observe(self, wait_s: float) -> None:
        """Remember a wait that ended with what was waited for."""
        if self._fixed_s is not None:
            return
        with self._lock:
            self._waits_s.appendleft(max(0.0, wait_s))
            self._timeout_s = derived_timeout_s(self._waits_s, self._rule)
