"""Every transport keeps every clause of the contract. A new variant is one id here."""

from functools import partial

import pytest

from hybrid.testing.transport_kit import CLAUSES, TransportKit
from hybrid.transports import VARIANTS, TransportNode, open_node
from hybrid.transports.emulated import EmulatedNode, LinkShape, SharedLink

KIT_OF_VARIANT = {
    "inproc": TransportKit(partial(open_node, "inproc"), processes=False),
    "shm": TransportKit(partial(open_node, "shm")),
    "zmq-tcp": TransportKit(partial(open_node, "zmq-tcp")),
    "zmq-curve": TransportKit(partial(open_node, "zmq-curve")),
    "zmq-ipc": TransportKit(partial(open_node, "zmq-ipc")),
    "tcp": TransportKit(partial(open_node, "tcp")),
    "tcp-sealed": TransportKit(partial(open_node, "tcp-sealed")),
}


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("variant", KIT_OF_VARIANT)
def test_the_variant_keeps_the_clause(variant: str, clause: str) -> None:
    KIT_OF_VARIANT[variant].check(clause)


@pytest.mark.parametrize("clause", CLAUSES)
def test_an_emulated_link_around_a_transport_keeps_the_clause(clause: str) -> None:
    TransportKit(_open_emulated_node, processes=False).check(clause)


def _open_emulated_node(rank: int, *, token: bytes, window_bytes: int) -> TransportNode:
    inner = open_node("inproc", rank, token=token, window_bytes=window_bytes + window_bytes // 8)
    link = SharedLink(LinkShape(latency_s=0.001, bandwidth_bytes_per_s=2e9, jitter_s=0.001), seed=rank)
    return EmulatedNode(inner, lambda peer: link)


def test_every_variant_of_the_table_is_put_through_the_kit() -> None:
    assert set(KIT_OF_VARIANT) == set(VARIANTS)
