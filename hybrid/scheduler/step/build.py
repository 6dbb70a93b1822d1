"""From a plan to a training step: replicas of layers on chips, with a profile table and links, or a `Plan` file.

Pure: no torch, no clock, no network. Takes what the planner's search knows (`ProfileTable`, `Network`), decides
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from hybrid.errors import FleetError, PlanError
from hybrid.scheduler.actions import Schedule
from hybrid.scheduler.held import peak_posted_of_stage
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.plan import Plan, ReplicaPlan
from hybrid.scheduler.schedules import build_placed_schedule, parse_order
from hybrid.scheduler.search.links import LinkModel, Network, reduce_seconds
from hybrid.scheduler.search.problem import MemoryModel, Pool
from hybrid.scheduler.search.table import ProfileTable
from hybrid.scheduler.step.facts import (
    EdgeCost,
    Message,
    Pipeline,
    Reduction,
    StageCost,
    StageMemory,
    TrainingStep,
)

GRADIENT_BYTES = 4
"""Gradients are summed in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Where a run of layers goes: `degree * width` chips of one pool."""

    pool: str
    first_layer: int
    end_layer: int
    """One past the last layer."""
    degree: int = 1
    """Tensor-parallel."""
    width: int = 1
    """Chips that share out each microbatch's samples."""
    recompute: bool = False
    """Keeps only its input and runs its forward again before each backward."""

    @property
    def num_ranks(self) -> int:
        """Chips of the stage."""
        return self.degree * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """A pipeline, and how many of exactly this kind."""

    name: str
    stages: tuple[StageSpec, ...]
    microbatch: int
    num_microbatches: int
    schedule: str = "1f1b"
    count: int = 1
    rank_of_stage: tuple[int, ...] = ()
    """Which pipeline rank holds each stage; empty: one each."""
    order: tuple[str, ...] = ()
    """Of each pipeline rank its actions as text, where the schedule's name does not say them."""


def build_step(
    table: ProfileTable,
    pools: Sequence[Pool],
    network: Network,
    memory: MemoryModel,
    replicas: Sequence[ReplicaSpec],
    *,
    bucket_bytes: float = float("inf"),
    num_buckets: int = 1,
    barrier: bool = True,
) -> TrainingStep:
    """Return the training step of some replicas.

    Args:
        table: seconds and bytes of every layer.
        pools: the chips, by name.
        network: links between pools and inside them; a stage's chips send side by side (lanes).
        memory: what a chip holds beside activations.
        replicas: kinds of pipelines; all must cover every layer.
        bucket_bytes: gradients are reduced in buckets of at most this size.
        num_buckets: in how many parts a reduction overlaps with the last backward; 1: it waits for its end.
        barrier: see `TrainingStep`.

    Raises:
        PlanError: a layer that no stage has, a cell that the table lacks, an unknown pool or schedule.
        FleetError: a link that is needed is missing.
    """
    by_name = {pool.name: pool for pool in pools}
    for replica in replicas:
        _check_cover(replica, table.num_layers, by_name)
    return TrainingStep(
        pipelines=tuple(_pipeline(table, by_name, network, memory, replica) for replica in replicas),
        reductions=tuple(_reductions(table, by_name, network, replicas, bucket_bytes, num_buckets)),
        tokens_per_sample=table.sequence_length,
        barrier=barrier,
        source=table.label,
    )


def step_of_plan(
    plan: Plan,
    *,
    tokens_per_sample: int = 1,
    usd_per_hour_of_chip: Mapping[str, float] | None = None,
    watts_of_chip: Mapping[str, float] | None = None,
) -> TrainingStep:
    """Return the training step of a plan file: a pipeline a kind of replica, and the plan's reduction; no optimizer.

    A plan file holds each stage's peak and not what it consists of: memory over time is that peak throughout. The
    reduction takes what the plan's step is longer than its slowest replica's.
    """
    usd, watts = usd_per_hour_of_chip or {}, watts_of_chip or {}
    kinds: dict[ReplicaPlan, list[ReplicaPlan]] = {}
    for replica in plan.replicas:
        kinds.setdefault(_kind(replica), []).append(replica)
    pipelines = tuple(_planned(plan, alike[0], len(alike), usd, watts) for alike in kinds.values())
    seconds = plan.step_s - max(replica.step_s for replica in plan.replicas)
    members = tuple((index, stage) for index, one in enumerate(pipelines) for stage in range(len(one.stages)))
    reduction = Reduction(name="gradients", members=members, seconds=max(seconds, 0.0))
    return TrainingStep(
        pipelines=pipelines,
        reductions=(reduction,) if len(plan.replicas) > 1 and seconds > 0 else (),
        tokens_per_sample=tokens_per_sample,
        source=plan.source,
    )


