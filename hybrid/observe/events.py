"""What a run tells while it runs: frozen events, handed to a sink in the driver.

Pure facts. Sinks render them (terminal), write them (`metrics.jsonl`) or collect them (tests, summaries).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEvent:
    """A phase of the start-up has ended."""

    name: str
    since_start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """A step is committed: every rank has reported it."""

    step: int
    """From 0."""
    loss: float
    """Mean over the step's tokens, in nats."""
    grad_norm: float
    """Global, before clipping."""
    learning_rate: float
    seconds: float
    tokens_per_s: float
    idle_share_of_rank: tuple[float, ...]
    overrun_s: float
    """Wall seconds by which emulated chips missed their pace; 0 elsewhere."""
    since_start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalEvent:
    """Held-out loss, in nats a token."""

    steps_done: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEvent:
    """A checkpoint is whole."""

    steps_done: int
    num_bytes: int


Event: TypeAlias = PhaseEvent | StepEvent | EvalEvent | CheckpointEvent
Sink: TypeAlias = Callable[[Event], None]
