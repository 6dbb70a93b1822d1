"""TransportGroup: collectives over one transport to each peer, of whatever variant.

Each call becomes a `Job` (which blocks, which algorithm) that `execute` runs in the order of calls. May import only
torch, `errors`, `transports.base` and this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from hybrid.collectives.algorithms import ALGORITHMS, Program
from hybrid.collectives.base import Group, PointToPoint, ReduceOp, Work
from hybrid.collectives.choose import DEFAULT_TABLE, Choice, Row, choose
from hybrid.collectives.elements import bytes_of, check_reducible, flat, wide_dtype
from hybrid.collectives.execute import Job, Mail, Segment, execute
from hybrid.collectives.header import Header
from hybrid.collectives.notices import Notices
from hybrid.collectives.progress import Progress, Waitable
from hybrid.collectives.scratch import Scratch
from hybrid.errors import UserError
from hybrid.transports.arrival import ArrivalHistory
from hybrid.transports.base import Pending, Transport

_MAX_SEGMENTS = 4096
_MAX_NAME_BYTES = 128


@final
class TransportGroup(Group):
    """See `Group`.

    Args:
        rank: this process's position.
        ranks: the members' ranks in the job.
        edges: an open transport to every other member, by position; they stay the caller's, and may be shared with
            other groups.
        name: the same on every member; no other group may ever have it on these edges.
        timeout_s: of waits that name none; None derives it from how long they took before.
        table: how operations are run; the same on every member.
        link: which rows of the table apply: the transports' variant.
    """

    def __init__(
        self,
        *,
        rank: int,
        ranks: Sequence[int],
        edges: Mapping[int, Transport],
        name: str,
        timeout_s: float | None,
        table: Sequence[Row] = DEFAULT_TABLE,
        link: str = "any",
    ) -> None:
        self.rank, self.ranks = rank, tuple(ranks)
        if set(edges) != set(range(self.size)) - {rank}:
            raise UserError(
                "a group takes one transport to each other member, by position",
                value=sorted(edges),
                valid=sorted(set(range(self.size)) - {rank}),
            )
        if "/" in name or len(name.encode()) > _MAX_NAME_BYTES:
            raise UserError("no such name for a group", value=name, valid=f"{_MAX_NAME_BYTES} bytes of UTF-8, no slash")
        self._edges, self._name, self._table, self._link = dict(edges), name, tuple(table), link
        self._scratch = Scratch()
        self._progress = Progress(name, Notices(self._edges, f"{name}/left"), ArrivalHistory(fixed_s=timeout_s))

    def all_reduce(self, x: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        x = flat(x)
        check_reducible(x.dtype, op)
        choice = self._choose("all_reduce", x.nbytes, narrow=wide_dtype(x.dtype, op) != x.dtype)
        return self._submit("all_reduce", choice, x.dtype, [x], [x], op=op, cut=True)

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM) -> Work:
        blocks, own = self._blocks(inputs, out.dtype), flat(out)
        check_reducible(out.dtype, op)
        _check_size(own, blocks[self.rank].numel(), "the output")
        narrow = wide_dtype(out.dtype, op) != out.dtype
        choice = self._choose("reduce_scatter", sum(block.nbytes for block in blocks), narrow=narrow)
        return self._submit("reduce_scatter", choice, own.dtype, blocks, self._only(own, self.rank), op=op)

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> Work:
        blocks, own = self._blocks(outs, x.dtype), flat(x)
        _check_size(own, blocks[self.rank].numel(), "the input")
        choice = self._choose("all_gather", sum(block.nbytes for block in blocks))
        return self._submit("all_gather", choice, own.dtype, self._only(own, self.rank), blocks)

    def broadcast(self, x: Tensor, root: int) -> Work:
        x = flat(x)
        choice = self._choose("broadcast", x.nbytes)
        return self._submit("broadcast", choice, x.dtype, [x], [x], root=root)

    def reduce(self, x: Tensor, root: int, op: ReduceOp = ReduceOp.SUM) -> Work:
        x = flat(x)
        check_reducible(x.dtype, op)
        choice = self._choose("reduce", x.nbytes, narrow=wide_dtype(x.dtype, op) != x.dtype)
        return self._submit("reduce", choice, x.dtype, [x], [x if self.rank == root else None], op=op, root=root)

    def gather(self, outs: Sequence[Tensor] | None, x: Tensor, root: int) -> Work:
        self._check_list(outs, root, "outs")
        own = flat(x)
        blocks: Sequence[Tensor | None] = [None] * self.size if outs is None else self._blocks(outs, x.dtype)
        if (kept := blocks[self.rank]) is not None:
            _check_size(own, kept.numel(), "the input")
        choice = Choice(algorithm="direct")
        return self._submit("gather", choice, own.dtype, self._only(own, self.rank), blocks, root=root)

    def scatter(self, out: Tensor, inputs: Sequence[Tensor] | None, root: int) -> Work:
        self._check_list(inputs, root, "inputs")
        own = flat(out)
        blocks: Sequence[Tensor | None] = [None] * self.size if inputs is None else self._blocks(inputs, out.dtype)
        if (kept := blocks[self.rank]) is not None:
            _check_size(own, kept.numel(), "the output")
        choice = Choice(algorithm="direct")
        return self._submit("scatter", choice, own.dtype, blocks, self._only(own, self.rank), root=root)

    def all_to_all(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Work:
        dtype = inputs[0].dtype if inputs else torch.uint8
        given, taken = self._blocks(inputs, dtype), self._blocks(outs, dtype)
        _check_size(taken[self.rank], given[self.rank].numel(), "the output from oneself")
        nothing = [None] * self.size
        choice = Choice(algorithm="direct")
        return self._submit("all_to_all", choice, dtype, [*given, *nothing], [*nothing, *taken])

    def barrier(self) -> Work:
        choice = Choice(algorithm="dissemination")
        return self._submit("barrier", choice, torch.uint8, [None], [None])

    def send(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self.batch([PointToPoint(kind="send", x=x, peer=peer, tag=tag)])

    def recv(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self.batch([PointToPoint(kind="recv", x=x, peer=peer, tag=tag)])

    def batch(self, operations: Sequence[PointToPoint]) -> Work:
        for each in operations:
            if each.peer not in self._edges:
                raise UserError("no such peer in the group", value=each.peer, valid=sorted(self._edges))
        parts = [(each, flat(each.x)) for each in operations]
        return self._progress.submit_loose(self._transfer(parts), tuple(each.peer for each in operations))

    def run(self, build: Callable[[int], Iterator[Pending]]) -> Work:
        """Queue an operation of a group that holds this one, in the order of the calls.

        Args:
            build: returns, for the operation's number, what it waits for one after the other.
        """
        return self._progress.submit(build)

    def close(self) -> None:
        self._progress.close()

    def run_in_turn(self, operation: str, x: Tensor, op: ReduceOp, steps: Callable[[], Iterator[Waitable]]) -> Work:
        """Queue what others make out of several groups: it runs when the collectives before it have ended.

        Every member must call it; whether all do is checked round a ring.

        Args:
            operation: its name, at most 16 letters.
            x: what it works on, for the check.
            steps: called in its turn; yields what it waits for.
        """

        def build(sequence: int) -> Iterator[Waitable]:
            header = Header(sequence=sequence, operation=operation, dtype=x.dtype, op=op, num_elements=x.numel())
            mail = Mail(self._edges, self._name, header)
            after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
            if self.size > 1:
                received, check = mail.receive(before, [])
                sent = mail.send(after, [])
            yield from steps()
            if self.size > 1:
                yield received
                check()
                yield sent

        return self._progress.submit(build)

    def _transfer(self, parts: Sequence[tuple[PointToPoint, Tensor]]) -> Iterator[Pending]:
        """Post receives, then sends; then wait for them."""
        pendings: list[tuple[Pending, Callable[[], None] | None]] = []
        for each, x in sorted(parts, key=lambda part: part[0].kind):
            header = Header(
                sequence=0,
                operation="send",
                algorithm="",
                dtype=x.dtype,
                num_elements=x.numel(),
            )
            mail = Mail(self._edges, f"{self._name}/{each.tag}", header)
            if each.kind == "send":
                pendings.append((mail.send(each.peer, [bytes_of(x)]), None))
            else:
                pendings.append(mail.receive(each.peer, [bytes_of(x)]))
        for pending, check in pendings:
            yield pending
            if check is not None:
                check()

    def _submit(
        self,
        operation: str,
        choice: Choice,
        dtype: torch.dtype,
        inputs: Sequence[Tensor | None],
        results: Sequence[Tensor | None],
        *,
        op: ReduceOp | None = None,
        root: int = 0,
        cut: bool = False,
    ) -> Work:
        """Queue one operation; `cut`: its one block is cut into as many as the algorithm likes."""
        if not 0 <= root < self.size:
            raise UserError("no such root in the group", value=root, valid=f"0 to {self.size - 1}")
        program = _program(operation, choice.algorithm, self.size, self.rank, root)
        segments = _segments(inputs, results, program.num_blocks, choice.segment_bytes, cut=cut)
        whole = operation not in ("gather", "scatter", "all_to_all")
        reduction = op or ReduceOp.SUM

        def build(sequence: int) -> Iterator[Pending]:
            header = Header(
                sequence=sequence,
                operation=operation,
                algorithm=choice.algorithm,
                dtype=dtype,
                op=op or "",
                root=root,
                num_segments=len(segments),
                num_elements=sum(_numel(x, y) for x, y in zip(inputs, results, strict=True)) if whole else 0,
            )
            wide = wide_dtype(dtype, reduction)
            divisor = self.size if reduction is ReduceOp.AVG else 1
            job = Job(program=program, segments=segments, header=header, wide=wide, op=reduction, divisor=divisor)
            mail = Mail(self._edges, self._name, header)
            return self._run(job, mail, operation, inputs, results)

        return self._progress.submit(build)

    def _run(
        self,
        job: Job,
        mail: Mail,
        operation: str,
        inputs: Sequence[Tensor | None],
        results: Sequence[Tensor | None],
    ) -> Iterator[Pending]:
        yield from execute(job, mail, self._scratch, self.rank)
        if operation in ("all_gather", "gather", "scatter", "all_to_all"):
            own, place = inputs[self.rank], results[self.rank + (self.size if operation == "all_to_all" else 0)]
            if own is not None and place is not None and own.data_ptr() != place.data_ptr():
                place.copy_(own)

    def _choose(self, operation: str, size_bytes: int, *, narrow: bool = False) -> Choice:
        return choose(self._table, operation, size_bytes, self.size, self._link, narrow=narrow)

    def _blocks(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return one vector a member, all of one format."""
        if len(tensors) != self.size:
            raise UserError("a group takes one tensor for each member", value=len(tensors), valid=str(self.size))
        if any(x.dtype != dtype for x in tensors):
            kinds = sorted({str(x.dtype) for x in tensors} | {str(dtype)})
            raise UserError("the tensors of a collective have one format", value=kinds)
        return [flat(x) for x in tensors]

    def _only(self, x: Tensor, position: int) -> list[Tensor | None]:
        return [x if at == position else None for at in range(self.size)]

    def _check_list(self, tensors: Sequence[Tensor] | None, root: int, name: str) -> None:
        if (tensors is not None) != (self.rank == root):
            raise UserError(f"the root alone gives {name}", value=f"position {self.rank}", valid=f"the root is {root}")


