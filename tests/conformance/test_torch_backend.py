"""The torch.distributed backend `hybrid` keeps every clause of the c10d kit. A new transport is one id."""

from collections.abc import Iterator

import pytest

from hybrid.collectives.torch_options import HybridOptions
from hybrid.testing.c10d_kit import CLAUSES, run_clauses
from hybrid.testing.rank_processes import RankProcesses

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def found_over_shm(two_ranks: RankProcesses) -> dict[str, str]:
    """What each clause found wrong: one world serves them all."""
    return two_ranks.run(run_clauses, two_ranks.new_store(), None, timeout_s=120.0)[0]


@pytest.mark.parametrize("clause", CLAUSES)
def test_two_ranks_of_one_host_keep_the_clause(found_over_shm: dict[str, str], clause: str) -> None:
    assert found_over_shm.get(clause) is None


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "tcp-sealed", "zmq-ipc", "zmq-tcp"])
def test_two_ranks_keep_every_clause_over(two_ranks: RankProcesses, transport: str) -> None:
    options = HybridOptions(transport=transport)
    assert two_ranks.run(run_clauses, two_ranks.new_store(), options, timeout_s=120.0)[0] == {}


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks_keep_every_clause(size: int) -> None:
    with RankProcesses(size) as ranks:
        assert ranks.run(run_clauses, ranks.new_store(), None, timeout_s=200.0)[0] == {}
