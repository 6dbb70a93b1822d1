"""Clauses of the c10d kit: sends and receives, works and futures, groups made and destroyed, refusals.

May import only torch and the kit's seat.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hybrid.testing.c10d_seat import Clause, Seat, all_values, check_close, check_refused, check_same, reduced, values

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

_LARGE = 5 << 20


def sends_and_receives(seat: Seat) -> None:
    """Blocking and not; both ends send first."""
    after, before = (seat.rank + 1) % seat.size, (seat.rank - 1) % seat.size
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        x = torch.empty(11, dtype=dtype)
        if seat.rank % 2 == 0:
            dist.send(values(seat.rank, 11, dtype), dst=after)
        if (before % 2 == 0) and before != seat.rank:
            assert dist.recv(x, src=before) == before
            check_same(x, values(before, 11, dtype), f"send of {dtype}")
    # Both ends send first, more than an edge holds; tags may be received in another order than they were sent.
    incoming = [torch.empty(_LARGE), torch.empty(3)]
    outgoing = [values(seat.rank, count, torch.float32) for count in (_LARGE, 3)]
    works = [dist.isend(x, dst=after, tag=tag) for tag, x in enumerate(outgoing)]
    works += [dist.irecv(x, src=before, tag=tag) for tag, x in reversed(list(enumerate(incoming)))]
    for work in works:
        work.wait()
    for x in incoming:
        check_same(x, values(before, len(x), torch.float32), "isend and irecv")


def batches_of_sends_and_receives(seat: Seat) -> None:
    """Take a batch in any order."""
    for sends_first in (True, False):
        peers = [peer for peer in range(seat.size) if peer != seat.rank]
        incoming = {peer: torch.empty(1000) for peer in peers}
        sends = [dist.P2POp(dist.isend, values(seat.rank, 1000, torch.float32, salt=peer), peer) for peer in peers]
        receives = [dist.P2POp(dist.irecv, incoming[peer], peer) for peer in peers]
        for work in dist.batch_isend_irecv(sends + receives if sends_first else receives + sends):
            work.wait()
        for peer, x in incoming.items():
            check_same(x, values(peer, 1000, torch.float32, salt=seat.rank), "batch_isend_irecv")


def a_strided_receive_lands_where_it_belongs(seat: Seat) -> None:
    """Sender and receiver may both be strided."""
    if seat.rank == 0:
        dist.send(values(0, (3, 4), torch.float32).t(), dst=1)
    elif seat.rank == 1:
        x = torch.zeros(3, 4).t()
        dist.recv(x, src=0)
        check_same(x.contiguous(), values(0, (3, 4), torch.float32).t().contiguous(), "a strided receive")


def works_end_in_any_order_of_waits(seat: Seat) -> None:
    """Several all_reduces are under way; the last is waited for first."""
    xs = [values(seat.rank, 1000, torch.float32, salt=salt) for salt in range(6)]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    for work in reversed(works):
        assert work.wait() is True
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None
    for salt, x in enumerate(xs):
        check_close(x, reduced(all_values(seat.size, 1000, torch.float32, salt), "SUM"), "asynchronous all_reduce")


def futures_hold_the_results(seat: Seat) -> None:
    """`get_future`, `then`, `wait_all`."""
    wanted = reduced(all_values(seat.size, 50, torch.float32), "SUM").sum()
    x = values(seat.rank, 50, torch.float32).view(5, 10).t()
    future = dist.all_reduce(x, async_op=True).get_future()
    total = future.then(lambda done: done.value()[0].sum()).wait()
    check_close(total, wanted, "future.then")
    check_close(future.wait()[0].sum(), wanted, "future.wait")
    works = [dist.all_reduce(values(seat.rank, 50, torch.float32), async_op=True) for _ in range(20)]
    for result in torch.futures.wait_all([work.get_future() for work in works]):
        check_close(result[0].sum(), wanted, "futures.wait_all")
    x = values(seat.rank, 50, torch.float32)
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    assert work.get_future().done()
    assert work.get_future() is work.get_future()
    check_same(work.result()[0], x, "result")


def groups_of_some_ranks(seat: Seat) -> None:
    """Several at work at once; ranks that are no members; groups of one."""
    subsets = [[0], [0, 1], list(range(1, seat.size)), list(range(seat.size))]
    groups = [dist.new_group(ranks) for ranks in subsets]
    pending = []
    for ranks, group in zip(subsets, groups, strict=True):
        if seat.rank not in ranks:
            assert group == dist.GroupMember.NON_GROUP_MEMBER
            continue
        x = values(seat.rank, 100, torch.float32)
        pending.append((ranks, x, dist.all_reduce(x, group=group, async_op=True)))
        assert dist.get_backend(group) == dist.get_backend()
        assert dist.get_process_group_ranks(group) == ranks
    for ranks, x, work in reversed(pending):
        work.wait()
        check_close(x, reduced([values(rank, 100, torch.float32) for rank in ranks], "SUM"), f"group {ranks}")
    for ranks, group in zip(subsets, groups, strict=True):
        if seat.rank in ranks:
            root = torch.full((1,), float(seat.rank))
            dist.broadcast(root, src=ranks[-1], group=group)
            assert root.item() == ranks[-1]
            dist.destroy_process_group(group)
    own, _ = dist.new_subgroups(group_size=1)
    dist.barrier(own)
    dist.destroy_process_group(own)


def groups_made_again_and_again_leave_nothing(seat: Seat) -> None:
    """No file, thread or segment stays."""

    def held() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(os.listdir("/dev/shm"))

    def one() -> None:
        group = dist.new_group(list(range(seat.size)))
        x = torch.ones(10)
        dist.all_reduce(x, group=group, async_op=True).get_future().wait()
        dist.destroy_process_group(group)

    one()
    dist.barrier(seat.gloo)
    before = held()
    for _ in range(10):
        one()
    dist.barrier(seat.gloo)
    after = held()
    assert after[0] <= before[0], f"files: {before[0]}, then {after[0]}"
    assert after[1] <= before[1], f"threads: {before[1]}, then {after[1]}"
    names = [thread.name for thread in threading.enumerate()]
    assert len([name for name in names if name.startswith("futures")]) <= 1, names


def a_wait_ends_with_its_time_out(seat: Seat) -> None:
    """And the operation can be waited for again."""
    from hybrid.errors import CommTimeout

    group = dist.new_group(list(range(seat.size)))
    if seat.rank == 0:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        check_refused(lambda: work.wait(timedelta(milliseconds=50)), CommTimeout)
        assert not work.is_completed()
    dist.barrier(seat.gloo)
    if seat.rank != 0:
        dist.all_reduce(torch.ones(3), group=group)
    else:
        assert work.wait() is True
        assert work.is_success()
    dist.destroy_process_group(group)
    short = dist.new_group(list(range(seat.size)), timeout=timedelta(milliseconds=50))
    if seat.rank == 0:
        check_refused(lambda: dist.barrier(short), CommTimeout)
    dist.barrier(seat.gloo)
    dist.destroy_process_group(short)


def a_group_that_was_shut_down_says_so(seat: Seat) -> None:
    """End with PeerLost what was under way and what is called later."""
    from hybrid.errors import PeerLost

    group = dist.new_group(list(range(seat.size)))
    work = None
    if seat.rank == 0:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        future = work.get_future()
    group.shutdown()
    if work is not None:
        check_refused(work.wait, PeerLost)
        assert isinstance(work.exception(), PeerLost)
        assert work.is_completed()
        assert not work.is_success()
        # As torch carries errors of futures, into C++ and out of it.
        check_refused(future.wait, RuntimeError, "PeerLost")
    check_refused(lambda: dist.all_reduce(torch.ones(3), group=group), PeerLost)
    dist.barrier(seat.gloo)


def wrong_uses_say_what_is_wrong(seat: Seat) -> None:
    """Refused at the call, on every rank alike."""
    from hybrid.errors import UnsupportedFormat, UserError

    sparse = torch.eye(3).to_sparse()
    check_refused(lambda: dist.all_reduce(sparse), UnsupportedFormat, "dense", "sparse")
    check_refused(lambda: dist.all_reduce(torch.ones(3, device="meta")), UnsupportedFormat, "meta")
    eighth = torch.ones(3).to(torch.float8_e4m3fn)
    check_refused(lambda: dist.reduce(eighth, dst=0), UnsupportedFormat, "float8_e4m3fn")
    average = dist.ReduceOp.AVG
    check_refused(lambda: dist.all_reduce(torch.ones(3, dtype=torch.int32), op=average), UnsupportedFormat, "average")
    out = torch.empty(seat.size * 2 + 1)
    check_refused(lambda: dist.all_gather_single(out, torch.ones(2)), UserError, f"{seat.size} times")
    rows = torch.ones(2 * seat.size + 1, 2)
    check_refused(lambda: dist.all_to_all_single(rows.clone(), rows), UserError, "divide")
    check_refused(lambda: dist.all_to_all_single(rows.clone(), rows, [1] * seat.size), UserError, "split sizes")
    check_refused(lambda: dist.isend(torch.ones(1), dst=seat.rank), UserError, "itself")
    check_refused(lambda: dist.recv(torch.ones(1)), UserError, "Name the source")
    check_refused(lambda: dist.new_group(pg_options={"transport": "tcp"}), UserError, "HybridOptions", "dict")
    bits = dist.ReduceOp.BAND
    check_refused(lambda: dist.reduce(torch.ones(3, dtype=torch.int32), 0, op=bits), UnsupportedFormat, "all_reduce")
    check_refused(lambda: dist.monitored_barrier(), ValueError, "GLOO")
    dist.barrier()


LIFE_CLAUSES: tuple[Clause, ...] = (
    sends_and_receives,
    batches_of_sends_and_receives,
    a_strided_receive_lands_where_it_belongs,
    works_end_in_any_order_of_waits,
    futures_hold_the_results,
    groups_of_some_ranks,
    groups_made_again_and_again_leave_nothing,
    a_wait_ends_with_its_time_out,
    a_group_that_was_shut_down_says_so,
    wrong_uses_say_what_is_wrong,
)
