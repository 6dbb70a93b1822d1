"""Sinks that keep what a run tells: `metrics.jsonl`, and a summary in memory.

One JSON object a line: {"event": "step" | "eval" | "checkpoint" | "phase", …fields of the event}.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, TextIO, final

from hybrid.observe.events import CheckpointEvent, EvalEvent, Event, PhaseEvent, Sink, StepEvent

_NAME_OF_EVENT = {StepEvent: "step", EvalEvent: "eval", CheckpointEvent: "checkpoint", PhaseEvent: "phase"}


@final
class MetricsFile:
    """Appends each event to `metrics.jsonl`; a line is on disk before the next event is taken."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: Event) -> None:
        """Write one line."""
        self._file.write(json.dumps({"event": _NAME_OF_EVENT[type(event)], **_plain(asdict(event))}) + "\n")

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()


@final
class Tally:
    """Remembers what the closing summary needs."""

    def __init__(self) -> None:
        self.steps: list[StepEvent] = []
        self.evals: list[EvalEvent] = []
        self.checkpoints: list[CheckpointEvent] = []
        self.phases: list[PhaseEvent] = []

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case StepEvent():
                self.steps.append(event)
            case EvalEvent():
                self.evals.append(event)
            case CheckpointEvent():
                self.checkpoints.append(event)
            case PhaseEvent():
                self.phases.append(event)

    @property
    def step_s(self) -> float | None:
        """Median seconds of a step; the first is left out where there are more."""
        seconds = [event.seconds for event in self.steps]
        return median(seconds[1:] or seconds) if seconds else None


def all_of(*sinks: Sink) -> Sink:
    """Return a sink that hands each event to every one of `sinks`, in order."""

    def sink(event: Event) -> None:
        for each in sinks:
            each(event)

    return sink


def _plain(value: Any) -> Any:
    """Replace what JSON cannot hold, at any depth: a NaN becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
