"""What the processes of the pipeline benchmark are told and what they answer. Data only; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from hybrid.bench.processes import Handler
from hybrid.bench.workload import Pace, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Make:
    """A maker that names its class, so that only the process that runs it imports torch."""

    target: str
    """`module:class`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Handler:
        """Return the handler."""
        module, name = self.target.split(":")
        handler: Handler = getattr(import_module(module), name)(**self.arguments)
        return handler


@dataclass(frozen=True, slots=True, kw_only=True)
class TellAddress:
    """Reply: where this rank's node listens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meet:
    """Open an edge to each neighbour; reply: None."""

    address_of_rank: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Build the workload's stage; reply: None."""

    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepPace:
    """Emulated chips: from now on actions take this long; reply: None."""

    pace: Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """Run one step; reply: Ran."""

    step: int
    """Makes the samples; never used twice for one loaded workload."""
    with_squares: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How one step went on one rank; times of CLOCK_MONOTONIC, which all processes of a host share."""

    start_s: float
    end_s: float
    cpu_s: float
    """Processor time of all threads of the process."""
    loss: float | None
    """Mean over the microbatches; known where the last stage is."""
    square_of_layer: Mapping[int, float]
    """Sum of squared gradients, where it was asked for."""
    overrun_s: float
    """Emulated chips: by how much actions ended later than their pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAlone:
    """Run a step's compute actions, in the rank's order, on made-up inputs, waiting for nobody; reply: Alone."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """Mean wall seconds of a forward and of a backward, and what all of them took."""

    forward_s: float
    backward_s: float
    cpu_s: float
    """Processor time of all threads of the process."""
