"""A group of islands sends each element across once, over every rank's own link, in the form that its codec says."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from hybrid.collectives import Group, open_edges, open_group, open_island_group
from hybrid.collectives.codecs import Codec, open_codec
from hybrid.testing.group_rig import Rig, at_once, everywhere, open_transport_world
from hybrid.transports import Pending, Transport, open_node
from hybrid.transports.base import Buffer, as_bytes

RIG = Rig(open_world=partial(open_transport_world, "inproc"))


class Counted(Transport):
    """Counts the bytes that are sent."""

    def __init__(self, inner: Transport, sent: Counter[tuple[int, int]], rank: int) -> None:
        self.peer, self.window_bytes = inner.peer, inner.window_bytes
        self._inner, self._sent, self._rank = inner, sent, rank

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        self._sent[self._rank, self.peer] += sum(as_bytes(buffer).nbytes for buffer in buffers)
        return self._inner.send(tag, buffers)

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        return self._inner.recv(tag, into)

    def close(self) -> None:
        self._inner.close()


def reduce_all(
    islands: list[list[int]], xs: list[torch.Tensor], *, bandwidths: dict[int, float] | None = None, codec: Codec | None
) -> Counter[tuple[int, int]]:
    """Reduce over islands of threads; return the bytes sent by (from, to)."""
    sent: Counter[tuple[int, int]] = Counter()
    nodes = [open_node("inproc", rank) for rank in range(len(xs))]
    addresses = {node.rank: node.address for node in nodes}

    def join(rank: int) -> Group:
        edges: dict[int, Transport] = {
            peer: Counted(edge, sent, rank) for peer, edge in open_edges(nodes[rank], addresses, timeout_s=10.0).items()
        }
        island = next(island for island in islands if rank in island)
        inner = open_group(edges, island, rank, name="inside", timeout_s=10.0)
        return open_island_group(
            edges, islands, rank, inner, name="all", timeout_s=10.0, bandwidth_of_rank=bandwidths, codec=codec,
            chunk_bytes=100_000,
        )  # fmt: skip

    groups = at_once(RIG, [partial(join, rank) for rank in range(len(xs))])
    try:
        everywhere(RIG, groups, lambda group: group.all_reduce(xs[group.ranks[group.rank]]))
    finally:
        for group in groups:
            group.close()
        for node in nodes:
            node.close()
    return sent


def crossed(sent: Counter[tuple[int, int]], island: list[int]) -> dict[int, int]:
    """Return what each member of an island has sent to others."""
    return {rank: sum(n for (a, b), n in sent.items() if a == rank and b not in island) for rank in island}


@pytest.mark.parametrize(("codec", "share"), [(None, 1.0), ("bf16", 0.5), ("fp8", 0.26)])
def test_bytes_between_islands_fall_with_the_codec_and_all_hold_the_same_bits(codec: str | None, share: float) -> None:
    xs = [torch.randn(100_000, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    wanted = torch.stack(xs).double().sum(0)
    sent = reduce_all([[0, 1], [2, 3]], xs, codec=None if codec is None else open_codec(codec))
    assert all(torch.equal(x, xs[0]) for x in xs)
    slack = {None: 1e-6, "bf16": 2**-8, "fp8": 2**-4}[codec]
    assert float((xs[0] - wanted).abs().max()) <= slack * float(wanted.abs().max()) * 2
    for island in ([0, 1], [2, 3]):
        for size_bytes in crossed(sent, island).values():
            assert size_bytes == pytest.approx(400_000 / 2 * share, rel=0.06)


def test_links_carry_what_they_are_good_for() -> None:
    xs = [torch.ones(100_000) for _ in range(5)]
    sent = reduce_all([[0, 1, 2], [3, 4]], xs, bandwidths={0: 1, 1: 1, 2: 2, 3: 3, 4: 1}, codec=None)
    assert all(bool((x == 5).all()) for x in xs)
    one, two = crossed(sent, [0, 1, 2]), crossed(sent, [3, 4])
    assert [one[rank] / 400_000 for rank in (0, 1, 2)] == pytest.approx([0.25, 0.25, 0.5], rel=0.06)
    assert [two[rank] / 400_000 for rank in (3, 4)] == pytest.approx([0.75, 0.25], rel=0.06)


def test_three_islands_of_other_sizes_hold_the_same_bits() -> None:
    xs = [torch.randn(10_007, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16) for rank in range(6)]
    wanted = torch.stack(xs).double().sum(0)
    reduce_all([[0, 1, 2], [3], [4, 5]], xs, codec=open_codec("fp8"))
    assert all(torch.equal(x, xs[0]) for x in xs)
    assert float((xs[0].double() - wanted).abs().max()) <= 0.1 * float(wanted.abs().max())


def test_groups_that_do_not_fit_the_islands_are_refused() -> None:
    from hybrid.collectives.hierarchical import HierarchicalGroup
    from hybrid.errors import UserError

    with RIG.world(2) as members:
        flat, other = members.world.open((0, 1)), members.open((0, 1))
        with pytest.raises(UserError, match="takes its island's group"):
            HierarchicalGroup(
                flat=flat[0],  # type: ignore[arg-type]
                islands=[[0], [1]],
                inner=other[0],
                cross={(0, 1): [other[0]]},
                weight_of_position=[1.0, 1.0],
            )
        members.opened += flat
