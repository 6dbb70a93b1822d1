"""Jobs and plans of several replicas for the tests: small, real, on threads of this process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import FleetConfig, JobConfig, parse_job
from hybrid.hardware.fleet import Fleet
from hybrid.observe.events import Event
from hybrid.runtime.local import ThreadPlacement
from hybrid.runtime.trainer import Summary, train, train_in_one_process
from hybrid.scheduler.plan import Plan, ReplicaPlan


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A replica as a test wants it: layers of each stage, and its share of the batch."""

    layers: tuple[int, ...]
    num_microbatches: int
    microbatch: int
    speed: float = 1.0
    island: int = 0
    """Which of the job's islands it is on, all of it."""


def job_of(tmp_path: Path, **changes: Any) -> JobConfig:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("\n".join(f"line {i} of {i * i % 97} and {i**3 % 89} apples" for i in range(4000)))
    raw: dict[str, Any] = {
        "name": "replicas",
        "model": {
            "num_blocks": 3,
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 96,
            "vocab_size": 320,
            "sequence_length": 16,
        },
        "data": {"source": "text", "path": str(tmp_path), "held_out_share": 0.1},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
        "batch": {"global_batch": 16, "microbatch": 2},
        "steps": 8,
        "fleet": {"islands": [{"name": "host", "device": "cpu", "count": 8}]},
        "evaluate": {"num_microbatches": 2},
        "checkpoint": {"at_end": True},
        "runtime": {"placement": "threads", "transport": "inproc", "timeout_s": 30.0},
        "runs_dir": str(tmp_path / "runs"),
    }
    for key, value in changes.items():
        where = raw
        *parents, last = key.split("__")
        for parent in parents:
            where = where.setdefault(parent, {})
        where[last] = value
    return parse_job(raw)


def plan_replicas(job: JobConfig, cuts: Sequence[Cut], *, codec: str = "none") -> tuple[Fleet, Plan]:
    """Return the fleet and a plan with these replicas, over ranks 0, 1, 2, …"""
    _, fleet = fleet_of(job, None)
    replicas: list[ReplicaPlan] = []
    for number, cut in enumerate(cuts):
        config = FleetConfig(islands=(job.fleet.islands[cut.island],))
        on_island = job.model_copy(update={"num_stages": len(cut.layers), "fleet": config})
        one = plan_of(on_island, fleet_of(on_island, None)[1]).replica
        first_rank = sum(len(replica.stages) for replica in replicas)
        ends = [sum(cut.layers[: index + 1]) for index in range(len(cut.layers))]
        stages = tuple(
            replace(
                stage,
                ranks=(first_rank + stage.stage,),
                first_layer=end - count,
                end_layer=end,
                forward_s=stage.forward_s / cut.speed,
                backward_s=stage.backward_s / cut.speed,
                weight_gradient_s=0.0,
            )
            for stage, end, count in zip(one.stages, ends, cut.layers, strict=True)
        )
        replicas.append(
            replace(
                one,
                replica=number,
                num_microbatches=cut.num_microbatches,
                microbatch=cut.microbatch,
                first_sample=sum(replica.num_samples for replica in replicas),
                stages=stages,
            )
        )
    whole = plan_of(job.model_copy(update={"num_stages": 1}), fleet)
    plan = replace(whole, replicas=tuple(replicas), gradient_codec=codec, global_batch=job.batch.global_batch)
    return fleet, Plan.from_yaml(plan.to_yaml())


def run_replicas(job: JobConfig, fleet: Fleet, plan: Plan, resume: Path | None = None) -> tuple[Summary, list[Event]]:
    events: list[Event] = []
    placement = ThreadPlacement(threads_per_rank=1)
    return train(job, fleet, plan, placement, resume=resume, sink=events.append, started_s=0.0), events


def run_reference(job: JobConfig, plan: Plan | None) -> tuple[Summary, list[Event]]:
    events: list[Event] = []
    return train_in_one_process(job, resume=None, sink=events.append, started_s=0.0, plan=plan), events
