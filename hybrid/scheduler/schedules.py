"""The named schedules: functions from sizes to compute actions.

Pure: no torch, no clock, no network. A schedule made here holds only F, B, I and W; `lowering` adds the
communication. In all of them a stage's backwards run in microbatch order, so that its gradients
are summed in the order in which one process would sum them and come out with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.interleaved import interleaved, round_layout
from hybrid.scheduler.sizes import check_sizes
from hybrid.scheduler.zero_bubble import v_layout, zb_h1, zb_h2, zb_v


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """Return GPipe: every rank runs all its forwards, then all its backwards.

    Holds: num_microbatches activations on every stage.

    Source:
        Huang et al. 2019, "GPipe: easy scaling with micro-batch pipeline parallelism" (there the
        backwards run in reverse; here in order, for the sum's sake; the step takes as long).
    """
    check_sizes(num_stages, num_microbatches)
    microbatches = range(num_microbatches)
    return Schedule(
        name="gpipe",
        num_microbatches=num_microbatches,
        rank_of_stage=tuple(range(num_stages)),
        actions_of_rank=tuple(
            tuple(Action(stage, kind, microbatch) for kind in (Kind.F, Kind.B) for microbatch in microbatches)
            for stage in range(num_stages)
        ),
    )


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """Return 1F1B: after its warm-up a rank runs forwards and backwards in turn.

    Holds: min(num_stages - stage, num_microbatches) activations on a stage.

    Source:
        Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training" (PipeDream-flush).
    """
    check_sizes(num_stages, num_microbatches)
    return Schedule(
        name="1f1b",
        num_microbatches=num_microbatches,
        rank_of_stage=tuple(range(num_stages)),
        actions_of_rank=tuple(
            _one_f_one_b_rank(stage, num_stages - stage - 1, num_microbatches) for stage in range(num_stages)
        ),
    )


def _one_f_one_b_rank(stage: int, num_warmup: int, num_microbatches: int) -> tuple[Action, ...]:
    num_warmup = min(num_warmup, num_microbatches)
    actions = [Action(stage, Kind.F, microbatch) for microbatch in range(num_warmup)]
    for microbatch in range(num_microbatches):
        if microbatch + num_warmup < num_microbatches:
            actions.append(Action(stage, Kind.F, microbatch + num_warmup))
        actions.append(Action(stage, Kind.B, microbatch))
    return tuple(actions)


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zb_h1, "zb-h2": zb_h2}
)
"""Schedules with one stage a rank, by the name that a job file writes."""


def build_schedule(name: str, num_stages: int, num_microbatches: int) -> Schedule:
    """Return the compute-only schedule called `name`, one stage a rank.

    Raises:
        ScheduleError: no such name, or a size below one.
    """
    build = SCHEDULES.get(name)
    if build is None:
        raise ScheduleError("no such schedule", value=name, valid=SCHEDULES, fix="name one of these")
    return build(num_stages, num_microbatches)


SCHEDULE_NAMES = (*SCHEDULES, "interleaved", "zb-v", "auto")
"""Every schedule that a plan may name; the last three put several stages on a rank, or may."""


def build_placed_schedule(name: str, rank_of_stage: Sequence[int], num_microbatches: int) -> Schedule:
    """Return the compute-only schedule called `name` of stages that lie on given ranks.

    Raises:
        ScheduleError: no such name, a size below one, `auto` (which has no order of its own), or stages that lie
            otherwise than the schedule needs.
    """
    num_ranks = max(rank_of_stage, default=-1) + 1
    counts = [list(rank_of_stage).count(rank) for rank in range(num_ranks)]
    match name:
        case "interleaved":
            layout, what = round_layout(counts), "dealt out in rounds"
        case "zb-v":
            layout, what = v_layout(num_ranks), "down the ranks and back up"
        case "auto":
            raise ScheduleError("auto is an order that was searched for", value=name, fix="write the order down")
        case _:
            layout, what = tuple(range(len(rank_of_stage))), "one a rank, in order"
    if tuple(rank_of_stage) != layout:
        valid = f"{what}: {', '.join(map(str, layout))}"
        raise ScheduleError(f"{name} needs its stages elsewhere", value=list(rank_of_stage), valid=valid)
    if name == "interleaved":
        return interleaved(counts, num_microbatches)
    return zb_v(num_ranks, num_microbatches) if name == "zb-v" else build_schedule(name, num_ranks, num_microbatches)


def parse_order(order: Sequence[str], name: str, rank_of_stage: Sequence[int], num_microbatches: int) -> Schedule:
    """Return the schedule whose compute actions are written down, a text a rank.

    Raises:
        ScheduleError: a word is no action, or there is a text too few or too many.
    """
    num_ranks = max(rank_of_stage, default=-1) + 1
    if len(order) != num_ranks:
        raise ScheduleError("the order needs a text for each pipeline rank", value=len(order), valid=str(num_ranks))
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        rank_of_stage=tuple(rank_of_stage),
        actions_of_rank=tuple(tuple(Action.parse(word) for word in text.split()) for text in order),
    )
