"""Clauses of the c10d kit: every collective over formats, sizes, roots and memory layouts.

May import only torch and the kit's seat.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hybrid.testing.c10d_seat import (
    FLOATS,
    INTEGERS,
    ODD,
    SIZES,
    Clause,
    Seat,
    all_values,
    check_close,
    check_same,
    reduced,
    values,
)

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

_OPS = ("SUM", "AVG", "MIN", "MAX", "PRODUCT")


def _cases(dtypes: Any = (*FLOATS, *INTEGERS)) -> list[tuple[int, torch.dtype]]:
    """Every format at one size, and every size in one format."""
    return [*((7, dtype) for dtype in dtypes), *((size, torch.float32) for size in SIZES)]


def all_reduce_equals_the_reference_and_gloo(seat: Seat) -> None:
    """Every format, size and operation."""
    for count, dtype in (*_cases(), (7, torch.bool)):
        for op in _OPS:
            if op == "AVG" and not dtype.is_floating_point:
                continue
            x = values(seat.rank, count, dtype)
            dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
            what = f"all_reduce {op} of {count} {dtype}"
            check_close(x, reduced(all_values(seat.size, count, dtype), op), what)
            _compare_with_gloo(seat, x, count, dtype, op, what)


def _compare_with_gloo(seat: Seat, found: Tensor, count: int, dtype: torch.dtype, op: str, what: str) -> None:
    # Two addends have one order; gloo adds more of them in another order, and narrow ones with a rounding each. Its sum
    # of booleans is a byte that may be 2.
    if (seat.size > 2 and dtype.is_floating_point) or dtype == torch.bool:
        return
    other = values(seat.rank, count, dtype)
    if seat.gloo_takes(lambda group: dist.all_reduce(other, op=getattr(dist.ReduceOp, op), group=group)):
        check_same(found, other, f"{what}, against gloo")


def all_reduce_of_bits_and_scaled_sums(seat: Seat) -> None:
    """BAND, BOR, BXOR and PREMUL_SUM."""
    parts = all_values(seat.size, 9, torch.int32)
    for op, function in (("BAND", torch.bitwise_and), ("BOR", torch.bitwise_or), ("BXOR", torch.bitwise_xor)):
        x, wanted = parts[seat.rank].clone(), parts[0].clone()
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
        for part in parts[1:]:
            wanted = function(wanted, part)
        check_same(x, wanted, op)
    x = values(seat.rank, 9, torch.float32)
    dist.all_reduce(x, op=dist._make_nccl_premul_sum(0.25))
    check_close(x, reduced(all_values(seat.size, 9, torch.float32), "SUM") / 4, "PREMUL_SUM")


def broadcast_from_every_root(seat: Seat) -> None:
    """Also of formats that cannot be reduced."""
    for count, dtype in _cases((*FLOATS, *INTEGERS, *ODD)):
        for root in range(seat.size):
            x = values(seat.rank, count, dtype)
            dist.broadcast(x, src=root)
            check_same(x, values(root, count, dtype), f"broadcast of {count} {dtype} from {root}")


def reduce_to_every_root_leaves_the_others(seat: Seat) -> None:
    """Only the root's tensor is written."""
    for count, dtype in _cases():
        for root in range(seat.size):
            x = values(seat.rank, count, dtype)
            dist.reduce(x, dst=root)
            if seat.rank == root:
                check_close(x, reduced(all_values(seat.size, count, dtype), "SUM"), f"reduce of {count} {dtype}")
            else:
                check_same(x, values(seat.rank, count, dtype), "reduce wrote at another rank than the root")


def all_gather_in_all_its_forms(seat: Seat) -> None:
    """Gather lists and single tensors, other sizes for each rank, in place."""
    for count, dtype in _cases((*FLOATS, *INTEGERS, *ODD)):
        parts = all_values(seat.size, count, dtype)
        outs = [torch.empty(count, dtype=dtype) for _ in range(seat.size)]
        dist.all_gather(outs, parts[seat.rank])
        whole = torch.empty(seat.size * count, dtype=dtype)
        dist.all_gather_single(whole, parts[seat.rank])
        for out, part in zip(outs, parts, strict=True):
            check_same(out, part, f"all_gather of {count} {dtype}")
        check_same(whole, torch.cat(parts), f"all_gather_single of {count} {dtype}")
    uneven = [torch.empty(rank + 1) for rank in range(seat.size)]
    dist.all_gather(uneven, values(seat.rank, seat.rank + 1, torch.float32))
    for rank, out in enumerate(uneven):
        check_same(out, values(rank, rank + 1, torch.float32), "all_gather of other sizes for each rank")
    # In place, as FSDP does it: the input is this rank's part of the output.
    whole = torch.zeros(seat.size, 5)
    whole[seat.rank] = values(seat.rank, 5, torch.float32)
    dist.all_gather_single(whole.view(-1), whole[seat.rank])
    check_same(whole, torch.stack(all_values(seat.size, 5, torch.float32)), "all_gather_single in place")


