"""Groups over transports do what their contract says."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from hybrid.collectives import Group, ReduceOp, open_edges, open_group
from hybrid.transports import open_node


def at_once(calls: list[Callable[[], None]]) -> None:
    errors: list[Exception] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


@contextmanager
def open_world(variant: str, size: int) -> Iterator[list[Group]]:
    with ExitStack() as stack:
        nodes = [open_node(variant, rank) for rank in range(size)]
        for node in nodes:
            stack.callback(node.close)
        addresses = {node.rank: node.address for node in nodes}
        groups: list[Group | None] = [None] * size

        def join(rank: int) -> None:
            edges = open_edges(nodes[rank], addresses, timeout_s=10)
            groups[rank] = open_group(edges, range(size), rank, name="world", timeout_s=10)

        at_once([lambda rank=rank: join(rank) for rank in range(size)])
        opened = [group for group in groups if group is not None]
        for group in opened:
            stack.callback(group.close)
        yield opened


@pytest.mark.parametrize("variant", ["inproc", "zmq-ipc"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_member_gets_the_same_sum(variant: str, size: int) -> None:
    with open_world(variant, size) as groups:
        for num_elements in (0, 1, 1001, 300_001):
            xs = [torch.randn(num_elements, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
            wanted = torch.stack(xs).double().sum(0).float()
            at_once([lambda g=g, x=x: g.all_reduce(x, ReduceOp.SUM).wait() for g, x in zip(groups, xs, strict=True)])
            torch.testing.assert_close(xs[0], wanted)
            assert all(torch.equal(x, xs[0]) for x in xs)
