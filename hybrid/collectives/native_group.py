"""NativeGroup: an island's own collective library (a torch.distributed group) as a `Group`, for tensors of the host.

What the library lacks is made of what it has: sizes that differ by rank, averages, narrow floats that are rounded
once, and a look at what the others call. May import only torch, `errors`, `transports.arrival` and this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid.collectives.base import Group, PointToPoint, ReduceOp, Work
from hybrid.collectives.elements import check_reducible, combine, flat, wide_dtype
from hybrid.collectives.header import HEADER_BYTES, Header
from hybrid.collectives.progress import NoEars, Progress, Waitable
from hybrid.errors import CommTimeout, PeerLost, UserError
from hybrid.transports.arrival import ArrivalHistory

_NATIVE: dict[ReduceOp, Any] = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.AVG: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
}
_REDUCED_NATIVELY = (torch.float64, torch.float32, torch.int64, torch.int32, torch.int8, torch.uint8)
"""What gloo reduces; others go through one of these."""
_LEAST_S = 0.001


@final
class NativeGroup(Group):
    """See `Group`; for the inside of an island, whose members live and die together.

    Two clauses it leaves to others: it refuses point-to-point operations (gloo's can neither be waited for twice nor
    survive a size that does not fit), and the loss of a member is told when the library's own time-out says so.

    Args:
        native: a process group that nobody else uses; it stays the caller's.
        ranks: the members' ranks in the job, by position in `native`.
        timeout_s: of waits that name none; None derives it from how long they took before.
    """

    def __init__(self, native: Any, *, ranks: Sequence[int], timeout_s: float | None) -> None:
        self.rank, self.ranks = int(native.rank()), tuple(ranks)
        if int(native.size()) != len(self.ranks):
            raise UserError("a native group has other members", value=int(native.size()), valid=str(len(self.ranks)))
        self._native = native
        self._progress = Progress("native", NoEars(), ArrivalHistory(fixed_s=timeout_s))

    def all_reduce(self, x: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        x = flat(x)
        check_reducible(x.dtype, op)
        return self._submit("all_reduce", x.dtype, x.numel(), lambda: self._all_reduce(x, x, op), op=op)

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM) -> Work:
        own, blocks = flat(out), self._blocks(inputs, out.dtype)
        check_reducible(own.dtype, op)
        _check_size(own, blocks[self.rank])
        total = sum(block.numel() for block in blocks)

        def steps() -> Iterator[Waitable]:
            parts = [torch.empty_like(own) for _ in self.ranks]
            yield from self._exchange(parts, blocks)
            wide = torch.empty(own.shape, dtype=wide_dtype(own.dtype, op))
            wide.copy_(parts[0])
            if self.size > 1:
                combine(op, parts, wide)
            own.copy_(wide.div_(self.size) if op is ReduceOp.AVG else wide)

        return self._submit("reduce_scatter", own.dtype, total, steps, op=op)

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> Work:
        own, blocks = flat(x), self._blocks(outs, x.dtype)
        _check_size(own, blocks[self.rank])
        total = sum(block.numel() for block in blocks)
        return self._submit("all_gather", own.dtype, total, lambda: self._exchange(blocks, [own] * self.size))

    def broadcast(self, x: Tensor, root: int) -> Work:
        x = flat(x)

        def steps() -> Iterator[Waitable]:
            options = dist.BroadcastOptions()
            options.rootRank = root
            if x.numel():
                yield _Native(self._native.broadcast([x.view(torch.uint8)], options))

        return self._submit("broadcast", x.dtype, x.numel(), steps, root=root)

    def reduce(self, x: Tensor, root: int, op: ReduceOp = ReduceOp.SUM) -> Work:
        x = flat(x)
        check_reducible(x.dtype, op)
        into = x if self.rank == root else None
        return self._submit("reduce", x.dtype, x.numel(), lambda: self._all_reduce(x, into, op), op=op, root=root)

    def gather(self, outs: Sequence[Tensor] | None, x: Tensor, root: int) -> Work:
        self._check_list(outs, root)
        own, nothing = flat(x), flat(x)[:0]
        taken = [nothing] * self.size if outs is None else self._blocks(outs, x.dtype)
        _check_size(own, taken[self.rank] if outs is not None else own)
        given = [own if at == root else nothing for at in range(self.size)]
        return self._submit("gather", own.dtype, 0, lambda: self._exchange(taken, given), root=root)

    def scatter(self, out: Tensor, inputs: Sequence[Tensor] | None, root: int) -> Work:
        self._check_list(inputs, root)
        own, nothing = flat(out), flat(out)[:0]
        given = [nothing] * self.size if inputs is None else self._blocks(inputs, out.dtype)
        _check_size(own, given[self.rank] if inputs is not None else own)
        taken = [own if at == root else nothing for at in range(self.size)]
        return self._submit("scatter", own.dtype, 0, lambda: self._exchange(taken, given), root=root)

    def all_to_all(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Work:
        dtype = inputs[0].dtype if inputs else torch.uint8
        given, taken = self._blocks(inputs, dtype), self._blocks(outs, dtype)
        _check_size(taken[self.rank], given[self.rank])
        return self._submit("all_to_all", dtype, 0, lambda: self._exchange(taken, given))

    def barrier(self) -> Work:
        return self._submit("barrier", torch.uint8, 0, lambda: iter(()))

    def send(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self.batch([PointToPoint(kind="send", x=x, peer=peer, tag=tag)])

    def recv(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self.batch([PointToPoint(kind="recv", x=x, peer=peer, tag=tag)])

    def batch(self, operations: Sequence[PointToPoint]) -> Work:
        raise UserError(
            "a native group has no sends and receives of its own",
            value=len(operations),
            fix="send over the group of all islands, or over an edge",
        )

    def close(self) -> None:
        self._progress.close()

    def _submit(
        self,
        operation: str,
        dtype: torch.dtype,
        num_elements: int,
        steps: Callable[[], Iterator[Waitable]],
        *,
        op: ReduceOp | None = None,
        root: int = 0,
    ) -> Work:
        """Queue one operation, after a look at what the others call: the library itself would hang or crash."""
        if not 0 <= root < self.size:
            raise UserError("no such root in the group", value=root, valid=f"0 to {self.size - 1}")

        def build(sequence: int) -> Iterator[Waitable]:
            header = Header(
                sequence=sequence,
                operation=operation,
                dtype=dtype,
                op=op or "",
                root=root,
                num_elements=num_elements,
            )
            words = [torch.empty(HEADER_BYTES, dtype=torch.uint8) for _ in self.ranks]
            mine = torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8)
            yield _Native(self._native.allgather([words], [mine]))
            for rank, word in zip(self.ranks, words, strict=True):
                header.check(bytes(word.numpy()), rank)
            yield from steps()

        return self._progress.submit(build)

    def _all_reduce(self, x: Tensor, into: Tensor | None, op: ReduceOp) -> Iterator[Waitable]:
        """Reduce a copy where the library lacks the format or `x` must be kept."""
        native: Any = _NATIVE[op]
        if x.dtype is torch.bool:
            work = x.to(torch.uint8)
            native = dist.ReduceOp.MIN if op in (ReduceOp.MIN, ReduceOp.PRODUCT) else dist.ReduceOp.MAX
        elif x.is_complex():
            raise UserError("a native group does not reduce complex numbers", value=str(x.dtype))
        elif x.dtype in _REDUCED_NATIVELY:
            work = x if into is not None else x.clone()
        else:
            work = x.float() if x.is_floating_point() else x.int()
        if x.numel() and self.size > 1:
            options = dist.AllreduceOptions()
            options.reduceOp = native
            yield _Native(self._native.allreduce([work], options))
        if into is not None:
            if op is ReduceOp.AVG:
                work.div_(self.size)
            if work is not into:
                into.copy_(work)

    def _exchange(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Waitable]:
        """Send `inputs[i]` to member i and receive `outs[i]` from it, of any sizes."""
        given = torch.cat([x.view(torch.uint8) for x in inputs])
        sizes = [out.nbytes for out in outs]
        taken = torch.empty(sum(sizes), dtype=torch.uint8)
        if self.size == 1:
            taken.copy_(given)
        else:
            splits = [x.nbytes for x in inputs]
            yield _Native(self._native.alltoall_base(taken, given, sizes, splits, dist.AllToAllOptions()))
        for out, part in zip(outs, torch.split(taken, sizes), strict=True):
            out.view(torch.uint8).copy_(part)

    def _blocks(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if len(tensors) != self.size:
            raise UserError("a group takes one tensor for each member", value=len(tensors), valid=str(self.size))
        if any(x.dtype != dtype for x in tensors):
            raise UserError(
                "the tensors of a collective have one format", value=sorted({str(x.dtype) for x in tensors})
            )
        return [flat(x) for x in tensors]

    def _check_list(self, tensors: Sequence[Tensor] | None, root: int) -> None:
        if (tensors is not None) != (self.rank == root):
            raise UserError("the root alone gives a list", value=f"position {self.rank}", valid=f"the root is {root}")


def _check_size(x: Tensor, block: Tensor) -> None:
    if x.numel() != block.numel():
        raise UserError("a tensor does not fit this member's place", value=x.numel(), valid=f"{block.numel()} elements")


@final
class _Native:
    """The library's handle as something to wait for."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, timeout_s: float) -> None:
        try:
            self._work.wait(timedelta(seconds=max(timeout_s, _LEAST_S)))
        except RuntimeError:
            if not self._work.is_completed():
                raise CommTimeout("the native library's operation has not ended") from None
            self._look()

    def _look(self) -> None:
        """Return or raise at once: it has ended, and perhaps just after the time was up."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise PeerLost(f"the native library has lost a member: {error}", fix="make a new group") from None
