"""Makes the process groups of the torch.distributed backend `hybrid`, over the world that they share.

The default group connects this process to all ranks; groups made of some of them open nothing more. Where the default
group is another backend's, a `hybrid` group connects its own members. May import only torch, `errors` and this folder.
"""

from __future__ import annotations

import atexit
import hashlib
import weakref
from typing import Any

import torch.distributed

from hybrid.collectives.torch_group import HybridProcessGroup
from hybrid.collectives.torch_options import HybridOptions
from hybrid.collectives.torch_world import World
from hybrid.errors import UserError

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

_alive: weakref.WeakSet[Any] = weakref.WeakSet()


def create_group(arguments: Any, options: Any) -> HybridProcessGroup:
    """Return a new process group; torch calls this on every member.

    Args:
        arguments: c10d's `_DistributedBackendOptions`.
        options: what the user gave as `pg_options`.

    Raises:
        UserError: other options than ours.
        CommTimeout: not all members came in time.
    """
    if options is not None and not isinstance(options, HybridOptions):
        raise UserError(
            "the hybrid backend takes its own pg_options", value=type(options).__name__, valid="HybridOptions"
        )
    rank, size, timeout_s = arguments.group_rank, arguments.group_size, arguments.timeout.total_seconds()
    # A group may be made again under its old name, over the same store: no key is used twice.
    number = arguments.store.add(f"made/{rank}", 1)
    store = dist.PrefixStore(f"made/{number}", arguments.store)
    members = tuple(arguments.global_ranks_in_group)
    world = _default_world() if members else None
    if world is None:
        world, members = World(store, rank, size, options or HybridOptions(), timeout_s), tuple(range(size))
    name = hashlib.sha256(f"{arguments.group_id} {number}".encode()).hexdigest()[:24]
    try:
        group = HybridProcessGroup(world, members, store=store, name=name, timeout_s=timeout_s)
    except BaseException:
        world.close_if_unused()
        raise
    _alive.add(group)
    return group


def _default_world() -> World | None:
    """Return the default group's world, if that is ours."""
    group = dist.group.WORLD
    return group.world if isinstance(group, HybridProcessGroup) else None


@atexit.register
def _close_all() -> None:
    for group in list(_alive):
        group.shutdown()
