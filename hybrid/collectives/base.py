"""The Group seam: collective operations among some ranks of a job, on tensors of the host.

A group's variant is one file beside this one; `hybrid.testing.group_kit` checks every clause. May import only torch,
`errors`, `config`, `wire` and `transports.base`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from torch import Tensor


class ReduceOp(StrEnum):
    """How elements of several ranks become one."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointToPoint:
    """One send or receive of a batch."""

    kind: Literal["send", "recv"]
    x: Tensor
    peer: int
    """Position in the group."""
    tag: int = 0


class Work(ABC):
    """A collective operation under way."""

    @abstractmethod
    def done(self) -> bool:
        """Return whether `wait` would return or raise at once; never blocks."""

    @abstractmethod
    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the operation has ended here; waiting again returns, or raises the same, at once.

        Until then the operation's tensors may be neither read nor written by the caller.

        Args:
            timeout_s: None: the group's own.

        Raises:
            CommTimeout: not ended in time; it stays under way.
            PeerLost: a member has gone, or the group was closed; the group is of no more use: make a new one.
            ProtocolError: members called different operations, or with sizes that do not fit.
        """


class Group(ABC):
    """Some ranks of a job, and the operations among them.

    Contract (every clause is checked by `hybrid.testing.group_kit`, under the name given first):

    1. *Order*: every member calls the same collectives in the same order; the group runs them in that order. Sends
       and receives (send, recv, batch) are ordered within a (peer, tag) alone: they start at the call, hold up
       nothing, and nothing but the wire holds them up. Any number of groups may be at work at once in one process,
       over the same edges too.
    2. *Asynchronous*: a call returns at once; its `Work` tells the end. Several may be under way.
    3. *In place*: the tensors given are read and written themselves: contiguous, on the host, of any number of
       elements, 0 among them. Input tensors that are not outputs keep their values.
    4. *Same bits*: after all_reduce, reduce_scatter and all_gather, what several members hold of one element has the
       same bits on all of them, whatever the algorithm and whoever is slow.
    5. *Numerics*: float16 and bfloat16 are accumulated in float32 and rounded once; float32, float64 and the integers
       in their own format. AVG is SUM divided by the group's size; integers refuse it.
    6. *Uneven*: reduce_scatter, all_gather, gather, scatter and all_to_all take other sizes for each rank, as long
       as both ends of each transfer name the same size.
    7. *Bounded waits*: see `Work.wait`.
    8. *Loss is told*: when a member has gone, at whatever phase, the others' waits raise PeerLost within the
       derived time-out, and a new group of those that are left can be made at once.
    9. *Misuse is refused*: other operations, sizes, formats or roots than the peers' raise ProtocolError at one end
       at least, at the latest in the next collective of that member with the other, and hang no one beyond the
       time-out; after that the group is of no more use. A tensor that is not contiguous, not on the host or of an
       unsupported format raises a UserError or UnsupportedFormat at the call, and nothing has started.
    10. *Close* is idempotent, ends every pending operation with PeerLost, and leaves no thread, socket or segment.
    """

    rank: int
    """This process's position in the group, 0 to size - 1."""
    ranks: tuple[int, ...]
    """The members' ranks in the job, by position."""

    @property
    def size(self) -> int:
        """How many members there are."""
        return len(self.ranks)

    @abstractmethod
    def all_reduce(self, x: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Replace every member's `x` by the reduction over all of them.

        Shapes:
            x: any, the same on every member.
        """

    @abstractmethod
    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM) -> Work:
        """Leave in `out` the reduction of every member's `inputs[rank]`; `out` may be `inputs[rank]` itself.

        Shapes:
            inputs[i]: the shape of member i's `out`, on every member.
        """

    @abstractmethod
    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> Work:
        """Leave in `outs[i]` member i's `x`; `outs[rank]` may be `x` itself.

        Shapes:
            outs[i]: the shape of member i's `x`.
        """

    @abstractmethod
    def broadcast(self, x: Tensor, root: int) -> Work:
        """Replace every member's `x` by the root's."""

    @abstractmethod
    def reduce(self, x: Tensor, root: int, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Leave the reduction in the root's `x`; the other members' keep their values."""

    @abstractmethod
    def gather(self, outs: Sequence[Tensor] | None, x: Tensor, root: int) -> Work:
        """Leave in the root's `outs[i]` member i's `x`; the others give None."""

    @abstractmethod
    def scatter(self, out: Tensor, inputs: Sequence[Tensor] | None, root: int) -> Work:
        """Leave in member i's `out` the root's `inputs[i]`; the others give None."""

    @abstractmethod
    def all_to_all(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Work:
        """Leave in `outs[i]` what member i gave as `inputs[rank]`."""

    @abstractmethod
    def barrier(self) -> Work:
        """End when every member has called it."""

    @abstractmethod
    def send(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        """Send to the member at position `peer`; ordered within a (peer, tag)."""

    @abstractmethod
    def recv(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        """Receive from the member at position `peer` into `x`, of the sender's size and format."""

    @abstractmethod
    def batch(self, operations: Sequence[PointToPoint]) -> Work:
        """Start sends and receives together; none of them holds up another. Their order does not matter."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; see clause 10. Returns within seconds. The transports that it was given are the caller's."""
