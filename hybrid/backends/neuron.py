"""The `neuron` backend: one logical core of a Trainium, by TorchNeuron.

TorchNeuron is a torch device named `neuron` that torch's autoload brings in with `import torch`; its environment must
be set before that (hybrid/hardware/neuron_environment.py). Graphs are static; there is no fp64 and no int64
arithmetic; random numbers are drawn on the host. **Never ran on a Trainium yet**: this file is executed on a fake
device of the same name (docs/hardware.md).

Source:
    AWS Neuron documentation, TorchNeuron (SDK 2.33), read 2026-11.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch

from hybrid.backends.accelerator import Accelerator, BlockingCopies
from hybrid.backends.base import Backend, BackendOptions, Capabilities, M, MemoryStats
from hybrid.backends.native_group import open_native_group
from hybrid.backends.neuron_packages import found_packages, why_not_loaded
from hybrid.backends.static_shapes import hold_shapes
from hybrid.errors import DeviceError, MachineError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

GROUP_SIZES = (1, 4, 8, 16, 32)
"""Ranks that a `neuron` group may have, each aligned to its size (**weak**: newer guides may allow more)."""
_OUT_OF_MEMORY = ("out of memory", "nrt_resource", "failed to allocate")


@final
class NeuronBackend(Backend):
    """One logical core of a Trainium.

    Args:
        options: `compile` runs functions through torch.compile(backend="neuron"); without it TorchNeuron runs
            operator by operator, each compiled once for its shapes.
        compiler: what compiles; a stand-in for it in tests.

    Raises:
        MachineError: TorchNeuron is not loaded or has no core; tells a placeholder package from a missing one.
    """

    name = "neuron"

    def __init__(
        self,
        capabilities: Capabilities,
        options: BackendOptions | None = None,
        *,
        compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    ) -> None:
        module = neuron_module()
        self.device = torch.device("neuron", 0)
        self.capabilities = capabilities
        self._options = BackendOptions() if options is None else options
        self._compiler = functools.partial(torch.compile, backend="neuron", dynamic=False)
        if compiler is not None:
            self._compiler = compiler  # type: ignore[assignment]
        memory = _memory_functions(module)
        self._it = Accelerator(self.device, capabilities, module, BlockingCopies(self.device), memory=memory)

    def compile(self, fn: Callable[..., T]) -> Callable[..., T]:
        chip = self.capabilities.chip
        if not self._options.compile:
            return hold_shapes(fn, chip=chip)
        return hold_shapes(_telling(self._compiler(fn), chip), chip=chip)

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
        check_group(ranks)
        return open_native_group("neuron", ranks, rank=rank, address=address, timeout_s=timeout_s)

    def synchronize(self) -> None:
        self._it.synchronize()

    def execute(self, fn: Callable[[], T], *, expected_s: float, ready_s: float | None = None) -> T:
        try:
            return fn()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The runtime tells of full memory in words of its own.
            if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
                raise torch.OutOfMemoryError(f"{self.capabilities.chip} out of memory: {error}") from error
            raise

    def allocate(self, num_bytes: int, what: str) -> None:
        self._it.allocate(num_bytes, what)

    def release(self, num_bytes: int) -> None:
        self._it.release(num_bytes)

    def memory_stats(self) -> MemoryStats:
        return self._it.memory_stats()


def neuron_module() -> Any:
    """Return `torch.neuron`, loaded and with a core.

    Raises:
        MachineError: see `NeuronBackend`.
    """
    module = getattr(torch, "neuron", None)
    if module is None:
        fact, fix = why_not_loaded(found_packages())
        raise MachineError(fact, fix=fix)
    if not module.is_available():
        raise MachineError(
            "TorchNeuron is loaded but sees no NeuronCore",
            fix="see `neuron-ls`; another process may hold the cores, or NEURON_RT_VISIBLE_CORES may name none of them",
        )
    return module


def check_group(ranks: Sequence[int]) -> None:
    """Refuse a group that the vendor's collectives don't take.

    Raises:
        DeviceError: names the sizes and the alignment.
    """
    first, size = min(ranks), len(ranks)
    if size not in GROUP_SIZES or list(ranks) != list(range(first, first + size)) or first % size:
        raise DeviceError(
            "the neuron library takes no such group",
            value=list(ranks),
            valid=f"{', '.join(map(str, GROUP_SIZES))} neighbouring ranks, the first a multiple of their number",
            fix="give the island a number of cores that such groups part evenly",
        )


def _telling(fn: Callable[..., T], chip: str) -> Callable[..., T]:
    """Return `fn`, which raises DeviceError where it does not compile."""

    def call(*args: object, **kwargs: object) -> T:
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            if type(error).__module__.startswith("torch._dynamo"):
                raise DeviceError(
                    f"a function did not compile for {chip}: {error}",
                    fix="see the compiler's log above, or run without runtime.compile",
                ) from error
            raise

    return call


def _memory_functions(module: Any) -> Callable[[], tuple[int, int]]:
    """Return what reads the device's memory; the functions' home has moved between releases."""
    owner = module if hasattr(module, "memory_allocated") else importlib.import_module("torch_neuronx")
    return lambda: (owner.memory_allocated(), owner.max_memory_allocated())
