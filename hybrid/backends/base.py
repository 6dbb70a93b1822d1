"""The Backend seam: one device, what it can do, and how work is run on it.

A backend belongs to one rank and is used by that rank's one compute thread. May import `collectives.base` and
`hybrid_kernels`; knows nothing of schedules, transports or Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from hybrid.errors import UnsupportedFormat

T = TypeVar("T")

DTYPE_OF_PRECISION: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a device can do, as data."""

    chip: str
    """The catalog's name of the chip."""
    formats: frozenset[str]
    """Number formats it computes in: `fp32`, `bf16`, …"""
    fp8_max: float | None
    """Largest finite e4m3 value: 240 on Trainium1 and 2, 448 in OCP e4m3fn; None without FP8."""
    memory_bytes: int | None
    """What may be held; None where nothing but the host limits it."""
    flops_of_format: Mapping[str, float]
    """Dense peak by format, in FLOP/s."""
    execution: Literal["eager", "graph"]
    """`graph` devices compile whole functions of static shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStats:
    """What a device holds now and held at most."""

    allocated_bytes: int
    peak_bytes: int
    limit_bytes: int | None


class Backend(ABC):
    """One device.

    Contract (checked by `hybrid.testing.backend_kit`):

    1. *Round trip*: `to_host(to_device(x))` has x's bits, for every format in `capabilities.formats`.
    2. *Formats*: `check_precision` raises UnsupportedFormat for a format that is not in `capabilities`, and only then.
    3. *Same mathematics*: `execute(fn)` returns what `fn()` returns and passes its exceptions on.
    4. *Memory is told*: `allocate` counts into `memory_stats`; beyond the limit it raises torch.OutOfMemoryError,
       what a CUDA or Neuron device raises, and counts nothing; `release` gives back.
    5. *Synchronize* returns once all work handed to the device is done.
    """

    name: str
    device: torch.device
    capabilities: Capabilities

    def check_precision(self, precision: str) -> None:
        """Refuse a compute format that the chip does not have.

        Raises:
            UnsupportedFormat: names the chip and the formats that it has.
        """
        if precision not in self.capabilities.formats:
            raise UnsupportedFormat(
                f"chip {self.capabilities.chip} does not compute in this precision",
                value=precision,
                valid=sorted(self.capabilities.formats & DTYPE_OF_PRECISION.keys()),
                fix="change `precision` in the job or leave this chip out of the fleet",
            )

    @abstractmethod
    def compile(self, fn: Callable[..., T]) -> Callable[..., T]:
        """Return `fn` made ready for this device; shapes must not change between calls."""

    @abstractmethod
    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """Return x on the device; may return before the copy has ended."""

    @abstractmethod
    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        """Return x on the host, contiguous and whole."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work handed to the device is done."""

    @abstractmethod
    def execute(self, fn: Callable[[], T], *, expected_s: float, ready_s: float | None = None) -> T:
        """Run one action of a schedule.

        Args:
            fn: the work.
            expected_s: what the cost table says the action takes on the real chip.
            ready_s: when its inputs landed, on `time.monotonic`'s clock; None where they were there already.
        """

    @abstractmethod
    def allocate(self, num_bytes: int, what: str) -> None:
        """Count memory that an action is about to hold.

        Raises:
            torch.OutOfMemoryError: it would not fit; names what was asked for, what is held and the limit.
        """

    @abstractmethod
    def release(self, num_bytes: int) -> None:
        """Count memory as given back."""

    @abstractmethod
    def memory_stats(self) -> MemoryStats:
        """Return what is held now and was held at most."""
