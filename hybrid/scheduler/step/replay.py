"""Goodput along a trace of device availability: spot prices, losses and joins, strung along simulated steps.

Pure: no clock, no file. The trace says how many chips of each kind there are and what they cost; for each state the
caller says how fast a step is, and the replay adds what a change costs: the step under way is lost, and recovery or
re-planning takes its time.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hybrid.errors import DataError

_COLUMNS = ("at_s", "chip", "num_chips")
_HOUR_S = 3600.0
_FIX = "see docs/simulator.md for the columns"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From `at_s` on there are so many chips of a kind, at this price."""

    at_s: float
    chip: str
    num_chips: int
    usd_per_hour: float | None = None
    """Of one chip; None: as before (0 at first)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What the caller answers for a state of the fleet: the step that would run on it."""

    step_s: float
    tokens: int
    chips: Mapping[str, int]
    """Used by the step; the others idle, and cost nothing only where the trace takes them away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A time in which nothing changed."""

    start_s: float
    end_s: float
    chips: Mapping[str, int]
    steps: int
    tokens: int
    lost_s: float
    """Recovery, and a step that a change cut off."""
    usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a trace comes to."""

    stretches: tuple[Stretch, ...]

    @property
    def seconds(self) -> float:
        """From the trace's start to its end."""
        return self.stretches[-1].end_s - self.stretches[0].start_s

    @property
    def tokens(self) -> int:
        """Trained on in steps that were finished."""
        return sum(stretch.tokens for stretch in self.stretches)

    @property
    def goodput(self) -> float:
        """Tokens a second over the whole time."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def useful_share(self) -> float:
        """Share of the time in which steps ran that were finished."""
        lost_s = sum(stretch.lost_s for stretch in self.stretches)
        return 1.0 - lost_s / self.seconds if self.seconds else 0.0

    @property
    def usd(self) -> float:
        """Price of every chip that was there."""
        return sum(stretch.usd for stretch in self.stretches)

    @property
    def usd_per_million_tokens(self) -> float:
        """Dollars; infinite where nothing was trained."""
        return self.usd / self.tokens * 1e6 if self.tokens else float("inf")


def replay(
    changes: Sequence[Change],
    pace_of: Callable[[Mapping[str, int]], Pace | None],
    *,
    end_s: float,
    recovery_s: float,
) -> Replay:
    """Return what training along a trace comes to.

    Args:
        changes: by rising time; those of one time take effect together.
        pace_of: the step on so many chips of each kind; None where no plan fits. Asked once for each state.
        end_s: when the trace ends.
        recovery_s: from a change to the first step on the new fleet; nothing trains meanwhile. Chips that come or go
            without changing what the step uses cost no recovery.

    Raises:
        DataError: changes that don't rise in time, or end after `end_s`; a negative number.
    """
    _check(changes, end_s, recovery_s)
    times = sorted({change.at_s for change in changes})
    chips: dict[str, int] = {}
    price: dict[str, float] = {}
    known: dict[tuple[tuple[str, int], ...], Pace | None] = {}
    stretches: list[Stretch] = []
    running: Pace | None = None
    pause_s = worked_s = 0.0
    for start_s, until_s in zip(times, [*times[1:], end_s], strict=True):
        for change in changes:
            if change.at_s == start_s:
                chips[change.chip] = change.num_chips
                if change.usd_per_hour is not None:
                    price[change.chip] = change.usd_per_hour
        state = tuple(sorted(chips.items()))
        if state not in known:
            known[state] = pace_of(dict(chips))
        if known[state] != running:
            if stretches and worked_s:
                # The step that the change cut off is done again.
                stretches[-1] = replace(stretches[-1], lost_s=stretches[-1].lost_s + worked_s)
            running, pause_s, worked_s = known[state], recovery_s, 0.0
        span_s = until_s - start_s
        paused_s = min(span_s, pause_s)
        pause_s -= paused_s
        steps = 0
        if running is None:
            paused_s = span_s
        else:
            worked_s += span_s - paused_s
            steps = int(worked_s / running.step_s + 1e-9)
            worked_s = max(0.0, worked_s - steps * running.step_s)
        stretches.append(
            Stretch(
                start_s=start_s,
                end_s=until_s,
                chips=dict(chips),
                steps=steps,
                tokens=steps * running.tokens if running else 0,
                lost_s=paused_s,
                usd=span_s / _HOUR_S * sum(number * price.get(chip, 0.0) for chip, number in chips.items()),
            )
        )
    return Replay(stretches=tuple(stretches))


def read_trace(text: str, *, where: str = "trace") -> tuple[tuple[Change, ...], float]:
    """Return the changes and the end of an availability trace, CSV or JSON; the format is in docs/simulator.md.

    Raises:
        DataError: a column or a number is missing or wrong; names the line.
    """
    rows: list[Mapping[str, object]]
    if text.lstrip().startswith(("{", "[")):
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DataError(f"the trace is not JSON: {error}", where=where, fix=_FIX) from None
        rows = raw.get("changes", []) if isinstance(raw, dict) else raw
        end: object = raw.get("end_s") if isinstance(raw, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError("the trace has no list of changes", where=where, fix=_FIX)
    else:
        rows, end = list(csv.DictReader(io.StringIO(text))), None
    changes = []
    for number, row in enumerate(rows, start=1):
        place = f"{where}: change {number}"
        missing = [name for name in _COLUMNS if row.get(name) in (None, "")]
        if missing:
            raise DataError("a column is missing", value=missing[0], valid=_COLUMNS, where=place, fix=_FIX)
        if row["chip"] == "end":
            end = row["at_s"]
            continue
        price = row.get("usd_per_hour")
        changes.append(
            Change(
                at_s=_number(row["at_s"], "at_s", place),
                chip=str(row["chip"]),
                num_chips=int(_number(row["num_chips"], "num_chips", place)),
                usd_per_hour=None if price in (None, "") else _number(price, "usd_per_hour", place),
            )
        )
    if end is None or not changes:
        raise DataError("the trace has no change or no end", where=where, fix=_FIX)
    return tuple(changes), _number(end, "end_s", where)


def _number(value: object, name: str, where: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not 0.0 <= number < float("inf"):
        raise DataError(f"{name} is no number from 0 on", value=value, where=where, fix=_FIX)
    return number


def _check(changes: Sequence[Change], end_s: float, recovery_s: float) -> None:
    times = [change.at_s for change in changes]
    if not times or times != sorted(times) or times[-1] >= end_s:
        raise DataError("the changes must rise in time and end before the trace does", value=[*times[-3:], end_s])
    if recovery_s < 0:
        raise DataError("recovery_s is negative", value=recovery_s, valid="0 or more")
