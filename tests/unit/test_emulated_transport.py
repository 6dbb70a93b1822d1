"""The emulated link keeps its promises to the second, by a clock that only the test moves."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hybrid.errors import CommTimeout, PeerLost
from hybrid.transports import open_node
from hybrid.transports.base import Pending, Transport
from hybrid.transports.emulated import EmulatedTransport, LinkShape, PlannedLoss, SharedLink


class Clock:
    """Time that stands until somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float, /) -> None:
        self.now_s += seconds


@contextmanager
def edges(
    shape: LinkShape, *, loss: PlannedLoss | None = None, num_edges: int = 1
) -> Iterator[tuple[Clock, list[tuple[Transport, Transport]]]]:
    """Yield edges from rank 0 to others, which share the link from rank 0; the way back takes no time."""
    clock = Clock()
    link, back = SharedLink(shape, seed=3, clock=clock), SharedLink(LinkShape(), clock=clock)
    nodes = [open_node("inproc", rank) for rank in range(num_edges + 1)]
    try:
        pairs: list[tuple[Transport, Transport]] = []
        for peer in range(1, num_edges + 1):
            far: list[Transport] = []
            opening = threading.Thread(
                target=lambda peer=peer, far=far: far.append(nodes[peer].open(0, nodes[0].address, timeout_s=5.0))
            )
            opening.start()
            near = nodes[0].open(peer, nodes[peer].address, timeout_s=5.0)
            opening.join(5.0)
            pairs.append((EmulatedTransport(near, link, loss=loss), EmulatedTransport(far[0], back)))
        yield clock, pairs
    finally:
        for node in nodes:
            node.close()


def _post(edge: Transport, size: int, tag: str = "x") -> Pending:
    return edge.recv(tag, [memoryview(bytearray(size))])


def test_a_message_takes_the_latency_and_the_time_that_it_fills_the_link() -> None:
    with edges(LinkShape(latency_s=2.0, bandwidth_bytes_per_s=100.0)) as (clock, [(low, high)]):
        received = _post(high, 300)
        low.send("x", [bytes(300)]).wait(1.0)
        assert clock.now_s == 100.0, "a send waits for no link"
        assert not received.done()
        received.wait(10.0)
        assert clock.now_s == pytest.approx(105.0)
        assert received.done()


def test_messages_queue_for_the_link_and_not_for_its_latency() -> None:
    with edges(LinkShape(latency_s=2.0, bandwidth_bytes_per_s=100.0)) as (clock, [(low, high)]):
        received = [_post(high, 100) for _ in range(3)]
        for _ in range(3):
            low.send("x", [bytes(100)])
        ends = []
        for pending in received:
            pending.wait(10.0)
            ends.append(clock.now_s)
        assert ends == pytest.approx([103.0, 104.0, 105.0])


def test_edges_that_share_a_link_share_its_bandwidth() -> None:
    with edges(LinkShape(bandwidth_bytes_per_s=100.0), num_edges=2) as (clock, pairs):
        received = [_post(high, 200) for _, high in pairs]
        for low, _ in pairs:
            low.send("x", [bytes(200)])
        received[1].wait(10.0)
        assert clock.now_s == pytest.approx(104.0)
        received[0].wait(10.0)
        assert clock.now_s == pytest.approx(104.0), "the first has long arrived"


def test_a_wait_that_is_too_short_times_out_and_the_message_is_still_on_its_way() -> None:
    with edges(LinkShape(latency_s=50.0)) as (clock, [(low, high)]):
        received = _post(high, 5)
        low.send("x", [b"hello"])
        with pytest.raises(CommTimeout, match="on its way"):
            received.wait(20.0)
        assert 119.0 < clock.now_s <= 120.0
        received.wait(60.0)
        assert clock.now_s == pytest.approx(150.0)


def test_jitter_is_the_seeds_and_lets_no_message_overtake_another() -> None:
    def arrivals() -> list[float]:
        with edges(LinkShape(latency_s=1.0, jitter_s=5.0)) as (clock, [(low, high)]):
            received = [_post(high, 1) for _ in range(20)]
            for _ in range(20):
                low.send("x", [b"1"])
                clock.sleep(0.1)
            ends = []
            for pending in received:
                pending.wait(100.0)
                ends.append(clock.now_s)
            return ends

    first = arrivals()
    assert first == arrivals()
    assert first == sorted(first)
    assert first[-1] > 102.9


@pytest.mark.parametrize("loss", [PlannedLoss(at_message=2), PlannedLoss(at_s=101.5)])
def test_an_edge_is_cut_as_planned_and_both_ends_are_told(loss: PlannedLoss) -> None:
    with edges(LinkShape(), loss=loss) as (clock, [(low, high)]):
        for number in range(2):
            received = _post(high, 1)
            low.send("x", [bytes([number])]).wait(1.0)
            received.wait(1.0)
            clock.sleep(1.0)
        never = _post(high, 1)
        with pytest.raises(PeerLost):
            low.send("x", [b"2"])
        with pytest.raises(PeerLost):
            never.wait(1.0)
        with pytest.raises(PeerLost):
            low.send("x", [b"3"])


def test_a_link_of_no_shape_takes_no_time() -> None:
    link = SharedLink(LinkShape(), clock=Clock())
    assert link.carry(1 << 40) == 100.0
    assert math.isinf(LinkShape().bandwidth_bytes_per_s)
