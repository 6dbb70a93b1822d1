"""Predicted against measured on this machine: CPU pipelines of 1, 2 and 4 stages, and eight emulated ranks.

CPU pipelines: each kind of layer is measured alone in as many processes as there are stages, all at once, in core
seconds; the step is simulated from these with the ranks sharing the machine's cores, then run. Emulated ranks: the
simulated step at the paces that they keep, then run. Imports no torch; the processes that compute do.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from hybrid.bench.judge import step_s
from hybrid.bench.messages import KeepPace, Load, Make, Meet, RunStep, TellAddress
from hybrid.bench.pipeline import MEDIUM
from hybrid.bench.processes import Maker, Team
from hybrid.bench.result import Row
from hybrid.bench.workload import COMPUTE_HEAVY, EVEN, TINY, UNEVEN, Pace, Workload
from hybrid.scheduler.actions import Action, Kind
from hybrid.scheduler.schedules import build_schedule
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.step.cores import simulate_on_cores

SCHEDULES_RUN = ("gpipe", "1f1b")
"""What the worker runs."""
CPU_WORKLOADS = tuple(
    replace(COMPUTE_HEAVY, name=f"cpu_{len(cuts)}", first_layer_of_stage=cuts) for cuts in ((0,), (0, 3), (0, 2, 3, 4))
)
_PACES: Mapping[str, Pace] = {"even": EVEN, "uneven": UNEVEN}
_CHIPS = ("trn2", "h100")
_REPLY_S = 90.0
_SPIN_S = 0.1
_LOAD_LIMIT = 0.25
"""Tasks a core that may run beside us before the figures are marked as taken on a busy machine."""


def measure_here(*, quick: bool) -> tuple[list[Row], dict[str, float]]:
    """Return a row for each pipeline and schedule, and the mean and the largest relative error.

    Raises:
        WorkerFailed: a process failed or was silent.
    """
    rounds = 3 if quick else 9
    busy = os.getloadavg()[0] / _num_cores()
    rows: list[Row] = [*_cpu_rows(rounds), *_emulated_rows(max(2, rounds // 2))]
    errors = [abs(float(str(row["error"]))) for row in rows]
    note = "busy: others had work" if busy > _LOAD_LIMIT else "quiet"
    rows = [{**row, "load_a_core_before": round(busy, 2), "machine": note} for row in rows]
    return rows, {"here_mae": sum(errors) / len(errors), "here_max": max(errors)}


def predict_on_cpu(workload: Workload, seconds: Sequence[Mapping[str, float]], paces: Sequence[float]) -> float:
    """Return the simulated step of a workload whose ranks share this machine's cores.

    Args:
        workload: model, cuts, microbatches, schedule.
        seconds: by stage, core seconds of a forward (`F`) and a backward (`B`) of one microbatch.
        paces: share of a core that each rank gets while 1, 2, … ranks compute.
    """
    schedule = build_schedule(workload.schedule, workload.num_stages, workload.num_microbatches)

    def seconds_of(action: Action) -> float:
        return seconds[action.stage]["F" if action.kind is Kind.F else "B"]

    return simulate_on_cores(schedule, seconds_of=seconds_of, paces=paces).step_s


def stage_seconds(workload: Workload, by_kind: Sequence[Mapping[str, tuple[float, float]]]) -> list[dict[str, float]]:
    """Return each stage's seconds from its own process's layers: (forward, backward) by kind."""
    last = workload.model.num_layers - 1
    found = []
    for stage in range(workload.num_stages):
        kinds = ["embedding" if i == 0 else "head" if i == last else "block" for i in workload.layers(stage)]
        layers = [by_kind[stage][kind] for kind in kinds]
        found.append({"F": sum(forward for forward, _ in layers), "B": sum(backward for _, backward in layers)})
    return found


def _cpu_rows(rounds: int) -> Iterator[Row]:
    for workload in CPU_WORKLOADS:
        names = [f"rank_{rank}" for rank in range(workload.num_stages)]
        profilers = [f"layers_{rank}" for rank in range(workload.num_stages)]
        makers = _ranks(names, None)
        makers.update((name, Make(target="hybrid.bench.layer_arm:LayerArm")) for name in profilers)
        with _team(makers, names) as team:
            for schedule in SCHEDULES_RUN if workload.num_stages > 1 else ("1f1b",):
                one = replace(workload, schedule=schedule)
                team.ask_all(names, Load(workload=one))
                team.ask_all(names, RunStep(step=0))
                predicted, measured, cores_s, layers_s = [], [], [], []
                for number in range(rounds):
                    # Side by side in time, so that what slows the machine for seconds slows both.
                    by_kind = [
                        {layer.kind: (layer.forward_s, layer.backward_s) for layer in layers}
                        for layers in team.ask_all(profilers, one)
                    ]
                    seconds = stage_seconds(one, by_kind)
                    predicted.append(predict_on_cpu(one, seconds, _paces(team, profilers)))
                    ran = team.ask_all(names, RunStep(step=1 + number))
                    measured.append(step_s(ran))
                    cores_s.append(sum(rank.cpu_s for rank in ran))
                    layers_s.append(one.num_microbatches * sum(row["F"] + row["B"] for row in seconds))
                row = _row(f"cpu, {workload.num_stages} stages", schedule, predicted, measured, "measured layers")
                yield {**row, "predicted_core_s": median(layers_s), "measured_core_s": median(cores_s)}


def _paces(team: Team, names: Sequence[str]) -> list[float]:
    """Return the share of a core that each of 1, 2, … processes gets now, whatever else the machine does."""
    shares = [team.ask_all(names[:count], _SPIN_S) for count in range(1, len(names) + 1)]
    return [sum(row) / len(row) for row in shares]


def _emulated_rows(rounds: int) -> Iterator[Row]:
    names = [f"chip_{rank}" for rank in range(TINY.num_stages)]
    with _team(_ranks(names, _CHIPS), names) as team:
        step = 0
        for schedule in SCHEDULES_RUN:
            one = replace(TINY, schedule=schedule)
            team.ask_all(names, Load(workload=one))
            for name, pace in _PACES.items():
                wanted_s = simulate(
                    build_schedule(schedule, one.num_stages, one.num_microbatches), seconds_of=pace.seconds_of
                ).step_s
                team.ask_all(names, KeepPace(pace=pace))
                measured = []
                for turn in range(rounds + 1):
                    step += 1
                    seconds = step_s(team.ask_all(names, RunStep(step=step)))
                    if turn:  # the first one warms up
                        measured.append(seconds)
                yield _row(f"emulated, 8 ranks, {name}", schedule, [wanted_s], measured, "given paces")


def _row(part: str, schedule: str, predicted: Sequence[float], measured: Sequence[float], source: str) -> Row:
    predicted_s, measured_s = median(predicted), median(measured)
    return {
        "part": part,
        "schedule": schedule,
        "predicted_s": predicted_s,
        "measured_s": measured_s,
        "error": predicted_s / measured_s - 1.0,
        "source": source,
        "rounds": len(measured),
    }


def _ranks(names: Sequence[str], chips: Sequence[str] | None) -> dict[str, Maker]:
    token = secrets.token_bytes(16)
    made: dict[str, Maker] = {}
    for rank, name in enumerate(names):
        chip = None if chips is None else chips[rank * len(chips) // len(names)]
        arguments: dict[str, Any] = {"rank": rank, "num_ranks": len(names), "medium": MEDIUM, "token": token}
        made[name] = Make(target="hybrid.bench.hybrid_arm:HybridRank", arguments={**arguments, "chip": chip})
    return made


@contextmanager
def _team(makers: Mapping[str, Maker], ranks: Sequence[str]) -> Iterator[Team]:
    with Team(makers, timeout_s=_REPLY_S, preload=("hybrid.bench.hybrid_arm", "hybrid.bench.layer_arm")) as team:
        addresses = team.ask_all(ranks, TellAddress())
        team.ask_all(ranks, Meet(address_of_rank=tuple(addresses)))
        yield team


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
