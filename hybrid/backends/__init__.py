"""Devices behind one contract. A new backend is one file here and one line in `_OPENERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hybrid.backends.base import Backend, Capabilities, MemoryStats
from hybrid.backends.cpu import CpuBackend
from hybrid.backends.emulated import EmulatedBackend
from hybrid.errors import FleetError

_OPENERS: Mapping[str, Callable[[Capabilities], Backend]] = {
    "cpu": CpuBackend,
    "emulated": EmulatedBackend,
}

BACKENDS = tuple(_OPENERS)
"""Names of the backends, in the order in which `hybrid doctor` shows them."""


def open_backend(name: str, capabilities: Capabilities) -> Backend:
    """Return a rank's device.

    Raises:
        FleetError: no such backend.
    """
    opener = _OPENERS.get(name)
    if opener is None:
        raise FleetError("no such backend", value=name, valid=BACKENDS, fix="mend `backend` of the island")
    return opener(capabilities)


__all__ = ["BACKENDS", "Backend", "Capabilities", "MemoryStats", "open_backend"]
