"""Warm-up of a stage: a few forwards and backwards on zeros, timed, before the job starts.

It makes memory and kernels warm, counts what a microbatch holds from forward to backward, and tells what the stage
costs this machine's CPU, from which the emulated chips' time scale follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hybrid.config import Precision
from hybrid.models.measure import measure_saved_bytes
from hybrid.models.stage import boundary_dtype, boundary_shape
from hybrid.runtime.compute import StageCompute

_ROUNDS = 3


def first_calls_of(compute: StageCompute, microbatch: int, precision: Precision) -> dict[str, Callable[[], object]]:
    """Return the calls that make a graph device compile all that the stage runs, for the plan's shapes."""
    shape = boundary_shape(compute.stage.config, microbatch)
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    backend = compute.backend
    boundary = backend.to_device(torch.zeros(shape, dtype=boundary_dtype(precision)))
    x = backend.to_device(ids) if compute.is_first else boundary

    def train() -> None:
        with compute.context():
            compute.forward(0, x, ids)
            compute.backward(0, None if compute.is_last else boundary)

    def evaluate() -> None:
        with compute.context():
            compute.evaluate(x, ids)

    return {"forward and backward": train, "evaluation": evaluate}


def warm_up(compute: StageCompute, microbatch: int, precision: Precision) -> dict[str, float]:
    """Return the CPU seconds of one action of each kind; sets `compute.saved_bytes`, leaves zero gradients.

    CPU time, not wall time: all ranks warm up at once on the same cores. On an accelerator it is the host's share.

    Raises:
        torch.OutOfMemoryError: not even one microbatch fits.
    """
    shape = boundary_shape(compute.stage.config, microbatch)
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    backend = compute.backend
    boundary = backend.to_device(torch.zeros(shape, dtype=boundary_dtype(precision)))
    compute.saved_bytes = measure_saved_bytes(
        compute.stage, microbatch=microbatch, precision=precision, device=backend.device.type
    )
    forward_s = backward_s = float("inf")
    with compute.context():
        for _ in range(_ROUNDS):
            start = time.thread_time()
            compute.forward(0, backend.to_device(ids) if compute.is_first else boundary, ids)
            middle = time.thread_time()
            compute.backward(0, None if compute.is_last else boundary)
            forward_s = min(forward_s, middle - start)
            backward_s = min(backward_s, time.thread_time() - middle)
    compute.take_loss()
    for parameter in compute.stage.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return {"F": forward_s, "B": backward_s}
