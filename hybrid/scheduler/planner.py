"""The planner: from a model's profile and a fleet to a plan of one replica.

Pure: no torch, no clock, no network. A rank is a chip, in the fleet's order; layers by the exact min-max split under
each chip's memory. `search/` chooses more (replicas, degrees, recompute) and searches for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from hybrid.errors import FleetError, PlanError, UnsupportedFormat
from hybrid.scheduler.cost import layer_seconds, transfer_seconds
from hybrid.scheduler.layout import layout_of
from hybrid.scheduler.partition import even_out_ranks, partition_min_max
from hybrid.scheduler.plan import EdgePlan, Plan, ReplicaPlan, StagePlan
from hybrid.scheduler.plan_memory import Fit, fitting_order, schedule_for_memory
from hybrid.scheduler.profile import LayerProfile, ModelProfile

if TYPE_CHECKING:
    from hybrid.hardware.fleet import Fleet, Island, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What a plan is asked for; the same for every choice of devices."""

    job: str
    profile: ModelProfile
    schedule: str
    rank_of_stage: tuple[int, ...]
    num_microbatches: int
    precision: str
    efficiency: float


def plan(
    profile: ModelProfile,
    fleet: Fleet,
    *,
    schedule: str,
    num_microbatches: int,
    precision: str,
    num_stages: int | None = None,
    stages_per_rank: int | Sequence[int] | None = None,
    efficiency: float = 0.4,
    job: str = "job",
) -> Plan:
    """Return the placement of a model on a fleet, with its predicted step.

    One rank a chip, islands in the order in which the fleet names them. With fewer ranks than chips, every
    run of neighbouring chips is tried, and the one with the shortest predicted step is taken (the first of
    equals).

    Args:
        profile: the model's layers, for one microbatch.
        fleet: islands and links.
        schedule: a name of `SCHEDULE_NAMES`; `auto` searches for an order.
        num_microbatches: microbatches in one step.
        precision: compute format.
        num_stages, stages_per_rank: see `layout_of`.
        efficiency: share of the catalog's peak that a chip reaches.
        job: the job's name, for the plan's head.

    Raises:
        PlanError: unknown schedule, more stages than layers, more ranks than chips, or a model that does not fit; says
            by how many bytes.
        UnsupportedFormat: a chip lacks the precision; names the chip and its formats.
        FleetError: a link that the plan needs is not there.
    """
    rank_of_stage = layout_of(
        schedule,
        num_chips=fleet.num_chips,
        num_layers=len(profile.layers),
        num_stages=num_stages,
        stages_per_rank=stages_per_rank,
    )
    request = _Request(
        job=job,
        profile=profile,
        schedule=schedule,
        rank_of_stage=rank_of_stage,
        num_microbatches=num_microbatches,
        precision=precision,
        efficiency=efficiency,
    )
    best: Plan | None = None
    refusal: PlanError | FleetError | UnsupportedFormat | None = None
    for chosen in _windows(fleet, rank_of_stage):
        try:
            found = _plan_on(request, chosen)
        except (PlanError, FleetError, UnsupportedFormat) as error:
            refusal = refusal or error
            continue
        if best is None or found.step_s < best.step_s:
            best = found
    if best is None:
        raise refusal or PlanError("the fleet has no chip", fix="add an island")
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _Devices:
    """The chips of one choice, a rank each, and the link behind each stage; None within a rank."""

    islands: tuple[Island, ...]
    links: tuple[Link | None, ...]


def _windows(fleet: Fleet, rank_of_stage: tuple[int, ...]) -> Iterable[_Devices]:
    """Return every run of neighbouring chips, those that look the same once."""
    chips = list(fleet.chips())
    size = max(rank_of_stage, default=-1) + 1
    seen: dict[tuple[object, ...], _Devices] = {}
    for start in range(len(chips) - size + 1):
        own = chips[start : start + size]
        islands = tuple(island for _, island, _ in own)
        links = tuple(
            None if here == there else fleet.rank_link(own[here][0], own[there][0])
            for here, there in pairwise(rank_of_stage)
        )
        looks = [link and (link.bandwidth_bytes_per_s, link.latency_s) for link in links]
        key = (*(island.name for island in islands), *looks)
        seen.setdefault(key, _Devices(islands=islands, links=links))
    return seen.values()


