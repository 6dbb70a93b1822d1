"""Pace: how long a step of many pipelines takes, all of one depth at once.

Pure. `simulated` follows the same rules as `hybrid.scheduler.simulate` for 1F1B, vectorised over pipelines;
`sailor` is the closed form of Sailor's simulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelines:
    """Seconds of N pipelines of P stages, for one microbatch.

    Shapes:
        forward_s, backward_s: (N, P).  activation_s, gradient_s, busy_s: (N, P - 1), by edge.
    """

    forward_s: Array
    backward_s: Array
    activation_s: Array
    """From the end of a forward to the next stage's having its input."""
    gradient_s: Array
    busy_s: Array
    """How long a message keeps its edge's direction from taking another."""

    @property
    def num_stages(self) -> int:
        """Depth of every pipeline."""
        return int(self.forward_s.shape[1])


def step_seconds(pipelines: Pipelines, num_microbatches: int, law: str) -> Array:
    """Return the seconds of one step, without the reduction and the optimizer.

    Beyond 3P + 2 microbatches the simulated law continues at the mean pace of the last P.

    Shapes:
        returns: (N,)
    """
    if law == "sailor":
        return _closed_form(pipelines, num_microbatches)
    depth = pipelines.num_stages
    known = 3 * depth + 2
    if depth == 1 or num_microbatches <= known:
        return _one_f_one_b(pipelines, num_microbatches)
    last = _one_f_one_b(pipelines, known)
    pace = (last - _one_f_one_b(pipelines, known - depth)) / depth
    return np.asarray(last + (num_microbatches - known) * pace)


def exact_step_seconds(pipelines: Pipelines, num_microbatches: int, law: str) -> Array:
    """Return the same without going on at a mean pace; O(P * microbatches)."""
    return (_closed_form if law == "sailor" else _one_f_one_b)(pipelines, num_microbatches)


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


def _one_f_one_b(pipelines: Pipelines, num_microbatches: int) -> Array:
    count, depth = pipelines.forward_s.shape
    if depth == 1:
        return np.asarray(num_microbatches * (pipelines.forward_s + pipelines.backward_s)[:, 0])
    forward_s, backward_s = pipelines.forward_s.T.copy(), pipelines.backward_s.T.copy()
    activation_s, gradient_s, busy_s = pipelines.activation_s.T, pipelines.gradient_s.T, pipelines.busy_s.T
    shares = bool(busy_s.any())
    now = np.zeros((depth, count))
    inputs = np.zeros((depth, num_microbatches, count))
    gradients = np.zeros((depth, num_microbatches, count))
    free = np.zeros((2, depth, count))
    for stage, is_forward, microbatch in _order(depth, num_microbatches):
        if is_forward:
            end = np.maximum(now[stage], inputs[stage, microbatch]) + forward_s[stage]
            target, edge, sends_s = stage + 1, stage, activation_s
        else:
            end = np.maximum(now[stage], gradients[stage, microbatch]) + backward_s[stage]
            target, edge, sends_s = stage - 1, stage - 1, gradient_s
        now[stage] = end
        if 0 <= target < depth:
            if shares:
                start = np.maximum(end, free[int(is_forward), edge])
                free[int(is_forward), edge] = start + busy_s[edge]
            else:
                start = end
            (inputs if is_forward else gradients)[target, microbatch] = start + sends_s[edge]
    return np.asarray(now.max(axis=0))


@lru_cache(maxsize=512)
def _order(depth: int, num_microbatches: int) -> tuple[tuple[int, bool, int], ...]:
    """Return 1F1B's compute actions of all stages in an order that keeps every dependency."""
    rows = []
    for stage in range(depth):
        warmup = min(depth - stage - 1, num_microbatches)
        row = [(stage, True, i) for i in range(warmup)]
        for i in range(num_microbatches):
            if i + warmup < num_microbatches:
                row.append((stage, True, i + warmup))
            row.append((stage, False, i))
        rows.append(row)
    done: set[tuple[int, bool, int]] = set()
    place = [0] * depth
    order: list[tuple[int, bool, int]] = []
    while len(order) < 2 * depth * num_microbatches:
        for stage in range(depth):
            while place[stage] < len(rows[stage]):
                _, is_forward, i = action = rows[stage][place[stage]]
                needs = (stage - 1, True, i) if is_forward else (stage + 1, False, i)
                if 0 <= needs[0] < depth and needs not in done:
                    break
                done.add(action)
                order.append(action)
                place[stage] += 1
    return tuple(order)
