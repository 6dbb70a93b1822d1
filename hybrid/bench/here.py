"""Predicted against measured on this machine: CPU pipelines of 1, 2 and 4 ranks, eight emulated ranks, every schedule.

CPU pipelines: each kind of layer is measured alone in as many processes as there are ranks, all at once, in core
seconds, whole backwards and split ones; the step is simulated from these with the ranks sharing the machine's cores,
then run. Emulated ranks: the simulated step at the paces that they keep, then run. No constant is fitted to the runs.
Imports no torch; the processes that compute do.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from hybrid.bench.here_workloads import chip_workloads, cpu_workloads, with_order
from hybrid.bench.judge import step_s
from hybrid.bench.messages import KeepPace, Load, Make, Meet, RunStep, TellAddress
from hybrid.bench.pipeline import MEDIUM
from hybrid.bench.processes import Maker, Team
from hybrid.bench.result import Row
from hybrid.bench.workload import EVEN, UNEVEN, Pace, Workload
from hybrid.scheduler.actions import Action, Kind
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.step.cores import simulate_on_cores

NUM_RANKS_CPU = (1, 2, 4)
NUM_CHIPS = 8
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
    rounds = 3 if quick else 7
    busy = os.getloadavg()[0] / _num_cores()
    rows = [row for num_ranks in NUM_RANKS_CPU for row in cpu_rows(num_ranks, rounds)]
    rows += emulated_rows(max(2, rounds // 2))
    errors = [abs(float(str(row["error"]))) for row in rows]
    note = "busy: others had work" if busy > _LOAD_LIMIT else "quiet"
    rows = [{**row, "load_a_core_before": round(busy, 2), "machine": note} for row in rows]
    return rows, {"here_mae": sum(errors) / len(errors), "here_max": max(errors)}


def predict_on_cpu(workload: Workload, seconds: Sequence[Mapping[str, float]], paces: Sequence[float]) -> float:
    """Return the simulated step of a workload whose ranks share this machine's cores.

    Args:
        workload: model, cuts, microbatches, schedule.
        seconds: by stage, core seconds of each kind of action for one microbatch.
        paces: share of a core that each rank gets while 1, 2, … ranks compute.
    """

    def seconds_of(action: Action) -> float:
        return seconds[action.stage][action.kind.value]

    return simulate_on_cores(workload.build_schedule(), seconds_of=seconds_of, paces=paces).step_s


def stage_seconds(workload: Workload, by_kind: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, float]]:
    """Return each stage's seconds of each action from its own rank's layers.

    Args:
        by_kind: by rank, seconds of each action of each kind of layer.
    """
    last = workload.model.num_layers - 1
    found = []
    for stage, rank in enumerate(workload.layout):
        kinds = ["embedding" if i == 0 else "head" if i == last else "block" for i in workload.layers(stage)]
        layers = [by_kind[rank][kind] for kind in kinds]
        found.append({action: sum(layer[action] for layer in layers) for action in layers[0]})
    return found


def cpu_rows(num_ranks: int, rounds: int) -> Iterator[Row]:
    """Yield a row for every schedule of real CPU pipelines."""
    names = [f"rank_{rank}" for rank in range(num_ranks)]
    profilers = [f"layers_{rank}" for rank in range(num_ranks)]
    makers = _ranks(names, None)
    makers.update((name, Make(target="hybrid.bench.layer_arm:LayerArm")) for name in profilers)
    with _team(makers, names) as team:
        step = 0
        for workload in cpu_workloads(num_ranks):
            one = workload
            if one.schedule == "auto":
                one = with_order(one, _measured(team, profilers, replace(one, schedule="zb-h1")))
            team.ask_all(names, Load(workload=one))
            team.ask_all(names, RunStep(step=(step := step + 1)))
            predicted, measured, cores_s, layers_s = [], [], [], []
            for _ in range(rounds):
                # Side by side in time, so that what slows the machine for seconds slows both.
                seconds = _measured(team, profilers, one)
                predicted.append(predict_on_cpu(one, seconds, _paces(team, profilers)))
                ran = team.ask_all(names, RunStep(step=(step := step + 1)))
                measured.append(step_s(ran))
                cores_s.append(sum(rank.cpu_s for rank in ran))
                layers_s.append(
                    sum(seconds[a.stage][a.kind.value] for r in one.build_schedule().actions_of_rank for a in r)
                )
            row = _row(f"cpu, {num_ranks} ranks", one.schedule, predicted, measured, "measured layers")
            yield {**row, "predicted_core_s": median(layers_s), "measured_core_s": median(cores_s)}


def _measured(team: Team, profilers: Sequence[str], workload: Workload) -> list[dict[str, float]]:
    """Return each stage's seconds, from layers measured now in as many processes as there are ranks."""
    # A forward whose backward may come in parts is another one: its products are caught.
    splits = any(action.kind is Kind.I for row in workload.build_schedule().actions_of_rank for action in row)
    by_kind = [
        {
            layer.kind: {
                "F": layer.split_forward_s if splits else layer.forward_s,
                "B": layer.backward_s,
                "I": layer.input_gradient_s,
                "W": layer.weight_gradient_s,
            }
            for layer in layers
        }
        for layers in team.ask_all(profilers, workload)
    ]
    return stage_seconds(workload, by_kind)


def _paces(team: Team, names: Sequence[str]) -> list[float]:
    """Return the share of a core that each of 1, 2, … processes gets now, whatever else the machine does."""
    shares = [team.ask_all(names[:count], _SPIN_S) for count in range(1, len(names) + 1)]
    return [sum(row) / len(row) for row in shares]


def emulated_rows(rounds: int) -> Iterator[Row]:
    """Yield a row for every schedule and pace of eight emulated ranks."""
    names = [f"chip_{rank}" for rank in range(NUM_CHIPS)]
    with _team(_ranks(names, _CHIPS), names) as team:
        step = 0
        for name, given in _PACES.items():
            for one, pace in chip_workloads(given):
                team.ask_all(names, Load(workload=one))
                team.ask_all(names, KeepPace(pace=pace))
                wanted_s = simulate(one.build_schedule(), seconds_of=pace.seconds_of).step_s
                measured = []
                for turn in range(rounds + 1):
                    seconds = step_s(team.ask_all(names, RunStep(step=(step := step + 1))))
                    if turn:  # the first one warms up
                        measured.append(seconds)
                yield _row(f"emulated, {NUM_CHIPS} ranks, {name}", one.schedule, [wanted_s], measured, "given paces")


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