def _kind(replica: ReplicaPlan) -> ReplicaPlan:
    """Return the replica without its number, its place in the batch and its ranks' numbers: like ones are equal."""
    first: dict[int, int] = {}
    for group in replica.groups:
        for rank in group:
            first[rank] = len(first)
    stages = tuple(replace(stage, ranks=tuple(first[rank] for rank in stage.ranks)) for stage in replica.stages)
    return replace(replica, replica=0, first_sample=0, stages=stages)


def _planned(
    plan: Plan, replica: ReplicaPlan, count: int, usd: Mapping[str, float], watts: Mapping[str, float]
) -> Pipeline:
    stages = tuple(
        StageCost(
            name=f"{stage.island} {stage.chip}",
            forward_s=stage.forward_s,
            input_gradient_s=stage.backward_s - stage.weight_gradient_s,
            weight_gradient_s=stage.weight_gradient_s,
            num_ranks=len(stage.ranks),
            memory=StageMemory(state_bytes=stage.memory_bytes, limit_bytes=stage.memory_limit_bytes),
            usd_per_hour=usd.get(stage.chip, 0.0),
            watts=watts.get(stage.chip, 0.0),
        )
        for stage in replica.stages
    )
    messages = [Message(transfer_s=edge.transfer_s, latency_s=edge.latency_s) for edge in replica.edges]
    return Pipeline(
        name=plan.job if len(plan.replicas) == 1 else f"{plan.job} replica {replica.replica}",
        schedule=replica.build_schedule(),
        stages=stages,
        edges=tuple(EdgeCost(activation=message, gradient=message) for message in messages),
        samples=replica.microbatch,
        count=count,
    )


def _check_cover(replica: ReplicaSpec, num_layers: int, pools: Mapping[str, Pool]) -> None:
    ends = [0, *(stage.end_layer for stage in replica.stages)]
    if [stage.first_layer for stage in replica.stages] != ends[:-1] or ends[-1] != num_layers:
        cuts = [(stage.first_layer, stage.end_layer) for stage in replica.stages]
        fact = f"the stages of {replica.name} don't follow one another over all {num_layers} layers"
        raise PlanError(fact, value=cuts, fix="let each stage start where the one before ends")
    for stage in replica.stages:
        if stage.pool not in pools:
            raise PlanError("no such pool", value=stage.pool, valid=pools, fix="name one of these")


def _pipeline(
    table: ProfileTable, pools: Mapping[str, Pool], network: Network, memory: MemoryModel, replica: ReplicaSpec
) -> Pipeline:
    schedule = schedule_of(replica)
    posted = peak_posted_of_stage(lower_communication(schedule))
    stages = tuple(
        _stage(table, pools[spec.pool], memory, replica, spec, max(posted[index]) + 1)
        for index, spec in enumerate(replica.stages)
    )
    edges = tuple(_edge(table, pools, network, replica, one, other) for one, other in pairwise(replica.stages))
    return Pipeline(
        name=replica.name,
        schedule=schedule,
        stages=stages,
        edges=edges,
        samples=replica.microbatch,
        count=replica.count,
    )


def schedule_of(replica: ReplicaSpec) -> Schedule:
    """Return the compute actions of one replica."""
    home = replica.rank_of_stage or tuple(range(len(replica.stages)))
    if replica.order:
        return parse_order(replica.order, replica.schedule, home, replica.num_microbatches)
    return build_placed_schedule(replica.schedule, home, replica.num_microbatches)


def _stage(
    table: ProfileTable, pool: Pool, memory: MemoryModel, replica: ReplicaSpec, spec: StageSpec, num_buffers: int
) -> StageCost:
    samples, rest = divmod(replica.microbatch, spec.width)
    key = (pool.chip, spec.degree, samples)
    if rest or key not in table.cells:
        have = sorted(cell for cell in table.cells if cell[0] == pool.chip)
        fact = f"the profile has no cell for {pool.chip} at tensor-parallel degree {spec.degree}"
        raise PlanError(fact, value=f"{replica.microbatch}/{spec.width} samples", valid=have, fix="profile it")
    cell, sizes = table.cells[key], table.sizes[spec.degree]
    layers = range(spec.first_layer, spec.end_layer)
    forward_s = sum(cell.forward_s[layer] for layer in layers)
    saved = sum(sizes.saved_bytes[layer] for layer in layers) * samples
    sent = sizes.output_bytes[spec.end_layer - 1] * samples if spec.end_layer < table.num_layers else 0
    taken = sizes.output_bytes[spec.first_layer - 1] * samples if spec.first_layer else 0
    num_parameters = sum(sizes.num_parameters[layer] for layer in layers)
    split = spec.degree > 1 and memory.fixed_bytes_split is not None
    fixed = memory.fixed_bytes_split if split and memory.fixed_bytes_split is not None else memory.fixed_bytes
    buffers = num_buffers * (sent + taken) if memory.counts_buffers else 0
    return StageCost(
        name=f"{pool.name} layers {spec.first_layer}-{spec.end_layer - 1}",
        forward_s=forward_s,
        input_gradient_s=sum(cell.input_gradient_s[layer] for layer in layers) + (forward_s if spec.recompute else 0.0),
        weight_gradient_s=sum(cell.weight_gradient_s[layer] for layer in layers),
        update_s=cell.update_s,
        num_ranks=spec.num_ranks,
        memory=StageMemory(
            fixed_bytes=fixed + buffers,
            state_bytes=num_parameters * memory.bytes_per_parameter,
            held_bytes=taken if spec.recompute else saved,
            backward_bytes=saved if spec.recompute else 0.0,
            limit_bytes=pool.memory_bytes * (1.0 - memory.margin),
        ),
        usd_per_hour=pool.usd_per_hour,
        watts=pool.watts,
    )


