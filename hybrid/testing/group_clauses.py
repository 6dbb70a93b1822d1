"""The clauses of the group contract about results, one function each; each raises where a variant breaks it.

Sleeps nowhere: each wait is for something, with a time-out. May import only torch, `errors`, `collectives` and the
kit's other parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hybrid.collectives import Group, PointToPoint, ReduceOp, Work
from hybrid.errors import UnsupportedFormat
from hybrid.testing.group_reference import complaint, ops_of, random_tensor, same_bits
from hybrid.testing.group_rig import Rig, at_once, demand, everywhere, expect


def reductions(rig: Rig) -> None:
    """Check all_reduce, reduce_scatter and reduce against the reference: every format, reduction and size."""
    for size in rig.sizes:
        with rig.groups(size) as groups:
            for dtype in rig.dtypes:
                for op in ops_of(dtype):
                    for count in rig.counts:
                        xs = [random_tensor(dtype, count, 10 * count + rank) for rank in range(size)]
                        _all_reduce(rig, groups, xs, op)
                        _reduce_scatter(rig, groups, dtype, [count] * size, op)
                        _reduce(rig, groups, xs, op, root=count % size)


def _all_reduce(rig: Rig, groups: Sequence[Group], xs: Sequence[Tensor], op: ReduceOp) -> None:
    got = [x.clone() for x in xs]
    everywhere(rig, groups, lambda group: group.all_reduce(got[group.rank], op))
    for rank, x in enumerate(got):
        _check(x, xs, op, f"all_reduce of {len(xs)} ranks, rank {rank}")
        demand(same_bits(x, got[0]), f"all_reduce {op} of {x.dtype}: rank {rank} and rank 0 hold other bits")


def _reduce_scatter(rig: Rig, groups: Sequence[Group], dtype: torch.dtype, counts: Sequence[int], op: ReduceOp) -> None:
    inputs = [
        [random_tensor(dtype, n, 7 * n + 11 * rank + at) for at, n in enumerate(counts)] for rank in range(len(counts))
    ]
    given = [[x.clone() for x in row] for row in inputs]
    outs = [torch.empty(n, dtype=dtype) for n in counts]
    everywhere(rig, groups, lambda group: group.reduce_scatter(outs[group.rank], inputs[group.rank], op))
    for rank, out in enumerate(outs):
        _check(out, [row[rank] for row in given], op, f"reduce_scatter of {list(counts)}, rank {rank}")
        _check_kept(inputs[rank], given[rank], "reduce_scatter")


def _reduce(rig: Rig, groups: Sequence[Group], xs: Sequence[Tensor], op: ReduceOp, root: int) -> None:
    got = [x.clone() for x in xs]
    everywhere(rig, groups, lambda group: group.reduce(got[group.rank], root, op))
    _check(got[root], xs, op, f"reduce to {root} of {len(xs)} ranks")
    for rank, x in enumerate(got):
        demand(
            rank == root or same_bits(x, xs[rank]), f"reduce has written into rank {rank}'s tensor, and it is no root"
        )


def _check(got: Tensor, xs: Sequence[Tensor], op: ReduceOp, what: str) -> None:
    wrong = complaint(got, xs, op)
    demand(wrong is None, f"{what}, {op} of {got.dtype}: {wrong}")


def _check_kept(now: Sequence[Tensor], before: Sequence[Tensor], what: str) -> None:
    kept = all(same_bits(a, b) for a, b in zip(now, before, strict=True))
    demand(kept, f"{what} has written into tensors that are inputs alone")


def moves(rig: Rig) -> None:
    """Check all_gather, broadcast, gather, scatter and all_to_all, bit for bit: every format and size."""
    for size in rig.sizes:
        with rig.groups(size) as groups:
            for dtype in rig.dtypes:
                for count in rig.counts:
                    _move(rig, groups, dtype, [count] * size, root=count % size)


def _move(rig: Rig, groups: Sequence[Group], dtype: torch.dtype, counts: Sequence[int], root: int) -> None:
    size = len(counts)
    xs = [random_tensor(dtype, n, 5 * n + rank) for rank, n in enumerate(counts)]
    given = [x.clone() for x in xs]
    outs = [[torch.empty(n, dtype=dtype) for n in counts] for _ in range(size)]
    everywhere(rig, groups, lambda group: group.all_gather(outs[group.rank], xs[group.rank]))
    for rank in range(size):
        _check_same(outs[rank], given, f"all_gather of {list(counts)}, rank {rank}")
    gathered = [torch.empty(n, dtype=dtype) for n in counts]
    everywhere(rig, groups, lambda group: group.gather(gathered if group.rank == root else None, xs[group.rank], root))
    _check_same(gathered, given, f"gather of {list(counts)} to {root}")
    scattered = [torch.empty(n, dtype=dtype) for n in counts]
    everywhere(
        rig, groups, lambda group: group.scatter(scattered[group.rank], xs if group.rank == root else None, root)
    )
    _check_same(scattered, given, f"scatter of {list(counts)} from {root}")
    _check_kept(xs, given, "all_gather, gather or scatter")
    spread = [torch.empty(counts[root], dtype=dtype) for _ in range(size)]
    spread[root].copy_(xs[root])
    everywhere(rig, groups, lambda group: group.broadcast(spread[group.rank], root))
    _check_same(spread, [given[root]] * size, f"broadcast of {counts[root]} from {root}")
    _all_to_all(rig, groups, dtype, counts)


def _all_to_all(rig: Rig, groups: Sequence[Group], dtype: torch.dtype, counts: Sequence[int]) -> None:
    """Exchange `counts[sender]` elements between each two."""
    size = len(counts)
    inputs = [[random_tensor(dtype, counts[rank], 3 * rank + at) for at in range(size)] for rank in range(size)]
    given = [[x.clone() for x in row] for row in inputs]
    outs = [[torch.empty(n, dtype=dtype) for n in counts] for _ in range(size)]
    everywhere(rig, groups, lambda group: group.all_to_all(outs[group.rank], inputs[group.rank]))
    for rank in range(size):
        _check_same(outs[rank], [row[rank] for row in given], f"all_to_all of {list(counts)}, rank {rank}")
        _check_kept(inputs[rank], given[rank], "all_to_all")


def _check_same(got: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    for at, (a, b) in enumerate(zip(got, wanted, strict=True)):
        demand(same_bits(a, b), f"{what}, {a.dtype}: tensor {at} is not what was given")


def uneven(rig: Rig) -> None:
    """Check the operations that take other sizes for each rank, 0 among them."""
    for size in rig.sizes:
        counts = [(5 * rank + 3) % 7 * 31 for rank in range(size)]
        with rig.groups(size) as groups:
            for dtype in (torch.float32, torch.int16):
                _reduce_scatter(rig, groups, dtype, counts, ReduceOp.SUM)
                _move(rig, groups, dtype, counts, root=size - 1)
                _move(rig, groups, dtype, [0] * (size - 1) + [3], root=size - 1)


def in_place(rig: Rig) -> None:
    """Check that views are written where they stand, whatever their shape, and nothing beside them."""
    size = max(rig.sizes)
    with rig.groups(size) as groups:
        fields = [torch.full((4, 6, 5), float(rank + 1)) for rank in range(size)]
        views = [field[1:3] for field in fields]
        everywhere(rig, groups, lambda group: group.all_reduce(views[group.rank]))
        total = float(sum(range(1, size + 1)))
        for rank, field in enumerate(fields):
            demand(bool((field[1:3] == total).all()), "all_reduce leaves its result elsewhere than in the tensor given")
            untouched = torch.cat([field[:1], field[3:]])
            demand(bool((untouched == rank + 1).all()), "all_reduce writes beside the tensor given")
        scalars = [torch.tensor(float(rank), requires_grad=True) for rank in range(size)]
        everywhere(rig, groups, lambda group: group.all_reduce(scalars[group.rank], ReduceOp.MAX))
        demand(all(float(x.detach()) == size - 1 for x in scalars), "all_reduce of a scalar is wrong")
        rows = [torch.zeros(size, 3) for _ in range(size)]
        for rank in range(size):
            rows[rank][rank] = rank + 1.0
        everywhere(rig, groups, lambda group: group.all_gather(list(rows[group.rank]), rows[group.rank][group.rank]))
        blocks = [torch.ones(size, 3) for _ in range(size)]
        everywhere(
            rig,
            groups,
            lambda group: group.reduce_scatter(blocks[group.rank][group.rank], list(blocks[group.rank])),
        )
        for rank, block in enumerate(blocks):
            right = torch.ones(size, 3)
            right[rank] = size
            demand(torch.equal(block, right), "reduce_scatter into one of its inputs is wrong, or writes beside it")
        wanted = torch.arange(1.0, size + 1).view(-1, 1).expand(size, 3)
        demand(all(torch.equal(each, wanted) for each in rows), "all_gather into rows that hold the input is wrong")


def same_bits_everywhere(rig: Rig) -> None:
    """Check that all hold the same bits, whoever comes last: of sums whose order shows, of NaN and zeros' signs."""
    for size in (size for size in rig.sizes if size > 1):
        with rig.groups(size) as groups:
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                for op in ops_of(dtype):
                    for last in range(size):
                        xs = [_awkward(dtype, rank) for rank in range(size)]
                        order = [group for group in groups if group.rank != last] + [groups[last]]
                        works = [group.all_reduce(xs[group.rank], op) for group in order]
                        at_once(rig, [partial(work.wait, rig.patience_s) for work in works])
                        for rank, x in enumerate(xs):
                            demand(
                                same_bits(x, xs[0]),
                                f"all_reduce {op} of {dtype}: rank {rank} and rank 0 of {size} hold other bits",
                            )


