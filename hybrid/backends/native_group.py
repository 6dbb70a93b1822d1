"""Opening a vendor's own collective group through torch.distributed; what all backends share of it.

torch.distributed is imported when a group is opened, not before. May import only torch and `errors`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hybrid.errors import CommTimeout, DeviceError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def open_native_group(library: str, ranks: Sequence[int], *, rank: int, address: str, timeout_s: float) -> ProcessGroup:
    """Join the group of `ranks` as torch's default group; see `Backend.native_group`.

    Args:
        library: torch.distributed's name of it: `gloo`, `nccl`, `neuron`.
    """
    members = list(ranks)
    if members != sorted(set(members)) or rank not in members:
        raise DeviceError(
            "a native group's ranks must be ascending and hold this one",
            value=f"rank {rank} of {members}",
            fix="give every member the same ascending ranks",
        )
    dist: Any = importlib.import_module("torch.distributed")
    if dist.is_initialized():
        raise DeviceError(
            "this process is in a native group already",
            value=library,
            fix="call torch.distributed.destroy_process_group() first",
        )
    try:
        dist.init_process_group(
            library,
            init_method=f"tcp://{address}",
            rank=members.index(rank),
            world_size=len(members),
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistStoreError, TimeoutError) as error:
        raise CommTimeout(
            f"not all of {len(members)} ranks joined the {library} group at {address} within {timeout_s:g} s: {error}",
            fix="see whether every rank has started, and whether the address can be reached from all",
        ) from None
    return dist.group.WORLD  # type: ignore[no-any-return]