def _edge(
    table: ProfileTable,
    pools: Mapping[str, Pool],
    network: Network,
    replica: ReplicaSpec,
    one: StageSpec,
    other: StageSpec,
) -> EdgeCost:
    link = _link(network, pools[one.pool], pools[other.pool], one.num_ranks, other.num_ranks)
    # What leaves a stage is whole on each of its tensor-parallel ranks; they send a part each, side by side.
    whole = table.sizes[min(table.sizes)].output_bytes[one.end_layer - 1] * replica.microbatch
    lanes = 1 if link.polynomial else min(one.num_ranks, other.num_ranks)
    message = Message(transfer_s=link.seconds(whole / lanes), latency_s=link.latency_s)
    return EdgeCost(activation=message, gradient=message)


def _link(network: Network, a: Pool, b: Pool, lanes: int, other_lanes: int) -> LinkModel:
    link = network.find(a.names, b.names, lanes, other_lanes)
    if link is None:
        raise FleetError(f"no link between {a.name} and {b.name}", fix="give its bandwidth and latency")
    return link


def _reductions(
    table: ProfileTable,
    pools: Mapping[str, Pool],
    network: Network,
    replicas: Sequence[ReplicaSpec],
    bucket_bytes: float,
    num_buckets: int,
) -> list[Reduction]:
    """Return a reduction for every run of layers between two cuts of any replica."""
    cuts = sorted({0, *(stage.end_layer for replica in replicas for stage in replica.stages)})
    found = []
    for first, end in pairwise(cuts):
        members, holders = [], []
        for index, replica in enumerate(replicas):
            stage = next(
                s for s, spec in enumerate(replica.stages) if spec.first_layer <= first and end <= spec.end_layer
            )
            members.append((index, stage))
            holders.append((replica.count, replica.stages[stage]))
        seconds = _reduce_seconds(table, pools, network, range(first, end), holders, bucket_bytes)
        if seconds > 0:
            name = f"layers {first}-{end - 1}"
            found.append(Reduction(name=name, members=tuple(members), seconds=seconds, num_buckets=num_buckets))
    return found


def _reduce_seconds(
    table: ProfileTable,
    pools: Mapping[str, Pool],
    network: Network,
    layers: range,
    holders: Sequence[tuple[int, StageSpec]],
    bucket_bytes: float,
) -> float:
    """Return the seconds of a reduction in two levels: inside each kind at once, then between the kinds.

    Cost:
        each level a ring: 2(n-1) messages of bytes/n.
    """
    inside_s, whole_bytes = 0.0, 0.0
    for count, spec in holders:
        pool = pools[spec.pool]
        size = sum(table.sizes[spec.degree].num_parameters[layer] for layer in layers) * GRADIENT_BYTES
        whole_bytes = max(whole_bytes, float(size))
        if count * spec.width > 1:
            link = _link(network, pool, pool, 1, 1)
            inside_s = max(
                inside_s,
                all_reduce_s(link, size, count * spec.width, bucket_bytes=bucket_bytes, sharers=pool.node_size),
            )
    kinds = [pools[spec.pool] for _, spec in holders]
    if len(holders) == 1:
        return inside_s
    ring = [*pairwise(kinds), (kinds[-1], kinds[0])]
    between_s = max(
        all_reduce_s(_link(network, a, b, 1, 1), whole_bytes, len(kinds), bucket_bytes=bucket_bytes) for a, b in ring
    )
    return inside_s + between_s


def all_reduce_s(
    link: LinkModel, size_bytes: float, num_ranks: int, *, bucket_bytes: float = float("inf"), sharers: int = 1
) -> float:
    """Return the seconds of one all-reduce over the slowest link of its ring; see `reduce_seconds`.

    Cost:
        ring: 2(P-1) messages a rank and bucket, 2(P-1)/P * size_bytes bytes on the wire a rank.
    """
    sizes = np.array([float(size_bytes)])
    return float(reduce_seconds(link, sizes, num_ranks, bucket_bytes=bucket_bytes, sharers=sharers)[0])
