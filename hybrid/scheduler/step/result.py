"""What follows from a simulated step: intervals and memory by rank, tokens a second, dollars, kilowatt-hours.

Pure. Everything is per kind of pipeline; nothing grows with the number of replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hybrid.scheduler.actions import Kind
from hybrid.scheduler.step.facts import Pipeline, Reduction, TrainingStep, blocked_seconds
from hybrid.scheduler.step.memory import memory_over_time, peak_bytes
from hybrid.scheduler.timeline import Timeline

NAME_OF_KIND = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}
_HOUR_S = 3600.0
_JOULES_PER_KWH = 3.6e6


class Interval(NamedTuple):
    """What a rank does for a while."""

    what: str
    """`forward`, `backward`, `input gradient`, `weight gradient`, `receive`, `send`, `reduce`, `update`, `idle`."""
    label: str
    """The action, like `2F0`, or the reduction's name."""
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ReductionRun:
    """When a reduction ran."""

    reduction: Reduction
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """One kind of pipeline in one step."""

    pipeline: Pipeline
    timeline: Timeline
    update_start_s: tuple[float, ...]
    """By rank of the schedule: when nothing but the update is left."""
    end_s: tuple[float, ...]

    def intervals(self, rank: int, reductions: tuple[ReductionRun, ...] = ()) -> list[Interval]:
        """Return what a rank does from the step's start to its own end, idle time included.

        A message is an interval of its own where it blocks the rank's compute; `reductions` are those that the
        rank takes part in.
        """
        blocked = blocked_seconds(self.pipeline)
        found: list[Interval] = []
        for span in self.timeline.spans_of_rank[rank]:
            before, after = blocked(span.action)
            label = str(span.action)
            if before:
                found.append(Interval("receive", label, span.start_s, span.start_s + before))
            found.append(Interval(NAME_OF_KIND[span.action.kind], label, span.start_s + before, span.end_s - after))
            if after:
                found.append(Interval("send", label, span.end_s - after, span.end_s))
        computed_s = found[-1].end_s if found else 0.0
        for run in sorted(reductions, key=lambda each: each.start_s):
            # What overlaps with compute doesn't keep the rank.
            start_s = max(run.start_s, computed_s)
            if run.end_s > start_s:
                found.append(Interval("reduce", run.reduction.name, start_s, run.end_s))
                computed_s = run.end_s
        if self.end_s[rank] > self.update_start_s[rank]:
            found.append(Interval("update", "update", self.update_start_s[rank], self.end_s[rank]))
        return _with_idle(found)

    def memory(self, rank: int) -> list[tuple[float, float]]:
        """Return (seconds, bytes held from then on) of each of a rank's devices."""
        stages = [s for s, owner in enumerate(self.pipeline.schedule.rank_of_stage) if owner == rank]
        spans = self.timeline.spans_of_rank[rank]
        end_s = spans[-1].end_s if spans else 0.0
        memories = [stage.memory for stage in self.pipeline.stages]
        return memory_over_time(spans, memories, stages, reduce_start_s=end_s)

    @cached_property
    def peak_bytes_of_rank(self) -> tuple[float, ...]:
        """Most bytes that each rank's devices hold."""
        return tuple(peak_bytes(self.memory(rank)) for rank in range(self.pipeline.schedule.num_ranks))


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One simulated step."""

    step: TrainingStep
    runs: tuple[PipelineRun, ...]
    reductions: tuple[ReductionRun, ...]

    @cached_property
    def span_s(self) -> float:
        """Seconds from the first action's start to the last update's end."""
        return max((end for run in self.runs for end in run.end_s), default=0.0)

    @cached_property
    def step_s(self) -> float:
        """Seconds a step where steps follow one another: with a barrier the whole span, else the longest rank's."""
        if self.step.barrier:
            return self.span_s
        longest = 0.0
        for run in self.runs:
            for spans, end_s in zip(run.timeline.spans_of_rank, run.end_s, strict=True):
                longest = max(longest, end_s - (spans[0].start_s if spans else 0.0))
        return longest

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on a second."""
        return self.step.tokens / self.step_s if self.step_s else 0.0

    @property
    def usd_per_hour(self) -> float:
        """Price of every device of the step, busy or idle."""
        return sum(_of_devices(pipeline, "usd_per_hour") for pipeline in self.step.pipelines)

    @property
    def watts(self) -> float:
        """Rated power of every device of the step: what it may draw, not what it drew."""
        return sum(_of_devices(pipeline, "watts") for pipeline in self.step.pipelines)

    @property
    def usd_per_step(self) -> float:
        """Price of one step."""
        return self.usd_per_hour * self.step_s / _HOUR_S

    @property
    def kwh_per_step(self) -> float:
        """Energy of one step at rated power."""
        return self.watts * self.step_s / _JOULES_PER_KWH

    @property
    def idle_share(self) -> float:
        """Share of the step in which devices compute nothing, all devices alike."""
        busy = devices = 0.0
        for run in self.runs:
            for rank, count in enumerate(run.pipeline.ranks_of_rank):
                spans = run.timeline.spans_of_rank[rank]
                worked = sum(run.pipeline.stages[s.action.stage].seconds_of(s.action.kind) for s in spans)
                worked += run.end_s[rank] - run.update_start_s[rank]
                busy += worked * count * run.pipeline.count
                devices += count * run.pipeline.count
        return max(0.0, 1.0 - busy / (devices * self.step_s)) if devices and self.step_s else 0.0

    @cached_property
    def peak_bytes(self) -> float:
        """Most bytes on any device."""
        return max((peak for run in self.runs for peak in run.peak_bytes_of_rank), default=0.0)

    def reductions_of(self, index: int, rank: int) -> tuple[ReductionRun, ...]:
        """Return the reductions that a rank of the pipeline `index` takes part in."""
        ranks = self.step.pipelines[index].schedule.rank_of_stage
        return tuple(
            run
            for run in self.reductions
            if any(p == index and ranks[stage] == rank for p, stage in run.reduction.members)
        )

    def intervals(self, index: int, rank: int) -> list[Interval]:
        """Return what a rank of the pipeline `index` does, until the whole step's end."""
        found = self.runs[index].intervals(rank, self.reductions_of(index, rank))
        end_s = found[-1].end_s if found else 0.0
        if self.span_s > end_s:
            found.append(Interval("idle", "", end_s, self.span_s))
        return found

    def rows(self) -> list[dict[str, object]]:
        """Return one row of plain data a rank of each kind of pipeline: seconds by what it does, and memory."""
        rows: list[dict[str, object]] = []
        for index, run in enumerate(self.runs):
            for rank in range(run.pipeline.schedule.num_ranks):
                seconds = dict.fromkeys((*NAME_OF_KIND.values(), "receive", "send", "reduce", "update", "idle"), 0.0)
                for interval in self.intervals(index, rank):
                    seconds[interval.what] += interval.seconds
                stages = [s for s, owner in enumerate(run.pipeline.schedule.rank_of_stage) if owner == rank]
                rows.append(
                    {
                        "pipeline": run.pipeline.name,
                        "replicas": run.pipeline.count,
                        "rank": rank,
                        "stages": stages,
                        "devices": run.pipeline.ranks_of_rank[rank],
                        **{f"{what.replace(' ', '_')}_s": value for what, value in seconds.items()},
                        "peak_bytes": run.peak_bytes_of_rank[rank],
                        "limit_bytes": min(run.pipeline.stages[s].memory.limit_bytes for s in stages),
                    }
                )
        return rows


def _of_devices(pipeline: Pipeline, name: str) -> float:
    """Return the sum of a stage's number over the devices of all replicas; stages of one rank count once."""
    worth = [0.0] * pipeline.schedule.num_ranks
    for stage, rank in zip(pipeline.stages, pipeline.schedule.rank_of_stage, strict=True):
        worth[rank] = max(worth[rank], float(getattr(stage, name)) * stage.num_ranks)
    return sum(worth) * pipeline.count


def _with_idle(found: list[Interval]) -> list[Interval]:
    filled: list[Interval] = []
    now_s = 0.0
    for interval in found:
        if interval.start_s > now_s:
            filled.append(Interval("idle", "", now_s, interval.start_s))
        filled.append(interval)
        now_s = max(now_s, interval.end_s)
    return filled
