"""The planner: from a model's profile and a fleet to a plan.

Pure: no torch, no clock, no network. One stage a chip, in the fleet's order; layers by the exact min-max
split under each chip's memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from hybrid.errors import FleetError, PlanError, ScheduleError, UnsupportedFormat
from hybrid.scheduler.cost import layer_seconds, transfer_seconds
from hybrid.scheduler.held import peak_in_flight_of_stage, peak_posted_of_stage
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.partition import partition_min_max, stage_bytes
from hybrid.scheduler.plan import EdgePlan, Plan, ReplicaPlan, StagePlan
from hybrid.scheduler.profile import LayerProfile, ModelProfile
from hybrid.scheduler.schedules import build_schedule

if TYPE_CHECKING:
    from hybrid.hardware.fleet import Fleet, Island, Link


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What a plan is asked for; the same for every choice of devices."""

    job: str
    profile: ModelProfile
    schedule: str
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
    efficiency: float = 0.4,
    job: str = "job",
) -> Plan:
    """Return the placement of a model on a fleet, with its predicted step.

    One stage a chip, islands in the order in which the fleet names them. With fewer stages than chips, every
    run of neighbouring chips is tried, and the one with the shortest predicted step is taken (the first of
    equals).

    Args:
        profile: the model's layers, for one microbatch.
        fleet: islands and links.
        schedule: a name of `SCHEDULES`.
        num_microbatches: microbatches in one step.
        precision: compute format.
        num_stages: default: one stage a chip.
        efficiency: share of the catalog's peak that a chip reaches.
        job: the job's name, for the plan's head.

    Raises:
        PlanError: unknown schedule, more stages than layers or chips, or a model that does not fit; says by
            how many bytes.
        UnsupportedFormat: a chip lacks the precision; names the chip and its formats.
        FleetError: a link that the plan needs is not there.
    """
    request = _Request(
        job=job,
        profile=profile,
        schedule=schedule,
        num_microbatches=num_microbatches,
        precision=precision,
        efficiency=efficiency,
    )
    wanted = _num_stages(num_stages, num_chips=fleet.num_chips, num_layers=len(profile.layers))
    best: Plan | None = None
    refusal: PlanError | FleetError | UnsupportedFormat | None = None
    for chosen in _windows(fleet, wanted):
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


def _num_stages(num_stages: int | None, *, num_chips: int, num_layers: int) -> int:
    most = min(num_chips, num_layers)
    if num_stages is None and num_chips > num_layers:
        raise PlanError(
            f"{num_chips} chips but only {num_layers} layers: a chip would stay without one",
            value=num_chips,
            valid=f"num_stages 1 to {most}",
            fix=f"set num_stages to {most} or fewer, or name fewer chips",
        )
    wanted = num_chips if num_stages is None else num_stages
    if not 1 <= wanted <= most:
        raise PlanError(
            f"num_stages must fit the fleet's {num_chips} chips and the model's {num_layers} layers",
            value=wanted,
            valid=f"1 to {most}",
            fix="change num_stages",
        )
    return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class _Devices:
    """The chips of one choice, in order, and the links between neighbours."""

    islands: tuple[Island, ...]
    links: tuple[Link, ...]


def _windows(fleet: Fleet, size: int) -> Iterable[_Devices]:
    """Return every run of neighbouring chips, those that look the same once."""
    chips = list(fleet.chips())
    links = [fleet.rank_link(here[0], there[0]) for here, there in pairwise(chips)]
    seen: dict[tuple[object, ...], _Devices] = {}
    for start in range(len(chips) - size + 1):
        islands = tuple(island for _, island, _ in chips[start : start + size])
        between = tuple(links[start : start + size - 1])
        looks = [(link.bandwidth_bytes_per_s, link.latency_s) for link in between]
        key = (*(island.name for island in islands), *looks)
        seen.setdefault(key, _Devices(islands=islands, links=between))
    return seen.values()


