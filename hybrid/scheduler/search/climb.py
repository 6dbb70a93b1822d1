"""Climb: better a found choice step by step: cuts moved, recompute turned, schedules changed, the batch shared anew.

Pure. Every neighbour is a replica on the same chips, so that a choice stays within the fleet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hybrid.scheduler.auto import auto_schedule
from hybrid.scheduler.pipeline_costs import PipelineCosts
from hybrid.scheduler.search.choice import Choice, Group, share_out
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.confirm import group_step_s
from hybrid.scheduler.search.pace import steady_microbatches
from hybrid.scheduler.search.shapes import enumerable, laid_out, measure_columns

_MOVES = 24
"""Improvements of one replica after which it is left as it is."""
_AUTO_ACTIONS, _AUTO_TRIES = 4096, 150
_LESS = 1.0 - 1e-6
_AUTO_PAYS = 0.999
"""An order of its own must shorten the step by more than this to be taken over a named one."""


def climb(choice: Choice) -> Choice:
    """Return a choice that is no worse, on the same chips.

    Cost:
        a few hundred vectorised steps a group of replicas.
    """
    problem = choice.problem
    while True:
        replicas = [(_better(group), group.num_replicas) for group in choice.groups]
        found = share_out(problem, replicas)
        if found is None or not found.keeps_limits or found.score >= choice.score * _LESS:
            return choice
        choice = found


def search_orders(choice: Choice) -> Choice:
    """Return the choice with searched orders (`auto`) where the vocabulary has them and they are faster."""
    if "auto" not in choice.problem.vocabulary.schedules:
        return choice
    best = replace(choice, groups=tuple(_ordered(group) for group in choice.groups))
    return best if best.score < choice.score else choice


def _better(group: Group) -> Column:
    """Return the fastest column that single changes lead to, at the group's number of microbatches."""
    column, count = group.column, group.num_microbatches
    best, best_s = column, column.exact_step_s(count)
    for _ in range(_MOVES):
        found = min(_neighbours(best, count), key=lambda other: other.seconds[0], default=None)
        if found is None or found.seconds[0] >= best_s * _LESS:
            break
        best, best_s = found, float(found.seconds[0])
    return column if best is column else _with_grid(best, count)


def _with_grid(column: Column, count: int) -> Column:
    """Return the column with its seconds at numbers of microbatches around `count`."""
    steady = steady_microbatches(column.schedule, column.num_ranks)
    near = {1, 2, column.num_ranks, steady, *(count + step for step in (-2, -1, 0, 1, 2))}
    grid = np.array(sorted(number for number in near if number >= 1))
    chosen, bounds = np.array([column.chosen]), np.array([column.bounds])
    return measure_columns(column.table, chosen, bounds, grid, capped=True, schedule=column.schedule)[0]


def _neighbours(column: Column, count: int) -> Iterator[Column]:
    shapes: dict[tuple[str, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for schedule, chosen, bounds in _changes(column):
        shapes.setdefault((schedule, len(chosen)), []).append((chosen, bounds))
    for (schedule, _), rows in shapes.items():
        yield from measure_columns(
            column.table,
            np.array([chosen for chosen, _ in rows], dtype=np.intp),
            np.array([bounds for _, bounds in rows], dtype=np.intp),
            np.array([count]),
            capped=True,
            schedule=schedule,
        )


def _changes(column: Column) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield (schedule, options, cuts): a cut moved, a rank's recompute turned, neighbours swapped, another order."""
    schedule, chosen, bounds = column.schedule, column.chosen, column.bounds
    for cut in range(1, len(bounds) - 1):
        for step in (-2, -1, 1, 2):
            moved = bounds[cut] + step
            if bounds[cut - 1] < moved < bounds[cut + 1]:
                yield schedule, chosen, (*bounds[:cut], moved, *bounds[cut + 1 :])
    home = column.rank_of_stage
    ranks = [chosen[home.index(rank)] for rank in range(column.num_ranks)]
    for rank, index in enumerate(ranks):
        twin = _twin(column, index)
        if twin is not None:
            turned = [*ranks[:rank], twin, *ranks[rank + 1 :]]
            yield schedule, tuple(turned[place] for place in home), bounds
        if rank and ranks[rank - 1] != index:
            swapped = [*ranks[: rank - 1], index, ranks[rank - 1], *ranks[rank + 1 :]]
            yield schedule, tuple(swapped[place] for place in home), bounds
    if len(ranks) > 1:
        for other in enumerable(column.table.problem):
            if other != schedule:
                yield from _on_schedule(column, ranks, other)


def _twin(column: Column, index: int) -> int | None:
    """Return the option that differs in recompute alone."""
    options = column.table.options
    wanted = replace(options[index], recompute=not options[index].recompute)
    return options.index(wanted) if wanted in options else None


def _on_schedule(
    column: Column, ranks: list[int], schedule: str
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield the same ranks on another schedule."""
    held = [0] * len(ranks)
    for stage, rank in enumerate(column.rank_of_stage):
        held[rank] += column.bounds[stage + 1] - column.bounds[stage]
    found = laid_out(column.table.problem, ranks, held, schedule)
    if found is not None:
        yield schedule, *found


def _ordered(group: Group) -> Group:
    column = group.column
    if column.num_ranks == 1 or 4 * len(column.chosen) * group.num_microbatches > _AUTO_ACTIONS:
        return group
    costs = _costs_of(column)
    schedule = auto_schedule(costs, group.num_microbatches, num_tries=_AUTO_TRIES)
    words = tuple(" ".join(map(str, actions)) for actions in schedule.actions_of_rank)
    draft = replace(group, order=words)
    seconds = group_step_s(draft)
    if seconds > _AUTO_PAYS * group_step_s(group):
        return group
    return replace(draft, order_s=seconds)


def _costs_of(column: Column) -> PipelineCosts:
    """Return the costs that an order is searched for: memory in bytes beyond what is held anyway."""
    table, lines, home = column.table, column.pipelines(), column.rank_of_stage
    runs = [(option, *run) for option, *run in zip(column.chosen, column.bounds, column.bounds[1:], strict=False)]
    held = tuple(float(table.held_bytes[run]) for run in runs)
    limits = []
    for rank in range(column.num_ranks):
        mine = [run for run, place in zip(runs, home, strict=True) if place == rank]
        limits.append(float(table.limit_bytes[mine[0][0]]) - sum(float(table.base_bytes[run]) for run in mine))
    forward_s, backward_s, weight_s = lines.forward_s[0], lines.backward_s[0], lines.weight_s[0]
    return PipelineCosts(
        rank_of_stage=home,
        forward_s=tuple(map(float, forward_s)),
        input_gradient_s=tuple(map(float, backward_s - weight_s)),
        weight_gradient_s=tuple(map(float, weight_s)),
        transfer_s=tuple(map(float, np.maximum(lines.activation_s[0], lines.gradient_s[0]))),
        held_bytes=held,
        kept_bytes=held,
        limit_bytes=tuple(limits),
    )