def _check_size(x: Tensor, num_elements: int, what: str) -> None:
    if x.numel() != num_elements:
        raise UserError(f"{what} does not fit this member's place", value=x.numel(), valid=f"{num_elements} elements")


def _numel(x: Tensor | None, y: Tensor | None) -> int:
    held = x if x is not None else y
    return 0 if held is None else held.numel()


@lru_cache(maxsize=1024)
def _program(operation: str, algorithm: str, size: int, rank: int, root: int) -> Program:
    return ALGORITHMS[operation][algorithm](size, rank, root)


def _segments(
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    num_blocks: int,
    segment_bytes: int,
    *,
    cut: bool,
) -> list[Segment]:
    """Return the blocks cut lengthwise, so that each message is of about `segment_bytes`."""
    if cut:
        inputs, results = _cut(inputs[0], num_blocks), _cut(results[0], num_blocks)
    held = [x if x is not None else y for x, y in zip(inputs, results, strict=True)]
    largest_bytes = max((x.nbytes for x in held if x is not None), default=0)
    count = min(max(1, -(-largest_bytes // segment_bytes)), _MAX_SEGMENTS)
    ins, outs = [_cut(x, count) for x in inputs], [_cut(x, count) for x in results]
    return [
        Segment(
            inputs=[x[at] for x in ins],
            results=[x[at] for x in outs],
            shapes=[_numel(x[at], y[at]) for x, y in zip(ins, outs, strict=True)],
        )
        for at in range(count)
    ]


def _cut(x: Tensor | None, count: int) -> Sequence[Tensor | None]:
    """Return a vector in `count` parts whose lengths differ by one at most."""
    if x is None or count == 1:
        return [x] * count
    borders = [x.numel() * at // count for at in range(count + 1)]
    return [x[start:stop] for start, stop in pairwise(borders)]
