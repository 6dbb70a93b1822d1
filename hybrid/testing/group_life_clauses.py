"""The clauses of the group contract about order, waits, loss, misuse and close.

As in `group_clauses.py`. May import only torch, `errors`, `collectives` and the kit's other parts.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hybrid.collectives import Group, ReduceOp, Work
from hybrid.errors import CommError, CommTimeout, PeerLost, ProtocolError, UnsupportedFormat, UserError
from hybrid.testing.group_rig import Broken, Members, Rig, at_once, demand, everywhere, expect

_SHORT_S = 0.1
_SLACK_S = 0.5
_LARGE = 1 << 20


def order(rig: Rig) -> None:
    """Check that what is called first is done first, and that groups over the same ranks do not hold each other up."""
    size = max(rig.sizes)
    with rig.world(size) as members:
        groups, others = members.open(range(size)), members.open(range(size))
        xs = [torch.ones(100, dtype=torch.float64) for _ in groups]

        def chain(rank: int) -> None:
            works = []
            for number in range(3):
                works.append(groups[rank].all_reduce(xs[rank], ReduceOp.SUM))
                works.append(groups[rank].broadcast(xs[rank], number % size))
                works.append(groups[rank].all_reduce(xs[rank], ReduceOp.PRODUCT))
            for work in reversed(works):
                work.wait(rig.patience_s)

        at_once(rig, [partial(chain, rank) for rank in range(size)])
        wanted = 1.0
        for _ in range(3):
            wanted = (size * wanted) ** size
        in_order = all(torch.allclose(x, torch.full_like(x, wanted), rtol=1e-9) for x in xs)
        demand(in_order, "operations are not run in the order of their calls")
        _crossed(rig, groups, others)


def _crossed(rig: Rig, groups: Sequence[Group], others: Sequence[Group]) -> None:
    xs = [torch.ones(_LARGE) for _ in groups]
    ys = [torch.full((_LARGE,), 2.0) for _ in groups]

    def cross(rank: int) -> None:
        pair = [(groups[rank], xs[rank]), (others[rank], ys[rank])]
        works = [group.all_reduce(x) for group, x in (pair if rank % 2 else pair[::-1])]
        for work in works:
            work.wait(rig.patience_s)

    at_once(rig, [partial(cross, rank) for rank in range(len(groups))])
    size = len(groups)
    right = all(bool((x == size).all()) for x in xs) and all(bool((y == 2 * size).all()) for y in ys)
    demand(right, "two groups at work at once have mixed up their tensors")


def asynchronous(rig: Rig) -> None:
    """Check that a call returns before the others have called, that `done` tells the end, and no wait is needed."""
    size = max(rig.sizes)
    with rig.groups(size) as groups:
        xs = [torch.ones(_LARGE) for _ in groups]
        began_s = time.monotonic()
        works: list[Work] = [groups[0].all_reduce(xs[0])]
        demand(time.monotonic() - began_s < _SLACK_S, "a call does not return before the other members have called")
        demand(not works[0].done(), "an operation is done before the other members have called it")
        works += [group.all_reduce(xs[group.rank]) for group in groups[1:]]
        # Nobody waits for rank 0's: it must move on by itself, or the others' could not end.
        at_once(rig, [partial(work.wait, rig.patience_s) for work in works[1:]])
        works[0].wait(rig.patience_s)
        demand(works[0].done(), "an operation that was waited for is not done")
        demand(all(bool((x == size).all()) for x in xs), "a wait has returned before the result was there")
        works[0].wait(0.0)


def bounded_waits(rig: Rig) -> None:
    """Check that a wait ends with CommTimeout in time, and that the operation can be waited for again."""
    with rig.groups(2) as groups:
        x, y = torch.ones(10), torch.ones(10)
        work = groups[0].all_reduce(x)
        for timeout_s in (0.0, _SHORT_S, _SHORT_S):
            _demand_timeout(partial(work.wait, timeout_s), timeout_s)
        landing = torch.empty(10)
        receive = groups[0].recv(landing, 1)
        _demand_timeout(lambda: receive.wait(_SHORT_S), _SHORT_S)
        at_once(rig, [partial(each.wait, rig.patience_s) for each in (groups[1].all_reduce(y), work)])
        demand(bool((x == 2).all()), "an operation that was waited for again has another result")
        at_once(rig, [partial(each.wait, rig.patience_s) for each in (groups[1].send(y, 0), receive)])
        demand(bool((landing == 2).all()), "a receive that was waited for again has another result")
    with rig.open_world(2, timeout_s=2 * _SHORT_S) as world:
        members = Members(rig, world)
        try:
            work = members.open((0, 1))[0].barrier()
            _demand_timeout(work.wait, 2 * _SHORT_S)
        finally:
            members.close()


def _demand_timeout(wait: Callable[[], None], timeout_s: float) -> None:
    began_s = time.monotonic()
    with expect(CommTimeout, otherwise="a wait for an operation that others have not called returned"):
        wait()
    took_s = time.monotonic() - began_s
    demand(timeout_s - 0.02 <= took_s <= timeout_s + _SLACK_S, f"a wait of {timeout_s} s took {took_s:.2f} s")


def loss_is_told(rig: Rig) -> None:
    """Check that all hear of a member's loss, whatever they wait for, and can make a new group at once."""
    for count in (1, _LARGE):
        with rig.world(3) as members:
            groups = members.open(range(3))
            xs = [torch.ones(count) for _ in range(3)]
            works = [group.all_reduce(x) for group, x in zip(groups[:2], xs, strict=False)]
            members.world.lose(2)
            for rank, work in enumerate(works):
                _demand_lost(rig, work, f"rank {rank}, in an all_reduce of {count} whose rank 2 was lost,")
            for group in groups[:2]:
                _demand_lost(rig, group.barrier(), "an operation called after the loss of a member")
            fresh = members.open((0, 1))
            ys = [torch.ones(100) for _ in fresh]
            _sum_up(rig, fresh, ys)
            demand(bool((ys[0] == 2).all()), "a new group of those that are left gives another result")
    _leaver(rig)


