"""Strangers by the thousand: nothing crashes, hangs or grows without bound, and the honest pair is not disturbed."""

from functools import partial

import pytest

from hybrid.testing.transport_fuzz import FuzzReport, fuzz_node
from hybrid.transports import VARIANTS, open_node

OVER_TCP = [name for name in ("zmq-tcp", "zmq-curve", "tcp", "tcp-sealed") if name in VARIANTS]
GROWTH_BYTES = 96 << 20


def check(report: FuzzReport, num_messages: int) -> None:
    assert report.num_messages >= num_messages
    assert report.num_connections > num_messages / 8
    assert report.num_recorded_bytes > 0
    assert report.num_honest > 0
    assert report.num_refused_kept <= 16
    assert report.growth_bytes < GROWTH_BYTES
    assert report.left_fds == 0


@pytest.mark.parametrize("variant", OVER_TCP)
def test_two_thousand_messages_of_strangers_do_not_disturb_an_honest_pair(variant):
    check(fuzz_node(partial(open_node, variant), num_messages=2_000, seed=1), 2_000)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", OVER_TCP)
def test_a_hundred_thousand_messages_of_strangers_do_not_disturb_an_honest_pair(variant):
    check(fuzz_node(partial(open_node, variant), num_messages=100_000, seed=2), 100_000)
