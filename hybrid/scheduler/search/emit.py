"""Emit: from a choice to a plan that can be run: concrete islands and ranks, exact shares, predicted seconds.

Pure. Decides nothing but which chips of an island a stage takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrid.errors import PlanError
from hybrid.scheduler.plan import EdgePlan, Plan, ReplicaPlan, StagePlan
from hybrid.scheduler.plan_check import check_consistent
from hybrid.scheduler.search.choice import Choice, Group
from hybrid.scheduler.search.codecs import choose_codecs
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.islands import Wanted, group_pools, place_stages
from hybrid.scheduler.search.problem import Pool, Problem
from hybrid.scheduler.search.sent import narrowing

MOST_RANKS = 16_384
"""A plan names each rank; a larger fleet's is written as groups (`hybrid-fleet-plan`)."""


if TYPE_CHECKING:
    from hybrid.hardware.fleet import Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a plan calls the chips of a pool."""

    island: str
    chip: str
    backend: str
    memory_bytes: int


def places_of_fleet(fleet: Fleet) -> dict[str, Place]:
    """Return what a plan calls each island of a fleet."""
    return {
        island.name: Place(
            island=island.name, chip=island.chip.name, backend=island.backend, memory_bytes=island.memory_bytes
        )
        for island in fleet.islands
    }


def places_of_pools(problem: Problem) -> dict[str, Place]:
    """Return places for pools that stand for no fleet: each is an island of emulated chips."""
    return {
        pool.name: Place(island=pool.name, chip=pool.chip, backend="emulated", memory_bytes=pool.memory_bytes)
        for pool in problem.pools
    }


def plan_of_choice(problem: Problem, choice: Choice, places: Mapping[str, Place], *, job: str) -> Plan:
    """Return the plan that the choice means.

    Args:
        problem: the one that was searched, before like pools were made one.
        choice: on `problem` with like pools made one.
        places: by the name of each of the problem's pools.
        job: the job's name, for the plan's head.

    Raises:
        PlanError: the shares do not add up to the batch, the stages do not pack into the nodes, or the plan is too
            large to name each rank.
    """
    if not choice.is_exact:
        total = sum(group.num_samples for group in choice.groups)
        fix = "give microbatches that add up to the global batch"
        raise PlanError("no shares add up to the global batch", value=total, valid=str(problem.global_batch), fix=fix)
    if sum(choice.chips) > MOST_RANKS:
        fix = "write it as JSON (`--out plan.json`): groups of like replicas"
        raise PlanError("the plan names each rank", value=sum(choice.chips), valid=f"up to {MOST_RANKS}", fix=fix)
    replicas = [group for group in choice.groups for _ in range(group.num_replicas)]
    ranks = _Ranks(problem, choice, replicas)
    made: list[ReplicaPlan] = []
    first = 0
    for index, group in enumerate(replicas):
        made.append(_replica(group, index, first, ranks, places))
        first += made[-1].num_samples
    count = sum(len(replica.ranks) for replica in made)
    plan = Plan(
        job=job,
        model=problem.table.model,
        num_layers=problem.table.num_layers,
        precision=problem.table.precision,
        source=problem.table.label,
        objective=problem.objective,
        global_batch=problem.global_batch,
        gradient_codec="none",
        step_s=max(replica.step_s for replica in made) + choice.reduce_s,
        idle_share=sum(replica.idle_share * len(replica.ranks) for replica in made) / count,
        replicas=tuple(made),
    )
    return check_consistent(plan, where="plan")


class _Ranks:
    """Which pool and which ranks each pipeline rank of each replica has."""

    def __init__(self, problem: Problem, choice: Choice, replicas: list[Group]) -> None:
        groups = group_pools(problem)
        slots = [(index, rank) for index, group in enumerate(replicas) for rank in range(group.column.num_ranks)]
        self._pool: dict[tuple[int, int], Pool] = {}
        chips: dict[tuple[int, int], tuple[int, ...]] = {}
        for place, pools in enumerate(groups):
            mine, wanted = [], []
            for index, rank in slots:
                option = replicas[index].column.option_of_rank(rank)
                if option.pool == place:
                    mine.append((index, rank))
                    wanted.append(Wanted(degree=option.degree, width=option.width))
            for slot, (pool, numbers) in zip(mine, place_stages(pools, wanted), strict=True):
                self._pool[slot] = pools[pool]
                chips[slot] = numbers
        self._number(slots, chips, [pool.name for pool in problem.pools])

    def _number(
        self, slots: list[tuple[int, int]], chips: Mapping[tuple[int, int], tuple[int, ...]], names: list[str]
    ) -> None:
        """Give numbers in the pipelines' order, or, where a stage has several ranks, by island and chip."""
        order = slots
        if any(len(numbers) > 1 for numbers in chips.values()):
            # The ranks of an island are placed on its nodes in their order.
            order = sorted(slots, key=lambda slot: (names.index(self._pool[slot].name), chips[slot]))
        self._ranks: dict[tuple[int, int], tuple[int, ...]] = {}
        first = 0
        for slot in order:
            self._ranks[slot] = tuple(range(first, first + len(chips[slot])))
            first += len(chips[slot])

    def of(self, replica: int, rank: int) -> tuple[Pool, tuple[int, ...]]:
        """Return the pool and the job's ranks of a pipeline rank."""
        return self._pool[replica, rank], self._ranks[replica, rank]