def _sum_up(rig: Rig, groups: Sequence[Group], xs: Sequence[Tensor]) -> None:
    everywhere(rig, groups, lambda group: group.all_reduce(xs[group.rank]))


def _leaver(rig: Rig) -> None:
    """Who closes after its part is done harms no one's operation; the next one is told."""
    with rig.groups(3) as groups:
        xs = [torch.ones(_LARGE) for _ in groups]

        def reduce_and_leave(rank: int) -> None:
            groups[rank].all_reduce(xs[rank]).wait(rig.patience_s)
            if rank == 0:
                groups[rank].close()

        try:
            at_once(rig, [partial(reduce_and_leave, rank) for rank in range(3)])
        except PeerLost:
            raise Broken("a member that closed after its last operation has broken that operation for others") from None
        demand(all(bool((x == 3).all()) for x in xs), "a member that closed early has spoilt the others' result")
        works = [group.all_reduce(xs[group.rank]) for group in groups[1:]]
        for work in works:
            _demand_lost(rig, work, "an operation with a member that has closed the group")


def _demand_lost(rig: Rig, work: Work, what: str) -> None:
    for attempt in ("", ", waited for again,"):
        with expect(PeerLost, otherwise=f"{what}{attempt} ended well"):
            try:
                work.wait(rig.loss_s)
            except CommTimeout:
                raise Broken(f"{what}{attempt} was not told so within {rig.loss_s} s") from None


def misuse_is_refused(rig: Rig) -> None:
    """Check that members who call different things hear of it, and that wrong tensors are refused at the call."""
    a, b = torch.ones(8), torch.ones(8)
    cases: dict[str, tuple[Callable[[Group], Work], Callable[[Group], Work]]] = {
        "another operation": (lambda g: g.all_reduce(a), lambda g: g.all_gather([b, b.clone()], b)),
        "another size": (lambda g: g.all_reduce(a), lambda g: g.all_reduce(torch.ones(9))),
        "another format": (lambda g: g.all_reduce(a), lambda g: g.all_reduce(torch.ones(8, dtype=torch.int32))),
        "another reduction": (lambda g: g.all_reduce(a), lambda g: g.all_reduce(b, ReduceOp.MAX)),
        "another root": (lambda g: g.broadcast(a, 0), lambda g: g.broadcast(b, 1)),
        "another size of one block": (
            lambda g: g.all_gather([torch.ones(3), torch.ones(5)], torch.ones(3)),
            lambda g: g.all_gather([torch.ones(3), torch.ones(4)], torch.ones(4)),
        ),
        "a receive of another size": (lambda g: g.send(a, 1), lambda g: g.recv(torch.ones(7), 0)),
        "a receive of another format": (lambda g: g.send(a, 1), lambda g: g.recv(torch.ones(8, dtype=torch.int32), 0)),
    }
    with rig.world(2) as members:
        for what, calls in cases.items():
            _demand_refused(rig, members.open((0, 1)), calls, what)
        _refused_at_the_call(rig, members.open((0, 1)))


def _demand_refused(rig: Rig, groups: Sequence[Group], calls: Sequence[Callable[[Group], Work]], what: str) -> None:
    def run(group: Group, call: Callable[[Group], Work]) -> Exception | None:
        try:
            call(group).wait(rig.patience_s)
            if "receive" not in what:
                group.barrier().wait(rig.patience_s)
        except CommTimeout:
            return CommTimeout("hung")
        except CommError as error:
            return error
        return None

    errors = at_once(rig, [partial(run, group, call) for group, call in zip(groups, calls, strict=True)])
    demand(any(isinstance(error, ProtocolError) for error in errors), f"{what} than the peer's was not refused")
    demand(not any(isinstance(error, CommTimeout) for error in errors), f"{what} than the peer's left one waiting")


