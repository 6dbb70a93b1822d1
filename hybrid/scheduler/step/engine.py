"""The engine: runs a training step on paper, each kind of pipeline once.

Pure: no torch, no clock, no network. Pipelines run by `hybrid.scheduler.simulate`; messages that block a rank's
compute are folded into the actions beside them; messages that share an interface are slowed until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from hybrid.scheduler.actions import Action, Kind
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.step.facts import Message, Pipeline, Reduction, TrainingStep, blocked_seconds
from hybrid.scheduler.step.result import PipelineRun, ReductionRun, StepResult
from hybrid.scheduler.step.share import Load, shared_seconds
from hybrid.scheduler.timeline import Timeline

_SHARE_ROUNDS = 6
_SETTLED = 1e-4
"""Relative change of the step below which the shares of the links are taken for settled."""


def simulate_step(step: TrainingStep) -> StepResult:
    """Return when everything of one training step happens.

    Identical pipelines are simulated once, whatever their number. A reduction starts when the last of its members
    has its gradients; reductions of one rank follow one another. Updates follow the rank's reductions, and the
    global norm where there is one.

    Raises:
        ScheduleError: a schedule deadlocks.

    Cost:
        O(actions) a kind of pipeline, times the rounds in which the links' shares settle.
    """
    runs: dict[object, Timeline] = {}
    timelines = []
    for pipeline in step.pipelines:
        key = (pipeline.schedule, pipeline.stages, pipeline.edges)
        if key not in runs:
            runs[key] = run_pipeline(pipeline)
        timelines.append(runs[key])
    return _finish(step, timelines)


def run_pipeline(pipeline: Pipeline) -> Timeline:
    """Return the time line of one pipeline; spans include the time in which messages block the rank's compute."""
    slowed: dict[Action, float] = {}
    timeline = _run_once(pipeline, slowed)
    if not any(m.interfaces for edge in pipeline.edges for m in (edge.activation, edge.gradient)):
        return timeline
    for _ in range(_SHARE_ROUNDS):
        loads = [_load(pipeline.message_of(transfer.action), transfer.start_s) for transfer in timeline.transfers]
        took = shared_seconds(loads)
        slowed = {
            transfer.action: seconds - load.busy_s
            for transfer, load, seconds in zip(timeline.transfers, loads, took, strict=True)
            if seconds > load.busy_s
        }
        again = _run_once(pipeline, slowed)
        settled = abs(again.step_s - timeline.step_s) <= _SETTLED * timeline.step_s
        timeline = again
        if settled:
            break
    return timeline


def _load(message: Message, start_s: float) -> Load:
    return Load(start_s, message.transfer_s - message.latency_s, message.interfaces)


def _run_once(pipeline: Pipeline, slowed: Mapping[Action, float]) -> Timeline:
    def transfer_s(send: Action) -> float:
        message = pipeline.message_of(send)
        # A message that blocks its sender starts before the sender's action ends.
        return message.transfer_s + slowed.get(send, 0.0) - message.sender_s

    def link_busy_s(send: Action) -> float:
        message = pipeline.message_of(send)
        return max(0.0, message.transfer_s - message.latency_s) + slowed.get(send, 0.0)

    blocked = blocked_seconds(pipeline)

    def seconds_of(action: Action) -> float:
        before, after = blocked(action)
        return before + pipeline.stages[action.stage].seconds_of(action.kind) + after

    return simulate(pipeline.schedule, seconds_of=seconds_of, transfer_s=transfer_s, link_busy_s=link_busy_s)


def _finish(step: TrainingStep, timelines: list[Timeline]) -> StepResult:
    """Add reductions, the norm and the updates to the pipelines' time lines."""
    free_s = [[spans[-1].end_s if spans else 0.0 for spans in timeline.spans_of_rank] for timeline in timelines]
    wire_free_s = [[0.0] * len(row) for row in free_s]
    reductions: list[ReductionRun] = []
    for reduction in sorted(step.reductions, key=lambda each: _ready(step, timelines, each)[1]):
        reductions.append(_reduce(step, timelines, reduction, free_s, wire_free_s))
    if step.norm_s is not None:
        together_s = max((end for row in free_s for end in row), default=0.0) + step.norm_s
        free_s = [[together_s] * len(row) for row in free_s]
    runs = []
    for pipeline, timeline, ready in zip(step.pipelines, timelines, free_s, strict=True):
        update_s = [0.0] * len(ready)
        for stage, rank in zip(pipeline.stages, pipeline.schedule.rank_of_stage, strict=True):
            update_s[rank] += stage.update_s
        runs.append(
            PipelineRun(
                pipeline=pipeline,
                timeline=timeline,
                update_start_s=tuple(ready),
                end_s=tuple(start + took for start, took in zip(ready, update_s, strict=True)),
            )
        )
    return StepResult(step=step, runs=tuple(runs), reductions=tuple(reductions))


def _ready(step: TrainingStep, timelines: list[Timeline], reduction: Reduction) -> tuple[float, float]:
    """Return when the first bucket's gradients are ready everywhere, and when the last one's are."""
    first_s = last_s = 0.0
    for pipeline, stage in reduction.members:
        rank = step.pipelines[pipeline].schedule.rank_of_stage[stage]
        spans = timelines[pipeline].spans_of_rank[rank]
        final = next(
            (s for s in reversed(spans) if s.action.stage == stage and s.action.kind in (Kind.B, Kind.W)), None
        )
        if final is None:
            continue
        share = 1.0 / reduction.num_buckets
        first_s = max(first_s, final.start_s + share * (final.end_s - final.start_s))
        last_s = max(last_s, final.end_s)
    return first_s, last_s


def _reduce(
    step: TrainingStep,
    timelines: list[Timeline],
    reduction: Reduction,
    free_s: list[list[float]],
    wire_free_s: list[list[float]],
) -> ReductionRun:
    """Run one reduction; later ones of its members wait for it, and so do their updates."""
    first_s, last_s = _ready(step, timelines, reduction)
    ranks = [(p, step.pipelines[p].schedule.rank_of_stage[stage]) for p, stage in reduction.members]
    open_s = max(wire_free_s[p][rank] for p, rank in ranks)
    if reduction.num_buckets == 1:
        start_s = max([last_s, *(free_s[p][rank] for p, rank in ranks)])
        end_s = start_s + reduction.seconds
    else:
        # Buckets get ready one after the other through the last backward; each takes its share.
        each_s, gap_s = reduction.seconds / reduction.num_buckets, (last_s - first_s) / (reduction.num_buckets - 1)
        start_s = end_s = max(first_s, open_s)
        for bucket in range(reduction.num_buckets):
            end_s = max(end_s, first_s + bucket * gap_s) + each_s
    for p, rank in ranks:
        free_s[p][rank] = max(free_s[p][rank], end_s)
        wire_free_s[p][rank] = end_s
    return ReductionRun(reduction=reduction, start_s=start_s, end_s=end_s)
