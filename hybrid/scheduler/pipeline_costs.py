"""What a pipeline's actions cost: seconds, bytes and limits, for searching orders and judging them.

Pure: no torch, no clock, no network. Per stage and in seconds; `cost.py` is where layers become seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.held import peak_held_of_rank
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCosts:
    """One microbatch's costs; stages may differ in all of them.

    Shapes:
        rank_of_stage, …_gradient_s, forward_s, held_bytes, kept_bytes: (stages,).  transfer_s: (stages - 1,).
        limit_bytes: (ranks,).
    """

    rank_of_stage: tuple[int, ...]
    forward_s: tuple[float, ...]
    input_gradient_s: tuple[float, ...]
    weight_gradient_s: tuple[float, ...]
    transfer_s: tuple[float, ...]
    """Of the edge behind each stage but the last; the gradient takes as long. Free where one rank has
    both."""
    held_bytes: tuple[float, ...]
    """What a forward leaves."""
    kept_bytes: tuple[float, ...]
    """The part of it that the input gradient does not free; the weight gradient frees it."""
    limit_bytes: tuple[float, ...]
    """What each rank may hold of these."""

    def __post_init__(self) -> None:
        num_stages = len(self.rank_of_stage)
        for name in ("forward_s", "input_gradient_s", "weight_gradient_s", "held_bytes", "kept_bytes"):
            if len(getattr(self, name)) != num_stages:
                raise ScheduleError(f"{name} has not one value a stage", value=len(getattr(self, name)))
        if len(self.transfer_s) != num_stages - 1:
            raise ScheduleError("transfer_s has not one value an edge", value=len(self.transfer_s))
        if set(self.rank_of_stage) != set(range(len(self.limit_bytes))):
            raise ScheduleError("limit_bytes has not one value a rank", value=len(self.limit_bytes))

    @property
    def num_stages(self) -> int:
        """How many stages."""
        return len(self.rank_of_stage)

    @property
    def num_ranks(self) -> int:
        """How many ranks."""
        return len(self.limit_bytes)

    @property
    def work_s_of_rank(self) -> tuple[float, ...]:
        """Seconds of one microbatch's compute, by rank; the largest bounds every step from below."""
        work_s = [0.0] * self.num_ranks
        for stage, rank in enumerate(self.rank_of_stage):
            backward_s = self.input_gradient_s[stage] + self.weight_gradient_s[stage]
            work_s[rank] += self.forward_s[stage] + backward_s
        return tuple(work_s)

    def seconds_of(self, action: Action) -> float:
        """Return the seconds of a compute action; a whole backward takes both its parts'."""
        stage = action.stage
        match action.kind:
            case Kind.F:
                return self.forward_s[stage]
            case Kind.I:
                return self.input_gradient_s[stage]
            case Kind.W:
                return self.weight_gradient_s[stage]
        return self.input_gradient_s[stage] + self.weight_gradient_s[stage]

    def seconds_of_send(self, send: Action) -> float:
        """Return the seconds of a message, by its SEND_F or SEND_B."""
        return self.transfer_s[send.stage if send.kind is Kind.SEND_F else send.stage - 1]

    def simulate(self, schedule: Schedule) -> Timeline:
        """Return the schedule's time line under these costs."""
        return simulate(schedule, seconds_of=self.seconds_of, transfer_s=self.seconds_of_send)

    def fits(self, schedule: Schedule) -> bool:
        """Return whether no rank ever holds more than its limit."""
        peaks = peak_held_of_rank(
            schedule,
            held_by_forward=self.held_bytes.__getitem__,
            kept_after_input_gradient=self.kept_bytes.__getitem__,
        )
        return all(
            peak <= limit * (1 + 1e-9) or math.isclose(peak, limit)
            for peak, limit in zip(peaks, self.limit_bytes, strict=True)
        )


def equal_costs(
    rank_of_stage: tuple[int, ...],
    *,
    forward_s: float = 1.0,
    input_gradient_s: float = 1.0,
    weight_gradient_s: float = 1.0,
    transfer_s: float = 0.0,
    held_bytes: float = 1.0,
    kept_bytes: float = 1.0,
    limit_bytes: float = math.inf,
) -> PipelineCosts:
    """Return costs that are the same for every stage, edge and rank."""
    num_stages = len(rank_of_stage)
    return PipelineCosts(
        rank_of_stage=rank_of_stage,
        forward_s=(forward_s,) * num_stages,
        input_gradient_s=(input_gradient_s,) * num_stages,
        weight_gradient_s=(weight_gradient_s,) * num_stages,
        transfer_s=(transfer_s,) * (num_stages - 1),
        held_bytes=(held_bytes,) * num_stages,
        kept_bytes=(kept_bytes,) * num_stages,
        limit_bytes=(limit_bytes,) * (max(rank_of_stage) + 1),
    )
