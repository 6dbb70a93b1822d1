"""The `emulated` backend: the CPU's mathematics with a chip's manners.

It is an emulation and says so: it keeps the chip's *pace* (an action ends no sooner than the cost table says), its
*memory limit*, its *number formats* and, where the chip runs static graphs, its *fixed shapes*. It does not reproduce
the chip's kernels; formats and rounding of its products only where the job asks (`number_emulation.py`).

How pace works on a machine with fewer cores than chips: a device runs its actions back to back, as an accelerator
does whose host enqueues ahead. An action starts when the one before it ended *on the emulated clock* or when its
inputs landed, whichever is later; the real computation is done somewhere in between, and the rest is waited out. A
host that is a little late therefore delays nothing unless it misses the action's end; that is counted as `overrun_s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar, final

import torch

from hybrid.backends.base import Backend, Capabilities, M, MemoryStats
from hybrid.backends.cpu import HostBuffers, HostMemory
from hybrid.backends.native_group import open_native_group
from hybrid.backends.static_shapes import hold_shapes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Clock(Protocol):
    """Time as an argument, so that tests need not wait."""

    def monotonic(self) -> float:
        """Return seconds since some fixed point."""

    def sleep(self, seconds: float, /) -> None:
        """Return after `seconds`."""


@final
class EmulatedBackend(Backend):
    """One emulated chip on the host's cores.

    Args:
        capabilities: the chip's, from the catalog.
        time_scale: wall seconds for one second of the real chip; 0 computes as fast as the host can.
        clock: defaults to `time`.
    """

    name = "emulated"

    def __init__(self, capabilities: Capabilities, *, time_scale: float = 0.0, clock: Clock | None = None) -> None:
        self.device = torch.device("cpu")
        self.capabilities = capabilities
        self.time_scale = time_scale
        self.overrun_s = 0.0
        """Wall seconds by which actions ended later than the cost table says."""
        self._clock: Clock = clock if clock is not None else time
        self._free_at = float("-inf")
        self._memory = HostMemory(f"emulated {capabilities.chip}", capabilities.memory_bytes)
        self._buffers = HostBuffers()

    def compile(self, fn: Callable[..., T]) -> Callable[..., T]:
        return hold_shapes(fn, chip=self.capabilities.chip) if self.capabilities.execution == "graph" else fn

    def place(self, module: M) -> M:
        return module

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def to_host(self, x: torch.Tensor, *, into: torch.Tensor | None = None) -> torch.Tensor:
        return x.contiguous()

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._buffers.take(shape, dtype)

    def recycle(self, buffer: torch.Tensor) -> None:
        self._buffers.give(buffer)

    def native_group(self, ranks: Sequence[int], *, rank: int, address: str, timeout_s: float) -> ProcessGroup:
        return open_native_group("gloo", ranks, rank=rank, address=address, timeout_s=timeout_s)

    def synchronize(self) -> None:
        """Wait until the emulated clock has caught up."""
        self._wait_until(self._free_at)

    def execute(self, fn: Callable[[], T], *, expected_s: float, ready_s: float | None = None) -> T:
        if self.time_scale == 0.0:
            return fn()
        started = self._clock.monotonic()
        # An idle device starts when its inputs land, not when it last ended.
        start = max(self._free_at, ready_s) if ready_s is not None else max(self._free_at, started - _HOST_LAG_S)
        end = start + expected_s * self.time_scale
        result = fn()
        late = self._clock.monotonic() - end
        if late > 0:
            self.overrun_s += late
            end += late
        else:
            self._wait_until(end)
        self._free_at = end
        return result

    def allocate(self, num_bytes: int, what: str) -> None:
        self._memory.allocate(num_bytes, what)

    def release(self, num_bytes: int) -> None:
        self._memory.release(num_bytes)

    def memory_stats(self) -> MemoryStats:
        return self._memory.stats()

    def _wait_until(self, moment: float) -> None:
        rest = moment - self._clock.monotonic()
        if rest > 0:
            self._clock.sleep(rest)


_HOST_LAG_S = 0.002
"""How much host time between two actions an accelerator's queue hides; a device that was idle for longer was idle."""
