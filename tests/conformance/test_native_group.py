"""A vendor's own group (gloo here) keeps the clauses of results, order and misuse, and serves inside an island."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from hybrid.collectives import Group, open_edges, open_island_group
from hybrid.collectives.native_group import NativeGroup
from hybrid.errors import CommTimeout, ProtocolError, UserError
from hybrid.testing.group_kit import GroupKit
from hybrid.testing.group_rig import Rig, World, at_once, everywhere, open_transport_world
from hybrid.transports import open_node

CLAUSES = ("order", "asynchronous", "in place", "same bits", "numerics", "reductions", "moves", "uneven", "large")
RIG = Rig(open_world=partial(open_transport_world, "inproc"))


class GlooWorld(World):
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._store, self._num_groups = timeout_s, dist.HashStore(), 0

    def open(self, ranks: Sequence[int]) -> list[Group]:
        self._num_groups += 1
        store = dist.PrefixStore(str(self._num_groups), self._store)

        def join(position: int) -> Group:
            gloo = dist.ProcessGroupGloo(store, position, len(ranks), timedelta(seconds=60))
            return NativeGroup(gloo, ranks=ranks, timeout_s=self._timeout_s)

        return at_once(RIG, [partial(join, position) for position in range(len(ranks))])

    def lose(self, rank: int) -> None:
        raise NotImplementedError


@contextmanager
def open_gloo_world(size: int, *, timeout_s: float) -> Iterator[World]:
    del size
    yield GlooWorld(timeout_s)


@pytest.mark.parametrize("clause", CLAUSES)
def test_a_native_group_keeps_the_clause(clause: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.int16, torch.bool)
    GroupKit(open_gloo_world, sizes=(1, 2, 3), dtypes=dtypes, counts=(0, 1001)).check(clause)


def test_a_wait_of_a_native_group_ends_in_time_and_may_be_repeated() -> None:
    a, b = GlooWorld(10.0).open((0, 1))
    x, y = torch.ones(3), torch.ones(3)
    work = a.all_reduce(x)
    with pytest.raises(CommTimeout):
        work.wait(0.05)
    at_once(RIG, [partial(each.wait, 10.0) for each in (b.all_reduce(y), work)])
    assert x.tolist() == y.tolist() == [2.0] * 3
    for group in (a, b):
        group.close()


def test_a_native_group_refuses_what_does_not_fit() -> None:
    groups = GlooWorld(10.0).open((0, 1))
    with pytest.raises(UserError, match="sends and receives"):
        groups[0].send(torch.ones(1), 1)

    def outcome(group: Group) -> type[Exception] | None:
        try:
            group.all_reduce(torch.ones(3 + group.rank)).wait()
        except ProtocolError as error:
            return type(error)
        return None

    assert at_once(RIG, [partial(outcome, group) for group in groups]) == [ProtocolError] * 2
    for group in groups:
        group.close()


def test_islands_reduce_inside_by_their_own_library() -> None:
    islands, world = [[0, 1], [2, 3, 4]], GlooWorld(10.0)
    inner = {rank: group for island in islands for rank, group in zip(island, world.open(island), strict=True)}
    nodes = [open_node("inproc", rank) for rank in range(5)]
    addresses = {node.rank: node.address for node in nodes}

    def join(rank: int) -> Group:
        edges = open_edges(nodes[rank], addresses, timeout_s=10.0)
        return open_island_group(edges, islands, rank, inner[rank], name="all", timeout_s=10.0, chunk_bytes=4000)

    groups = at_once(RIG, [partial(join, rank) for rank in range(5)])
    xs = [torch.randn(3001, generator=torch.Generator().manual_seed(rank)) for rank in range(5)]
    wanted = torch.stack(xs).double().sum(0).float()
    everywhere(RIG, groups, lambda group: group.all_reduce(xs[group.rank]))
    torch.testing.assert_close(xs[0], wanted)
    assert all(torch.equal(x, xs[0]) for x in xs)
    for closing in (*groups, *nodes):
        closing.close()
