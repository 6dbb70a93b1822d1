"""Clauses of the c10d kit: what torch builds on a process group: functional collectives, DTensor, DDP, FSDP2.

Each runs on the backend and on gloo, from the same seed. May import only torch and the kit's seat.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from hybrid.testing.c10d_seat import Clause, Seat, all_values, check_close, check_same, reduced, values

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

_STEPS = 3


def functional_collectives(seat: Seat) -> None:
    """Serve DTensor and compiled programs."""
    import torch.distributed._functional_collectives as funcol

    call: Any = funcol
    world, size, rank = dist.group.WORLD, seat.size, seat.rank
    parts = all_values(size, (2 * size, 3), torch.float32)
    x = parts[rank]
    check_close(call.all_reduce(x, "sum", world) + 0, reduced(parts, "SUM"), "all_reduce")
    check_close(call.all_reduce(x, "avg", world) + 0, reduced(parts, "AVG"), "all_reduce, average")
    check_same(call.all_gather_tensor(x, 0, world) + 0, torch.cat(parts), "all_gather_tensor")
    check_same(call.all_gather_tensor(x, 1, world) + 0, torch.cat(parts, 1), "all_gather_tensor of columns")
    mine = reduced(parts, "SUM").chunk(size)[rank]
    check_close(call.reduce_scatter_tensor(x, "sum", 0, world) + 0, mine, "reduce_scatter_tensor")
    check_same(call.broadcast(x, 1, world) + 0, parts[1], "broadcast")
    swapped = call.all_to_all_single(x, None, None, world) + 0
    check_same(swapped, torch.cat([part.chunk(size)[rank] for part in parts]), "all_to_all_single")
    for found, part in zip(call.all_reduce_coalesced([x, x * 2], "sum", world), (1, 2), strict=True):
        check_close(found + 0, reduced(parts, "SUM") * part, "all_reduce_coalesced")
    for found in call.all_gather_into_tensor_coalesced([x, x], world):
        check_same(found + 0, torch.cat(parts), "all_gather_into_tensor_coalesced")
    for found in call.reduce_scatter_tensor_coalesced([x, x], "sum", [0, 0], world):
        check_close(found + 0, mine, "reduce_scatter_tensor_coalesced")


def dtensors_are_redistributed_and_multiplied(seat: Seat) -> None:
    """Every placement to every other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (seat.size,))
    whole, weight = values(0, (2 * seat.size + 1, 5), torch.float64), values(1, (5, 2 * seat.size), torch.float64)
    placements: list[Any] = [Replicate(), Shard(0), Shard(1)]
    for source in placements:
        x: Any = distribute_tensor(whole, mesh, [source])
        for target in placements:
            check_same(x.redistribute(mesh, [target]).full_tensor(), whole, f"redistribute {source} to {target}")
    for left in placements:
        for right in placements:
            product: Any = distribute_tensor(whole, mesh, [left]) @ distribute_tensor(weight, mesh, [right])
            check_close(product.full_tensor(), whole @ weight, f"matmul of {left} and {right}")
    partial: Any = DTensor.from_local(values(seat.rank, (seat.size, 2), torch.float64), mesh, [Partial()])
    wanted = reduced(all_values(seat.size, (seat.size, 2), torch.float64), "SUM")
    for target in placements:
        check_close(partial.redistribute(mesh, [target]).full_tensor(), wanted, f"partial to {target}")


def ddp_gives_the_gradients_of_gloo(seat: Seat) -> None:
    """Buckets, unused parameters, a communication hook."""
    for options in ({}, {"find_unused_parameters": True}, {"bucket_cap_mb": 1, "gradient_as_bucket_view": True}):
        ours, theirs = (_ddp_steps(seat, group, options) for group in (None, seat.gloo))
        _check_parameters(seat, ours, theirs, f"DDP with {options}")
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hook: Any = default_hooks.fp16_compress_hook
    ours, theirs = (_ddp_steps(seat, group, {}, hook) for group in (None, seat.gloo))
    for found, wanted in zip(ours, theirs, strict=True):
        # gloo rounds every partial sum to fp16, we the whole one.
        assert torch.allclose(found, wanted, atol=2e-2), "DDP with the fp16 hook"


def _ddp_steps(seat: Seat, group: Any, options: dict[str, Any], hook: Any = None) -> list[Tensor]:
    torch.manual_seed(seat.rank)  # other weights on each rank: DDP must send rank 0's
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 4))
    wrapped: Any = nn.parallel.DistributedDataParallel(model, process_group=group, **options)
    if hook is not None:
        wrapped.register_comm_hook(group, hook)
    # Not Adam: behind a BatchNorm a bias's gradient is all rounding, which Adam would make as large as any other.
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(_STEPS):
        optimizer.zero_grad()
        loss = wrapped(values(seat.rank, (6, 16), torch.float32, salt=step)).square().mean()
        loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def fsdp2_gives_the_weights_of_gloo(seat: Seat) -> None:
    """Shard with sums and with averages."""
    from torch.distributed.device_mesh import DeviceMesh

    # gloo has no average over ranks in every version: sum, and divide.
    for force_sum in (True, False):
        meshes: list[Any] = [DeviceMesh.from_group(group, "cpu") for group in (dist.group.WORLD, seat.gloo)]
        ours = _fsdp_steps(seat, meshes[0], force_sum=force_sum)
        if force_sum or seat.gloo_takes(lambda group: dist.all_reduce(torch.ones(1), dist.ReduceOp.AVG, group)):
            theirs = _fsdp_steps(seat, meshes[1], force_sum=force_sum)
            _check_parameters(seat, ours, theirs, f"FSDP2, force_sum {force_sum}")


def _fsdp_steps(seat: Seat, mesh: Any, *, force_sum: bool) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 4))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in (model, *model):
        part.set_force_sum_reduction_for_comms(force_sum)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(_STEPS):
        optimizer.zero_grad()
        model(values(seat.rank, (6, 16), torch.float32, salt=step)).square().mean().backward()
        optimizer.step()
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def _check_parameters(seat: Seat, ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    for found, wanted in zip(ours, theirs, strict=True):
        if seat.size == 2:
            check_same(found, wanted, what)
        else:
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6), what


TRAINING_CLAUSES: tuple[Clause, ...] = (
    functional_collectives,
    dtensors_are_redistributed_and_multiplied,
    ddp_gives_the_gradients_of_gloo,
    fsdp2_gives_the_weights_of_gloo,
)