def _plan_on(request: _Request, devices: _Devices) -> Plan:
    """Return the plan with one rank on each of the given devices."""
    profile, home = request.profile, request.rank_of_stage
    seconds = [[_seconds(request, layer, devices.islands[rank]) for layer in profile.layers] for rank in home]
    limits = [island.memory_bytes for island in devices.islands]
    rough = schedule_for_memory(request.schedule, home, request.num_microbatches)
    fit = Fit.of(profile, rough, limits)
    # A rank of several stages works on each in turn: what counts is their sum.
    work = [[(f + b) * home.count(home[stage]) for f, b in row] for stage, row in enumerate(seconds)]
    split = partition_min_max(
        work,
        layer_bytes_of_stage=fit.layer_bytes,
        cut_bytes_of_stage=fit.cut_bytes,
        limit_bytes_of_stage=fit.limit_bytes,
    )
    if len(set(home)) < len(home):
        plain = [[f + b for f, b in row] for row in seconds]
        split = even_out_ranks(split, plain, home, fits=fit.fits)
    edges = _edges(profile, devices.links, split)
    forward_s = [sum(seconds[stage][layer][0] for layer in run) for stage, run in enumerate(split)]
    backward_s = [sum(seconds[stage][layer][1] for layer in run) for stage, run in enumerate(split)]
    order = fitting_order(
        request.schedule,
        profile,
        rough,
        split=split,
        forward_s=forward_s,
        backward_s=backward_s,
        transfer_s=[edge.transfer_s for edge in edges],
        limit_bytes=limits,
    )
    stages = tuple(
        StagePlan(
            stage=stage,
            ranks=(home[stage],),
            island=devices.islands[home[stage]].name,
            chip=devices.islands[home[stage]].chip.name,
            backend=devices.islands[home[stage]].backend,
            first_layer=run.start,
            end_layer=run.stop,
            tensor_parallel=1,
            width=1,
            recompute=False,
            forward_s=forward_s[stage],
            backward_s=backward_s[stage],
            # One matrix product a weight each: halves, where products dominate.
            weight_gradient_s=backward_s[stage] / 2,
            memory_bytes=order.memory_bytes[stage],
            memory_limit_bytes=limits[home[stage]],
        )
        for stage, run in enumerate(split)
    )
    return _predicted(request, stages, edges, order.words)


def _seconds(request: _Request, layer: LayerProfile, island: Island) -> tuple[float, float]:
    try:
        return layer_seconds(layer, island.chip, request.precision, request.efficiency, speed=island.speed)
    except UnsupportedFormat:
        raise UnsupportedFormat(
            f"chip {island.chip.name} of island {island.name} has no {request.precision}",
            value=request.precision,
            valid=sorted(island.chip.flops_of_format),
            fix="set precision to a format that every chip has",
        ) from None


def _edges(profile: ModelProfile, links: tuple[Link | None, ...], split: tuple[range, ...]) -> tuple[EdgePlan, ...]:
    edges = []
    for stage, link in enumerate(links):
        size_bytes = profile.layers[split[stage].stop - 1].output_bytes
        edges.append(
            EdgePlan(
                from_stage=stage,
                to_stage=stage + 1,
                size_bytes=size_bytes,
                transfer_s=0.0 if link is None else transfer_seconds(link, size_bytes),
                latency_s=0.0 if link is None else link.latency_s,
                codec="none",
            )
        )
    return tuple(edges)


def _predicted(
    request: _Request, stages: tuple[StagePlan, ...], edges: tuple[EdgePlan, ...], order: tuple[str, ...]
) -> Plan:
    replica = ReplicaPlan(
        replica=0,
        schedule=request.schedule,
        order=order,
        num_microbatches=request.num_microbatches,
        microbatch=request.profile.microbatch,
        first_sample=0,
        step_s=0.0,
        idle_share=0.0,
        stages=stages,
        edges=edges,
    ).predicted()
    return Plan(
        job=request.job,
        model=request.profile.model,
        num_layers=len(request.profile.layers),
        precision=request.precision,
        source=f"{request.profile.source} at efficiency {request.efficiency:g}, uncalibrated",
        objective="throughput",
        global_batch=replica.num_samples,
        gradient_codec="none",
        step_s=replica.step_s,
        idle_share=replica.idle_share,
        replicas=(replica,),
    )
