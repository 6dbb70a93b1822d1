"""The two kinds of axis among the ranks of a stage: over the job's own collectives, or over a vendor's group.

`open_axes` decides which, and opens them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from hybrid.collectives.base import Group
from hybrid.errors import CommTimeout, PeerLost
from hybrid.models.axis import Axis

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@final
class GroupAxis(Axis):
    """An axis over our own collectives.

    Args:
        group: the caller's, who closes it.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size

    def all_reduce(self, x: Tensor) -> None:
        self._group.all_reduce(x.detach()).wait()

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        self._group.all_gather(list(outs), x.detach()).wait()

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor]) -> None:
        self._group.reduce_scatter(out, list(inputs)).wait()


@final
class NativeAxis(Axis):
    """An axis over a vendor's own group, or over a part of it."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._dist: Any = importlib.import_module("torch.distributed")
        self.rank, self.size = group.rank(), group.size()

    def all_reduce(self, x: Tensor) -> None:
        with _told(self):
            self._dist.all_reduce(x.detach(), group=self._group)

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> None:
        with _told(self):
            self._dist.all_gather(list(outs), x.detach(), group=self._group)

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor]) -> None:
        with _told(self):
            self._dist.reduce_scatter(out, list(inputs), group=self._group)


@contextmanager
def _told(axis: NativeAxis) -> Iterator[None]:
    """Tell a native group's failures by our names: they come as RuntimeError, whatever the library."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        late = "timed out" in first.lower() or "timeout" in first.lower()
        kind = CommTimeout if late else PeerLost
        raise kind(
            f"the stage's native group of {axis.size} ranks failed at place {axis.rank}: {first[:500]}"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageAxes:
    """One rank's axes; None where the degree is 1."""

    tensor: Axis | None
    """The ranks that hold the other parts of this copy's weights."""
    width: Axis | None
    """The ranks that hold the same part of the other copies' weights."""
    close: Callable[[], None] = lambda: None
    """Leaves the groups."""


SINGLE = StageAxes(tensor=None, width=None)
"""Of a stage that one rank holds."""
