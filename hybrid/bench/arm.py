"""The arms' contract: what a process of the pipeline benchmark is told and what it answers; and the one-process arm.

An arm is a handler of `Team`: it loads a workload and then runs one step at a time, timed by CLOCK_MONOTONIC, which all
processes of a host share. Making samples and clearing gradients are outside the timed part, in every arm.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from hybrid.backends.base import Backend
from hybrid.backends.cpu import CpuBackend
from hybrid.bench.messages import Load, Ran, RunStep
from hybrid.bench.workload import Workload
from hybrid.hardware import load_catalog
from hybrid.models.stage import Stage, build_stage
from hybrid.runtime.capabilities import capabilities_of
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.stage_state import squares_of_layers
from hybrid.transports.zmq_memory import keep_freed_memory

WAIT_S = 30.0
"""The longest wait of one rank for another."""


class Arm(ABC):
    """One process of an arm. Subclasses keep the loaded stages in `stages`."""

    stages: tuple[Stage, ...]

    def __init__(self) -> None:
        torch.set_num_threads(1)
        # Our transport asks this of the process that it runs in; the other arms are spared the page faults as well.
        keep_freed_memory()

    @property
    def overrun_s(self) -> float:
        """Emulated chips: by how much actions ended late, so far."""
        return 0.0

    def __call__(self, message: object) -> Any:
        """Do what the message says and return the reply."""
        match message:
            case Load(workload=workload):
                return self.load(workload)
            case RunStep():
                return self._run(message)
            case _:
                return self.answer(message)

    @abstractmethod
    def load(self, workload: Workload) -> None:
        """Build the stages, their gradients zero and their memory at hand."""

    @abstractmethod
    def prepare(self, step: int) -> None:
        """Make the step's samples; not timed."""

    @abstractmethod
    def step(self, step: int) -> float | None:
        """Run a step and leave its gradients in the stages; return the loss where it is known."""

    @abstractmethod
    def answer(self, message: object) -> Any:
        """Return the reply to a message that only this arm knows."""

    def _run(self, message: RunStep) -> Ran:
        self.prepare(message.step)
        overrun_s, cpu_s, start_s = self.overrun_s, time.process_time(), time.monotonic()
        loss = self.step(message.step)
        end_s, cpu_s = time.monotonic(), time.process_time() - cpu_s
        squares: dict[int, float] = {}
        for stage in self.stages:
            squares |= squares_of_layers(stage) if message.with_squares else {}
            zero_gradients(stage)
        return Ran(
            start_s=start_s,
            end_s=end_s,
            cpu_s=cpu_s,
            loss=loss,
            square_of_layer=squares,
            overrun_s=self.overrun_s - overrun_s,
        )


@final
class OneProcess(Arm):
    """The whole model microbatch by microbatch: forward, backward, no pipeline, no wire."""

    def load(self, workload: Workload) -> None:
        self._workload = workload
        self._compute = build_compute(workload, range(workload.model.num_layers), open_cpu())
        self.stages = (self._compute.stage,)

    def prepare(self, step: int) -> None:
        self._batch = microbatches(self._workload, step)

    def step(self, step: int) -> float | None:
        for microbatch in range(self._workload.num_microbatches):
            ids, targets = self._batch(microbatch)
            self._compute.forward(microbatch, ids, targets)
            self._compute.backward(microbatch, None)
        return self._compute.take_loss()

    def answer(self, message: object) -> Any:
        raise TypeError(f"one process is asked for {message}")


def samples(workload: Workload, step: int) -> tuple[Tensor, Tensor]:
    """Return a step's token ids and targets: a function of (seed, step), so that no token travels.

    Shapes:
        returns: (B * num_microbatches, T) int64, twice; a microbatch is B rows on end.
    """
    generator = torch.Generator().manual_seed(workload.seed * 1_000_003 + step)
    shape = (workload.microbatch * workload.num_microbatches, workload.model.sequence_length)
    ids, targets = torch.randint(workload.model.vocab_size, (2, *shape), generator=generator)
    return ids, targets


def microbatches(workload: Workload, step: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return a step's samples by microbatch; see `samples`."""
    ids, targets = (torch.split(rows, workload.microbatch) for rows in samples(workload, step))
    return lambda microbatch: (ids[microbatch], targets[microbatch])


def build_layers(workload: Workload, layers: range) -> Stage:
    """Return layers of the workload's model with zero gradients."""
    stage = build_stage(workload.model, layers.start, layers.stop, seed=workload.seed, dtype=torch.float32)
    zero_gradients(stage)
    return stage


def build_compute(workload: Workload, layers: range, backend: Backend, *, splits: bool = False) -> StageCompute:
    """Return the runtime's forward and backward of some layers."""
    stage, count = build_layers(workload, layers), workload.num_microbatches
    return StageCompute(stage, backend, precision="fp32", num_microbatches=count, splits=splits)


def zero_gradients(stage: Stage) -> None:
    """Clear the gradients but keep their memory, as the runtime's optimizer does."""
    for parameter in stage.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.zero_()


def open_cpu() -> Backend:
    """Return the CPU as a device without a memory limit."""
    return CpuBackend(capabilities_of(load_catalog().chip("cpu"), None))
