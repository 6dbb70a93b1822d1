"""The enumerations of `nki.isa`; members and values as documented."""

from __future__ import annotations

from enum import Enum

from hybrid.testing.nki.refusal import refuse


class Engine(Enum):
    """Engines of a core."""

    unknown = 0
    tensor = 1
    scalar = 2
    gpsimd = 3
    dma = 4
    vector = 5
    sync = 6


class ReduceCmd(Enum):
    """What an instruction does with its engine's reduction registers."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class DgeMode(Enum):
    """Who generates the descriptors of a DMA."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class OobMode(Enum):
    """What a runtime address out of bounds does."""

    error = 0
    skip = 1


class MatmulPerfMode(Enum):
    """Performance modes of the Tensor Engine."""

    none = "none"
    double_row = "double_row"


class NcVersion(Enum):
    """Generations."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class DmaEngine(Enum):
    """DMA engines of `sendrecv`."""

    dma = 1
    gpsimd_dma = 2


def check_enum(value: object, kind: type[Enum], parameter: str) -> None:
    """Refuse a value that is no member of its enum.

    Raises:
        NkiRefused: rule `enum-not-int`.
    """
    if not isinstance(value, kind):
        refuse("enum-not-int", f"`{parameter}` is no member of its enum", value=value, valid=[m.name for m in kind])
