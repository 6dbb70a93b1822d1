"""What the transport kit's clauses stand on: opens pairs of a variant, runs calls at once, lands messages.

No clause is here. May import only `errors` and `transports`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hybrid.errors import HybridError
from hybrid.transports.base import Pending, Transport, TransportNode

TOKEN = b"the kit's token"

T = TypeVar("T")


class OpenKitNode(Protocol):
    """What the kit needs of a variant; `functools.partial(open_node, "zmq-tcp")` is one."""

    def __call__(self, rank: int, *, token: bytes, window_bytes: int) -> TransportNode:
        """Return a node; see `hybrid.transports.open_node`."""


def unwrapped(transport: Transport) -> Transport:
    """Return the transport as it is."""
    return transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """One variant, and how long things may take."""

    open_node: OpenKitNode
    """Can be pickled where `processes` is true."""
    processes: bool = True
    """Whether the medium joins processes; then one is killed to see that its loss is told."""
    wrap: Callable[[Transport], Transport] = unwrapped
    """Laid around both ends: a wrapper under test, or a planted fault."""
    patience_s: float = 5.0
    """How long what must happen may take."""
    loss_s: float = 8.0
    """How long the loss of a peer may stay unknown."""
    window_bytes: int = 1 << 20

    def node(self, rank: int, *, token: bytes = TOKEN) -> TransportNode:
        """Return a node with the kit's small window."""
        return self.open_node(rank, token=token, window_bytes=self.window_bytes)

    @contextmanager
    def open_nodes(self, count: int) -> Iterator[list[TransportNode]]:
        """Yield nodes of ranks 0 to `count - 1`; close them after."""
        nodes: list[TransportNode] = []
        try:
            for rank in range(count):
                nodes.append(self.node(rank))
            yield nodes
        finally:
            for node in nodes:
                node.close()

    @contextmanager
    def open_pair(self) -> Iterator[tuple[Transport, Transport]]:
        """Yield both ends of an edge between ranks 0 and 1; close them after."""
        with self.open_nodes(2) as (low, high):
            yield self.join(low, high)

    def join(self, low: TransportNode, high: TransportNode) -> tuple[Transport, Transport]:
        """Return both ends of an edge between two nodes, opened from two threads."""
        low_end, high_end = at_once(
            self,
            lambda: low.open(high.rank, high.address, timeout_s=self.patience_s),
            lambda: high.open(low.rank, low.address, timeout_s=self.patience_s),
        )
        return self.wrap(low_end), self.wrap(high_end)


class Broken(Exception):
    """Raised inside a clause; the kit adds the clause's name."""


def demand(kept: bool, otherwise: str) -> None:
    """Go on only if `kept`."""
    if not kept:
        raise Broken(otherwise)


def at_once(rig: Rig, *calls: Callable[[], T]) -> list[T]:
    """Return what the calls return, each run in a thread of its own; the first error is raised."""
    results: dict[int, T] = {}
    errors: list[Exception] = []

    def run(index: int, call: Callable[[], T]) -> None:
        try:
            results[index] = call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item, daemon=True, name=f"kit {item[0]}") for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(6 * rig.patience_s)
    if errors:
        raise errors[0]
    demand(len(results) == len(calls), f"a call still blocks after {6 * rig.patience_s} s")
    return [results[index] for index in range(len(calls))]


def wait_all(rig: Rig, *pendings: Pending) -> None:
    """Wait for all, each in a thread of its own: a wait at one end may need one at the other."""
    at_once(rig, *[lambda pending=pending: pending.wait(rig.patience_s) for pending in pendings])


@contextmanager
def expect(*errors: type[HybridError], otherwise: str) -> Iterator[None]:
    """Go on only if the block raises one of `errors`."""
    with suppress(*errors):
        yield
        raise Broken(otherwise)


class Landing:
    """Where a message is received: buffers that stand between guard bytes."""

    _GUARD = b"\xa5" * 16

    def __init__(self, sizes: Sequence[int]) -> None:
        self._guarded = [bytearray(self._GUARD + bytes(size) + self._GUARD) for size in sizes]
        self.views = [memoryview(guarded)[16:-16] for guarded in self._guarded]

    def check_guards(self) -> None:
        """Go on only if nothing was written beside the buffers."""
        for guarded in self._guarded:
            demand(guarded[:16] == self._GUARD == guarded[-16:], "bytes were written past the end of a buffer")

    def check(self, message: Sequence[bytes], name: str) -> None:
        """Go on only if exactly `message` was received."""
        self.check_guards()
        for index, (view, sent) in enumerate(zip(self.views, message, strict=True)):
            if view != sent:
                wrong = next(at for at in range(len(sent)) if view[at] != sent[at])
                raise Broken(f"{name}: byte {wrong} of {len(sent)} in buffer {index} is not what was sent")


def random_message(chance: random.Random, sizes: Sequence[int]) -> list[bytes]:
    """Return buffers of random bytes."""
    return [chance.randbytes(size) for size in sizes]


def transfer(rig: Rig, sender: Transport, receiver: Transport, tag: str, message: Sequence[bytes]) -> None:
    """Send one message and go on only if it arrives; its receive is posted first, so that it may be of any size."""
    landing = Landing([len(buffer) for buffer in message])
    received = receiver.recv(tag, landing.views)
    wait_all(rig, received, sender.send(tag, message))
    landing.check(message, f"message {tag!r}")
