"""A rank that fails in any phase of the replicas' exchange: the job ends with its error, soon, and leaves no thread."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hybrid.errors import WorkerFailed
from hybrid.runtime.bucket_exchange import BucketExchange
from tests.numerics.replica_plans import Cut, job_of, plan_replicas, run_replicas

CUTS = (
    Cut(layers=(2, 2, 1), num_microbatches=5, microbatch=2),
    Cut(layers=(1, 4), num_microbatches=3, microbatch=2),
)


def _group_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("group layers-")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("phase", ["leave", "land", "spread", "arrive", "gather"])
def test_a_rank_that_fails_in_any_phase_ends_the_job_with_its_error(
    phase: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, inner = [0], getattr(BucketExchange, phase)

    def failing(self: BucketExchange, *args: Any) -> Any:
        if threading.current_thread().name == f"rank-{rank}":
            calls[0] += 1
            if calls[0] == 3:
                raise RuntimeError("planted")
        return inner(self, *args)

    monkeypatch.setattr(BucketExchange, phase, failing)
    job = job_of(tmp_path, steps=4, checkpoint__every_steps=1)
    fleet, plan = plan_replicas(job, CUTS)
    started_s = time.monotonic()
    with pytest.raises(WorkerFailed, match=f"rank {rank} failed with RuntimeError: planted"):
        run_replicas(job, fleet, plan)
    assert time.monotonic() - started_s < 20.0
    assert _group_threads() == []


def test_a_job_that_ends_well_leaves_no_thread_of_a_group(tmp_path: Path) -> None:
    job = job_of(tmp_path, steps=1)
    run_replicas(job, *plan_replicas(job, CUTS))
    assert _group_threads() == []
