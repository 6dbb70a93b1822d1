"""Every rank that measures gets the same rows."""

from functools import partial
from itertools import count

from hybrid.collectives import open_edges
from hybrid.collectives.choose import Row
from hybrid.collectives.measure import measure_table
from hybrid.testing.group_rig import Rig, at_once, open_transport_world
from hybrid.transports import open_node


def test_all_ranks_measure_the_same_table() -> None:
    rig = Rig(open_world=partial(open_transport_world, "inproc"))
    nodes = [open_node("inproc", rank) for rank in range(2)]
    addresses = {node.rank: node.address for node in nodes}

    def measure(rank: int) -> list[Row]:
        ticks = count()
        edges = open_edges(nodes[rank], addresses, timeout_s=10.0)
        rows, timings = measure_table(
            edges, rank, 2, link="inproc", sizes=(1000, 40_000), segments=(10_000,), turns=2,
            clock=lambda: next(ticks) * (1.0 + rank),
        )  # fmt: skip
        assert all(timing.median_s == 2.0 for timing in timings), "the slowest rank's clock decides"
        return rows

    first, second = at_once(rig, [partial(measure, rank) for rank in range(2)])
    assert first == second
    assert {row.operation for row in first} == {"all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce"}
    for node in nodes:
        node.close()
