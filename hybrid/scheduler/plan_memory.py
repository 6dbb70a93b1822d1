"""What a schedule makes the stages of a plan hold, and an order that keeps to it.

Pure: no torch, no clock, no network. Parameters with their optimizer state, activations in flight, edges' buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid.errors import PlanError, ScheduleError
from hybrid.scheduler.actions import Schedule
from hybrid.scheduler.auto import auto_schedule
from hybrid.scheduler.held import held_of_stage_at_peak, peak_in_flight_of_stage, peak_posted_of_stage
from hybrid.scheduler.interleaved import interleaved
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.pipeline_costs import PipelineCosts
from hybrid.scheduler.profile import ModelProfile
from hybrid.scheduler.schedules import build_placed_schedule, build_schedule

_NUM_TRIES = 120
"""Of `auto`: policies tried for one choice of chips."""


def schedule_for_memory(name: str, rank_of_stage: Sequence[int], num_microbatches: int) -> Schedule:
    """Return the schedule, or for `auto` the one by hand that holds least on these stages: layers are cut for it.

    Raises:
        PlanError: a size below one.
    """
    num_ranks = max(rank_of_stage, default=-1) + 1
    try:
        if name != "auto":
            return build_placed_schedule(name, rank_of_stage, num_microbatches)
        if len(rank_of_stage) == num_ranks:
            return build_schedule("1f1b", num_ranks, num_microbatches)
        return interleaved([list(rank_of_stage).count(rank) for rank in range(num_ranks)], num_microbatches)
    except ScheduleError as error:
        raise PlanError(error.fact, value=error.value, valid=error.valid, fix="change the job") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Bytes of each layer and each cut, by stage, and what each stage may take: for `partition_min_max`."""

    layer_bytes: list[list[float]]
    cut_bytes: list[list[float]]
    limit_bytes: list[float]

    @classmethod
    def of(cls, profile: ModelProfile, schedule: Schedule, limit_bytes: Sequence[float]) -> Fit:
        """Return what the schedule needs; the stages of one rank share its memory evenly.

        Args:
            limit_bytes: by rank.
        """
        home = schedule.rank_of_stage
        # A cut needs a buffer for each posted receive and one for the message being sent the other way.
        outputs = [0, *(layer.output_bytes for layer in profile.layers[:-1]), 0]
        posted = peak_posted_of_stage(lower_communication(schedule))
        return cls(
            layer_bytes=[
                [
                    layer.num_parameters * profile.bytes_per_parameter + held * layer.saved_activation_bytes
                    for layer in profile.layers
                ]
                for held in peak_in_flight_of_stage(schedule)
            ],
            cut_bytes=[[(max(receives) + 1.0) * size for size in outputs] for receives in posted],
            limit_bytes=[limit_bytes[rank] / home.count(rank) for rank in home],
        )

    def fits(self, stage: int, layers: range) -> bool:
        """Return whether a stage could hold these layers."""
        cuts = self.cut_bytes[stage]
        needed = sum(self.layer_bytes[stage][layer] for layer in layers) + cuts[layers.start] + cuts[layers.stop]
        return needed <= self.limit_bytes[stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the ranks do, where the schedule's name does not say it, and what each stage takes of its rank's peak."""

    words: tuple[str, ...]
    memory_bytes: tuple[int, ...]


def fitting_order(
    name: str,
    profile: ModelProfile,
    rough: Schedule,
    *,
    split: Sequence[range],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    transfer_s: Sequence[float],
    limit_bytes: Sequence[float],
) -> Order:
    """Return the order and its memory; for `auto` the fastest order that is found within the limits.

    Args:
        rough: the schedule for which the layers were cut.
        split: each stage's layers.
        forward_s, backward_s: of one microbatch, by stage.
        transfer_s: by edge.
        limit_bytes: by rank.

    Raises:
        PlanError: no order fits.
    """
    layers = profile.layers
    held = [float(sum(layers[layer].saved_activation_bytes for layer in run)) for run in split]
    static = [
        sum(layers[layer].num_parameters for layer in run) * profile.bytes_per_parameter
        + _buffers(profile, run, posted)
        for run, posted in zip(split, peak_posted_of_stage(lower_communication(rough)), strict=True)
    ]
    schedule = rough
    if name == "auto":
        home = rough.rank_of_stage
        free = [
            limit - sum(static[stage] for stage, owner in enumerate(home) if owner == rank)
            for rank, limit in enumerate(limit_bytes)
        ]
        halves = tuple(seconds / 2 for seconds in backward_s)
        costs = PipelineCosts(
            rank_of_stage=home,
            forward_s=tuple(forward_s),
            input_gradient_s=halves,
            weight_gradient_s=halves,
            transfer_s=tuple(transfer_s),
            held_bytes=tuple(held),
            kept_bytes=tuple(held),
            limit_bytes=tuple(free),
        )
        schedule = auto_schedule(costs, rough.num_microbatches, num_tries=_NUM_TRIES)
    at_peak = held_of_stage_at_peak(
        schedule, held_by_forward=held.__getitem__, kept_after_input_gradient=held.__getitem__
    )
    return Order(
        words=tuple(" ".join(map(str, row)) for row in schedule.actions_of_rank) if name == "auto" else (),
        memory_bytes=tuple(round(a + b) for a, b in zip(static, at_peak, strict=True)),
    )


def _buffers(profile: ModelProfile, run: range, posted: tuple[int, int]) -> float:
    """Return the bytes of a stage's buffers on both its sides."""
    before = profile.layers[run.start - 1].output_bytes if run.start else 0
    after = profile.layers[run.stop - 1].output_bytes if run.stop < len(profile.layers) else 0
    return (max(posted) + 1.0) * (before + after)
