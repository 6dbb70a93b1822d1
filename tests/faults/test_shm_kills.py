"""A process that shares memory is killed at a planned moment: the others are told, go on, and nothing stays behind."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from hybrid.collectives import open_edges, open_shm_group, shm_group, shm_steps
from hybrid.collectives.shm_board import Board
from hybrid.collectives.shm_group import ShmGroup
from hybrid.errors import PeerLost
from hybrid.transports import open_node
from hybrid.transports.base import Transport, TransportNode
from hybrid.transports.shm_segment import Lane

PATIENCE_S = 20.0
LONG = 300_000
POSTS = 1 + 1 + 2 + 3
"""Of `_work` on each member: a short sum, a bucket, its sum, and a long sum of two tiles."""
Pipe: TypeAlias = "Connection[Any, Any]"


def _die_at(owner: object, name: str, nth_call: int) -> None:
    """Let this process kill itself when `owner.name` is called for the nth time (from 0)."""
    planted: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == nth_call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return planted(*args, **kwargs)

    setattr(owner, name, dying)


PLACES: list[tuple[str, int]] = [
    ("meeting", 0),
    *[("post", number) for number in range(POSTS)],
    ("fold", 1),
    ("fold", 3),
]
OWNER_OF_PLACE: dict[str, tuple[object, str]] = {
    "meeting": (shm_group, "meet"),
    "post": (Board, "post"),
    "fold": (shm_steps, "fold"),
}


def _work(group: ShmGroup) -> None:
    """Go through every program that reduces."""
    group.all_reduce(torch.ones(10)).wait(PATIENCE_S)
    bucket = group.bucket(LONG, torch.float32)
    group.all_reduce(bucket).wait(PATIENCE_S)
    group.all_reduce(torch.ones(LONG)).wait(PATIENCE_S)


@contextmanager
def _forked(target: Callable[..., None], *args: Any) -> Iterator[tuple[multiprocessing.process.BaseProcess, Pipe]]:
    """Yield a child, forked before this process opens anything, and the pipe to it."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=target, args=(*args, there), daemon=True)
    child.start()
    there.close()
    try:
        yield child, here
    finally:
        child.kill()
        child.join()
        here.close()


def _member(rank: int, place: tuple[str, int], pipe: Pipe) -> None:
    """Take part until killed."""
    torch.set_num_threads(1)
    _die_at(*OWNER_OF_PLACE[place[0]], place[1])
    node = open_node("shm", rank)
    pipe.send(node.address)
    edges = open_edges(node, pipe.recv(), timeout_s=PATIENCE_S)
    _work(open_shm_group(edges, range(3), rank, name="first", timeout_s=PATIENCE_S))
    pipe.recv()  # until killed, if nobody was


def _cases() -> list[Any]:
    """Return every place and victim; in the quick run the two take turns."""
    return [
        pytest.param(place, victim, id=f"{place[0]} {place[1]} of {victim}", marks=[pytest.mark.slow] * (turn % 2))
        for number, place in enumerate(PLACES)
        for turn, victim in enumerate((0, 2), start=number)
    ]


@pytest.mark.parametrize(("place", "victim"), _cases())
def test_who_shares_memory_with_a_killed_member_is_told_and_makes_a_new_group_at_once(
    place: tuple[str, int], victim: int
) -> None:
    survivors = [rank for rank in range(3) if rank != victim]
    gc.collect()
    before = _memory_of(os.getpid())
    with _forked(_member, victim, place) as (child, pipe):
        nodes = {rank: open_node("shm", rank) for rank in survivors}
        addresses = {rank: node.address for rank, node in nodes.items()} | {victim: pipe.recv()}
        pipe.send(addresses)
        outcomes: dict[int, str] = {}

        def survive(rank: int) -> None:
            edges = open_edges(nodes[rank], addresses, timeout_s=PATIENCE_S)
            outcomes[rank] = _survive(edges, rank, survivors)

        threads = [threading.Thread(target=survive, args=(rank,), daemon=True) for rank in survivors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE_S)
        child.join(PATIENCE_S)
        assert child.exitcode == -signal.SIGKILL
        assert outcomes == dict.fromkeys(survivors, "told, and went on")
        for node in nodes.values():
            node.close()
    gc.collect()  # what only a caught error's traceback still holds
    assert _memory_of(os.getpid()) == before


