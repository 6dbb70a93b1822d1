"""`hybrid bench pipeline`: the JSON contract, the figures made from times, and the processes that take them."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hybrid.bench import judge, pipeline
from hybrid.bench.judge import Round
from hybrid.bench.messages import Alone, Make, Ran
from hybrid.bench.processes import Team
from hybrid.bench.result import Result
from hybrid.bench.workload import COMPUTE_HEAVY, Pace, Workload
from hybrid.commands import bench
from hybrid.config import ModelConfig
from hybrid.errors import ConfigError, ScheduleError, WorkerFailed

SUMMARY = {
    "compute_heavy_vs_torch",
    "comm_heavy_vs_torch",
    "compute_heavy_vs_ideal",
    "emulated_even_vs_ideal",
    "emulated_uneven_vs_ideal",
}
ARMS = {"one_process", "torch", "ours", "ideal"}

NOISY_BENCH = """
import os, subprocess, sys
from hybrid.bench.result import Result

def measure(*, quick):
    print("a library")
    os.write(1, b"a C library")
    subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
    line = {"arm": "ours", "step": "500 ms"}
    return Result(rows=[{"step_s": 0.5}], summary={"quick": float(quick)}, shown=[line], goals={"quick": 0.9})
"""


# The contract of every `hybrid bench … --json` ------------------------------------------------------------


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "noisy_bench.py").write_text(NOISY_BENCH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench, "BENCHES", {"noisy": ("noisy_bench:measure", "prints what it should not")})
    return "noisy"


def test_json_is_one_object_of_four_keys_and_nothing_else_is_on_standard_output(
    noisy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.run_bench(noisy, as_json=True, quick=True)
    output, errors = capfd.readouterr()
    told = json.loads(output)
    assert set(told) == {"machine", "date", "rows", "summary"}
    assert told["rows"] == [{"step_s": 0.5}]
    assert told["summary"] == {"quick": 1.0}
    assert told["machine"]["num_cores"] >= 1
    assert all(voice in errors for voice in ("a library", "a C library", "a child"))


def test_people_get_a_table_and_a_verdict(noisy: str, capfd: pytest.CaptureFixture[str]) -> None:
    bench.run_bench(noisy, as_json=False, quick=True)
    output, _ = capfd.readouterr()
    assert "500 ms" in output
    assert "goal ≤ 0.90: MISSED" in output


def test_a_bench_that_does_not_exist_is_refused_with_the_ones_that_do(noisy: str) -> None:
    with pytest.raises(ConfigError, match="noisy"):
        bench.run_bench("pipelin", as_json=True, quick=True)


def test_a_summary_that_is_no_number_is_refused() -> None:
    with pytest.raises(AssertionError):
        Result(rows=[], summary={"ratio": math.nan})


# From times to figures ------------------------------------------------------------------------------------


def ran(seconds: float, *, loss: float | None = None, start_s: float = 10.0) -> Ran:
    return Ran(start_s=start_s, end_s=start_s + seconds, cpu_s=0.0, loss=loss, square_of_layer={}, overrun_s=0.0)


def round_of(number: int, *, torch_s: float, ours_s: float, our_loss: float = 2.0) -> Round:
    return Round(
        number=number,
        ran_of_arm={
            "one_process": [ran(2.0, loss=2.0)],
            "torch": [ran(0.5), ran(torch_s, loss=2.0)],
            "ours": [ran(ours_s), ran(0.5, loss=our_loss)],
        },
        alone_of_stage=[Alone(forward_s=0.01, backward_s=0.02, cpu_s=0.0)] * 2,
    )


HOW = dict.fromkeys(ARMS, "by hand")


def test_a_ratio_is_the_median_of_the_rounds_ratios_without_the_warm_up() -> None:
    rounds = [
        round_of(0, torch_s=1.0, ours_s=50.0),
        round_of(1, torch_s=1.0, ours_s=0.9),
        round_of(2, torch_s=10.0, ours_s=8.0),
        round_of(3, torch_s=1.0, ours_s=1.5),
    ]
    result = judge.side_by_side(COMPUTE_HEAVY, rounds, HOW)
    # 1F1B of two stages on paper: (microbatches + 1) forwards and backwards, one after the other.
    ideal_s = (COMPUTE_HEAVY.num_microbatches + 1) * 0.03
    assert result.summary["compute_heavy_vs_torch"] == pytest.approx(0.9)
    assert result.summary["compute_heavy_vs_ideal"] == pytest.approx(1.5 / ideal_s)


def test_a_step_ends_when_the_last_rank_ends() -> None:
    assert judge.step_s([ran(1.0, start_s=5.0), ran(3.0, start_s=4.5)]) == pytest.approx(2.5)


def test_an_arm_that_computes_another_loss_is_refused() -> None:
    rounds = [round_of(0, torch_s=1.0, ours_s=1.0), round_of(1, torch_s=1.0, ours_s=1.0, our_loss=2.1)]
    with pytest.raises(ScheduleError, match=r"round 1: ours computed another loss"):
        judge.side_by_side(COMPUTE_HEAVY, rounds, HOW)


def test_rounds_stop_in_time_but_the_least_number_is_run() -> None:
    assert list(pipeline.rounds_until(time.monotonic() - 1.0, least=3)) == [0, 1, 2]


# The real thing, small --------------------------------------------------------------------------------------


def small(name: str, *, num_stages: int, num_microbatches: int) -> Workload:
    blocks = max(2, num_stages - 2)
    model = ModelConfig(
        num_blocks=blocks,
        hidden_size=16,
        num_heads=1,
        num_kv_heads=1,
        intermediate_size=32,
        vocab_size=300,
        sequence_length=16,
        tied_embeddings=False,
    )
    first = tuple(stage * model.num_layers // num_stages for stage in range(num_stages))
    return Workload(name=name, model=model, microbatch=1, num_microbatches=num_microbatches, first_layer_of_stage=first)


def test_all_arms_run_side_by_side_with_the_same_bits_and_leave_no_process() -> None:
    settings = pipeline.Settings(
        workloads=tuple(small(name, num_stages=2, num_microbatches=4) for name in ("compute_heavy", "comm_heavy")),
        tiny=small("tiny", num_stages=4, num_microbatches=4),
        pace_of_part={
            "emulated_even": Pace(forward_s=(0.01,) * 4, backward_s=(0.02,) * 4),
            "emulated_uneven": Pace(forward_s=(0.01, 0.02, 0.005, 0.01), backward_s=(0.02, 0.03, 0.01, 0.02)),
        },
        least_rounds=2,
        total_s=0.0,
    )
    result = pipeline.measure(settings)
    assert set(result.summary) == SUMMARY
    medians = {(row["part"], row["arm"]): row for row in result.rows if row["round"] == "median"}
    for part in ("compute_heavy", "comm_heavy"):
        assert {arm for of, arm in medians if of == part} == ARMS
        assert all(medians[part, arm]["same_bits"] for arm in ARMS)
        measured = [row for row in result.rows if row["part"] == part and row["round"] != "median"]
        assert len(measured) == len(ARMS) * 3  # a warm-up and two rounds
    # No clock of an emulated chip runs fast: a step takes no less than on paper.
    assert result.summary["emulated_even_vs_ideal"] > 0.99
    assert result.summary["emulated_uneven_vs_ideal"] > 0.99
    assert all(row["how"] for row in medians.values())
    left = [child for child in psutil.Process().children() if is_running(child.pid)]
    assert not [child for child in left if "hybrid.bench.nursery" in child.cmdline()]


# The processes ------------------------------------------------------------------------------------------------


MEMBERS = """
import os, time

