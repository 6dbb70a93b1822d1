"""The `cpu` backend: the reference that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, final

import torch

from hybrid.backends.base import Backend, Capabilities, MemoryStats

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


@final
class CpuBackend(Backend):
    """The host's own cores, through torch."""

    name = "cpu"

    def __init__(self, capabilities: Capabilities) -> None:
        self.device = torch.device("cpu")
        self.capabilities = capabilities
        self._memory = HostMemory(capabilities.chip, capabilities.memory_bytes)

    def compile(self, fn: Callable[..., T]) -> Callable[..., T]:
        return fn

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()

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
