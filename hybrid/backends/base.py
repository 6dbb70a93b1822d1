"""The Backend seam: one device, what it can do, and how work is run on it.

A backend belongs to one rank and is used by that rank's one compute thread. May import `collectives.base` and
`hybrid_kernels`; knows nothing of schedules, transports or Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import nn

from hybrid.errors import UnsupportedFormat
from hybrid_kernels.selection import OPS, Choice, choose

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

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
    """What the job has counted by `allocate`, not yet released."""
    peak_bytes: int
    limit_bytes: int | None
    device_bytes: int | None = None
    """What the device's own allocator says is in use; None where it is not asked."""
    device_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What a job may ask of a backend; one that has no use for an option ignores it."""

    compile: bool = False
    """Compile whole stages (torch.compile) instead of running operator by operator."""
    tf32: bool = False
    """Allow TF32 in products of fp32 matrices."""


class Backend(ABC):
    """One device.

    Contract (checked by `hybrid.testing.backend_kit`):

    1. *Round trip*: `to_host(to_device(x))` has x's bits, for every format in `capabilities.formats`; `to_device` lands
       on `device`, `to_host` on the host, contiguous.
    2. *Formats*: `check_precision` raises UnsupportedFormat for a format that is not in `capabilities`, and only then.
    3. *Same mathematics*: `execute(fn)` returns what `fn()` returns and passes its exceptions on.
    4. *Memory is told*: `allocate` counts into `memory_stats`; beyond the limit it raises torch.OutOfMemoryError,
       what a CUDA or Neuron device raises, and counts nothing; `release` gives back.
    5. *Synchronize* returns once all work handed to the device is done.
    6. *Place*: the parameters and buffers of a placed module are on `device`, with their bits and their names; what is
       computed with them, and their gradients, is on `device`.
    7. *Compile*: a compiled function returns what the function returns. Where `capabilities.execution` is `graph`, a
       call with tensors of other shapes or formats than the first call's raises DeviceError before anything is
       computed. A failure to compile raises; nothing falls back silently.
    8. *Chance*: `generator(seed)` draws the same numbers on every backend: it draws on the host.
    9. *Host buffers*: a buffer given to `recycle` may come back from `host_buffer`, but not before a copy out of it has
       ended. `to_host(x, into=buffer)` may return `buffer`.
    10. *Native group*: a group of one rank, this one, opens and reduces a tensor of the device to itself.
    11. *Kernels*: `kernels` names a variant for every operation of `hybrid_kernels`, by its rule for the device.
    """

    name: str
    device: torch.device
    capabilities: Capabilities

    @property
    def is_host(self) -> bool:
        """Whether the device computes in the host's own memory, so that nothing need be copied."""
        return self.device.type == "cpu"

    @property
    def kernels(self) -> Mapping[str, Choice]:
        """The variant of every operation of `hybrid_kernels` that runs on this device, and why."""
        return {op: choose(op, self.device.type) for op in OPS}

    def generator(self, seed: int) -> torch.Generator:
        """Return the host's generator; what it draws is then moved to the device."""
        return torch.Generator().manual_seed(seed)

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
        """Return `fn` made ready for this device; shapes must not change between calls.

        Raises:
            DeviceError: (when called) shapes have changed on a device of static graphs, or it does not compile.
        """

    @abstractmethod
    def place(self, module: M) -> M:
        """Return the module with its parameters and buffers on the device; it may be the same object."""

    @abstractmethod
    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """Return x on the device; may return before the copy has ended, so x must stay as it is (see `recycle`)."""

    @abstractmethod
    def to_host(self, x: torch.Tensor, *, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return x on the host, contiguous and whole.

        Args:
            into: a host buffer of x's shape and format where the copy may land; unused where nothing is copied.
        """

    @abstractmethod
    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialised host memory from which the device copies fast."""

    @abstractmethod
    def recycle(self, buffer: torch.Tensor) -> None:
        """Give back a host buffer that the caller will no longer read or write."""

    @abstractmethod
    def native_group(self, ranks: Sequence[int], *, rank: int, address: str, timeout_s: float) -> ProcessGroup:
        """Join the vendor's own collective group (NCCL, Neuron, gloo) of ranks of one island; blocks until all have.

        A process is in one such group at a time: it becomes torch's default group.

        Args:
            ranks: the members, ascending; every member gives the same.
            rank: this process's.
            address: HOST:PORT where the first of them listens.
            timeout_s: the longest wait for the others, and of each later operation.

        Raises:
            DeviceError: the vendor's library takes no such group.
            CommTimeout: not all came in time.
        """

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
