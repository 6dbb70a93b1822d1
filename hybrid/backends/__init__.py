"""Devices behind one contract. A new backend is one file here and one line in `_OPENERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hybrid.backends.base import Backend, BackendOptions, Capabilities, MemoryStats
from hybrid.backends.cpu import CpuBackend
from hybrid.backends.cuda import CudaBackend
from hybrid.backends.emulated import EmulatedBackend
from hybrid.backends.neuron import NeuronBackend
from hybrid.errors import FleetError

_OPENERS: Mapping[str, Callable[[Capabilities, BackendOptions], Backend]] = {
    "cpu": lambda capabilities, options: CpuBackend(capabilities),
    "emulated": lambda capabilities, options: EmulatedBackend(capabilities),
    "cuda": CudaBackend,
    "neuron": NeuronBackend,
}

BACKENDS = tuple(_OPENERS)
"""Names of the backends, in the order in which `hybrid doctor` shows them."""


def open_backend(name: str, capabilities: Capabilities, options: BackendOptions | None = None) -> Backend:
    """Return a rank's device.

    Raises:
        FleetError: no such backend.
        MachineError: the backend's device or its software is not here.
    """
    opener = _OPENERS.get(name)
    if opener is None:
        raise FleetError("no such backend", value=name, valid=BACKENDS, fix="mend `backend` of the island")
    return opener(capabilities, BackendOptions() if options is None else options)


__all__ = ["BACKENDS", "Backend", "BackendOptions", "Capabilities", "MemoryStats", "open_backend"]
