"""From the pipeline benchmark's raw times to rows, medians and ratios. Pure: no clock, no process, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from hybrid.bench.messages import Alone, Ran
from hybrid.bench.result import Result, Row, Value
from hybrid.bench.workload import Pace, Workload
from hybrid.errors import ScheduleError
from hybrid.scheduler.schedules import one_f_one_b
from hybrid.scheduler.simulate import simulate

_SAME = 1e-6
"""Relative difference up to which two arms' losses are the same; `same_bits` says whether there is any."""

GOALS: Mapping[str, float] = {
    "compute_heavy_vs_torch": 1.00,
    "comm_heavy_vs_torch": 1.00,
    "compute_heavy_vs_ideal": 1.03,
    "emulated_even_vs_ideal": 1.03,
    "emulated_uneven_vs_ideal": 1.03,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One step of every arm, and each stage alone."""

    number: int
    """0 warms up and counts for nothing but the bits."""
    ran_of_arm: Mapping[str, Sequence[Ran]]
    alone_of_stage: Sequence[Alone]

    @property
    def pace(self) -> Pace:
        """What the stages took alone."""
        return Pace(
            forward_s=tuple(stage.forward_s for stage in self.alone_of_stage),
            backward_s=tuple(stage.backward_s for stage in self.alone_of_stage),
        )


def side_by_side(workload: Workload, rounds: Sequence[Round], how_of_arm: Mapping[str, str]) -> Result:
    """Return a workload's rows and ratios.

    Raises:
        ScheduleError: the arms computed different losses or gradients.
    """
    # Every round is checked, also after one whose bits differ.
    same_bits = False not in [_check_same(workload, each) for each in rounds]
    counted = rounds[1:]
    seconds = {arm: [step_s(each.ran_of_arm[arm]) for each in counted] for arm in rounds[0].ran_of_arm}
    seconds["ideal"] = [ideal_s(workload, each.pace) for each in counted]
    rows: list[Row] = [row for each in rounds for row in _rows_of_round(workload, each)]
    shown = []
    for arm, mine in seconds.items():
        facts = {
            "step_s": median(mine),
            "vs_one_process": _ratio(mine, seconds["one_process"]),
            "vs_torch": _ratio(mine, seconds["torch"]),
            "vs_ideal": _ratio(mine, seconds["ideal"]),
        }
        row = _median_row(workload.name, arm, facts, len(mine), how_of_arm[arm])
        rows.append(row | {"same_bits": same_bits})
        shown.append(_line(workload.name, arm, facts, len(mine)))
    ratios = {f"{workload.name}_vs_{other}": _ratio(seconds["ours"], seconds[other]) for other in ("torch", "ideal")}
    summary = {name: ratio for name, ratio in ratios.items() if name in GOALS}
    return Result(rows=rows, summary=summary, shown=shown)


def emulated(name: str, workload: Workload, pace: Pace, steps: Sequence[Sequence[Ran]], how: str) -> Result:
    """Return the rows and the ratio of emulated steps at one pace."""
    ideal = ideal_s(workload, pace)
    seconds = [step_s(ran) for ran in steps]
    rows: list[Row] = [
        _row(name, "ours", number, seconds[number - 1]) | _cost(ran) | {"overrun_s": max(r.overrun_s for r in ran)}
        for number, ran in enumerate(steps, start=1)
    ]
    ratio = median(seconds) / ideal
    facts = {"step_s": median(seconds), "vs_ideal": ratio}
    rows.append(_median_row(name, "ours", facts, len(seconds), how))
    ideal_row = _median_row(name, "ideal", {"step_s": ideal}, 0, "the same seconds, simulated")
    rows.append(ideal_row | asdict(pace))
    shown = [_line(name, "ours", facts, len(seconds)), _line(name, "ideal", {"step_s": ideal}, 0)]
    return Result(rows=rows, summary={f"{name}_vs_ideal": ratio}, shown=shown)


def join(parts: Sequence[Result]) -> Result:
    """Return the parts as one result."""
    return Result(
        rows=[row for part in parts for row in part.rows],
        summary={name: value for part in parts for name, value in part.summary.items()},
        shown=[line for part in parts for line in part.shown],
        goals=GOALS,
    )


def step_s(ran: Sequence[Ran]) -> float:
    """Return the seconds from the first stage's start to the last rank's end; ranks in order."""
    return max(rank.end_s for rank in ran) - ran[0].start_s


def ideal_s(workload: Workload, pace: Pace) -> float:
    """Return the simulated seconds of a 1F1B step without communication."""
    schedule = one_f_one_b(workload.num_stages, workload.num_microbatches)
    return simulate(schedule, seconds_of=pace.seconds_of).step_s


def _ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within a round.

    The arms of a round run within a second or two: what slows the machine for longer falls out.
    """
    return median(one / other for one, other in zip(mine, others, strict=True))


def _check_same(workload: Workload, each: Round) -> bool:
    """Return whether all arms of a round computed the same bits.

    Raises:
        ScheduleError: not even the same numbers.
    """
    numbers_of_arm = {arm: _numbers(ran) for arm, ran in each.ran_of_arm.items()}
    wanted = numbers_of_arm["one_process"]
    for arm, found in numbers_of_arm.items():
        if len(found) != len(wanted) or not all(map(_is_close, found, wanted)):
            raise ScheduleError(
                f"{workload.name}, round {each.number}: {arm} computed another loss or gradient than one process",
                value=found,
                valid=str(wanted),
            )
    return all(found == wanted for found in numbers_of_arm.values())


def _numbers(ran: Sequence[Ran]) -> list[float]:
    """Return the loss, then each layer's squared gradients where they were asked for, in layer order."""
    squares = {layer: square for rank in ran for layer, square in rank.square_of_layer.items()}
    return [rank.loss for rank in ran if rank.loss is not None] + [squares[layer] for layer in sorted(squares)]


def _is_close(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=_SAME)


def _rows_of_round(workload: Workload, each: Round) -> list[Row]:
    number = each.number or "warm-up"
    rows: list[Row] = [
        _row(workload.name, arm, number, step_s(ran)) | _cost(ran) | {"loss": _numbers(ran)[0]}
        for arm, ran in each.ran_of_arm.items()
    ]
    rows.append(
        _row(workload.name, "ideal", number, ideal_s(workload, each.pace))
        | _cost(each.alone_of_stage)
        | asdict(each.pace)
    )
    return rows


def _row(part: str, arm: str, number: int | str, seconds: float) -> dict[str, Value]:
    return {"part": part, "arm": arm, "round": number, "step_s": seconds}


def _cost(ran: Sequence[Ran | Alone]) -> dict[str, Value]:
    return {"cpu_s": sum(rank.cpu_s for rank in ran)}


def _median_row(part: str, arm: str, facts: Mapping[str, float], num_rounds: int, how: str) -> dict[str, Value]:
    return {"part": part, "arm": arm, "round": "median", "num_rounds": num_rounds, **facts, "how": how}


def _line(part: str, arm: str, facts: Mapping[str, float], num_rounds: int) -> dict[str, str]:
    """Return a line of the table for people."""
    line = {"part": part, "arm": arm, "median step": f"{facts['step_s'] * 1e3:.1f} ms"}
    for other in ("one_process", "torch", "ideal"):
        ratio = facts.get(f"vs_{other}")
        line[f"÷ {other.replace('_', ' ')}"] = "" if ratio is None else f"{ratio:.3f}"
    line["rounds"] = str(num_rounds or "")
    return line
