"""`hybrid bench pipeline`: one process, torch's 1F1B over gloo and ours, side by side; emulated ranks against paper.

The owner of the processes: it tells one arm at a time to run one step, in rotating order, while all others wait
blocked. Imports no torch. How each figure is taken stands in the median rows under `how`.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hybrid.bench import judge
from hybrid.bench.judge import Round
from hybrid.bench.messages import Alone, KeepPace, Load, Make, Meet, Ran, RunAlone, RunStep, TellAddress
from hybrid.bench.processes import Maker, Team
from hybrid.bench.result import Result
from hybrid.bench.workload import COMM_HEAVY, COMPUTE_HEAVY, EVEN, TINY, UNEVEN, Pace, Workload
from hybrid.config import RuntimeConfig

MEDIUM = RuntimeConfig().medium
"""Our arms' transport: what a job gets that names none."""

MEMBERS_OF_ARM = {
    "one_process": ("one_process",),
    "torch": ("torch_0", "torch_1"),
    "ours": ("ours_0", "ours_1"),
}
_CHIPS = ("trn2", "h100")
_PRELOAD = ("hybrid.bench.hybrid_arm", "hybrid.bench.torch_arm")
_REPLY_S = 90.0
_MOST_ROUNDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured, and for how long."""

    workloads: tuple[Workload, ...] = (COMPUTE_HEAVY, COMM_HEAVY)
    tiny: Workload = TINY
    pace_of_part: Mapping[str, Pace] = field(default_factory=lambda: {"emulated_even": EVEN, "emulated_uneven": UNEVEN})
    least_rounds: int = 3
    """These are run on the slowest machine too."""
    total_s: float
    """What the whole aims at, start and all."""

    @property
    def emulated(self) -> tuple[str, ...]:
        """Names of the emulated ranks' processes, in rank order."""
        return tuple(f"emulated_{rank}" for rank in range(self.tiny.num_stages))


QUICK, FULL = Settings(total_s=38.0), Settings(total_s=200.0)
_SHARE_OF_PART = (0.42, 0.45, 0.5, 1.0)
"""Of the time that is left when a part begins."""


def measure_pipeline(*, quick: bool) -> Result:
    """Measure everything; see `docs/benchmarks.md`.

    Raises:
        WorkerFailed: a process failed or was silent.
        ScheduleError: the arms computed different losses or gradients.
    """
    return measure(QUICK if quick else FULL)


def measure(settings: Settings) -> Result:
    """Measure what the settings say; see `measure_pipeline`."""
    end_s = time.monotonic() + settings.total_s
    shares = iter(_SHARE_OF_PART)

    def until_s() -> float:
        now_s = time.monotonic()
        return now_s + next(shares) * max(0.0, end_s - now_s)

    parts = []
    with (
        tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder,
        Team(makers(settings, Path(folder)), timeout_s=_REPLY_S, preload=_PRELOAD) as team,
    ):
        meet(team, MEMBERS_OF_ARM["ours"])
        meet(team, settings.emulated)
        for workload in settings.workloads:
            rounds = run_side_by_side(team, workload, least=settings.least_rounds + 1, until_s=until_s())
            parts.append(judge.side_by_side(workload, rounds, _how_of_arm(workload)))
        warm_up(team, settings)
        for index, (name, pace) in enumerate(settings.pace_of_part.items()):
            first_step = 1 + index * _MOST_ROUNDS
            steps = run_emulated(team, settings, pace, first_step=first_step, until_s=until_s())
            parts.append(judge.emulated(name, settings.tiny, pace, steps, _how_emulated(settings.tiny)))
    return judge.join(parts)


def run_side_by_side(team: Team, workload: Workload, *, least: int, until_s: float) -> list[Round]:
    """Return the rounds of a workload: each arm's step, and each stage alone, in an order that rotates.

    The first round warms up; it alone carries the gradients' squares.
    """
    team.ask_all([name for names in MEMBERS_OF_ARM.values() for name in names], Load(workload=workload))
    order = [*MEMBERS_OF_ARM, "ideal"]
    rounds = []
    for number in rounds_until(until_s, least=least):
        ran: dict[str, list[Ran]] = {}
        alone: list[Alone] = []
        turn = number % len(order)
        for arm in order[turn:] + order[:turn]:
            if arm == "ideal":
                alone = team.ask_all(MEMBERS_OF_ARM["ours"], RunAlone(step=number))
            else:
                ran[arm] = team.ask_all(MEMBERS_OF_ARM[arm], RunStep(step=number, with_squares=number == 0))
        rounds.append(Round(number=number, ran_of_arm=ran, alone_of_stage=alone))
    return rounds


