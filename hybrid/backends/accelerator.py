"""What the accelerator backends share, written once: placing, copying, counting, waiting.

CUDA and Neuron are both torch devices with a module of functions (`torch.cuda`, `torch.neuron`), so the same code
serves them. Composed, not inherited: a backend holds an `Accelerator` and hands it the module and its way of copying.
May import only torch, `errors` and this folder's `base` and `cpu`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, final

import torch

from hybrid.backends.base import Capabilities, M, MemoryStats
from hybrid.backends.cpu import HostBuffers, HostMemory


class DeviceModule(Protocol):
    """The functions of `torch.cuda` and `torch.neuron` that are used here."""

    def is_available(self) -> bool:
        """Return whether a device can be had."""

    def set_device(self, device: int, /) -> None:
        """Make a device the current one of this thread."""

    def synchronize(self) -> None:
        """Wait for all work of the current device."""

    def memory_allocated(self) -> int:
        """Return the bytes of live tensors."""

    def max_memory_allocated(self) -> int:
        """Return the most bytes that were ever live."""


class Copies(ABC):
    """How tensors travel between the host and one device."""

    @abstractmethod
    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """See `Backend.to_device`."""

    @abstractmethod
    def to_host(self, x: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        """See `Backend.to_host`."""

    @abstractmethod
    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Backend.host_buffer`."""

    @abstractmethod
    def recycle(self, buffer: torch.Tensor) -> None:
        """See `Backend.recycle`."""


@final
class BlockingCopies(Copies):
    """Copies that have ended when the call returns; for devices without streams of their own for copying."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = HostBuffers()

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._device)

    def to_host(self, x: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        return into.copy_(x) if into is not None and fits(into, x) else x.to("cpu").contiguous()

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._buffers.take(shape, dtype)

    def recycle(self, buffer: torch.Tensor) -> None:
        self._buffers.give(buffer)


def fits(buffer: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether a copy of x may land in the buffer."""
    return buffer.shape == x.shape and buffer.dtype == x.dtype


@final
class Accelerator:
    """One accelerator of this process.

    Args:
        device: with its index.
        module: torch's functions for its kind.
        copies: how tensors travel to it and back.
        memory: (bytes live, most bytes ever live), by the device's own allocator.
    """

    def __init__(
        self,
        device: torch.device,
        capabilities: Capabilities,
        module: DeviceModule,
        copies: Copies,
        *,
        memory: Callable[[], tuple[int, int]],
    ) -> None:
        self.device, self.copies = device, copies
        self._module, self._memory = module, memory
        self._counted = HostMemory(capabilities.chip, capabilities.memory_bytes)
        module.set_device(device.index)

    def place(self, module: M) -> M:
        """See `Backend.place`."""
        return module.to(self.device)

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        self._module.synchronize()

    def allocate(self, num_bytes: int, what: str) -> None:
        """Count what the job means to hold, against the plan's limit; the device's own allocator allocates."""
        self._counted.allocate(num_bytes, what)

    def release(self, num_bytes: int) -> None:
        """See `Backend.release`."""
        self._counted.release(num_bytes)

    def memory_stats(self) -> MemoryStats:
        """Return what the job has counted, and what the device says; waits for the device, whose count lags."""
        self._module.synchronize()
        counted, (live, peak) = self._counted.stats(), self._memory()
        return MemoryStats(
            allocated_bytes=counted.allocated_bytes,
            peak_bytes=counted.peak_bytes,
            limit_bytes=counted.limit_bytes,
            device_bytes=live,
            device_peak_bytes=peak,
        )
