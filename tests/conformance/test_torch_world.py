"""How ranks of a `hybrid` world meet: which transport a pair takes, and who shares a host."""

import pytest

from hybrid.collectives.torch_facts import RankFacts, host_identity
from hybrid.collectives.torch_world import hosts_of, transport_between
from hybrid.errors import UserError


def _rank(rank: int, host: str, transport: str = "auto") -> RankFacts:
    return RankFacts(rank=rank, host=host, transport=transport)


@pytest.mark.parametrize(
    ("one", "other", "transport"),
    [
        (_rank(0, "a"), _rank(1, "a"), "shm"),
        (_rank(0, "a"), _rank(1, "b"), "tcp"),
        (_rank(0, "a", "zmq-tcp"), _rank(1, "a", "zmq-tcp"), "zmq-tcp"),
        (_rank(0, "a", "tcp-sealed"), _rank(1, "b", "tcp-sealed"), "tcp-sealed"),
    ],
)
def test_a_pair_takes_the_transport_that_spans_the_way(one: RankFacts, other: RankFacts, transport: str) -> None:
    assert transport_between(one, other) == transport == transport_between(other, one)


def test_transports_that_differ_or_stay_on_one_host_are_refused() -> None:
    with pytest.raises(UserError, match=r"ranks 0 and 1 were given different transports \(got 'tcp and auto'\)"):
        transport_between(_rank(0, "a", "tcp"), _rank(1, "a"))
    with pytest.raises(UserError, match=r"ranks 0 and 1 are on two hosts, and this transport stays on one"):
        transport_between(_rank(0, "a", "shm"), _rank(1, "b", "shm"))


def test_ranks_are_sorted_by_host_in_order_of_each_hosts_first() -> None:
    assert hosts_of([_rank(0, "b"), _rank(1, "a"), _rank(2, "b")]) == [[0, 2], [1]]


def test_a_host_knows_itself_again() -> None:
    assert host_identity() == host_identity()
