"""The `cuda` backend: one NVIDIA GPU of this process.

Copies run on streams of their own from pinned host buffers and are ordered by events; nothing waits for the whole
device within a step. TF32 is set, not inherited. CUDA graphs are left to the user. **Never ran on a GPU yet**: its
order of operations is tested on a recorded stand-in for `torch.cuda` (docs/hardware.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch

from hybrid.backends.accelerator import Accelerator, Copies, fits
from hybrid.backends.base import Backend, BackendOptions, Capabilities, M, MemoryStats
from hybrid.backends.native_group import open_native_group
from hybrid.errors import MachineError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


@final
class CudaBackend(Backend):
    """One NVIDIA GPU.

    Args:
        options: `compile` runs functions through torch.compile; `tf32` allows TF32 in fp32 products.
        module: `torch.cuda`, or a stand-in for it in tests.
        device: the first GPU that the process sees; Ray shows each worker its own alone.

    Raises:
        MachineError: this torch sees no GPU.
    """

    name = "cuda"

    def __init__(
        self,
        capabilities: Capabilities,
        options: BackendOptions | None = None,
        *,
        module: Any = torch.cuda,
        device: torch.device | None = None,
    ) -> None:
        if not module.is_available():
            raise MachineError(
                "this torch sees no CUDA device",
                value=torch.__version__,
                fix="run on a node with a GPU, a driver and a CUDA build of torch, or emulate one: `backend: emulated`",
            )
        self.device = torch.device("cuda", 0) if device is None else device
        self.capabilities = capabilities
        self._options = BackendOptions() if options is None else options
        precision = "tf32" if self._options.tf32 else "ieee"
        torch.backends.cuda.matmul.fp32_precision = precision
        torch.backends.cudnn.fp32_precision = precision
        self._it = Accelerator(
            self.device,
            capabilities,
            module,
            StreamCopies(self.device, module),
            memory=lambda: (module.memory_allocated(), module.max_memory_allocated()),
        )

    def compile(self, fn: Callable[..., T]) -> Callable[..., T]:
        return torch.compile(fn, dynamic=False) if self._options.compile else fn

    def place(self, module: M) -> M:
        return self._it.place(module)

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        return self._it.copies.to_device(x)

    def to_host(self, x: torch.Tensor, *, into: torch.Tensor | None = None) -> torch.Tensor:
        return self._it.copies.to_host(x, into)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._it.copies.buffer(shape, dtype)

    def recycle(self, buffer: torch.Tensor) -> None:
        self._it.copies.recycle(buffer)

    def native_group(self, ranks: Sequence[int], *, rank: int, address: str, timeout_s: float) -> ProcessGroup:
        return open_native_group("nccl", ranks, rank=rank, address=address, timeout_s=timeout_s)

    def synchronize(self) -> None:
        self._it.synchronize()

    def execute(self, fn: Callable[[], T], *, expected_s: float, ready_s: float | None = None) -> T:
        return fn()

    def allocate(self, num_bytes: int, what: str) -> None:
        self._it.allocate(num_bytes, what)

    def release(self, num_bytes: int) -> None:
        self._it.release(num_bytes)

    def memory_stats(self) -> MemoryStats:
        return self._it.memory_stats()


@final
class StreamCopies(Copies):
    """Copies on two streams of their own, one a direction, ordered against the compute stream by events."""

    def __init__(self, device: torch.device, module: Any) -> None:
        self._device, self._cuda = device, module
        self._into, self._out = module.Stream(), module.Stream()
        self._busy: dict[int, Any] = {}
        """Address of a pinned buffer to the event after which the device reads it no more."""
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return x
        compute = self._cuda.current_stream()
        with self._cuda.stream(self._into):
            out = x.to(self._device, non_blocking=True)
        copied = self._cuda.Event()
        copied.record(self._into)
        compute.wait_event(copied)
        # The allocator must not hand the memory out again before the compute stream is done with it.
        out.record_stream(compute)
        if x.is_pinned():
            self._busy[x.data_ptr()] = copied
        return out

    def to_host(self, x: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        if x.device.type == "cpu":
            return x.contiguous()
        x = x.contiguous()
        target = into if into is not None and fits(into, x) else self.buffer(tuple(x.shape), x.dtype)
        computed = self._cuda.Event()
        computed.record(self._cuda.current_stream())
        self._out.wait_event(computed)
        with self._cuda.stream(self._out):
            target.copy_(x, non_blocking=True)
        x.record_stream(self._out)
        copied = self._cuda.Event()
        copied.record(self._out)
        copied.synchronize()
        return target

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        free = self._free.get((shape, dtype), [])
        for place, buffer in enumerate(free):
            event = self._busy.get(buffer.data_ptr())
            if event is None or event.query():
                self._busy.pop(buffer.data_ptr(), None)
                return free.pop(place)
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def recycle(self, buffer: torch.Tensor) -> None:
        self._free.setdefault((tuple(buffer.shape), buffer.dtype), []).append(buffer)
