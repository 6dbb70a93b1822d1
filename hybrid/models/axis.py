"""Axis: the ranks among which a stage's tensors are cut, and the three operations that its mathematics needs.

The model computes with this alone; `runtime.axes` opens one over a vendor's own group or over transports. May import
torch only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class Axis(ABC):
    """Some ranks in order; every one of them calls the same operations in the same order.

    Each operation returns when its tensors may be used, or raises CommTimeout or PeerLost.
    """

    rank: int
    """This process's place, 0 to size - 1."""
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> None:
        """Replace every rank's contiguous `x` by the sum over all; the same bits on all."""

    @abstractmethod
    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        """Leave in `outs[i]` rank i's `x`; all contiguous and of one shape."""

    @abstractmethod
    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor]) -> None:
        """Leave in `out` the sum of every rank's `inputs[rank]`; all contiguous and of one shape."""