def _replica(group: Group, index: int, first: int, ranks: _Ranks, places: Mapping[str, Place]) -> ReplicaPlan:
    column = group.column
    draft = ReplicaPlan(
        replica=index,
        schedule=group.schedule_name,
        order=group.order,
        num_microbatches=group.num_microbatches,
        microbatch=column.samples,
        first_sample=first,
        step_s=0.0,
        idle_share=0.0,
        stages=tuple(
            _stage(group, stage, places[pool.name], numbers)
            for stage in range(len(column.chosen))
            for pool, numbers in [ranks.of(index, column.rank_of_stage[stage])]
        ),
        edges=tuple(_edge(column, stage, codec) for stage, codec in enumerate(choose_codecs(group))),
    )
    return draft.predicted()


def _stage(group: Group, stage: int, place: Place, numbers: tuple[int, ...]) -> StagePlan:
    column, table = group.column, group.column.table
    option, run = column.chosen[stage], (column.bounds[stage], column.bounds[stage + 1])
    facts = table.options[option]
    fixed = table.fixed_bytes(option)
    return StagePlan(
        stage=stage,
        ranks=numbers,
        island=place.island,
        chip=place.chip,
        backend=place.backend,
        first_layer=run[0],
        end_layer=run[1],
        tensor_parallel=facts.degree,
        width=facts.width,
        recompute=facts.recompute,
        forward_s=float(table.forward_s[(option, *run)]),
        backward_s=float(table.backward_s[(option, *run)]),
        weight_gradient_s=float(table.weight_s[(option, *run)]),
        memory_bytes=round(fixed + column.peak_bytes_of_stage(stage, group.num_microbatches)),
        memory_limit_bytes=place.memory_bytes,
    )


def _edge(column: Column, stage: int, codec: str) -> EdgePlan:
    table, (here, there, cut), home = column.table, column.ends_of_edge(stage), column.rank_of_stage
    transfer_s, latency_s = table.coded_edge_s(codec, here, there, cut)
    if home[stage] == home[stage + 1]:  # nothing travels
        transfer_s = latency_s = 0.0
    return EdgePlan(
        from_stage=stage,
        to_stage=stage + 1,
        size_bytes=round(float(table.output_bytes[cut]) * narrowing(table.problem.table.precision, codec)),
        transfer_s=transfer_s,
        latency_s=latency_s,
        codec=codec,
    )
