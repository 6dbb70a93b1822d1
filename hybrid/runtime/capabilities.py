"""From a chip of the catalog to what a backend can do with it."""

from __future__ import annotations

from hybrid.backends.base import Capabilities
from hybrid.hardware.catalog import Chip


def capabilities_of(chip: Chip, memory_bytes: int | None) -> Capabilities:
    """Return what a chip of the catalog can do; `memory_bytes` is what the job may hold on it, None for no limit."""
    return Capabilities(
        chip=chip.name,
        formats=frozenset(chip.flops_of_format),
        fp8_max=chip.fp8_max,
        memory_bytes=memory_bytes,
        flops_of_format=chip.flops_of_format,
        execution="graph" if chip.family == "trainium" else "eager",
    )
