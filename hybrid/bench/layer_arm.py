"""LayerArm: a process that measures the kinds of layers of a workload's model, beside others that do the same."""

from __future__ import annotations

import time
from typing import Any, final

import torch

from hybrid.bench.arm import open_cpu
from hybrid.bench.workload import Workload
from hybrid.runtime.layer_profile import LayerSeconds, measure_layers
from hybrid.transports.zmq_memory import keep_freed_memory


@final
class LayerArm:
    """Takes a workload, answers with its layers in core seconds; takes a number of seconds, computes as long."""

    def __init__(self) -> None:
        # As the ranks that it measures for: one thread, and freed memory at hand.
        torch.set_num_threads(1)
        keep_freed_memory()

    def __call__(self, message: Any) -> tuple[LayerSeconds, ...] | float:
        """Measure the workload's layers on this process's one thread, or the share of a core that it gets."""
        if isinstance(message, float):
            return _share_of_core(message)
        assert isinstance(message, Workload), message
        return measure_layers(
            message.model, open_cpu(), microbatch=message.microbatch, precision="fp32", clock=time.thread_time
        )


def _share_of_core(seconds: float) -> float:
    start_s, cpu_s = time.perf_counter(), time.thread_time()
    while time.perf_counter() - start_s < seconds:
        sum(range(1000))
    return (time.thread_time() - cpu_s) / (time.perf_counter() - start_s)