def reduce_scatter_in_all_its_forms(seat: Seat) -> None:
    """Scatter sums and averages of lists and single tensors, in place."""
    for count, dtype in _cases():
        wanted = reduced(all_values(seat.size, (seat.size, count), dtype), "SUM")[seat.rank]
        x = values(seat.rank, (seat.size, count), dtype)
        outs = [torch.empty(count, dtype=dtype) for _ in range(2)]
        dist.reduce_scatter(outs[0], list(x.clone()))
        dist.reduce_scatter_single(outs[1], x.view(-1))
        for out in outs:
            check_close(out, wanted, f"reduce_scatter of {count} {dtype}")
        check_same(x, values(seat.rank, (seat.size, count), dtype), "reduce_scatter wrote into its input")
    out = torch.empty(4)
    dist.reduce_scatter_single(out, values(seat.rank, 4 * seat.size, torch.float32), op=dist.ReduceOp.AVG)
    average = reduced(all_values(seat.size, 4 * seat.size, torch.float32), "AVG").chunk(seat.size)[seat.rank]
    check_close(out, average, "reduce_scatter AVG")
    # In place: the output is this rank's part of the input.
    x = values(seat.rank, (seat.size, 4), torch.float32)
    dist.reduce_scatter_single(x[seat.rank], x.view(-1))
    whole = reduced(all_values(seat.size, (seat.size, 4), torch.float32), "SUM")
    check_close(x[seat.rank], whole[seat.rank], "reduce_scatter in place")


def all_to_all_with_even_and_uneven_splits(seat: Seat) -> None:
    """Exchange lists and single tensors."""
    for count, dtype in _cases((*FLOATS, *INTEGERS, *ODD)):
        outs = [torch.empty(count, dtype=dtype) for _ in range(seat.size)]
        dist.all_to_all(outs, [values(seat.rank, count, dtype, salt=peer) for peer in range(seat.size)])
        for peer, out in enumerate(outs):
            check_same(out, values(peer, count, dtype, salt=seat.rank), f"all_to_all of {count} {dtype}")
    rows = values(seat.rank, (seat.size * 2, 3), torch.float32)
    even = torch.empty_like(rows)
    dist.all_to_all_single(even, rows)
    wanted = [part.chunk(seat.size)[seat.rank] for part in all_values(seat.size, (seat.size * 2, 3), torch.float32)]
    check_same(even, torch.cat(wanted), "all_to_all_single")
    # Rank r sends p + 1 rows to each rank p.
    splits = [peer + 1 for peer in range(seat.size)]
    rows = values(seat.rank, (sum(splits), 3), torch.float32)
    taken = torch.empty((seat.rank + 1) * seat.size, 3)
    dist.all_to_all_single(taken, rows, [seat.rank + 1] * seat.size, splits)
    parts = all_values(seat.size, (sum(splits), 3), torch.float32)
    check_same(taken, torch.cat([torch.split(part, splits)[seat.rank] for part in parts]), "all_to_all_single, uneven")


def gather_and_scatter_at_every_root(seat: Seat) -> None:
    """Also of formats that cannot be reduced."""
    for count, dtype in _cases((*FLOATS, *INTEGERS, *ODD)):
        for root in range(seat.size):
            parts = all_values(seat.size, count, dtype)
            outs = [torch.empty(count, dtype=dtype) for _ in range(seat.size)] if seat.rank == root else None
            dist.gather(parts[seat.rank], outs, dst=root)
            for out, part in zip(outs or [], parts, strict=False):
                check_same(out, part, f"gather of {count} {dtype}")
            own = torch.empty(count, dtype=dtype)
            dist.scatter(own, parts if seat.rank == root else None, src=root)
            check_same(own, parts[seat.rank], f"scatter of {count} {dtype}")


