"""HybridProcessGroup: what `dist.init_process_group("hybrid")` puts in torch's hands.

C++ (DDP's reducer, functional collectives) reaches a Python process group through eleven operations alone; torch's
Python calls all of them by name. Tensors of a device go to the vendor's own group where every member has one, else
through the host. May import only torch, `errors` and this folder.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, final

import torch.distributed
from torch import Tensor

from hybrid.collectives.torch_host import HostCollectives
from hybrid.collectives.torch_native import POINT_TO_POINT, native_device, open_native
from hybrid.collectives.torch_work import Completer, HybridWork
from hybrid.collectives.torch_world import World
from hybrid.errors import PeerLost, UserError

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed


@final
class HybridProcessGroup(dist.ProcessGroup):  # type: ignore[misc]
    """A process group of some ranks of a world; methods and arguments are c10d's.

    Args:
        world: which connects them; left when this group is shut down.
        ranks: the members, by position.
        store: torch's, of this group alone.
        name: of no other group of the world, ever.
        timeout_s: for operations that name none.
    """

    supports_splitting = False
    supports_coalescing = False
    supports_time_estimate = False

    def __init__(self, world: World, ranks: Sequence[int], *, store: Any, name: str, timeout_s: float) -> None:
        position = ranks.index(world.rank)
        super().__init__(position, len(ranks))  # with a store, torch makes an object that Python cannot extend
        self._names = {"group": "", "description": ""}
        self.world = world
        self._store, self._position, self._size = store, position, len(ranks)
        self._native_device = native_device([world.facts[rank] for rank in ranks])
        self._native_group: Any = None
        self._completer = Completer(name)
        self._group = world.open_group(ranks, name, timeout_s)
        self._host = HostCollectives(self._group, self._completer, timeout_s)
        self._lock, self._closed = threading.Lock(), False
        self._coalesced: list[HybridWork] | None = None
        world.enter()

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """Return the name under which torch knows the backend."""
        return "hybrid"

    name = getBackendName

    def setGroupName(self, name: str) -> None:  # noqa: N802 - torch's name
        self._names["group"] = name

    def getGroupName(self) -> str:  # noqa: N802 - torch's name
        return self._names["group"]

    def setGroupDesc(self, text: str) -> None:  # noqa: N802 - torch's name
        self._names["description"] = text

    def getGroupDesc(self) -> str:  # noqa: N802 - torch's name
        return self._names["description"]

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllreduceOptions()
        native = self._native_for(tensors)
        return native.allreduce(tensors, opts) if native else self._kept(self._host.all_reduce(tensors, opts))

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllreduceCoalescedOptions()
        native = self._native_for(tensors)
        return native.allreduce_coalesced(tensors, opts) if native else self._kept(self._host.all_reduce(tensors, opts))

    def reduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.ReduceOptions()
        native = self._native_for(tensors)
        return native.reduce(tensors, opts) if native else self._kept(self._host.reduce(tensors, opts))

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.BroadcastOptions()
        native = self._native_for(tensors)
        return native.broadcast(tensors, opts) if native else self._kept(self._host.broadcast(tensors, opts))

    def allgather(self, outs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllgatherOptions()
        native = self._native_for(tensors)
        return (
            native.allgather(outs, tensors, opts) if native else self._kept(self._host.all_gather(outs, tensors, opts))
        )

    def allgather_coalesced(self, outs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Take c10d's order: `outs[rank][i]` for `tensors[i]`."""
        return self._kept(self._host.all_gather(list(zip(*outs, strict=True)), tensors, opts))

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Any:
        opts = opts or dist.AllgatherOptions()
        native = self._native_for([x])
        if native:
            return native.all_gather_single(out, x, opts)
        return self._kept(self._host.all_gather_single([out], [x], opts))

    def all_gather_single_coalesced(self, outs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllgatherOptions()
        native = self._native_for(tensors)
        if native:
            return native.all_gather_single_coalesced(outs, tensors, opts)
        return self._kept(self._host.all_gather_single(outs, tensors, opts))

    def reduce_scatter(self, outs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        native = self._native_for(outs)
        if native:
            return native.reduce_scatter(outs, inputs, opts)
        return self._kept(self._host.reduce_scatter(outs, inputs, opts))

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any = None) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        native = self._native_for([x])
        if native:
            return native.reduce_scatter_single(out, x, opts)
        return self._kept(self._host.reduce_scatter_single([out], [x], opts))

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any = None
    ) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        native = self._native_for(tensors)
        if native:
            return native.reduce_scatter_single_coalesced(outs, tensors, opts)
        return self._kept(self._host.reduce_scatter_single(outs, tensors, opts))

    def all_to_all_single(
        self, out: Tensor, x: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], opts: Any = None
    ) -> Any:
        opts = opts or dist.AllToAllOptions()
        native = self._native_for([x])
        if native:
            return native.all_to_all_single(out, x, out_splits, in_splits, opts)
        return self._kept(self._host.all_to_all_single(out, x, out_splits, in_splits, opts))

    def alltoall(self, outs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllToAllOptions()
        native = self._native_for(inputs)
        return native.alltoall(outs, inputs, opts) if native else self._kept(self._host.all_to_all(outs, inputs, opts))

    def gather(self, outs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.GatherOptions()
        native = self._native_for(tensors)
        return native.gather(outs, tensors, opts) if native else self._kept(self._host.gather(outs, tensors, opts))

    def scatter(self, outs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> Any:
        opts = opts or dist.ScatterOptions()
        native = self._native_for(outs)
        return native.scatter(outs, inputs, opts) if native else self._kept(self._host.scatter(outs, inputs, opts))

    def barrier(self, opts: Any = None) -> Any:
        """Let the ranks' processes meet; work queued on devices may still run."""
        return self._kept(self._host.barrier(opts))

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int = 0) -> Any:
        native = self._native_for(tensors, point_to_point=True)
        return native.send(tensors, peer, tag) if native else self._kept(self._host.send(tensors, peer, tag))

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int = 0) -> Any:
        native = self._native_for(tensors, point_to_point=True)
        return native.recv(tensors, peer, tag) if native else self._kept(self._host.recv(tensors, peer, tag))

    def recv_anysource(self, tensors: Sequence[Tensor], tag: int = 0) -> Any:
        """Refuse: receives are posted at the peer's own edge."""
        raise UserError(
            "hybrid does not receive from whichever rank comes first", fix="name the source: recv(x, src=…)"
        )

    # The names that other libraries know these by.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _start_coalescing(self, device: Any) -> None:
        """Collect the works from here to `_end_coalescing`; they start at once all the same."""
        self._coalesced = []

    def _end_coalescing(self, device: Any) -> Any:
        works, self._coalesced = self._coalesced or [], None
        return self._host.together(works)

    def get_group_store(self) -> Any:
        return self._store

    def _get_backend(self, device: Any) -> Any:
        """Return what serves a device: this group, for all of them."""
        return self

    def supports_tensor_alloc(self, device: Any) -> bool:
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        self._host.timeout_s = timeout.total_seconds()

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """End what is under way with PeerLost, and free all that is this group's alone; idempotent."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        self._group.close()
        self._completer.close()
        if self._native_group is not None:
            self._native_group.shutdown()
        self.world.leave()

    abort = shutdown

    def _kept(self, work: HybridWork) -> HybridWork:
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _native_for(self, tensors: Sequence[Tensor], *, point_to_point: bool = False) -> Any:
        """Return the vendor's group if the tensors are its device's, opened at its first use."""
        device = tensors[0].device.type if tensors and isinstance(tensors[0], Tensor) else "cpu"
        if device == "cpu" or device != self._native_device:
            return None
        if point_to_point and device not in POINT_TO_POINT:
            return None
        with self._lock:
            if self._closed:
                raise PeerLost("this process group was shut down", fix="make a new one")
            if self._native_group is None:
                timeout = timedelta(seconds=self._host.timeout_s)
                store = dist.PrefixStore("native", self._store)
                self._native_group = open_native(device, store, self._position, self._size, timeout)
            return self._native_group
