"""Our arms: a rank as in a job's worker (Interpreter, StageCompute, a transport), on the CPU or as an emulated chip."""

from __future__ import annotations

import time
from typing import Any, final

import torch

from hybrid.backends.base import Backend
from hybrid.backends.emulated import EmulatedBackend
from hybrid.bench.arm import WAIT_S, Arm, build_compute, microbatches, open_cpu, zero_gradients
from hybrid.bench.messages import Alone, KeepPace, Meet, RunAlone, TellAddress
from hybrid.bench.workload import Pace, Workload
from hybrid.hardware import load_catalog
from hybrid.models.stage import boundary_shape
from hybrid.runtime.capabilities import capabilities_of
from hybrid.runtime.emulated_link import EmulatedLink
from hybrid.runtime.held_stages import splits_backward
from hybrid.runtime.interpreter import Interpreter
from hybrid.scheduler.actions import Action, Kind
from hybrid.scheduler.lowering import lower_communication
from hybrid.transports import open_node
from hybrid.transports.arrival import ArrivalHistory
from hybrid.transports.base import Transport


@final
class HybridRank(Arm):
    """One rank of our pipeline, by the workload's schedule.

    Args:
        medium: a name of `hybrid.transports.VARIANTS`.
        chip: emulate this chip of the catalog, at the pace that `KeepPace` sets; None computes on the CPU.
    """

    def __init__(self, rank: int, num_ranks: int, medium: str, token: bytes, chip: str | None = None) -> None:
        super().__init__()
        self._rank, self._num_ranks = rank, num_ranks
        self._node = open_node(medium, rank, token=token)
        self._edges: dict[int, Transport] = {}
        self._backend: Backend = open_cpu() if chip is None else _open_emulated(chip)
        self._pace: Pace | None = None

    @property
    def overrun_s(self) -> float:
        return self._backend.overrun_s if isinstance(self._backend, EmulatedBackend) else 0.0

    def load(self, workload: Workload) -> None:
        self._workload = workload
        self._schedule = workload.build_schedule()
        own = [stage for stage, rank in enumerate(workload.layout) if rank == self._rank]
        self._compute = {
            stage: build_compute(
                workload, workload.layers(stage), self._backend, splits=splits_backward(self._schedule, stage)
            )
            for stage in own
        }
        self.stages = tuple(compute.stage for compute in self._compute.values())
        self._interpreter = Interpreter(
            lower_communication(self._schedule),
            self._rank,
            self._compute,
            self._edges,
            shape=boundary_shape(workload.model, workload.microbatch),
            dtype=torch.float32,
            seconds_of=self._seconds_of,
            waits=ArrivalHistory(fixed_s=WAIT_S),
            link_of_rank=self._links(),
        )

    def prepare(self, step: int) -> None:
        self._batch = microbatches(self._workload, step)
        # An emulated chip's work begins now, not within the lag that its queue may hide.
        self._backend.execute(lambda: None, expected_s=0.0)

    def step(self, step: int) -> float | None:
        self._interpreter.run(step, self._batch)
        return self._compute[max(self._compute)].take_loss()

    def answer(self, message: object) -> Any:
        match message:
            case TellAddress():
                return self._node.address
            case Meet(address_of_rank=addresses):
                return self._meet(addresses)
            case KeepPace(pace=pace):
                self._pace = pace
                return None
            case RunAlone(step=step):
                return self._run_alone(step)
            case _:
                raise TypeError(f"a rank of ours is asked for {message}")

    def _seconds_of(self, action: Action) -> float:
        return 0.0 if self._pace is None else self._pace.seconds_of(action)

    def _links(self) -> dict[int, EmulatedLink]:
        """Return emulated chips' links to the neighbours, which take no time on the chips' clock."""
        if not isinstance(self._backend, EmulatedBackend):
            return {}
        return {peer: EmulatedLink(transfer_s=0.0, busy_s=0.0) for peer in self._edges}

    def _meet(self, address_of_rank: tuple[str, ...]) -> None:
        last = self._num_ranks - 1
        # The last one hands on to the first where ranks hold several stages. One order for all, as in a job.
        pairs = {(rank, rank + 1) for rank in range(last)} | ({(0, last)} if last else set())
        for pair in sorted(pairs):
            if self._rank in pair:
                peer = pair[1 - pair.index(self._rank)]
                self._edges[peer] = self._node.open(peer, address_of_rank[peer], timeout_s=WAIT_S)

    def _run_alone(self, step: int) -> Alone:
        batch = microbatches(self._workload, step)
        shape = boundary_shape(self._workload.model, self._workload.microbatch)
        x, grad = torch.randn(shape), torch.randn(shape) * 1e-3
        (compute,) = self._compute.values()
        seconds = {Kind.F: 0.0, Kind.B: 0.0}
        cpu_s = time.process_time()
        for action in self._schedule.actions_of_rank[self._rank]:
            start_s = time.monotonic()
            if action.kind is Kind.F:
                ids, targets = batch(action.microbatch)
                compute.forward(action.microbatch, ids if compute.is_first else x, targets)
            else:
                compute.backward(action.microbatch, None if compute.is_last else grad)
            seconds[action.kind] += time.monotonic() - start_s
        cpu_s = time.process_time() - cpu_s
        compute.take_loss()
        zero_gradients(compute.stage)
        num = self._workload.num_microbatches
        return Alone(forward_s=seconds[Kind.F] / num, backward_s=seconds[Kind.B] / num, cpu_s=cpu_s)


def _open_emulated(chip: str) -> EmulatedBackend:
    return EmulatedBackend(capabilities_of(load_catalog().chip(chip), None), time_scale=1.0)
