"""SIGKILL of a rank of a `hybrid` world: the others are told within seconds, nothing hangs, and they go on together."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hybrid.testing.rank_processes import RankProcesses

pytestmark = pytest.mark.timeout(180)
TOLD_WITHIN_S = 30.0


@pytest.fixture
def ranks() -> Iterator[RankProcesses]:
    with RankProcesses(3) as ranks:
        yield ranks


def _lose_a_rank(rank: int, _: int, store: str, size: int, phase: str) -> dict[str, Any]:
    """The last rank of the world kills itself in `phase`; what the others met, and when."""
    import torch
    import torch.distributed as dist

    from hybrid.testing.c10d_kit import world

    with world("hybrid", rank, size, store):
        dist.all_reduce(torch.ones(3))
        started_s = time.monotonic()
        try:
            _PHASES[phase](rank, rank == size - 1)
        except Exception as error:
            found = {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - started_s}
        else:
            found = {"kind": "", "text": "nothing was raised", "seconds": 0.0}
    return {**found, "threads": _threads()}


def _threads() -> list[str]:
    import threading

    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("futures", "group"))]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before_an_all_reduce(rank: int, victim: bool) -> None:
    import torch
    import torch.distributed as dist

    if victim:
        _die()
    dist.all_reduce(torch.ones(1000))


def _within_many_all_reduces(rank: int, victim: bool) -> None:
    import torch
    import torch.distributed as dist

    works = [dist.all_reduce(torch.ones(1 << 20), async_op=True) for _ in range(20)]
    if victim:
        works[3].wait()
        _die()
    for work in works:
        work.wait()


def _in_a_receive(rank: int, victim: bool) -> None:
    import torch
    import torch.distributed as dist

    if victim:
        _die()
    dist.recv(torch.ones(3), src=dist.get_world_size() - 1)


def _in_ddps_backward(rank: int, victim: bool) -> None:
    import torch
    from torch import nn

    model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))))
    loss = model(torch.ones(2, 64)).sum()
    if victim:
        model.module[2].weight.register_hook(lambda gradient: _die())  # type: ignore[union-attr, index]
    loss.backward()
    loss.backward()


_PHASES = {
    "before an all_reduce": _before_an_all_reduce,
    "within many all_reduces": _within_many_all_reduces,
    "in a receive": _in_a_receive,
    "in DDP's backward": _in_ddps_backward,
}


def _check_told(found: tuple[bool, Any], *kinds: str) -> None:
    ok, told = found
    assert ok, told
    assert told["kind"] in kinds, told
    assert "PeerLost" in told["kind"] + told["text"], told
    assert told["seconds"] < TOLD_WITHIN_S, told
    assert told["threads"] == []


def _run(ranks: RankProcesses, size: int, phase: str, *kinds: str) -> None:
    ranks.start(_lose_a_rank, ranks.new_store(), size, phase)
    for rank in range(size - 1):
        _check_told(ranks.result(rank, 90.0), *kinds)


@pytest.mark.slow
def test_those_that_are_left_are_told_and_make_a_new_world(ranks: RankProcesses) -> None:
    _run(ranks, 3, "within many all_reduces", "PeerLost")
    # torch's C++ carries the error out of the backward as a RuntimeError with its text.
    _run(ranks, 2, "in DDP's backward", "RuntimeError", "PeerLost")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before an all_reduce", "in a receive"])
def test_a_loss_at_another_phase_is_told(ranks: RankProcesses, phase: str) -> None:
    _run(ranks, 3, phase, "PeerLost")
