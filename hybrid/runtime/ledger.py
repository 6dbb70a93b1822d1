"""The ledger: what the coordinator knows and decides, as a state machine without sockets, clocks or tasks.

Feed it messages and the time; it answers with effects that the coordinator carries out. A step counts as committed
when every rank has reported it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from hybrid.errors import HybridError, MachineError, TrainingDiverged, UserError, WorkerFailed
from hybrid.observe.events import CheckpointEvent, EvalEvent, Event, PhaseEvent, StepEvent
from hybrid.runtime.messages import (
    Abort,
    CheckpointPart,
    Compiled,
    EvalReport,
    Fault,
    Finished,
    Heartbeat,
    Hello,
    Message,
    Ready,
    Shutdown,
    Start,
    StepReport,
    Welcome,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a message to one rank, or to all that have joined."""

    rank: int | None
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """Tell the user."""

    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Make a checkpoint whole."""

    steps_done: int
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The job is over; `error` is None when it went well."""

    error: HybridError | None


Effect: TypeAlias = Send | Emit | Commit | End
ScaleOf: TypeAlias = Callable[[list[Ready]], float]


@dataclass(slots=True)
class _Rank:
    last_heard_s: float
    phase: str = "joined"
    step: int = -1


@dataclass(slots=True)
class Ledger:
    """One job's state.

    Args:
        num_ranks: how many workers must join.
        token: what a worker must show in its Hello.
        tokens_per_step: for tokens/s.
        scale_of: emulated time scale from what the ranks measured.
        join_timeout_s, silence_s: how long to wait for the workers, and for a word from a joined one.
        fault_grace_s: how long to look for a root cause after a fault that may be a consequence.
        last_words_s: how long to wait for the fault of a worker whose process has ended.
    """

    num_ranks: int
    token: bytes
    tokens_per_step: int
    scale_of: ScaleOf
    join_timeout_s: float
    silence_s: float
    started_s: float
    fault_grace_s: float = 3.0
    last_words_s: float = 1.0
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _address_of_rank: dict[int, str] = field(default_factory=dict)
    _native_address_of_rank: dict[str, str] = field(default_factory=dict)
    _ready: dict[int, Ready] = field(default_factory=dict)
    _steps: dict[int, dict[int, StepReport]] = field(default_factory=dict)
    _parts: dict[int, dict[int, CheckpointPart]] = field(default_factory=dict)
    _finished: dict[int, Finished] = field(default_factory=dict)
    _faults: list[Fault] = field(default_factory=list)
    _fault_deadline_s: float | None = None
    _gone: dict[int, str] = field(default_factory=dict)
    _ended: bool = False

    @property
    def ended(self) -> bool:
        """Whether an End was decided."""
        return self._ended

    @property
    def peak_bytes_of_rank(self) -> dict[int, int]:
        """What each finished rank held at most."""
        return {rank: message.peak_bytes for rank, message in self._finished.items()}

    def on_message(self, message: Message, now_s: float) -> list[Effect]:
        """Take one message from a worker."""
        rank = getattr(message, "rank", None)
        if rank is None or not 0 <= rank < self.num_ranks or self._ended:
            return []
        if isinstance(message, Hello):
            return self._on_hello(message, now_s)
        state = self._ranks.get(rank)
        if state is None:
            return []
        state.last_heard_s = now_s
        match message:
            case Ready():
                state.phase = "ready"
                self._ready[rank] = message
                if len(self._ready) == self.num_ranks:
                    scale = self.scale_of([self._ready[r] for r in range(self.num_ranks)])
                    return [
                        Emit(event=PhaseEvent(name="stages built and warm", since_start_s=now_s - self.started_s)),
                        Send(rank=None, message=Start(time_scale=scale)),
                    ]
            case Compiled():
                told = f"rank {rank} compiled {message.name} ({message.done} of {message.total})"
                return [Emit(event=PhaseEvent(name=told, since_start_s=now_s - self.started_s))]
            case StepReport():
                return self._on_step(message, now_s)
            case EvalReport():
                return [Emit(event=EvalEvent(steps_done=message.steps_done, loss=message.loss))]
            case CheckpointPart():
                return self._on_part(message)
            case Finished():
                state.phase = "finished"
                self._finished[rank] = message
                if len(self._finished) == self.num_ranks:
                    self._ended = True
                    return [Send(rank=None, message=Shutdown()), End(error=None)]
            case Fault():
                return self._on_fault(message, now_s)
            case Heartbeat():
                state.step = message.step
            case _:
                pass
        return []

    def on_worker_gone(self, rank: int, why: str, now_s: float) -> list[Effect]:
        """Take the news that a worker's process has ended before its job did."""
        if self._ended or rank in self._finished or any(f.rank == rank for f in self._faults):
            return []
        if not self._gone:
            # Its last words may be on the wire still: who watches processes is quicker than the socket.
            self._fault_deadline_s = now_s + self.last_words_s
        self._gone[rank] = why
        return []

    def on_tick(self, now_s: float) -> list[Effect]:
        """Look at the clock."""
        if self._ended:
            return []
        if self._fault_deadline_s is not None and now_s >= self._fault_deadline_s:
            return self._end_with_root_cause()
        if len(self._ranks) < self.num_ranks and now_s - self.started_s > self.join_timeout_s:
            missing = [rank for rank in range(self.num_ranks) if rank not in self._ranks]
            error: HybridError = MachineError(
                f"workers did not join within {self.join_timeout_s:.0f} s: rank {', '.join(map(str, missing))}",
                fix="see the worker logs, or raise runtime.placement_timeout_s",
            )
            return self._end(error)
        for rank, state in self._ranks.items():
            silent_s = now_s - state.last_heard_s
            if state.phase != "finished" and silent_s > self.silence_s:
                return self._end(
                    WorkerFailed(f"rank {rank} has been silent for {silent_s:.1f} s after step {state.step}")
                )
        return []

    def _on_hello(self, message: Hello, now_s: float) -> list[Effect]:
        if not hmac.compare_digest(message.token, self.token) or message.rank in self._ranks:
            return []
        self._ranks[message.rank] = _Rank(last_heard_s=now_s)
        self._address_of_rank[message.rank] = message.address
        if message.native_address:
            self._native_address_of_rank[str(message.rank)] = message.native_address
        if len(self._ranks) < self.num_ranks:
            return []
        addresses = {str(rank): self._address_of_rank[rank] for rank in range(self.num_ranks)}
        return [
            Emit(event=PhaseEvent(name="workers joined", since_start_s=now_s - self.started_s)),
            Send(
                rank=None,
                message=Welcome(address_of_rank=addresses, native_address_of_rank=self._native_address_of_rank),
            ),
        ]

    def _on_step(self, message: StepReport, now_s: float) -> list[Effect]:
        self._ranks[message.rank].step = message.step
        reports = self._steps.setdefault(message.step, {})
        reports[message.rank] = message
        if len(reports) < self.num_ranks:
            return []
        del self._steps[message.step]
        ordered = [reports[rank] for rank in range(self.num_ranks)]
        loss = sum(report.loss for report in ordered if report.loss is not None)
        seconds = max(report.seconds for report in ordered)
        event = StepEvent(
            step=message.step,
            loss=loss,
            grad_norm=ordered[0].grad_norm,
            learning_rate=ordered[0].learning_rate,
            seconds=seconds,
            tokens_per_s=self.tokens_per_step / seconds,
            idle_share_of_rank=tuple(max(0.0, 1.0 - r.busy_s / r.seconds) for r in ordered),
            overrun_s=max(report.overrun_s for report in ordered),
            since_start_s=now_s - self.started_s,
        )
        return [Emit(event=event)]

    def _on_part(self, message: CheckpointPart) -> list[Effect]:
        parts = self._parts.setdefault(message.steps_done, {})
        parts[message.rank] = message
        if len(parts) < self.num_ranks:
            return []
        del self._parts[message.steps_done]
        files = {name: (fact[0], fact[1]) for part in parts.values() for name, fact in part.files.items()}
        return [
            Commit(steps_done=message.steps_done, files=files),
            Emit(
                event=CheckpointEvent(steps_done=message.steps_done, num_bytes=sum(size for size, _ in files.values()))
            ),
        ]

    def _on_fault(self, message: Fault, now_s: float) -> list[Effect]:
        self._faults.append(message)
        self._gone.pop(message.rank, None)
        if not message.is_consequence:
            return self._end_with_root_cause()
        if self._fault_deadline_s is None:
            self._fault_deadline_s = now_s + self.fault_grace_s
        return []

    def _end_with_root_cause(self) -> list[Effect]:
        root = next((f for f in self._faults if not f.is_consequence), None)
        if root is not None:
            return self._end(_error_of(root))
        if self._gone:
            rank, why = next(iter(self._gone.items()))
            return self._end(WorkerFailed(f"rank {rank}'s process ended before its job did: {why}"))
        return self._end(_error_of(self._faults[0]))

    def _end(self, error: HybridError) -> list[Effect]:
        self._ended = True
        return [Send(rank=None, message=Abort(reason=str(error)[:2000])), End(error=error)]


def _error_of(fault: Fault) -> HybridError:
    text = f"rank {fault.rank}: {fault.text}".rstrip(".")
    if fault.error == TrainingDiverged.__name__:
        return TrainingDiverged(text)
    if fault.exit_code == UserError.exit_code:
        return UserError(text)
    return WorkerFailed(f"rank {fault.rank} failed with {fault.error}: {fault.text}\n{fault.traceback.rstrip()}\n")