def warm_up(team: Team, settings: Settings) -> None:
    """Load the emulated ranks and run step 0 as fast as they can."""
    team.ask_all(settings.emulated, Load(workload=settings.tiny))
    team.ask_all(settings.emulated, RunStep(step=0))


def run_emulated(team: Team, settings: Settings, pace: Pace, *, first_step: int, until_s: float) -> list[list[Ran]]:
    """Return the steps of the emulated ranks at a pace, each with every rank's report."""
    names = settings.emulated
    team.ask_all(names, KeepPace(pace=pace))
    steps = rounds_until(until_s, least=settings.least_rounds)
    return [team.ask_all(names, RunStep(step=first_step + number)) for number in steps]


def rounds_until(until_s: float, *, least: int) -> Iterator[int]:
    """Yield 0, 1, … while a round more, as long as the last one, would end in time; `least` come in any case."""
    last_s = 0.0
    for number in range(_MOST_ROUNDS):
        started_s = time.monotonic()
        if number >= least and started_s + last_s > until_s:
            return
        yield number
        last_s = time.monotonic() - started_s


def meet(team: Team, names: tuple[str, ...]) -> None:
    """Join our ranks, neighbour to neighbour."""
    addresses = team.ask_all(names, TellAddress())
    team.ask_all(names, Meet(address_of_rank=tuple(addresses)))


def makers(settings: Settings, folder: Path) -> dict[str, Maker]:
    """Return what runs in each process; `folder` holds torch's rendezvous."""
    made: dict[str, Maker] = {"one_process": Make(target="hybrid.bench.arm:OneProcess")}
    names = MEMBERS_OF_ARM["torch"]
    for rank, name in enumerate(names):
        arguments = {"rank": rank, "num_ranks": len(names), "store": str(folder / "gloo")}
        made[name] = Make(target="hybrid.bench.torch_arm:TorchRank", arguments=arguments)
    for names in (MEMBERS_OF_ARM["ours"], settings.emulated):
        token = secrets.token_bytes(16)
        for rank, name in enumerate(names):
            chip = None if names == MEMBERS_OF_ARM["ours"] else _CHIPS[rank * len(_CHIPS) // len(names)]
            arguments = {"rank": rank, "num_ranks": len(names), "medium": MEDIUM, "token": token, "chip": chip}
            made[name] = Make(target="hybrid.bench.hybrid_arm:HybridRank", arguments=arguments)
    return made


def _how_of_arm(workload: Workload) -> Mapping[str, str]:
    """Return how each arm's figure is taken."""
    what = (
        f"{workload.num_microbatches} microbatches in float32, one thread a process, "
        f"{workload.activation_bytes / 2**20:g} MiB over the cut for each, each way"
    )
    timed = "from the first stage's start to the last rank's end; making samples and clearing gradients not timed"
    return {
        "one_process": f"whole model, microbatch by microbatch; {what}; {timed}",
        "torch": f"torch.distributed.pipelining Schedule1F1B over gloo, 2 processes; {what}; {timed}",
        "ours": f"1F1B by Interpreter, StageCompute and {MEDIUM}, 2 processes; {what}; {timed}",
        "ideal": (
            "1F1B simulated without communication from each stage's mean forward and backward seconds; these were "
            "measured once a round in our two processes, both computing at once, the same actions in the same order "
            "on made-up inputs, without pipeline or wire"
        ),
    }


def _how_emulated(workload: Workload) -> str:
    return (
        f"{workload.num_stages} processes, an emulated chip each: an action takes the seconds given, what its own tiny "
        f"compute leaves of them is waited out; 1F1B of {workload.num_microbatches} microbatches over {MEDIUM}; from "
        "the first stage's start to the last rank's end"
    )
