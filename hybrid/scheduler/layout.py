"""Layout: which pipeline rank holds which stage, from a schedule's name and the numbers of stages and chips.

Pure: no torch, no clock, no network.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.errors import PlanError
from hybrid.scheduler.interleaved import round_layout
from hybrid.scheduler.schedules import SCHEDULE_NAMES, SCHEDULES
from hybrid.scheduler.zero_bubble import v_layout

_DEFAULT_PER_RANK = {"interleaved": 2, "zb-v": 2}


def layout_of(
    schedule: str,
    *,
    num_chips: int,
    num_layers: int,
    num_stages: int | None = None,
    stages_per_rank: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Return the pipeline rank of each stage.

    Args:
        schedule: a name of `SCHEDULE_NAMES`.
        num_chips: of the fleet; a rank is a chip.
        num_layers: of the model; a stage holds one or more.
        num_stages: of all ranks; default: as many as all chips hold.
        stages_per_rank: the same for all ranks, or one number a rank; default: 2 for `interleaved` and `zb-v`, else 1.

    Raises:
        PlanError: no such schedule, or numbers that do not go together; names the valid ones.
    """
    if schedule not in SCHEDULE_NAMES:
        raise PlanError("no such schedule", value=schedule, valid=SCHEDULE_NAMES, fix="name one of these")
    per_rank = _DEFAULT_PER_RANK.get(schedule, 1) if stages_per_rank is None else stages_per_rank
    _check_per_rank(schedule, per_rank)
    if not isinstance(per_rank, int):
        counts = list(per_rank)
        if num_stages not in (None, sum(counts)):
            raise PlanError(
                "num_stages is not the sum of stages_per_rank",
                value=num_stages,
                valid=str(sum(counts)),
                fix="leave num_stages out",
            )
        _check_sum(counts, num_chips, num_layers)
    else:
        counts = [per_rank] * _num_ranks(num_stages, per_rank, num_chips=num_chips, num_layers=num_layers)
    return v_layout(len(counts)) if schedule == "zb-v" else round_layout(counts)


def _check_per_rank(schedule: str, per_rank: int | Sequence[int]) -> None:
    """Refuse numbers of stages a rank that the schedule cannot have."""
    counts = [per_rank] if isinstance(per_rank, int) else list(per_rank)
    wanted = 1 if schedule in SCHEDULES else 2 if schedule == "zb-v" else None
    if not counts or min(counts) < 1 or (wanted is not None and set(counts) != {wanted}):
        raise PlanError(
            f"{schedule} has other numbers of stages a rank",
            value=per_rank if isinstance(per_rank, int) else counts,
            valid="1 or more" if wanted is None else str(wanted),
            where="stages_per_rank",
            fix="change stages_per_rank or the schedule (interleaved and auto take any)",
        )


def _check_sum(counts: Sequence[int], num_chips: int, num_layers: int) -> None:
    if len(counts) > num_chips or sum(counts) > num_layers:
        raise PlanError(
            f"stages_per_rank must fit the fleet's {num_chips} chips and the model's {num_layers} layers",
            value=list(counts),
            valid=f"at most {num_chips} numbers, together at most {num_layers}",
            fix="name fewer",
        )


def _num_ranks(num_stages: int | None, per_rank: int, *, num_chips: int, num_layers: int) -> int:
    most = min(num_chips, num_layers // per_rank)
    valid = f"{per_rank} to {most * per_rank}" + (f", a multiple of {per_rank}" if per_rank > 1 else "")
    if num_stages is None and num_chips > most:
        raise PlanError(
            f"{num_chips} chips but only {num_layers} layers: a chip would stay without one"
            if per_rank == 1
            else f"{num_chips} chips of {per_rank} stages but only {num_layers} layers",
            value=num_chips,
            valid=f"num_stages {valid}",
            fix=f"set num_stages to {most * per_rank} or fewer, or name fewer chips",
        )
    wanted = num_chips * per_rank if num_stages is None else num_stages
    if not per_rank <= wanted <= most * per_rank or wanted % per_rank:
        raise PlanError(
            f"num_stages must fit the fleet's {num_chips} chips and the model's {num_layers} layers",
            value=wanted,
            valid=valid,
            fix="change num_stages",
        )
    return wanted // per_rank
