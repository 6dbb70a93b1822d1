"""The interpreter: walks one rank's actions of a step, over its stages and edges.

The only place where a schedule's actions act. Receives are posted where the schedule says so, ahead of
their use; sends are started and never waited for within the step; a compute action waits for its own input only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid.errors import ScheduleError
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.emulated_link import STAMP_BYTES, EmulatedLink, arrival_s
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.transports.arrival import ArrivalHistory
from hybrid.transports.base import Buffer, Pending, Transport

Batch = Callable[[int], tuple[Tensor, Tensor]]
"""Microbatch number to (token ids, targets), both (B, T) int64 on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When one compute action ran, in seconds of `time.monotonic`."""

    action: Action
    start_s: float
    end_s: float


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """What a rank did in one step."""

    start_s: float = 0.0
    end_s: float = 0.0
    spans: list[Span] = field(default_factory=list)

    @property
    def busy_s(self) -> float:
        """Seconds in compute actions."""
        return sum(span.end_s - span.start_s for span in self.spans)


def host_bytes(x: Tensor) -> memoryview:
    """Return the bytes of a contiguous host tensor, without a copy."""
    return x.detach().view(-1).view(torch.uint8).numpy().data


@dataclass(slots=True)
class _Posted:
    pending: Pending
    buffer: Tensor
    stamp: bytearray | None


class Interpreter:
    """Runs one rank's part of a schedule, step after step.

    Args:
        compute_of_stage: this rank's stages.
        edge_of_rank: an open transport to every rank that this rank's actions name.
        shape, dtype: of the activation between two stages, (B, T, H).
        seconds_of: what the cost table says an action takes on the real chip.
        waits: how long peers were waited for, and from it how long to wait; its limits hold.
        link_of_rank: the emulated link to a peer, where both ends are emulated chips.
        on_last_backward: told of each stage just before its last backward of the step, where that is a whole one.
        on_stage_done: told of each stage when its last backward of the step has run here; its gradients are whole.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        compute_of_stage: Mapping[int, StageCompute],
        edge_of_rank: Mapping[int, Transport],
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        seconds_of: Callable[[Action], float],
        waits: ArrivalHistory,
        link_of_rank: Mapping[int, EmulatedLink] | None = None,
        on_last_backward: Callable[[int], None] | None = None,
        on_stage_done: Callable[[int], None] | None = None,
    ) -> None:
        self._on_last_backward = on_last_backward
        self._on_stage_done = on_stage_done
        self._links = link_of_rank or {}
        self._actions = schedule.actions_of_rank[rank]
        last_of_stage = {a.stage: a for a in self._actions if a.kind in (Kind.B, Kind.W)}
        self._last_backwards = frozenset(last_of_stage.values())
        self._rank_of_stage = schedule.rank_of_stage
        self._compute = compute_of_stage
        self._backend = next(iter(compute_of_stage.values())).backend
        self._edges = edge_of_rank
        self._shape, self._dtype = shape, dtype
        self._seconds_of = seconds_of
        self._waits = waits
        self._borrowed: dict[tuple[int, int], list[Tensor]] = {}
        self._posted: dict[tuple[Kind, int, int], _Posted] = {}
        self._local: dict[tuple[Kind, int, int], Tensor] = {}
        self._sends: deque[tuple[Pending, Tensor]] = deque()

    def run(self, step: int, batch: Batch) -> StepRecord:
        """Run every action of the step; gradients are left in the stages' parameters.

        Raises:
            CommTimeout, PeerLost: a neighbour was silent or has gone.
            torch.OutOfMemoryError: the device's memory is exceeded.
        """
        record = StepRecord(start_s=time.monotonic())
        earlier, self._sends = self._sends, deque()
        with next(iter(self._compute.values())).context():
            for action in self._actions:
                is_last = action in self._last_backwards
                if self._on_last_backward is not None and is_last and action.kind is Kind.B:
                    self._on_last_backward(action.stage)
                self._do(action, step, batch, record)
                if self._on_stage_done is not None and is_last:
                    self._on_stage_done(action.stage)
        # Sends of the step before have had a whole step to leave; these must have.
        while earlier:
            self._end_send(*earlier.popleft())
        record.end_s = time.monotonic()
        return record

    def _do(self, action: Action, step: int, batch: Batch, record: StepRecord) -> None:
        match action.kind:
            case Kind.RECV_F | Kind.RECV_B:
                self._post(action, step)
            case Kind.SEND_F | Kind.SEND_B:
                self._send(action, step)
            case Kind.F:
                self._forward(action, batch, record)
            case Kind.B | Kind.I:
                self._backward(action, record)
            case Kind.W:
                self._weight(action, record)

    def _post(self, action: Action, step: int) -> None:
        source = action.stage - 1 if action.kind is Kind.RECV_F else action.stage + 1
        kind = Kind.F if action.kind is Kind.RECV_F else Kind.B
        buffer = self._backend.host_buffer(self._shape, self._dtype)
        peer = self._rank_of_stage[source]
        stamp = bytearray(STAMP_BYTES) if peer in self._links else None
        into = [host_bytes(buffer)] if stamp is None else [host_bytes(buffer), memoryview(stamp)]
        pending = self._edges[peer].recv(_tag(kind, action, step), into)
        self._posted[(kind, action.stage, action.microbatch)] = _Posted(pending, buffer, stamp)

    def _send(self, action: Action, step: int) -> None:
        target = action.stage + 1 if action.kind is Kind.SEND_F else action.stage - 1
        kind = Kind.F if action.kind is Kind.SEND_F else Kind.B
        # The receiver's name for the message: its own stage.
        received = Action(target, kind, action.microbatch)
        tensor = self._local.pop((kind, target, action.microbatch))
        peer = self._rank_of_stage[target]
        buffers: list[Buffer] = [host_bytes(tensor)]
        if peer in self._links:
            buffers.append(self._links[peer].stamp())
        # What has left is let go at once, or a step would hold every microbatch's activation.
        while self._sends and self._sends[0][0].done():
            self._end_send(*self._sends.popleft())
        self._sends.append((self._edges[peer].send(_tag(kind, received, step), buffers), tensor))

    def _end_send(self, pending: Pending, sent: Tensor) -> None:
        pending.wait(self._waits.timeout_s)
        if not self._backend.is_host:
            self._backend.recycle(sent)

    def _take(self, kind: Kind, action: Action) -> tuple[Tensor, float | None]:
        """Return the input of a compute action and when it landed, None where it was there already."""
        key = (kind, action.stage, action.microbatch)
        posted = self._posted.pop(key, None)
        if posted is None:
            if key not in self._local:
                raise ScheduleError("an action's input was neither received nor computed here", value=str(action))
            return self._local.pop(key), None
        was_there = posted.pending.done()
        began_s = time.monotonic()
        posted.pending.wait(self._waits.timeout_s)
        self._waits.observe(time.monotonic() - began_s)
        self._borrowed.setdefault((action.stage, action.microbatch), []).append(posted.buffer)
        if posted.stamp is not None:
            return posted.buffer, arrival_s(posted.stamp)
        return posted.buffer, None if was_there else time.monotonic()

    def _forward(self, action: Action, batch: Batch, record: StepRecord) -> None:
        compute = self._compute[action.stage]
        backend = compute.backend
        ready_s: float | None = None
        targets: Tensor | None = None
        if compute.is_first or compute.is_last:
            ids, targets = batch(action.microbatch)
        if compute.is_first:
            x = ids
        else:
            x, ready_s = self._take(Kind.F, action)
        start_s = time.monotonic()
        out = backend.execute(
            lambda: compute.forward(action.microbatch, backend.to_device(x), targets),
            expected_s=self._seconds_of(action),
            ready_s=ready_s,
        )
        # Where the device works on after `execute` has returned, the copy waits for it: it belongs to the action.
        landed = None if out is None else self._landed(out)
        record.spans.append(Span(action=action, start_s=start_s, end_s=time.monotonic()))
        if landed is not None:
            self._local[(Kind.F, action.stage + 1, action.microbatch)] = landed

    def _backward(self, action: Action, record: StepRecord) -> None:
        compute = self._compute[action.stage]
        backend = compute.backend
        grad: Tensor | None = None
        ready_s: float | None = None
        if not compute.is_last:
            grad, ready_s = self._take(Kind.B, action)
        backward = compute.backward if action.kind is Kind.B else compute.backward_input
        start_s = time.monotonic()
        out = backend.execute(
            lambda: backward(action.microbatch, None if grad is None else backend.to_device(grad)),
            expected_s=self._seconds_of(action),
            ready_s=ready_s,
        )
        landed = None if out is None else self._landed(out)
        record.spans.append(Span(action=action, start_s=start_s, end_s=time.monotonic()))
        if landed is not None:
            self._local[(Kind.B, action.stage - 1, action.microbatch)] = landed
        if action.kind is Kind.B:
            self._give_back(action)

    def _weight(self, action: Action, record: StepRecord) -> None:
        compute = self._compute[action.stage]
        start_s = time.monotonic()
        compute.backend.execute(lambda: compute.backward_weight(action.microbatch), expected_s=self._seconds_of(action))
        record.spans.append(Span(action=action, start_s=start_s, end_s=time.monotonic()))
        self._give_back(action)

    def _give_back(self, action: Action) -> None:
        """Recycle the buffers in which a microbatch's input and gradient came: its last action has read them."""
        for buffer in self._borrowed.pop((action.stage, action.microbatch), ()):
            self._backend.recycle(buffer)

    def _landed(self, out: Tensor) -> Tensor:
        """Return an action's result on the host, in a buffer that has been used before where it had to be copied."""
        if self._backend.is_host:
            return self._backend.to_host(out)
        return self._backend.to_host(out, into=self._backend.host_buffer(self._shape, self._dtype))


def _tag(kind: Kind, receiver: Action, step: int) -> str:
    return f"{step}/{receiver.stage}{kind.value}{receiver.microbatch}"
