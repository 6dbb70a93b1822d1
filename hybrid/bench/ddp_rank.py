"""One process of the DDP benchmark. Imports torch when it is called."""

from __future__ import annotations

import time
from typing import Any

ARMS = ("hybrid", "gloo", "alone")
"""`alone` exchanges nothing."""
_LAYERS = 4
_ROWS = 16
_STEPS = 3
"""A turn is so many steps, of which the mean is told."""


def time_steps(rank: int, size: int, store: str, width: int, turns: int) -> dict[str, list[float]]:
    """Return the seconds of a step, forward and backward, by arm and turn."""
    import torch
    import torch.distributed
    from torch import nn

    from hybrid.testing.c10d_kit import world

    dist: Any = torch.distributed
    with world("hybrid", rank, size, store):
        gloo = dist.new_group(backend="gloo")
        torch.manual_seed(0)
        x = torch.randn(_ROWS, width)
        model = {
            arm: nn.parallel.DistributedDataParallel(
                nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(_LAYERS))),
                process_group=gloo if arm == "gloo" else None,
                gradient_as_bucket_view=True,
            )
            for arm in ARMS
        }
        found: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(turns + 1):
            for arm in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
                dist.barrier(gloo)
                seconds = _turn(model[arm], x, exchange=arm != "alone")
                if turn:  # the first turn warms up
                    found[arm].append(seconds)
    return found


def _turn(model: Any, x: Any, *, exchange: bool) -> float:
    start_s = time.perf_counter()
    for _ in range(_STEPS):
        model.require_backward_grad_sync = exchange
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        model(x).square().mean().backward()
    return (time.perf_counter() - start_s) / _STEPS
