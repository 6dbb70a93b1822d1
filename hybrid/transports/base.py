"""The Transport seam: bytes between two ranks, over one edge.

No torch: a buffer is anything that `memoryview` takes. May import only `errors`, `config` and `wire`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

from hybrid.errors import ProtocolError

Buffer: TypeAlias = "memoryview | bytes | bytearray"

MESSAGE_OVERHEAD_BYTES = 512
"""What a message weighs in the window beside its payload, so that empty messages cannot pile up without end."""

DEFAULT_WINDOW_BYTES = 64 << 20
MIN_WINDOW_BYTES = 64 << 10


class Pending(ABC):
    """A send or receive under way."""

    @abstractmethod
    def done(self) -> bool:
        """Return whether `wait` would return or raise PeerLost or ProtocolError at once; never blocks.

        Asking moves the node on as waiting does.
        """

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Block until the operation has ended.

        After a send's wait its buffers may be overwritten; after a receive's wait
        the target buffers hold the message. Waiting again is allowed and returns at once.
        While one operation is waited for, every other operation of the same node moves on too;
        between waits, those may rest that neither the window nor a posted receive has room for.

        Raises:
            CommTimeout: the operation did not end within `timeout_s`; it stays under way.
            PeerLost: the peer has gone and the message was not wholly received or, of a send, not
                wholly taken by the medium; what was taken may still be lost with the peer.
            ProtocolError: the message does not fit the receive that was posted for it, or the
                peer sent bytes that no honest peer sends.
        """


class Transport(ABC):
    """One end of an edge to one peer; full duplex.

    Contract (every clause is checked by `hybrid.testing.transport_kit`, under the name given first):

    1. *Whole*: a message arrives with the same number of buffers, sizes and bytes as sent, or not at all;
       what a caller writes into its buffers after a send's wait is not seen by the receiver.
    2. *Once*: no message is lost, doubled, cut or invented while both ends are open.
    3. *Ordered*: messages of one tag are received in the order in which they were sent.
    4. *Tagged*: a receive takes only messages of its tag; receives of different tags may be
       posted and waited for in any order. Receives of one tag are filled in the order in which they were posted.
    5. *Posted ahead*: `recv` returns at once, before the message was sent; it is filled when the message comes.
    6. *Window*: send does not wait for the receiver until `window_bytes` of unreceived messages (payload and
       `MESSAGE_OVERHEAD_BYTES` each) stand between the two; beyond it the send's `wait` blocks (back-pressure),
       and memory stays bounded. A message larger than the window gets through once its receive is posted. Messages
       held back by a full window may hold back later ones of other tags. Two ends that both send beyond
       the window, with the receives posted, do not block each other.
    7. *Fits*: a message whose number of buffers or sizes are not those of the posted buffers is used up: its receive
       raises ProtocolError and writes past no end; the edge goes on. A buffer of zero bytes and a message of zero
       buffers are messages too.
    8. *Bounded waits*: every wait ends within its time-out with CommTimeout; the operation can be waited for again.
    9. *Loss is told*: when the peer is gone, waits raise PeerLost within seconds, also when its process was
       killed; what was sent before an orderly `close` is still delivered first.
    10. *Close* is idempotent, ends every pending operation with PeerLost, and frees threads, sockets and segments.
    11. *Threads*: any thread may call any method; one may send while others wait.
    """

    peer: int
    """The rank at the other end."""

    window_bytes: int
    """What may stand between the two ends unreceived, in each direction."""

    @abstractmethod
    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        """Start sending one message; the buffers must stay unchanged until the returned wait has ended.

        Args:
            tag: at most 256 bytes of UTF-8.
            buffers: at most 1024 contiguous buffers.

        Raises:
            PeerLost: the peer is already known to be gone, or this end is closed.
            ProtocolError: the tag or the number of buffers is beyond the limits; nothing was sent.
        """

    @abstractmethod
    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        """Post a receive of the next message tagged `tag` into writable, contiguous byte buffers.

        Where the peer has gone and no such message came before, the returned wait raises PeerLost.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the edge; see clause 10. Returns within seconds, whatever the peer does."""


class TransportNode(ABC):
    """A rank's place on a medium: listens once, then opens one Transport for each peer.

    How two ranks meet: each opens a node and publishes `address`; once the addresses are known
    (the coordinator hands them round) *both* ends call `open` with the other's rank and address.

    Contract, checked by the same kit:

    12. *Meets*: ends may call `open` in any order and at any time; a ring of ranks that each open first
        the next and then the one before do not block each other. After a close the same two may open again.
    13. *Strangers*: who knocks with another token, another protocol version, or for another rank is refused
        with ProtocolError, is listed in `refused`, and does not disturb the honest peer.
    14. *Leaves*: a node's `close`, from any thread and from several at once, ends an `open` under way with PeerLost.
    """

    rank: int
    address: str
    """Where peers reach this rank, in this medium's own syntax, for example `tcp://10.0.0.1:40123`."""

    @property
    @abstractmethod
    def refused(self) -> tuple[str, ...]:
        """Who was refused and why, oldest first; the last 16."""

    @abstractmethod
    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        """Return this rank's end of the edge to `peer`; both ends must call it.

        Raises:
            CommTimeout: the peer did not answer within `timeout_s`.
            ProtocolError: the peer refuses: another token, protocol version or rank.
            PeerLost: this node was closed meanwhile.
        """

    @abstractmethod
    def close(self) -> None:
        """Close every transport that this node opened; idempotent."""


def as_bytes(buffer: Buffer) -> memoryview:
    """Return a flat byte view of a contiguous buffer; of no bytes where any dim is 0."""
    view = memoryview(buffer)
    assert view.contiguous, "a buffer must be contiguous"
    if view.nbytes == 0:
        return memoryview(b"")
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def as_targets(into: Sequence[memoryview]) -> tuple[memoryview, ...]:
    """Return flat byte views of the buffers of a receive."""
    targets = tuple(as_bytes(buffer) for buffer in into)
    assert not any(target.readonly and target.nbytes for target in targets), "a receive's buffers must be writable"
    return targets


def sizes_of(buffers: Sequence[memoryview]) -> tuple[int, ...]:
    """Return the bytes of each buffer."""
    return tuple(buffer.nbytes for buffer in buffers)


def misfit(peer: int, tag: str, sizes: tuple[int, ...], posted: tuple[int, ...]) -> ProtocolError:
    """Return the error of a receive whose message has other sizes."""
    return ProtocolError(
        f"message {tag!r} from rank {peer} does not fit the posted receive",
        value=list(sizes[:8]),
        valid=f"buffers of {list(posted[:8])} bytes",
        fix="post buffers of the sender's sizes",
    )
