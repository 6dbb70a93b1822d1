"""HostCollectives: c10d's operations, with c10d's arguments, as calls of a Group on the host.

May import only torch, `errors` and this folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from hybrid.collectives.base import Group, Work
from hybrid.collectives.torch_tensors import Reduction, Staging, equal_parts, one, reduction_of, split_parts
from hybrid.collectives.torch_work import Completer, HybridWork, seconds_of
from hybrid.errors import UnsupportedFormat, UserError


@final
class HostCollectives:
    """One method an operation; `opts` are c10d's option structs; each returns at once.

    Tensors of devices, strided ones and those of odd memory are copied to the host before the operation and back after
    it; contiguous ones of the host are used themselves.

    Args:
        group: what carries them out.
        completer: completes the futures.
        timeout_s: for operations that name none.
    """

    def __init__(self, group: Group, completer: Completer, timeout_s: float) -> None:
        self._group, self._completer, self.timeout_s = group, completer, timeout_s

    def all_reduce(self, tensors: Sequence[Tensor], opts: Any) -> HybridWork:
        """Reduce each of the tensors over all ranks."""
        reduction, staging = reduction_of(opts.reduceOp), Staging("all_reduce")
        parts = [self._all_reduce(staging.change(x, reduction.scale), reduction, staging) for x in tensors]
        return self._work(parts, tensors, staging, opts)

    def _all_reduce(self, x: Tensor, reduction: Reduction, staging: Staging) -> Work:
        if reduction.op is not None:
            return self._group.all_reduce(x, reduction.op)
        rows = list(torch.empty((self._group.size, x.numel()), dtype=x.dtype))
        staging.first(lambda: reduction.bitwise(rows, x))
        return self._group.all_gather(rows, x)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> HybridWork:
        """Reduce to the root; the others' tensors keep their values."""
        x, reduction, staging = one(tensors, "reduce"), reduction_of(opts.reduceOp), Staging("reduce")
        stage = staging.change if self._group.rank == opts.rootRank else staging.read
        part = self._group.reduce(stage(x, reduction.scale), opts.rootRank, _group_op(reduction, "reduce"))
        return self._work([part], tensors, staging, opts)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> HybridWork:
        """Give every rank the root's tensor."""
        x, staging = one(tensors, "broadcast"), Staging("broadcast")
        stage = staging.read if self._group.rank == opts.rootRank else staging.write
        return self._work([self._group.broadcast(stage(x), opts.rootRank)], tensors, staging, opts)

    def all_gather(self, outs_of_each: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], opts: Any) -> HybridWork:
        """For each tensor given, collect every rank's."""
        staging = Staging("all_gather")
        parts = [
            self._group.all_gather([staging.write(out) for out in outs], staging.read(x))
            for outs, x in zip(outs_of_each, tensors, strict=True)
        ]
        return self._work(parts, [out for outs in outs_of_each for out in outs], staging, opts)

    def all_gather_single(self, outs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any) -> HybridWork:
        """For each tensor given, collect every rank's, one behind the other in one tensor."""
        staging, parts = Staging("all_gather_single"), []
        for out, x in zip(outs, tensors, strict=True):
            own = staging.read(x)
            places = equal_parts(staging.write(out), self._group.size, own, "all_gather_single")
            parts.append(self._group.all_gather(places, own))
        return self._work(parts, outs, staging, opts)

    def reduce_scatter(self, outs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> HybridWork:
        """Leave in each output the reduction of every rank's tensor for this one."""
        reduction, staging, parts = reduction_of(opts.reduceOp), Staging("reduce_scatter"), []
        for out, row in zip(outs, inputs, strict=True):
            blocks = [staging.read(x, reduction.scale) for x in row]
            op = _group_op(reduction, "reduce_scatter")
            parts.append(self._group.reduce_scatter(staging.write(out), blocks, op))
        return self._work(parts, outs, staging, opts)

    def reduce_scatter_single(self, outs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any) -> HybridWork:
        """Do the same with one tensor that holds the parts for all ranks one behind the other."""
        reduction, staging, parts = reduction_of(opts.reduceOp), Staging("reduce_scatter_single"), []
        for out, x in zip(outs, tensors, strict=True):
            own = staging.write(out)
            blocks = equal_parts(staging.read(x, reduction.scale), self._group.size, own, "reduce_scatter_single")
            parts.append(self._group.reduce_scatter(own, blocks, _group_op(reduction, "reduce_scatter_single")))
        return self._work(parts, outs, staging, opts)

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any
    ) -> HybridWork:
        """Exchange rows: so many to each rank and so many from each."""
        staging, size = Staging("all_to_all_single"), self._group.size
        places = split_parts(staging.write(out), out, out_splits, size, "all_to_all_single, the output")
        blocks = split_parts(staging.read(x), x, in_splits, size, "all_to_all_single, the input")
        return self._work([self._group.all_to_all(places, blocks)], [out], staging, opts)

    def all_to_all(self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any) -> HybridWork:
        """Exchange one tensor with each rank."""
        staging = Staging("all_to_all")
        blocks = [staging.read(x) for x in inputs]
        return self._work([self._group.all_to_all([staging.write(x) for x in outs], blocks)], outs, staging, opts)

    def gather(self, outs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], opts: Any) -> HybridWork:
        """Collect every rank's tensor at the root."""
        staging, own = Staging("gather"), one(tensors, "gather")
        places = [staging.write(x) for x in outs[0]] if self._group.rank == opts.rootRank else None
        part = self._group.gather(places, staging.read(own), opts.rootRank)
        return self._work([part], [x for row in outs for x in row], staging, opts)

    def scatter(self, outs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any) -> HybridWork:
        """Give each rank its tensor of the root's."""
        staging, own = Staging("scatter"), one(outs, "scatter")
        blocks = [staging.read(x) for x in inputs[0]] if self._group.rank == opts.rootRank else None
        return self._work([self._group.scatter(staging.write(own), blocks, opts.rootRank)], outs, staging, opts)

    def barrier(self, opts: Any) -> HybridWork:
        """End when every rank has come."""
        return self._work([self._group.barrier()], [], Staging("barrier"), opts)

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> HybridWork:
        """Send to one rank; holds up nothing else, and nothing else holds it up."""
        staging = Staging("send")
        part = self._group.send(staging.read(one(tensors, "send")), self._peer(peer, "send"), tag)
        return self._work([part], tensors, staging, None, in_order=False, source=self._group.rank)

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> HybridWork:
        """Receive from one rank; as `send`."""
        staging = Staging("recv")
        part = self._group.recv(staging.write(one(tensors, "recv")), self._peer(peer, "recv"), tag)
        return self._work([part], tensors, staging, None, in_order=False, source=peer)

    def together(self, works: Sequence[HybridWork]) -> HybridWork:
        """Return a work that ends when all of these have."""
        staging = Staging("coalesced operations")
        staging.first(lambda: _wait_for(works))
        return self._work([], [], staging, None, in_order=False)

    def _work(
        self,
        parts: Sequence[Work],
        results: Sequence[Tensor],
        staging: Staging,
        opts: Any,
        *,
        in_order: bool = True,
        source: int = -1,
    ) -> HybridWork:
        timeout_s = seconds_of(getattr(opts, "timeout", None), self.timeout_s)
        return HybridWork(
            parts,
            results,
            staging.finish,
            timeout_s=timeout_s,
            completer=self._completer,
            in_order=in_order,
            source=source,
        )

    def _peer(self, peer: int, operation: str) -> int:
        if peer == self._group.rank:
            raise UserError(f"{operation}: a rank does not send to itself", value=peer, fix="copy the tensor")
        return peer


def _group_op(reduction: Reduction, operation: str) -> Any:
    if reduction.op is None:
        raise UnsupportedFormat(
            f"{operation} does not reduce bit by bit", value=reduction.name, fix="use all_reduce, which does"
        )
    return reduction.op


def _wait_for(works: Sequence[HybridWork]) -> None:
    for work in works:
        work.wait()
