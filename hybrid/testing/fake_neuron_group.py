"""The fake `neuron` device's process group: collectives of device tensors over gloo, under the name `neuron`.

Refuses host tensors, as the vendor's library does. May import only torch and the fake's tensor.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hybrid.testing.fake_neuron_tensor import DeviceTensor

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed


class NeuronGroup(dist.ProcessGroup):  # type: ignore[misc]
    """A gloo group that takes device tensors only."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """Return the name under which torch knows the group."""
        return "neuron"

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._gloo.allreduce(_inner(tensors), opts or dist.AllreduceOptions())

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._gloo.broadcast(_inner(tensors), opts or dist.BroadcastOptions())

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._gloo.allgather([_inner(row) for row in outputs], _inner(inputs), opts or dist.AllgatherOptions())

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        return self._gloo.reduce_scatter(
            _inner(outputs), [_inner(row) for row in inputs], opts or dist.ReduceScatterOptions()
        )

    def send(self, tensors: Any, target: int, tag: int = 0) -> Any:
        return self._gloo.send(_inner(tensors), target, tag)

    def recv(self, tensors: Any, source: int, tag: int = 0) -> Any:
        return self._gloo.recv(_inner(tensors), source, tag)

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier(dist.BarrierOptions())


def _inner(tensors: Any) -> list[torch.Tensor]:
    for x in tensors:
        if not isinstance(x, DeviceTensor):
            raise RuntimeError(f"the neuron group takes neuron tensors, not one on {x.device}")
    return [x.host for x in tensors]
