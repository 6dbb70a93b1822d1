"""Interleaved 1F1B: several stages a rank, dealt out in rounds, so that the pipeline fills sooner.

Pure: no torch, no clock, no network. Ranks may hold different numbers of stages: a fast one more than a slow
one.

Source:
    Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters using Megatron-LM".
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.sizes import check_sizes


def interleaved(stages_of_rank: Sequence[int], num_microbatches: int) -> Schedule:
    """Return interleaved 1F1B.

    Microbatches go through in groups of as many as there are ranks; a rank takes a group through its first
    stage, then through its second, and so on. The last group may be smaller.

    Args:
        stages_of_rank: how many stages each rank holds; stages are dealt out in rounds, and ranks that are
            full are passed over.
        num_microbatches: microbatches in one step.

    Raises:
        ScheduleError: a size below one.

    Idle:
        (ranks - 1) (F + B) / v of equal ranks of v stages each, where num_microbatches is a multiple of
        the ranks.
    """
    check_sizes(len(stages_of_rank), num_microbatches)
    if min(stages_of_rank) < 1:
        raise ScheduleError("a rank needs a stage", value=min(stages_of_rank), valid="1 or more")
    rank_of_stage = round_layout(stages_of_rank)
    num_ranks = len(stages_of_rank)
    forwards, backwards, warmups = [], [], []
    for rank, count in enumerate(stages_of_rank):
        stages = [stage for stage, home in enumerate(rank_of_stage) if home == rank]
        forwards.append(_in_groups(stages, Kind.F, num_ranks, num_microbatches))
        backwards.append(_in_groups(stages[::-1], Kind.B, num_ranks, num_microbatches))
        warmups.append((num_ranks - rank - 1) * 2 + (count - 1) * num_ranks)
    if len(set(stages_of_rank)) == 1 and num_microbatches % num_ranks == 0:
        rows = [_one_by_one(*row) for row in zip(forwards, backwards, warmups, strict=True)]
    else:
        rows = _as_ready(forwards, backwards, warmups, rank_of_stage)
    return Schedule(
        name="interleaved",
        num_microbatches=num_microbatches,
        rank_of_stage=rank_of_stage,
        actions_of_rank=tuple(map(tuple, rows)),
    )


def round_layout(stages_of_rank: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks of the stages, dealt out in rounds: (2, 1, 2) gives 0, 1, 2, 0, 2."""
    return tuple(
        rank
        for turn in range(max(stages_of_rank, default=0))
        for rank, count in enumerate(stages_of_rank)
        if count > turn
    )


def _in_groups(stages: Sequence[int], kind: Kind, group: int, num_microbatches: int) -> list[Action]:
    return [
        Action(stage, kind, microbatch)
        for first in range(0, num_microbatches, group)
        for stage in stages
        for microbatch in range(first, min(first + group, num_microbatches))
    ]


def _one_by_one(forwards: list[Action], backwards: list[Action], num_warmup: int) -> list[Action]:
    row = forwards[:num_warmup]
    for index, backward in enumerate(backwards):
        row += forwards[index + num_warmup : index + num_warmup + 1]
        row.append(backward)
    return row


def _as_ready(
    forwards: list[list[Action]], backwards: list[list[Action]], warmups: list[int], rank_of_stage: tuple[int, ...]
) -> list[list[Action]]:
    """Merge each rank's forwards and backwards in the order in which a run finds them ready.

    Ranks of different depths, or a group cut short, can block one another in the fixed one-by-one order. Here
    each rank takes, a time slot at a time, a backward that is ready, else a forward; a forward past the
    warm-up waits for its turn, unless every rank would wait.
    """
    num_ranks, last = len(forwards), len(rank_of_stage) - 1
    rows: list[list[Action]] = [[] for _ in range(num_ranks)]
    next_f, next_b = [0] * num_ranks, [0] * num_ranks
    done: set[Action] = set()
    spare = 0

    def is_ready(action: Action) -> bool:
        if action.kind is Kind.F:
            return action.stage == 0 or Action(action.stage - 1, Kind.F, action.microbatch) in done
        if Action(action.stage, Kind.F, action.microbatch) not in done:
            return False
        return action.stage == last or Action(action.stage + 1, Kind.B, action.microbatch) in done

    while any(next_b[rank] < len(backwards[rank]) for rank in range(num_ranks)):
        taken = []
        for rank in range(num_ranks):
            if next_b[rank] < len(backwards[rank]) and is_ready(backwards[rank][next_b[rank]]):
                taken.append(backwards[rank][next_b[rank]])
                next_b[rank] += 1
            elif (
                next_f[rank] < len(forwards[rank])
                and next_f[rank] - next_b[rank] <= warmups[rank] + spare
                and is_ready(forwards[rank][next_f[rank]])
            ):
                taken.append(forwards[rank][next_f[rank]])
                next_f[rank] += 1
            else:
                continue
            rows[rank].append(taken[-1])
        done.update(taken)
        if not taken:
            # All wait for one another: let the forwards run further ahead.
            spare += 1
    return rows
