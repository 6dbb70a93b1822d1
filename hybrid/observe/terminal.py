"""The live view of a run: a panel that redraws itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from hybrid.config import JobConfig
from hybrid.observe.events import CheckpointEvent, EvalEvent, Event, PhaseEvent, Sink, StepEvent

_LINE_EVERY_S = 2.0


@contextmanager
def open_progress(console: Console, job: JobConfig, *, num_ranks: int, quiet: bool) -> Iterator[Sink]:
    """Yield a sink that shows the run; `quiet` shows nothing."""
    if quiet:
        yield lambda event: None
    elif console.is_terminal:
        view = _LiveView(job, num_ranks)
        with Live(view.render(), console=console, refresh_per_second=8, transient=False) as live:

            def sink(event: Event) -> None:
                view.take(event)
                live.update(view.render())

            yield sink
    else:
        yield _PlainView(console, job).take


class _PlainView:
    """A line for every phase, evaluation and checkpoint, and for a step every two seconds."""

    def __init__(self, console: Console, job: JobConfig) -> None:
        self._console, self._job = console, job
        self._shown_s = float("-inf")

    def take(self, event: Event) -> None:
        match event:
            case PhaseEvent():
                self._print(f"[{event.since_start_s:6.1f} s] {event.name}")
            case StepEvent():
                now_s = time.monotonic()
                if now_s - self._shown_s < _LINE_EVERY_S and event.step + 1 < self._job.steps:
                    return
                self._shown_s = now_s
                self._print(step_line(event, self._job))
            case EvalEvent():
                self._print(f"held-out loss after {event.steps_done} steps: {event.loss:.4f}")
            case CheckpointEvent():
                self._print(f"checkpoint after {event.steps_done} steps: {event.num_bytes / 2**20:.1f} MiB")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def step_line(event: StepEvent, job: JobConfig) -> str:
    """Return a step as one line."""
    utilisation = " ".join(f"{1 - idle:.0%}" for idle in event.idle_share_of_rank)
    left_s = (job.steps - event.step - 1) * event.seconds
    return (
        f"step {event.step + 1}/{job.steps}  loss {event.loss:.4f}  grad norm {event.grad_norm:.3f}  "
        f"{event.tokens_per_s:,.0f} tokens/s  stages busy {utilisation}  ETA {left_s:.0f} s"
    )


class _LiveView:
    """Progress bar, the last step's figures, a bar a stage, and what happened last."""

    def __init__(self, job: JobConfig, num_ranks: int) -> None:
        self._job, self._num_ranks = job, num_ranks
        self._bar = Progress(TextColumn("steps"), BarColumn(bar_width=40), TextColumn("{task.completed}/{task.total}"))
        self._task = self._bar.add_task("steps", total=job.steps)
        self._step: StepEvent | None = None
        self._notes: list[str] = []

    def take(self, event: Event) -> None:
        match event:
            case PhaseEvent():
                self._notes.append(f"{event.since_start_s:6.1f} s  {event.name}")
            case StepEvent():
                self._step = event
                self._bar.update(self._task, completed=event.step + 1)
            case EvalEvent():
                self._notes.append(f"held-out loss after {event.steps_done} steps: {event.loss:.4f}")
            case CheckpointEvent():
                self._notes.append(f"checkpoint after {event.steps_done} steps: {event.num_bytes / 2**20:.1f} MiB")

    def render(self) -> Group:
        lines = [Text(note, style="dim") for note in self._notes[-5:]]
        if self._step is None:
            return Group(*lines, self._bar)
        bars = [
            Text(f"stage {rank:<3} {'█' * round(30 * (1 - idle)):<30} {1 - idle:4.0%} busy")
            for rank, idle in enumerate(self._step.idle_share_of_rank)
        ]
        return Group(*lines, self._bar, Text(step_line(self._step, self._job)), *bars)
