"""The `cpu` backend: the reference that every other backend is compared with.

Also here: what every backend that computes in the host's memory has (`HostMemory`, `HostBuffers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, final

import torch

from hybrid.backends.base import Backend, Capabilities, M, MemoryStats
from hybrid.backends.native_group import open_native_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class HostMemory:
    """Counts what a device of the host holds, against a limit."""

    def __init__(self, chip: str, limit_bytes: int | None) -> None:
        self._chip, self._limit = chip, limit_bytes
        self._allocated = self._peak = 0

    def allocate(self, num_bytes: int, what: str) -> None:
        """Count `num_bytes` more, or raise torch.OutOfMemoryError and count nothing."""
        if self._limit is not None and self._allocated + num_bytes > self._limit:
            raise torch.OutOfMemoryError(
                f"{self._chip} out of memory: tried to allocate {num_bytes / 2**20:.1f} MiB for {what}; "
                f"{self._allocated / 2**20:.1f} MiB of {self._limit / 2**20:.1f} MiB are in use"
            )
        self._allocated += num_bytes
        self._peak = max(self._peak, self._allocated)

    def release(self, num_bytes: int) -> None:
        """Count `num_bytes` as given back."""
        assert num_bytes <= self._allocated, "released more than was allocated"
        self._allocated -= num_bytes

    def stats(self) -> MemoryStats:
        """Return what is held."""
        return MemoryStats(allocated_bytes=self._allocated, peak_bytes=self._peak, limit_bytes=self._limit)


class HostBuffers:
    """Host tensors that are used again, by shape and format; first touch of fresh memory is slow."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a buffer that was given back, or a fresh one."""
        free = self._free.get((shape, dtype))
        return free.pop() if free else torch.empty(shape, dtype=dtype)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        self._free.setdefault((tuple(buffer.shape), buffer.dtype), []).append(buffer)


@final
class CpuBackend(Backend):
    """The host's own cores, through torch."""

    name = "cpu"

    def __init__(self, capabilities: Capabilities) -> None:
        self.device = torch.device("cpu")
        self.capabilities = capabilities
        self._memory = HostMemory(capabilities.chip, capabilities.memory_bytes)
        self._buffers = HostBuffers()

    def compile(self, fn: Callable[..., T]) -> Callable[..., T]:
        return fn

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
        """Return at once: the CPU is synchronous."""

    def execute(self, fn: Callable[[], T], *, expected_s: float, ready_s: float | None = None) -> T:
        return fn()

    def allocate(self, num_bytes: int, what: str) -> None:
        self._memory.allocate(num_bytes, what)

    def release(self, num_bytes: int) -> None:
        self._memory.release(num_bytes)

    def memory_stats(self) -> MemoryStats:
        return self._memory.stats()