def _refused_at_the_call(rig: Rig, groups: Sequence[Group]) -> None:
    group = groups[0]
    wrong: dict[str, Callable[[], Work]] = {
        "a tensor that is not contiguous": lambda: group.all_reduce(torch.ones(4, 6).t()),
        "a tensor that is not on the host": lambda: group.all_reduce(torch.ones(4, device="meta")),
        "a format that cannot be reduced": lambda: group.all_reduce(torch.ones(4).to(torch.float8_e4m3fn)),
        "a list of the wrong length": lambda: group.all_gather([torch.ones(4)], torch.ones(4)),
        "a root that is no member": lambda: group.broadcast(torch.ones(4), 2),
        "a peer that is no member": lambda: group.send(torch.ones(4), 5),
        "an output of another size": lambda: group.reduce_scatter(torch.ones(3), [torch.ones(4), torch.ones(4)]),
        "tensors of several formats": lambda: group.all_gather([torch.ones(4), torch.ones(4).int()], torch.ones(4)),
    }
    for what, call in wrong.items():
        with expect(UserError, UnsupportedFormat, otherwise=f"{what} was not refused at the call"):
            call()
    xs = [torch.ones(5) for _ in groups]
    everywhere(rig, groups, lambda group: group.all_reduce(xs[group.rank]))
    demand(bool((xs[0] == 2).all()), "after a refused call the group gives another result")


def close(rig: Rig) -> None:
    """Check that closing twice is closing once, ends what is pending, and leaves no thread, file or segment."""
    _close_all(rig)  # what a library opens once and keeps is open after this
    before = _resources()
    _close_all(rig)
    left = _resources() - before
    demand(not left, f"close left behind: {', '.join(sorted(left))}")


def _close_all(rig: Rig) -> None:
    with rig.world(2) as members:
        before = _resources()
        groups = members.open((0, 1))
        everywhere(rig, groups, lambda group: group.all_reduce(torch.ones(10)))
        pending = [groups[0].all_reduce(torch.ones(_LARGE)), groups[0].barrier(), groups[0].recv(torch.ones(3), 1)]
        waiter = _Waiter(pending[0], rig.patience_s)
        began_s = time.monotonic()
        groups[0].close()
        demand(time.monotonic() - began_s < rig.patience_s / 2, "close does not return")
        for work in pending:
            _demand_closed(work)
        demand(waiter.join() is PeerLost, "who waited while the group was closed was not told")
        _demand_closed(groups[0].barrier())
        for group in (*groups, *groups):
            group.close()
        left = {name for name in _resources() - before if name.startswith("thread")}
        demand(not left, f"close left behind: {', '.join(sorted(left))}")


def _demand_closed(work: Work) -> None:
    with expect(PeerLost, otherwise="an operation of a closed group ended well"):
        try:
            work.wait(_SLACK_S)
        except CommTimeout:
            raise Broken("an operation that was pending when the group was closed was not told") from None


class _Waiter:
    """Waits for one operation in a thread of its own, and keeps what came of it."""

    def __init__(self, work: Work, timeout_s: float) -> None:
        self._outcome: type[Exception] | None = None
        self._thread = threading.Thread(target=self._wait, args=(work, timeout_s), daemon=True, name="kit waiter")
        self._thread.start()

    def join(self) -> type[Exception] | None:
        self._thread.join(_SLACK_S)
        return self._outcome

    def _wait(self, work: Work, timeout_s: float) -> None:
        try:
            work.wait(timeout_s)
        except CommError as error:
            self._outcome = type(error)


def _resources() -> Counter[str]:
    """Return the open files, mapped segments and threads of this process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    targets = [_target(name) for name in os.listdir("/proc/self/fd")]
    names = [thread.name for thread in threading.enumerate() if not thread.name.startswith("kit")]
    return Counter(
        [f"file {target}" for target in targets if not target.startswith("/proc/")]
        + [f"segment {line.split()[-1]}" for line in maps if "/dev/shm/" in line]
        + [f"thread {name}" for name in names]
    )


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]
    except OSError:
        return "/proc/ (closed meanwhile)"


def large(rig: Rig) -> None:
    """Check tensors of several segments, and that a tensor that is used again at once was not sent too late."""
    for size in (size for size in rig.sizes if size > 1):
        with rig.groups(size) as groups:
            at_once(rig, [partial(_reduce_and_overwrite, rig, group) for group in groups])


def _reduce_and_overwrite(rig: Rig, group: Group) -> None:
    size = group.size
    base = torch.arange(3 * _LARGE + 17, dtype=torch.int32) % 1000
    x, wanted = base + group.rank, base * size + sum(range(size))
    group.all_reduce(x).wait(rig.patience_s)
    demand(torch.equal(x, wanted), f"all_reduce of {len(x)} integers is wrong on rank {group.rank}")
    outs = [torch.empty_like(x) for _ in range(size)]
    group.all_gather(outs, x).wait(rig.patience_s)
    x.zero_()
    demand(all(torch.equal(out, wanted) for out in outs), f"all_gather is wrong on rank {group.rank}")
    group.barrier().wait(rig.patience_s)
    spread = torch.full_like(x, group.rank)
    group.broadcast(spread, size - 1).wait(rig.patience_s)
    demand(bool((spread == size - 1).all()), f"broadcast is wrong on rank {group.rank}")
