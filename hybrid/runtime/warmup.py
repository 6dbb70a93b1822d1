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
from hybrid.models.stage import boundary_dtype
from hybrid.runtime.compute import StageCompute

_ROUNDS = 3


def first_calls_of(compute: StageCompute, microbatch: int, precision: Precision) -> dict[str, Callable[[], object]]:
    """Return the calls that make a graph device compile all that the stage runs, for the plan's shapes."""
    shape = compute.stage.boundary_shape(microbatch)
    ids = torch.zeros(microbatch, compute.stage.config.sequence_length, dtype=torch.int64)
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
    """Return the CPU seconds of one action of each kind: F and B, or F, I and W of a stage that splits its backwards.

    Sets what the stage's microbatches hold, in bytes; leaves zero gradients. CPU time, not wall time: all ranks warm up
    at once on the same cores. On an accelerator it is the host's share.

    Raises:
        torch.OutOfMemoryError: not even one microbatch fits.
    """
    shape = compute.stage.boundary_shape(microbatch)
    ids = torch.zeros(microbatch, compute.stage.config.sequence_length, dtype=torch.int64)
    backend = compute.backend
    boundary = backend.to_device(torch.zeros(shape, dtype=boundary_dtype(precision)))
    x = backend.to_device(ids) if compute.is_first else boundary
    grad = None if compute.is_last else boundary
    compute.saved_bytes = measure_saved_bytes(
        compute.stage, microbatch=microbatch, precision=precision, device=backend.device.type
    )
    compute.input_bytes = min(x.untyped_storage().nbytes(), compute.saved_bytes)
    actions: dict[str, Callable[[], object]] = {"F": lambda: compute.forward(0, x, ids)}
    if compute.splits:
        actions |= {"I": lambda: compute.backward_input(0, grad), "W": lambda: compute.backward_weight(0)}
    else:
        actions["B"] = lambda: compute.backward(0, grad)
    seconds = dict.fromkeys(actions, float("inf"))
    put_off_bytes = 0
    with compute.context():
        for _ in range(_ROUNDS):
            for kind, act in actions.items():
                start_s = time.thread_time()
                act()
                seconds[kind] = min(seconds[kind], time.thread_time() - start_s)
                if kind == "I":
                    put_off_bytes = compute.held_for_weights(0)
    compute.put_off_bytes = put_off_bytes
    compute.take_loss()
    for parameter in compute.stage.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return seconds