def tensors_of_any_layout(seat: Seat) -> None:
    """Transposed, strided, of no dims, leaves that want a gradient."""
    parts = all_values(seat.size, (4, 6), torch.float32)
    strided = parts[seat.rank].clone().t()
    dist.all_reduce(strided)
    check_close(strided, reduced(parts, "SUM").t(), "all_reduce of a transposed tensor")
    wide = torch.zeros(4, 12)
    column = wide[:, ::2]
    column.copy_(parts[seat.rank])
    dist.all_reduce(column)
    check_close(column, reduced(parts, "SUM"), "all_reduce of every other column")
    assert not wide[:, 1::2].any(), "all_reduce wrote between its tensor's elements"
    number = torch.tensor(float(seat.rank))
    dist.all_reduce(number)
    assert number.item() == sum(range(seat.size))
    outs = [torch.zeros(6, 4).t() for _ in range(seat.size)]
    dist.all_gather(outs, parts[seat.rank].t().contiguous().t())
    for out, part in zip(outs, parts, strict=True):
        check_same(out.contiguous(), part, "all_gather of transposed tensors")
    leaf = torch.nn.Parameter(parts[seat.rank].clone())
    dist.broadcast(leaf, src=0)
    check_same(leaf.detach(), parts[0], "broadcast into a leaf that wants a gradient")
    negative = values(seat.rank, 3, torch.complex64).conj().imag
    outs = [torch.empty(3) for _ in range(seat.size)]
    dist.all_gather(outs, negative)
    check_same(outs[0], -values(0, 3, torch.complex64).imag, "all_gather of a lazy negative")


def coalesced_collectives(seat: Seat) -> None:
    """Take what torch's coalescing manager gathers into one call."""
    xs = [values(seat.rank, count, torch.float32, salt=count) for count in (3, 1, 8)]
    with dist._coalescing_manager(group=dist.group.WORLD):
        for x in xs:
            dist.all_reduce(x)
    for x in xs:
        check_close(x, reduced(all_values(seat.size, len(x), torch.float32, salt=len(x)), "SUM"), "coalesced")
    wholes = [torch.empty(count * seat.size) for count in (3, 5)]
    with dist._coalescing_manager(group=dist.group.WORLD, async_ops=True) as manager:
        for whole in wholes:
            count = len(whole) // seat.size
            dist.all_gather_single(whole, values(seat.rank, count, torch.float32))
    manager.wait()
    for whole in wholes:
        count = len(whole) // seat.size
        check_same(whole, torch.cat(all_values(seat.size, count, torch.float32)), "coalesced all_gather_single")
    rows = values(seat.rank, 2 * seat.size, torch.float32)
    outs = [torch.empty(2), torch.empty(2)]
    with dist._coalescing_manager(group=dist.group.WORLD):
        for out in outs:
            dist.reduce_scatter_single(out, rows)
    wanted = reduced(all_values(seat.size, 2 * seat.size, torch.float32), "SUM").chunk(seat.size)[seat.rank]
    for out in outs:
        check_close(out, wanted, "coalesced reduce_scatter_single")
    with dist._coalescing_manager(group=dist.group.WORLD, device=torch.device("cpu"), async_ops=True) as manager:
        dist.broadcast(outs[0], src=0, async_op=True)
    manager.wait()


def objects(seat: Seat) -> None:
    """Pickled objects travel as tensors of bytes."""
    mine = {"rank": seat.rank, "text": "x" * (10 * seat.rank + 1)}
    everyone: list[Any] = [{"rank": rank, "text": "x" * (10 * rank + 1)} for rank in range(seat.size)]
    found: list[Any] = [None] * seat.size
    dist.all_gather_object(found, mine)
    assert found == everyone
    gathered: list[Any] | None = [None] * seat.size if seat.rank == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    assert gathered in (None, everyone)
    shared: list[Any] = ["a", 2, [3]] if seat.rank == 0 else [None] * 3
    dist.broadcast_object_list(shared, src=0)
    assert shared == ["a", 2, [3]]
    own: list[Any] = [None]
    dist.scatter_object_list(own, everyone if seat.rank == 0 else None, src=0)
    assert own == [mine]
    if seat.rank == 0:
        dist.send_object_list([mine, 7], dst=1)
    elif seat.rank == 1:
        got: list[Any] = [None, None]
        dist.recv_object_list(got, src=0)
        assert got == [everyone[0], 7]


COLLECTIVE_CLAUSES: tuple[Clause, ...] = (
    all_reduce_equals_the_reference_and_gloo,
    all_reduce_of_bits_and_scaled_sums,
    broadcast_from_every_root,
    reduce_to_every_root_leaves_the_others,
    all_gather_in_all_its_forms,
    reduce_scatter_in_all_its_forms,
    all_to_all_with_even_and_uneven_splits,
    gather_and_scatter_at_every_root,
    tensors_of_any_layout,
    coalesced_collectives,
    objects,
)
