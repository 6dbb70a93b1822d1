"""The vendor's own process group, for a group whose ranks all sit on one island's devices.

NCCL moves CUDA tensors, TorchNeuron's library Neuron ones; whatever torch names as a device's default backend. May
import only torch, `errors` and `collectives.torch_facts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from hybrid.collectives.torch_facts import RankFacts
from hybrid.errors import MachineError

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

POINT_TO_POINT = frozenset({"cuda"})
"""Devices whose library is known to send and receive between two ranks of a larger group."""


def native_device(members: Sequence[RankFacts]) -> str:
    """Return the device type whose own library reaches all members, or nothing: then tensors go through the host."""
    kinds = {(each.accelerator, each.island) for each in members}
    return kinds.pop()[0] if len(kinds) == 1 else ""


def open_native(device: str, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """Return the vendor's process group, with c10d's own methods; the vendor connects at its first operation.

    Raises:
        MachineError: torch knows no library for the device.
    """
    name = dist.Backend.default_device_backend_map.get(device, "")
    if name == "nccl" and dist.is_nccl_available():
        made = _nccl(store, rank, size, timeout)
    elif name.upper() in dist.Backend._plugins:
        made = _plugin(name, store, rank, size, timeout)
    else:
        raise MachineError(
            f"torch has no collective library for {device} tensors here",
            value=name,
            fix="install the vendor's, or set HybridOptions(native=False) on every rank to go through the host",
        )
    if isinstance(made, dist.ProcessGroup):
        return made
    group = dist.ProcessGroup(store, rank, size)
    kind = dist.ProcessGroup.BackendType.NCCL if name == "nccl" else dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    group._register_backend(torch.device(device), kind, made)
    return group


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _plugin(name: str, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    plugin = dist.Backend._plugins[name.upper()]
    if not plugin.extended_api:
        return plugin.creator_fn(store, rank, size, timeout)
    arguments = dist._DistributedBackendOptions() if hasattr(dist, "_DistributedBackendOptions") else _arguments()
    arguments.store, arguments.group_rank, arguments.group_size = store, rank, size
    arguments.timeout, arguments.group_id, arguments.global_ranks_in_group = timeout, "native", []
    return plugin.creator_fn(arguments, None)


def _arguments() -> Any:
    return torch._C._distributed_c10d._DistributedBackendOptions()
