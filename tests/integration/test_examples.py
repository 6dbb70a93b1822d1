"""The examples, run as their reader would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

CLUSTER = """
import ray, sys
info = ray.init(address="local", num_cpus=4, resources={"emulated_trn2": 2, "emulated_h100": 2},
                include_dashboard=True, dashboard_port=0, log_to_driver=False)
print("http://" + info.dashboard_url, flush=True)
sys.stdin.read()
ray.shutdown()
"""


def _run(*words: str, timeout_s: float = 300.0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})}
    return subprocess.run(words, cwd=ROOT, env=full, capture_output=True, text=True, timeout=timeout_s)


def test_resume_on_another_split(tmp_path: Path) -> None:
    done = _run("examples/resume_on_another_split.sh", "--set", f"runs_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "10 losses, the same bits on both splits" in done.stdout


def test_the_mixed_fleet_example_trains(tmp_path: Path) -> None:
    done = _run(
        str(BIN / "hybrid"),
        "train",
        "examples/mixed_fleet.yaml",
        *("--set", "steps=3"),
        *("--set", "evaluate.every_steps=null"),
        *("--set", f"runs_dir={tmp_path}"),
    )
    assert done.returncode == 0, done.stderr
    assert "unigram entropy" in done.stdout


def test_a_job_submitted_to_a_cluster_returns_its_log_and_its_exit_status(tmp_path: Path) -> None:
    # Ray's clients and servers must agree on a token; this one is the test's own.
    (tmp_path / "token").write_text("a" * 64)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **token},
    )
    try:
        assert cluster.stdout is not None
        address = next(line.strip() for line in cluster.stdout if line.startswith("http://"))
        done = _run("examples/submit.sh", address, "--set", f"runs_dir={tmp_path}", env=token)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "step 20/20" in done.stdout
        # The second job is refused on the cluster: it asks for a chip that no node has.
        wrong = _run(
            "examples/submit.sh", address, "--set", "fleet.islands=[{name: a, device: b200, count: 2}]", env=token
        )
        locked_out = _run("examples/submit.sh", address, env={"RAY_AUTH_MODE": "disabled"})
        assert locked_out.returncode == 2
        assert "RAY_AUTH_TOKEN_PATH" in locked_out.stderr
        assert wrong.returncode == 2, wrong.stdout + wrong.stderr
        assert "emulated_b200" in wrong.stdout
    finally:
        cluster.communicate(timeout=60.0)
