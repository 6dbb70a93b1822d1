"""The transport kit is worth its name: it refuses every planted fault, for that fault's own reason."""

import os
import threading
from functools import partial

import pytest

from hybrid.errors import CommTimeout
from hybrid.testing.faulty_transport import CLAUSE_OF_FAULT, LEAKED_FDS, Fault, FaultyTransport
from hybrid.testing.transport_kit import CLAUSES, ClauseBroken, TransportKit
from hybrid.transports import Transport, TransportNode, open_node

REASON_OF_FAULT = {
    Fault.CUT: "is not what was sent",
    Fault.CORRUPT: "is not what was sent",
    Fault.READ_LATE: "is not what was sent",
    Fault.LOSE: "was lost|does not fit|is not what was sent",
    Fault.DOUBLE: "arrived twice|does not fit|is not what was sent",
    Fault.REORDER: "does not fit|is not what was sent",
    Fault.MIX_TAGS: "is not what was sent",
    Fault.RECEIVE_AT_ONCE: "recv does not return before the message was sent",
    Fault.NO_WINDOW: "were taken and nobody received one",
    Fault.WAIT_FOR_RECEIVER: "a send waits for the receiver after 1 messages",
    Fault.CROP: "was taken for one of",
    Fault.SWALLOW_TIMEOUT: "a wait for a message that was never sent returned",
    Fault.OVERSTAY: r"a wait of 0.0 s took",
    Fault.ONE_WAIT: r"a wait of 0.1 s took 0.00 s",
    Fault.DEAF: "a receive whose peer has closed was not told so",
    Fault.DROP_LAST: "PeerLost",
    Fault.CLOSE_ONCE: "closed before",
    Fault.CLOSE_LATE: "pending when its end closed was not told so",
    Fault.LEAK: "close left 1 more open files",
}


def _kit(fault: Fault | None, variant: str = "inproc", *, patience_s: float = 0.5) -> TransportKit:
    def wrap(transport: Transport) -> Transport:
        return FaultyTransport(transport, fault)

    return TransportKit(
        partial(open_node, variant), processes=False, wrap=wrap, patience_s=patience_s, loss_s=patience_s
    )


def _check_refused(fault: Fault, variant: str) -> None:
    try:
        with pytest.raises(ClauseBroken, match=REASON_OF_FAULT[fault]) as refusal:
            _kit(fault, variant).check(CLAUSE_OF_FAULT[fault])
    finally:
        while LEAKED_FDS:
            os.close(LEAKED_FDS.pop())
    assert refusal.value.clause == CLAUSE_OF_FAULT[fault]


@pytest.mark.parametrize("fault", Fault)
def test_a_planted_fault_is_refused_by_its_clause(fault: Fault) -> None:
    _check_refused(fault, "inproc")


@pytest.mark.parametrize("fault", [Fault.CORRUPT, Fault.REORDER, Fault.NO_WINDOW, Fault.DEAF])
def test_a_planted_fault_is_refused_between_sockets_too(fault: Fault) -> None:
    _check_refused(fault, "zmq-ipc")


@pytest.mark.parametrize("clause", CLAUSES)
def test_the_same_wrapper_without_a_fault_keeps_every_clause(clause: str) -> None:
    _kit(None, patience_s=5.0).check(clause)


def test_a_node_that_lets_strangers_in_is_refused() -> None:
    def open_to_all(rank: int, *, token: bytes, window_bytes: int) -> TransportNode:
        return open_node("inproc", rank, window_bytes=window_bytes)

    with pytest.raises(ClauseBroken, match="a stranger was let in"):
        TransportKit(open_to_all, processes=False).check("strangers")


def test_a_transport_that_hangs_is_refused() -> None:
    class Hanging:
        peer, window_bytes = 1, 1 << 20

        def recv(self, tag: str, into: object) -> None:
            threading.Event().wait(30)
            raise CommTimeout("the thread that hung has gone on at last")

    kit = TransportKit(
        partial(open_node, "inproc"),
        processes=False,
        wrap=lambda transport: Hanging(),  # type: ignore[arg-type, return-value]
        patience_s=0.05,
        loss_s=0.05,
    )
    with pytest.raises(ClauseBroken, match="still blocks"):
        kit.check("bounded waits")


def test_every_clause_about_messages_has_a_planted_fault() -> None:
    assert set(CLAUSES) - set(CLAUSE_OF_FAULT.values()) == {"threads", "meets", "strangers", "leaves"}
