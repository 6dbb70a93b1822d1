"""ShmGroup: collectives through one piece of memory that all members share; for ranks of one host.

Long tensors that live in the shared memory (`bucket`) are reduced where they lie; others go through it tile by tile.
Sends and receives, and the news that a member has gone, go over the edges of a TransportGroup that it holds.
May import only torch, `errors`, `transports.base` and this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from hybrid.collectives import shm_steps
from hybrid.collectives.base import Group, PointToPoint, ReduceOp, Work
from hybrid.collectives.elements import check_reducible, flat
from hybrid.collectives.header import Header
from hybrid.collectives.scratch import Scratch
from hybrid.collectives.shm_board import Board, BoardLayout
from hybrid.collectives.shm_meeting import meet
from hybrid.collectives.shm_steps import Call
from hybrid.collectives.transport_group import TransportGroup
from hybrid.errors import UserError
from hybrid.transports.base import Pending, Transport

SMALL_BYTES = 64 << 10
"""Up to this, every member reduces all of an all_reduce by itself: one round instead of two."""
Steps = Iterator[Pending]


@final
class ShmGroup(Group):
    """See `Group`.

    Args:
        rank: this process's position.
        ranks: the members' ranks in the job.
        edges: an open transport to every other member, by position; they stay the caller's.
        name: the same on every member; no other group may ever have it on these edges.
        timeout_s: for waits that name none; None: derived from the waits that were observed.
    """

    def __init__(
        self, *, rank: int, ranks: Sequence[int], edges: Mapping[int, Transport], name: str, timeout_s: float | None
    ) -> None:
        self.rank, self.ranks = rank, tuple(ranks)
        self._inner = TransportGroup(rank=rank, ranks=ranks, edges=edges, name=name, timeout_s=timeout_s, link="shm")
        self._edges, self._name = dict(edges), name
        self._scratch = Scratch()
        self._board: Board | None = None
        self._buckets: list[Tensor] = []
        """Every member's part of each bucket, as bytes; (P, bytes) each."""

    def bucket(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Return a zeroed vector in shared memory; an all_reduce of it, or of a part of it, copies nothing.

        Every member calls it, in the same place of the order and with the same sizes, and waits for the others. The
        memory is freed when the group is closed and the tensor is gone.

        Shapes:
            returns: (num_elements,)

        Raises:
            CommTimeout: a member did not call within the group's time-out.
            PeerLost: a member has gone.
            ProtocolError: a member called something else.
            MachineError: no memory.
        """
        member_bytes = -(-max(num_elements * dtype.itemsize, 1) // 4096) * 4096
        made: list[Tensor] = []

        def steps(call: Call) -> Steps:
            yield from shm_steps.barrier(call)
            size_bytes = self.size * member_bytes
            memory = yield from meet(self._edges, self.rank, f"{self._name}/memory", size_bytes)
            self._buckets.append(memory.view(self.size, member_bytes))
            made.append(memory.view(self.size, member_bytes)[self.rank])

        self._submit("bucket", dtype, num_elements, steps).wait()
        return made[0][: num_elements * dtype.itemsize].view(dtype)

    def all_reduce(self, x: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        x = flat(x)
        check_reducible(x.dtype, op)

        def steps(call: Call) -> Steps:
            if self.size == 1:
                return iter(())
            if x.nbytes <= SMALL_BYTES:
                return shm_steps.all_reduce_small(call, x)
            if not self._buckets:
                return shm_steps.all_reduce_staged(call, x)
            # One member's bucket may be another's ordinary tensor: the first round shows where it lies.
            rows = self._buckets[call.bucket] if call.bucket >= 0 else ()
            places = [row[call.offset : call.offset + x.nbytes].view(x.dtype) for row in rows]
            return shm_steps.all_reduce_bucket(call, x, places, lambda: shm_steps.all_reduce_staged(call, x))

        return self._submit("all_reduce", x.dtype, x.numel(), steps, op=op, x=x)

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM) -> Work:
        out, blocks = flat(out), self._blocks(inputs, out.dtype)
        check_reducible(out.dtype, op)
        _check_size(out, blocks[self.rank], "the output")
        total = sum(block.numel() for block in blocks)
        return self._submit(
            "reduce_scatter", out.dtype, total, lambda call: shm_steps.reduce_scatter(call, out, blocks), op=op
        )

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> Work:
        x, blocks = flat(x), self._blocks(outs, x.dtype)
        _check_size(x, blocks[self.rank], "the input")
        total = sum(block.numel() for block in blocks)
        taken = [_bytes(block) for block in blocks]

        def steps(call: Call) -> Steps:
            _place(blocks[self.rank], x)
            return shm_steps.show_to_all(call, _bytes(x), taken)

        return self._submit("all_gather", x.dtype, total, steps)

    def broadcast(self, x: Tensor, root: int) -> Work:
        x = flat(x)
        self._check_root(root)
        is_root = self.rank == root
        taken: list[Tensor | None] = [None] * self.size
        taken[root] = None if is_root else _bytes(x)
        return self._submit(
            "broadcast",
            x.dtype,
            x.numel(),
            lambda call: shm_steps.show_to_all(call, _bytes(x) if is_root else None, taken),
            root=root,
        )

    def reduce(self, x: Tensor, root: int, op: ReduceOp = ReduceOp.SUM) -> Work:
        x = flat(x)
        check_reducible(x.dtype, op)
        self._check_root(root)
        return self._submit(
            "reduce", x.dtype, x.numel(), lambda call: shm_steps.reduce_to_root(call, x, root), op=op, root=root
        )

    def gather(self, outs: Sequence[Tensor] | None, x: Tensor, root: int) -> Work:
        x = flat(x)
        self._check_root(root)
        self._check_list(outs, root, "outs")
        blocks = None if outs is None else self._blocks(outs, x.dtype)
        if blocks is not None:
            _check_size(x, blocks[self.rank], "the input")
        taken = [None] * self.size if blocks is None else [_bytes(block) for block in blocks]

        def steps(call: Call) -> Steps:
            if blocks is not None:
                _place(blocks[self.rank], x)
            return shm_steps.show_to_all(call, _bytes(x), taken)

        return self._submit("gather", x.dtype, 0, steps, root=root)

    def scatter(self, out: Tensor, inputs: Sequence[Tensor] | None, root: int) -> Work:
        out = flat(out)
        self._check_root(root)
        self._check_list(inputs, root, "inputs")
        blocks = None if inputs is None else self._blocks(inputs, out.dtype)
        if blocks is not None:
            _check_size(out, blocks[self.rank], "the output")
        given = [None] * self.size if blocks is None else [_bytes(block) for block in blocks]
        taken: list[Tensor | None] = [None] * self.size
        taken[root] = _bytes(out)

        def steps(call: Call) -> Steps:
            if blocks is not None:
                _place(out, blocks[self.rank])
            return shm_steps.give_to_each(call, given, taken)

        return self._submit("scatter", out.dtype, 0, steps, root=root)

    def all_to_all(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Work:
        dtype = inputs[0].dtype if inputs else torch.uint8
        given, taken = self._blocks(inputs, dtype), self._blocks(outs, dtype)
        _check_size(taken[self.rank], given[self.rank], "the output from oneself")

        def steps(call: Call) -> Steps:
            _place(taken[self.rank], given[self.rank])
            return shm_steps.give_to_each(call, [_bytes(x) for x in given], [_bytes(x) for x in taken])

        return self._submit("all_to_all", dtype, 0, steps)

    def barrier(self) -> Work:
        return self._submit("barrier", torch.uint8, 0, shm_steps.barrier)

    def send(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self._inner.send(x, peer, tag)

    def recv(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self._inner.recv(x, peer, tag)

    def batch(self, operations: Sequence[PointToPoint]) -> Work:
        return self._inner.batch(operations)

    def close(self) -> None:
        self._inner.close()
        self._board = None
        self._buckets = []

    # Running ---------------------------------------------------------------------------------------------

    def _submit(
        self,
        operation: str,
        dtype: torch.dtype,
        num_elements: int,
        steps: Callable[[Call], Steps],
        *,
        op: ReduceOp | None = None,
        root: int = 0,
        x: Tensor | None = None,
    ) -> Work:
        """Queue an operation; `x` is the tensor that may lie in a bucket."""

        def build(sequence: int) -> Steps:
            header = Header(
                sequence=sequence,
                operation=operation,
                algorithm="shm",
                dtype=dtype,
                op=op or "",
                root=root,
                num_elements=num_elements,
            )
            return self._run(header, steps, op or ReduceOp.SUM, x)

        return self._inner.run(build)

    def _run(self, header: Header, steps: Callable[[Call], Steps], op: ReduceOp, x: Tensor | None) -> Steps:
        if self._board is None:
            layout = BoardLayout(num_members=self.size)
            memory = yield from meet(self._edges, self.rank, f"{self._name}/memory", layout.size_bytes)
            self._board = Board(memory, layout, rank=self.rank)
        bucket, offset = (-1, 0) if x is None or x.nbytes <= SMALL_BYTES else self._place_of(x)
        call = Call(board=self._board, header=header, scratch=self._scratch, op=op, bucket=bucket, offset=offset)
        yield from steps(call)

    def _place_of(self, x: Tensor) -> tuple[int, int]:
        """Return the bucket that `x` lies in, and where; (-1, 0) where in none."""
        for number, memory in enumerate(self._buckets):
            offset = x.data_ptr() - memory[self.rank].data_ptr()
            if offset >= 0 and offset + x.nbytes <= memory.shape[1]:
                return number, offset
        return -1, 0

    def _blocks(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return one vector a member, all of one format."""
        if len(tensors) != self.size:
            raise UserError("a group takes one tensor for each member", value=len(tensors), valid=str(self.size))
        if any(x.dtype != dtype for x in tensors):
            kinds = sorted({str(x.dtype) for x in tensors} | {str(dtype)})
            raise UserError("the tensors of a collective have one format", value=kinds)
        return [flat(x) for x in tensors]

    def _check_root(self, root: int) -> None:
        if not 0 <= root < self.size:
            raise UserError("no such root in the group", value=root, valid=f"0 to {self.size - 1}")

    def _check_list(self, tensors: Sequence[Tensor] | None, root: int, name: str) -> None:
        if (tensors is not None) != (self.rank == root):
            raise UserError(f"the root alone gives {name}", value=f"position {self.rank}", valid=f"the root is {root}")


def _check_size(x: Tensor, place: Tensor, what: str) -> None:
    if x.numel() != place.numel():
        fact = f"{what} does not fit this member's place"
        raise UserError(fact, value=x.numel(), valid=f"{place.numel()} elements")


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def _place(target: Tensor, source: Tensor) -> None:
    """Copy what goes to oneself."""
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)
