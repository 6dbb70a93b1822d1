"""What a stage holds from its forward to its backward, measured on a real run.

Runs the stage; reads no clock.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hybrid.config import Precision
from hybrid.models.stage import Stage, boundary_dtype, compute_context


def measure_saved_bytes(stage: Stage, *, microbatch: int, precision: Precision, device: str = "cpu") -> int:
    """Return the bytes that one microbatch more in flight makes autograd hold.

    Two microbatches are run and what the second alone holds is counted, each storage once: parameters, rotary
    tables and autocast's copies of the weights, which all microbatches share, fall out. The stage's own input
    and, for the last stage, the loss are counted. Under `FakeTensorMode` (and a stage made under it) the same
    number comes out and nothing is computed.
    """
    with compute_context(precision, device):
        first, kept = _saved_storages(stage, microbatch, precision, device)
        second, _ = _saved_storages(stage, microbatch, precision, device)
        del kept  # alive until here, so that the second run can't be given the first one's storages
    return sum(size for storage, size in second.items() if storage not in first)


def _saved_storages(stage: Stage, microbatch: int, precision: Precision, device: str) -> tuple[dict[int, int], Tensor]:
    """Return {storage: bytes} of what a forward saves, and the output that keeps it alive."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()  # the address of its memory would be 0 for a fake tensor
        return x

    shape = stage.boundary_shape(microbatch)
    targets = torch.zeros(microbatch, stage.config.sequence_length, dtype=torch.int64, device=device)
    if stage.is_first:
        x = torch.zeros_like(targets)
    else:
        x = torch.zeros(shape, dtype=boundary_dtype(precision), device=device, requires_grad=True)
    with saved_tensors_hooks(pack, lambda x: x):
        y: Tensor = stage(x)
        if stage.is_last:
            y = stage.loss(y, targets)
    return sizes, y