def _awkward(dtype: torch.dtype, rank: int) -> Tensor:
    chance = torch.Generator().manual_seed(rank)
    x = torch.randn(999, generator=chance, dtype=torch.float64) * torch.logspace(-4, 4, 999, dtype=torch.float64)
    x[::50] = (0.0, -0.0, float("inf"), float("nan"), -0.0)[rank % 5]
    x[7::50] = (-0.0, 0.0, float("-inf"), 1.0, float("nan"))[rank % 5]
    return x.to(dtype)


def numerics(rig: Rig) -> None:
    """Check that narrow floats are accumulated in float32 and rounded once, and that integers refuse the average."""
    # Two are rounded once whatever the format of the accumulation: it takes three to see it.
    with rig.groups(max(3, *rig.sizes)) as groups:
        for dtype in (torch.bfloat16, torch.float16):
            _narrow(rig, groups, dtype)
        with expect(UnsupportedFormat, otherwise="the average of integers was not refused"):
            groups[0].all_reduce(torch.zeros(3, dtype=torch.int32), ReduceOp.AVG)


def _narrow(rig: Rig, groups: Sequence[Group], dtype: torch.dtype) -> None:
    size = len(groups)
    # Ones that are lost one by one beside a large number in this format, but not all together.
    large = 2.0 / torch.finfo(dtype).eps
    values = [large] + [1.0] * (size - 1)
    sums = [torch.full((64,), value, dtype=dtype) for value in values]
    means = [x.clone() for x in sums]
    everywhere(rig, groups, lambda group: group.all_reduce(sums[group.rank]))
    everywhere(rig, groups, lambda group: group.all_reduce(means[group.rank], ReduceOp.AVG))
    for what, got, exact in (("sum", sums, sum(values)), ("average", means, sum(values) / size)):
        wanted = torch.tensor(exact, dtype=torch.float32).to(dtype)
        for x in got:
            demand(
                bool((x == wanted).all()),
                f"the {what} of {dtype} is {x[0].item()} and not {wanted.item()}: accumulated in the format itself, "
                "or rounded twice",
            )