class Works:
    def __call__(self, message):
        match message:
            case "raise":
                raise ValueError("this member does not like it")
            case "leave":
                os._exit(3)
            case float():
                time.sleep(message)
        return os.getpid()
"""
WORKS = Make(target="members:Works")

OWNER = """
import time
from hybrid.bench.messages import Make
from hybrid.bench.processes import Team

if __name__ == "__main__":
    team = Team({"a": Make(target="members:Works"), "b": Make(target="members:Works")}, timeout_s=20.0)
    print(*team.ask_all(("a", "b"), "hello"), team.nursery_pid, flush=True)
    team.ask({"a": 30.0})
"""


@pytest.fixture
def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "members.py").write_text(MEMBERS)
    paths = [str(tmp_path), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


@pytest.mark.usefixtures("members")
def test_a_team_works_in_other_processes_and_ends_them() -> None:
    with Team({"a": WORKS, "b": WORKS}, timeout_s=20.0) as team:
        pids = team.ask_all(("a", "b"), "hello")
        assert len({os.getpid(), *pids}) == 3
        assert team.ask_all(("b",), "hello") == pids[1:]
    assert_gone(pids)


@pytest.mark.usefixtures("members")
def test_a_member_that_raises_is_told_with_its_traceback() -> None:
    with Team({"a": WORKS}, timeout_s=20.0) as team:
        with pytest.raises(WorkerFailed, match="does not like it"):
            team.ask({"a": "raise"})
        assert team.ask({"a": "hello"})


@pytest.mark.usefixtures("members")
def test_a_member_that_ends_or_is_silent_is_told_in_time() -> None:
    with Team({"a": WORKS, "b": WORKS}, timeout_s=20.0) as team:
        pids = team.ask_all(("a", "b"), "hello")
        with pytest.raises(WorkerFailed, match="a has ended"):
            team.ask({"a": "leave"})
        team.timeout_s = 0.2
        with pytest.raises(WorkerFailed, match=r"b was silent for 0\.2 s"):
            team.ask({"b": 30.0})
        team.leave_s = 0.2
    assert_gone(pids)


def test_members_die_with_an_owner_that_is_killed(members: Path) -> None:
    (members / "owner.py").write_text(OWNER)
    owner = subprocess.Popen([sys.executable, str(members / "owner.py")], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(psutil.pid_exists, pids))
    finally:
        owner.kill()
        owner.communicate(timeout=10)
    assert_gone(pids)


def assert_gone(pids: list[int]) -> None:
    deadline_s = time.monotonic() + 5.0
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline_s, f"{alive} still run"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_quick_run_of_the_command_ends_within_its_fifty_seconds() -> None:
    """On a machine that does nothing else; a busy one may take longer."""
    started_s = time.monotonic()
    words = [sys.executable, "-m", "hybrid.cli", "bench", "pipeline", "--json", "--quick"]
    output = subprocess.run(words, check=True, capture_output=True, text=True, timeout=110).stdout
    assert set(json.loads(output)["summary"]) == SUMMARY
    assert time.monotonic() - started_s < 50.0
