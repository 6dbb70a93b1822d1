"""Pace: how long a step of many pipelines takes, all of one depth at once.

Pure. `simulated` follows the same rules as `hybrid.scheduler.simulate`, vectorised over pipelines; `sailor` is the
closed form of Sailor's simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid.scheduler.actions import Kind
from hybrid.scheduler.search.orders import order_of, stages_a_rank

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelines:
    """Seconds of N pipelines of P stages, for one microbatch.

    Shapes:
        forward_s, backward_s, weight_s: (N, P).  activation_s, gradient_s, busy_s: (N, P - 1), by edge.
    """

    forward_s: Array
    backward_s: Array
    weight_s: Array
    """The part of `backward_s` that a split backward puts off."""
    activation_s: Array
    """From the end of a forward to the next stage's having its input."""
    gradient_s: Array
    busy_s: Array
    """How long a message keeps its edge's direction from taking another."""

    @property
    def num_stages(self) -> int:
        """Depth of every pipeline."""
        return int(self.forward_s.shape[1])


def step_seconds(pipelines: Pipelines, num_microbatches: int, law: str, schedule: str = "1f1b") -> Array:
    """Return the seconds of one step, without the reduction and the optimizer.

    Beyond some steady rounds (3P + 2 microbatches; 4P + 2 with several stages a rank) the simulated law continues at
    the mean pace of the last P.

    Shapes:
        returns: (N,)
    """
    if law == "sailor":
        return _closed_form(pipelines, num_microbatches)
    layers = stages_a_rank(schedule)
    ranks = pipelines.num_stages // layers
    known = steady_microbatches(schedule, ranks)
    if ranks == 1 or num_microbatches <= known:
        return _walk(pipelines, num_microbatches, schedule)
    last = _walk(pipelines, known, schedule)
    pace = (last - _walk(pipelines, known - ranks, schedule)) / ranks
    return np.asarray(last + (num_microbatches - known) * pace)


def steady_microbatches(schedule: str, num_ranks: int) -> int:
    """Return the number of microbatches beyond which a step grows at a steady pace."""
    return (4 if stages_a_rank(schedule) > 1 else 3) * num_ranks + 2


def exact_step_seconds(pipelines: Pipelines, num_microbatches: int, law: str, schedule: str = "1f1b") -> Array:
    """Return the same without going on at a mean pace; O(P * microbatches)."""
    if law == "sailor":
        return _closed_form(pipelines, num_microbatches)
    return _walk(pipelines, num_microbatches, schedule)


def sailor_stage_seconds(pipelines: Pipelines) -> Array:
    """Return compute plus communication of each stage as Sailor's simulator counts it.

    Inner stages count one activation and one gradient; the last one two gradients; the first one two activations
    in pipelines of more than three stages, else one.

    Source:
        eth-easl/sailor, commit cf2c8e3, `estimate_p2p_pipeline_times` (read for its rules).
    """
    stage_s = pipelines.forward_s + pipelines.backward_s
    depth = pipelines.num_stages
    if depth > 1:
        stage_s = stage_s.copy()
        stage_s[:, 1:-1] += pipelines.activation_s[:, 1:] + pipelines.gradient_s[:, :-1]
        stage_s[:, -1] += 2 * pipelines.gradient_s[:, -1]
        stage_s[:, 0] += (1 if depth <= 3 else 2) * pipelines.activation_s[:, 0]
    return stage_s


def _closed_form(pipelines: Pipelines, num_microbatches: int) -> Array:
    stage_s = sailor_stage_seconds(pipelines)
    return np.asarray(stage_s.sum(axis=1) + (num_microbatches - 1) * stage_s.max(axis=1))


def _walk(pipelines: Pipelines, num_microbatches: int, schedule: str) -> Array:
    """Return the step action by action."""
    count, depth = pipelines.forward_s.shape
    if depth == 1:
        return np.asarray(num_microbatches * (pipelines.forward_s + pipelines.backward_s)[:, 0])
    order = order_of(schedule, depth // stages_a_rank(schedule), num_microbatches)
    home = order.rank_of_stage
    forward_s, backward_s, weight_s = (
        x.T.copy() for x in (pipelines.forward_s, pipelines.backward_s, pipelines.weight_s)
    )
    seconds = {Kind.F: forward_s, Kind.B: backward_s, Kind.I: backward_s - weight_s, Kind.W: weight_s}
    activation_s, gradient_s, busy_s = pipelines.activation_s.T, pipelines.gradient_s.T, pipelines.busy_s.T
    shares = bool(busy_s.any())
    now = np.zeros((max(home) + 1, count))
    inputs = np.zeros((depth, num_microbatches, count))
    gradients = np.zeros((depth, num_microbatches, count))
    free: dict[tuple[int, int], Array] = {}
    for stage, kind, microbatch in order.actions:
        rank = home[stage]
        if kind is Kind.W:
            now[rank] = now[rank] + seconds[kind][stage]
            continue
        is_forward = kind is Kind.F
        ready = (inputs if is_forward else gradients)[stage, microbatch]
        end = np.maximum(now[rank], ready) + seconds[kind][stage]
        now[rank] = end
        target = stage + 1 if is_forward else stage - 1
        if not 0 <= target < depth:
            continue
        arrival = end
        if home[target] != rank:
            edge = min(stage, target)
            start = end
            if shares:
                way = rank, home[target]
                start = np.maximum(end, free[way]) if way in free else end
                free[way] = start + busy_s[edge]
            arrival = start + (activation_s if is_forward else gradient_s)[edge]
        (inputs if is_forward else gradients)[target, microbatch] = arrival
    return np.asarray(now.max(axis=0))
