"""Every transport keeps every clause of the contract. A new variant is one id here."""

from functools import partial

import pytest

from hybrid.testing.transport_kit import CLAUSES, TransportKit
from hybrid.transports import VARIANTS, open_node

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


def test_every_variant_of_the_table_is_put_through_the_kit() -> None:
    assert set(KIT_OF_VARIANT) == set(VARIANTS)