def _survive(edges: dict[int, Transport], rank: int, survivors: list[int]) -> str:
    group = open_shm_group(edges, range(3), rank, name="first", timeout_s=PATIENCE_S)
    try:
        _work(group)
        group.barrier().wait(PATIENCE_S)
        return "nobody was missed"
    except PeerLost:
        pass
    finally:
        group.close()
    again = open_shm_group(edges, survivors, rank, name="again", timeout_s=PATIENCE_S)
    x = torch.full((LONG,), float(rank))
    again.all_reduce(x).wait(PATIENCE_S)
    again.close()
    return "told, and went on" if bool((x == float(sum(survivors))).all()) else f"summed to {x[:3].tolist()}"


def _sender(dies_at_note: int, pipe: Pipe) -> None:
    """Send a short message, then one of many pieces, and die among them."""
    node = open_node("shm", 0)
    pipe.send(node.address)
    edge = node.open(1, pipe.recv(), timeout_s=PATIENCE_S)
    _die_at(Lane, "note", dies_at_note)
    edge.send("short", [b"short"]).wait(PATIENCE_S)
    edge.send("long", [bytes(8 << 20)]).wait(PATIENCE_S)
    pipe.recv()


@pytest.mark.parametrize("dies_at_note", [1, 2, 7])
def test_a_sender_killed_within_a_message_leaves_what_it_had_sent_whole(dies_at_note: int) -> None:
    with _forked(_sender, dies_at_note) as (child, pipe):
        node, edge = _meet(pipe)
        long = edge.recv("long", [memoryview(bytearray(8 << 20))])
        child.join(PATIENCE_S)
        with pytest.raises(PeerLost):
            long.wait(PATIENCE_S)
        landed = memoryview(bytearray(5))
        edge.recv("short", [landed]).wait(PATIENCE_S)
        assert bytes(landed) == b"short"
        node.close()


def _receiver(dies_at_return: int, pipe: Pipe) -> None:
    node = open_node("shm", 0)
    pipe.send(node.address)
    edge = node.open(1, pipe.recv(), timeout_s=PATIENCE_S)
    _die_at(Lane, "give_back", dies_at_return)
    edge.recv("long", [memoryview(bytearray(256 << 20))]).wait(PATIENCE_S)


@pytest.mark.parametrize("dies_at_return", [0, 3])
def test_a_sender_whose_receiver_is_killed_within_a_message_is_told(dies_at_return: int) -> None:
    with _forked(_receiver, dies_at_return) as (child, pipe):
        node, edge = _meet(pipe)
        with pytest.raises(PeerLost):
            edge.send("long", [bytes(256 << 20)]).wait(PATIENCE_S)
        child.join(PATIENCE_S)
        node.close()


def _meet(pipe: Pipe) -> tuple[TransportNode, Transport]:
    node = open_node("shm", 1)
    address = pipe.recv()
    pipe.send(node.address)
    return node, node.open(0, address, timeout_s=PATIENCE_S)


def _one_of_two(rank: int, pipe: Pipe) -> None:
    torch.set_num_threads(1)
    node = open_node("shm", rank)
    pipe.send(node.address)
    edges = open_edges(node, pipe.recv(), timeout_s=PATIENCE_S)
    group = open_shm_group(edges, range(2), rank, name="both", timeout_s=PATIENCE_S)
    bucket = group.bucket(LONG, torch.float32)
    group.all_reduce(bucket).wait(PATIENCE_S)
    pipe.send("all is open")
    pipe.recv()


def test_nothing_is_left_when_both_who_share_memory_are_killed() -> None:
    files = sorted(os.listdir("/dev/shm"))
    with _forked(_one_of_two, 0) as (low, to_low), _forked(_one_of_two, 1) as (high, to_high):
        addresses = {0: to_low.recv(), 1: to_high.recv()}
        for pipe in (to_low, to_high):
            pipe.send(addresses)
        assert [pipe.recv() for pipe in (to_low, to_high)] == ["all is open"] * 2
        assert low.pid is not None
        assert high.pid is not None
        inodes = _memory_of(low.pid)
        assert len(inodes) >= 3, "an edge, a board and a bucket are shared"
        assert inodes == _memory_of(high.pid)
        for child in (low, high):
            child.kill()
            child.join(PATIENCE_S)
        others = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        assert not any(inodes & _memory_of(pid) for pid in others)
    assert sorted(os.listdir("/dev/shm")) == files


def _memory_of(pid: int) -> set[str]:
    """Return the inodes of the shared memory that a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in lines if "memfd:hybrid-" in line}
