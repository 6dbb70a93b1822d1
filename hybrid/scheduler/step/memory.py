"""Memory of a rank over time, and its peak, from when its actions run.

Pure. Counts what is alive; an allocator's fragmentation is for the caller to put into `fixed_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.scheduler.actions import Kind
from hybrid.scheduler.step.facts import StageMemory
from hybrid.scheduler.timeline import Span


def memory_over_time(
    spans: Sequence[Span],
    memory_of_stage: Sequence[StageMemory],
    stages: Sequence[int],
    *,
    reduce_start_s: float | None,
) -> list[tuple[float, float]]:
    """Return (seconds, bytes held from then on) of one rank, by rising time.

    Args:
        spans: the rank's compute actions in order.
        memory_of_stage: of every stage of the pipeline.
        stages: the ones that this rank holds.
        reduce_start_s: when its gradients begin to be reduced or its weights to be updated; None: never.
    """
    held = sum(memory_of_stage[stage].state_bytes for stage in stages)
    held += max((memory_of_stage[stage].fixed_bytes for stage in stages), default=0.0)
    points = [(0.0, held)]
    for span in spans:
        memory = memory_of_stage[span.action.stage]
        kept = memory.held_bytes if memory.kept_bytes is None else memory.kept_bytes
        kind = span.action.kind
        if kind is Kind.F:
            # What the backward will need grows while the forward runs; its peak counts all of it.
            held += memory.held_bytes
            points.append((span.start_s, held + memory.forward_bytes))
        else:
            points.append((span.start_s, held + memory.backward_bytes))
            freed = {Kind.B: memory.held_bytes, Kind.I: memory.held_bytes - kept, Kind.W: kept}
            held -= freed.get(kind, 0.0)
        points.append((span.end_s, held))
    if reduce_start_s is not None:
        points.append((reduce_start_s, held + sum(memory_of_stage[stage].reduce_bytes for stage in stages)))
    return sorted(points, key=lambda point: point[0])


def peak_bytes(points: Sequence[tuple[float, float]]) -> float:
    """Return the most bytes held at any time."""
    return max((held for _, held in points), default=0.0)