def _plan_on(request: _Request, devices: _Devices) -> Plan:
    """Return the plan with one stage on each of the given devices."""
    layers = request.profile.layers
    islands = devices.islands
    seconds = [[_seconds(request, layer, island) for layer in layers] for island in islands]
    memory = _Memory.of(request, len(islands))
    limits = [island.memory_bytes for island in islands]
    split = partition_min_max(
        [[forward_s + backward_s for forward_s, backward_s in row] for row in seconds],
        layer_bytes_of_stage=memory.layer_bytes,
        cut_bytes_of_stage=memory.cut_bytes,
        limit_bytes_of_stage=limits,
    )
    needed = stage_bytes(memory.layer_bytes, memory.cut_bytes)
    stages = tuple(
        StagePlan(
            stage=stage,
            ranks=(stage,),
            island=island.name,
            chip=island.chip.name,
            backend=island.backend,
            first_layer=run.start,
            end_layer=run.stop,
            tensor_parallel=1,
            width=1,
            recompute=False,
            forward_s=sum(seconds[stage][layer][0] for layer in run),
            backward_s=sum(seconds[stage][layer][1] for layer in run),
            # One matrix product a weight each: halves, where products dominate.
            weight_gradient_s=sum(seconds[stage][layer][1] for layer in run) / 2,
            memory_bytes=round(float(needed[stage, run.start, run.stop])),
            memory_limit_bytes=limits[stage],
        )
        for stage, (island, run) in enumerate(zip(islands, split, strict=True))
    )
    return _predicted(request, stages, _edges(request, devices.links, split))


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


def _edges(request: _Request, links: tuple[Link, ...], split: tuple[range, ...]) -> tuple[EdgePlan, ...]:
    edges = []
    for stage, link in enumerate(links):
        size_bytes = request.profile.layers[split[stage].stop - 1].output_bytes
        edges.append(
            EdgePlan(
                from_stage=stage,
                to_stage=stage + 1,
                size_bytes=size_bytes,
                transfer_s=transfer_seconds(link, size_bytes),
                latency_s=link.latency_s,
                codec="none",
            )
        )
    return tuple(edges)


def _predicted(request: _Request, stages: tuple[StagePlan, ...], edges: tuple[EdgePlan, ...]) -> Plan:
    draft = ReplicaPlan(
        replica=0,
        schedule=request.schedule,
        order=(),
        num_microbatches=request.num_microbatches,
        microbatch=request.profile.microbatch,
        first_sample=0,
        step_s=0.0,
        idle_share=0.0,
        stages=stages,
        edges=edges,
    )
    timeline = draft.simulate()
    return Plan(
        job=request.job,
        model=request.profile.model,
        num_layers=len(request.profile.layers),
        precision=request.precision,
        source=f"{request.profile.source} at efficiency {request.efficiency:g}, uncalibrated",
        objective="throughput",
        global_batch=draft.num_samples,
        gradient_codec="none",
        step_s=timeline.step_s,
        idle_share=timeline.idle_share,
        replicas=(replace(draft, step_s=timeline.step_s, idle_share=timeline.idle_share),),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """Bytes of each layer and each cut, by stage."""

    layer_bytes: list[list[float]]
    cut_bytes: list[list[float]]

    @classmethod
    def of(cls, request: _Request, num_stages: int) -> _Memory:
        profile = request.profile
        try:
            schedule = build_schedule(request.schedule, num_stages, request.num_microbatches)
        except ScheduleError as error:
            raise PlanError(error.fact, value=error.value, valid=error.valid, fix="change the job") from None
        in_flight = peak_in_flight_of_stage(schedule)
        posted = peak_posted_of_stage(lower_communication(schedule))
        # A cut needs a buffer for each posted receive and one for the message being sent the other way.
        outputs = [0, *(layer.output_bytes for layer in profile.layers[:-1]), 0]
        return cls(
            layer_bytes=[
                [
                    layer.num_parameters * profile.bytes_per_parameter + held * layer.saved_activation_bytes
                    for layer in profile.layers
                ]
                for held in in_flight
            ],
            cut_bytes=[[(max(receives) + 1.0) * size for size in outputs] for receives in posted],
        )