def point_to_point(rig: Rig) -> None:
    """Check that sends and receives are ordered within a peer and a tag alone, and that a batch's order is free."""
    size = max(rig.sizes)
    with rig.groups(size) as groups:
        _ring_of_receives(rig, groups)
        first, second = groups[0], groups[1]
        a, b = torch.arange(5.0), torch.arange(5.0) + 100
        into_a, into_b = torch.empty(5), torch.empty(5)
        received = [second.recv(into_b, 0, tag=2), second.recv(into_a, 0, tag=1)]
        sent = [first.send(a, 1, tag=1), first.send(b, 1, tag=2)]
        _wait_all(rig, [*sent, *received])
        demand(torch.equal(into_a, a) and torch.equal(into_b, b), "a receive took a message of another tag")
        many = [torch.full((3,), float(number)) for number in range(20)]
        landed = [torch.empty(3) for _ in many]
        works = [second.recv(x, 0) for x in landed[:10]] + [first.send(x, 1) for x in many]
        works += [second.recv(x, 0) for x in landed[10:]]
        _wait_all(rig, works)
        demand(all(map(torch.equal, many, landed)), "messages of one tag are received in another order than sent")
        _beside_a_collective(rig, groups)


def _wait_all(rig: Rig, works: Sequence[Work]) -> None:
    at_once(rig, [partial(work.wait, rig.patience_s) for work in works])


def _ring_of_receives(rig: Rig, groups: Sequence[Group]) -> None:
    """Pass large tensors round in a batch, every member's send before its receive: none may hold up another."""
    size = len(groups)
    xs = [random_tensor(torch.float32, 1 << 20, rank) for rank in range(size)]
    landed = [torch.empty(1 << 20) for _ in range(size)]

    def call(group: Group) -> Work:
        after, before = (group.rank + 1) % size, (group.rank - 1) % size
        return group.batch(
            [
                PointToPoint(kind="send", x=xs[group.rank], peer=after, tag=9),
                PointToPoint(kind="recv", x=landed[group.rank], peer=before, tag=9),
            ]
        )

    everywhere(rig, groups, call)
    for rank in range(size):
        demand(torch.equal(landed[rank], xs[rank - 1]), "a batch has delivered something else than was sent")


def _beside_a_collective(rig: Rig, groups: Sequence[Group]) -> None:
    """Check that an open receive holds up no collective, nor a collective a send."""
    landing = torch.empty(4)
    waiting = groups[1].recv(landing, 0, tag=3)
    xs = [torch.ones(10) for _ in groups]
    everywhere(rig, groups, lambda group: group.all_reduce(xs[group.rank]))
    demand(bool((xs[0] == len(groups)).all()), "all_reduce beside an open receive is wrong")
    early = groups[1].all_reduce(xs[1])
    _wait_all(rig, [groups[0].send(torch.full((4,), 7.0), 1, tag=3), waiting])
    demand(bool((landing == 7).all()), "a receive beside a collective is wrong")
    late = [group.all_reduce(xs[group.rank]) for group in groups if group.rank != 1]
    _wait_all(rig, [early, *late])
