"""The zero-bubble schedules by hand: backwards split into input gradients (I) and weight gradients (W).

Pure: no torch, no clock, no network. An I is needed by the stage before, a W by nobody until the step's end,
so W fills what would be idle. Weight gradients run in microbatch order too, so that sums keep their bits.

Source:
    Qi et al. 2024, "Zero bubble pipeline parallelism" (H1, H2); Qi et al. 2024, "Pipeline parallelism with
    controllable memory" (V).
"""

from __future__ import annotations

from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.sizes import check_sizes


def zb_h1(num_stages: int, num_microbatches: int) -> Schedule:
    """Return ZB-H1: 1F1B's warm-up, and stage s puts its weight gradients off by s microbatches.

    Holds: at most what min(num_stages, num_microbatches) forwards leave, on every stage.
    Idle: (num_stages - 1) (F + I - W) of equal stages.
    """
    return _by_hand("zb-h1", num_stages, num_microbatches, warmup_per_stage=1)


def zb_h2(num_stages: int, num_microbatches: int) -> Schedule:
    """Return ZB-H2: twice H1's warm-up and twice its delay, for steps that follow each other with no barrier.

    Holds: at most what 2 num_stages - 1 forwards leave.
    Idle: (num_stages - 1) (F + I - 2 W) of equal stages from one step's start to the next one's.
    """
    return _by_hand("zb-h2", num_stages, num_microbatches, warmup_per_stage=2)


def _by_hand(name: str, num_stages: int, num_microbatches: int, *, warmup_per_stage: int) -> Schedule:
    check_sizes(num_stages, num_microbatches)
    rows = []
    for stage in range(num_stages):
        num_warmup = min((num_stages - stage - 1) * warmup_per_stage, num_microbatches)
        delay = min(stage * warmup_per_stage, num_microbatches)
        row = [Action(stage, Kind.F, microbatch) for microbatch in range(num_warmup)]
        for microbatch in range(num_microbatches):
            if microbatch + num_warmup < num_microbatches:
                row.append(Action(stage, Kind.F, microbatch + num_warmup))
            row.append(Action(stage, Kind.I, microbatch))
            if microbatch >= delay:
                row.append(Action(stage, Kind.W, microbatch - delay))
        row += [Action(stage, Kind.W, num_microbatches - delay + late) for late in range(delay)]
        rows.append(tuple(row))
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        rank_of_stage=tuple(range(num_stages)),
        actions_of_rank=tuple(rows),
    )


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """Return ZB-V: two stages a rank, the first half going down the ranks and the second half back up.

    Rank 0 holds the first and the last stage. Without idle time where F, I and W take the same time, no time
    is lost in transfers, and num_microbatches is at least 2 num_ranks.

    Holds: at most what 2 num_ranks forwards of its stages leave: one half of ZB-H2's.
    """
    check_sizes(num_ranks, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        # A shorter step is a longer one without its last microbatches: order and causality stay.
        order = _v_rank(rank, num_ranks, max(num_microbatches, 2 * num_ranks))
        rows.append(tuple(action for action in order if action.microbatch < num_microbatches))
    return Schedule(
        name="zb-v",
        num_microbatches=num_microbatches,
        rank_of_stage=v_layout(num_ranks),
        actions_of_rank=tuple(rows),
    )


def v_layout(num_ranks: int) -> tuple[int, ...]:
    """Return the ranks of a V's stages: 0, 1, …, p-1, p-1, …, 1, 0."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def _v_rank(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    down, up = rank, 2 * num_ranks - 1 - rank
    row: list[Action] = []
    count = dict.fromkeys(((stage, kind) for stage in (down, up) for kind in (Kind.F, Kind.I, Kind.W)), 0)

    def put(stage: int, *kinds: Kind) -> None:
        for kind in kinds:
            row.append(Action(stage, kind, count[stage, kind]))
            count[stage, kind] += 1

    for _ in range(2 * (num_ranks - rank) - 1):
        put(down, Kind.F)
    for _ in range(rank):
        put(up, Kind.F)
        put(down, Kind.F)
    for _ in range(num_ranks - rank):
        put(up, Kind.F, Kind.I, Kind.W)
    while count[up, Kind.F] < num_microbatches:
        if count[down, Kind.F] < num_microbatches:
            put(down, Kind.F)
        put(down, Kind.I, Kind.W)
        put(up, Kind.F, Kind.I, Kind.W)
    for _ in range(rank):
        put(down, Kind.I)
        put(up, Kind.I)
    for _ in range(num_ranks - rank):
        put(down, Kind.I, Kind.W)
    for stage in (up, down):
        while count[stage, Kind.W] < num_microbatches:
            put(stage, Kind.W)
    return row
