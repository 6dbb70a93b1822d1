"""A member that is killed at whatever phase of a collective: the others hear of it in time, and go on without it.

Two members are threads of this process; the third is a process that kills itself just before its nth message.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from hybrid.collectives import Group, open_edges
from hybrid.collectives.algorithms import ALGORITHMS
from hybrid.collectives.choose import DEFAULT_TABLE, Choice, Row
from hybrid.collectives.transport_group import TransportGroup
from hybrid.errors import CommError, PeerLost
from hybrid.testing.group_rig import Rig, at_once, everywhere, open_transport_world
from hybrid.transports import VARIANTS, Pending, Transport, open_node
from hybrid.transports.base import Buffer

VICTIM = 2
LOSS_S = 10.0
SEGMENT_BYTES = 16 << 10
NUM_ELEMENTS = 3 * SEGMENT_BYTES
RIG = Rig(open_world=partial(open_transport_world, "inproc"), patience_s=20.0)


class KilledAt(Transport):
    """Ends the process instead of sending its nth message."""

    def __init__(self, inner: Transport, left: list[int]) -> None:
        self.peer, self.window_bytes = inner.peer, inner.window_bytes
        self._inner, self._left = inner, left

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        self._left[0] -= 1
        if self._left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._inner.send(tag, buffers)

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        return self._inner.recv(tag, into)

    def close(self) -> None:
        self._inner.close()


def table(algorithm: str) -> tuple[Row, ...]:
    choice = Choice(algorithm=algorithm, segment_bytes=SEGMENT_BYTES)
    return (Row(operation="all_reduce", choice=choice), *DEFAULT_TABLE)


def group_of(rank: int, ranks: Sequence[int], edges: dict[int, Transport], name: str, algorithm: str) -> Group:
    mine = {at: edges[peer] for at, peer in enumerate(ranks) if peer != rank}
    position = list(ranks).index(rank)
    return TransportGroup(
        rank=position, ranks=ranks, edges=mine, name=name, timeout_s=RIG.patience_s, table=table(algorithm)
    )


def nursery(pipe: Connection) -> None:
    """Make victims: each is a copy of this process, which has imported all and has no threads."""
    torch.set_num_threads(1)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        child = os.fork()
        if child == 0:
            try:
                live_and_die(pipe, *order)
            finally:
                os._exit(1)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def live_and_die(pipe: Connection, variant: str, addresses: dict[int, str], algorithm: str, kill_at: int) -> None:
    node = open_node(variant, VICTIM)
    pipe.send(node.address)
    left = [kill_at]
    edges: dict[int, Transport] = {
        peer: KilledAt(edge, left) for peer, edge in open_edges(node, addresses, timeout_s=20.0).items()
    }
    group = group_of(VICTIM, range(3), edges, "all", algorithm)
    group.all_reduce(torch.ones(NUM_ELEMENTS)).wait()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def victims() -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=nursery, args=(there,), daemon=True)
    process.start()
    assert here.poll(60.0)
    here.recv()
    yield here
    here.send(None)
    process.join(20.0)
    process.kill()


def check_loss(victims: Any, variant: str, algorithm: str, kill_at: int) -> None:
    nodes = [open_node(variant, rank) for rank in range(2)]
    groups: list[Group] = []
    try:
        addresses = {node.rank: node.address for node in nodes}
        victims.send((variant, addresses, algorithm, kill_at))
        assert victims.poll(30.0)
        addresses[VICTIM] = victims.recv()
        edges = at_once(RIG, [partial(open_edges, node, addresses, timeout_s=20.0) for node in nodes])
        groups += [group_of(rank, range(3), edges[rank], "all", algorithm) for rank in range(2)]

        def outcome(rank: int) -> list[Exception | None]:
            return [ended(groups[rank], NUM_ELEMENTS), ended(groups[rank], 1)]

        began_s = time.monotonic()
        found = at_once(RIG, [partial(outcome, rank) for rank in range(2)])
        assert time.monotonic() - began_s < LOSS_S
        assert victims.poll(30.0)
        assert victims.recv() == -signal.SIGKILL
        # Who has all that the victim owed may end well; but nobody gets on to the next operation.
        for first, second in found:
            assert first is None or isinstance(first, PeerLost), first
            assert isinstance(second, PeerLost), second
        fresh = [group_of(rank, range(2), edges[rank], "those left", algorithm) for rank in range(2)]
        groups += fresh
        xs = [torch.ones(NUM_ELEMENTS) for _ in fresh]
        everywhere(RIG, fresh, lambda group: group.all_reduce(xs[group.rank]))
        assert all(bool((x == 2).all()) for x in xs)
    finally:
        for group in groups:
            group.close()
        for node in nodes:
            node.close()


def ended(group: Group, num_elements: int) -> Exception | None:
    try:
        group.all_reduce(torch.ones(num_elements)).wait(LOSS_S)
    except CommError as error:
        return error
    return None


def num_messages(algorithm: str) -> int:
    """Return how many messages the victim sends in an all-reduce."""
    program = ALGORITHMS["all_reduce"][algorithm](3, VICTIM, 0)
    num_segments = -(-4 * NUM_ELEMENTS // program.num_blocks // SEGMENT_BYTES)
    return num_segments * sum(len(step.sends) for step in program.steps)


@pytest.mark.parametrize("kill_at", [1, 4, 9])
@pytest.mark.parametrize("variant", ["tcp", "zmq-ipc"])
def test_others_hear_of_a_member_that_was_killed_and_go_on_without_it(victims, variant, kill_at) -> None:
    check_loss(victims, variant, "direct", kill_at)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", ALGORITHMS["all_reduce"])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "inproc"])
def test_others_hear_of_a_member_that_was_killed_before_any_of_its_messages(victims, variant, algorithm) -> None:
    for kill_at in range(1, num_messages(algorithm) + 2):
        check_loss(victims, variant, algorithm, kill_at)
