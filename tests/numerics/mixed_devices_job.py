"""One job with stages on cpu, a fake neuron core and an emulated chip; prints its losses and the reference's as JSON.

A program of its own: the fake device can be registered once a process. `python mixed_devices_job.py FOLDER PRECISION
threads|processes`.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import parse_job
from hybrid.observe.events import EvalEvent, Event, StepEvent
from hybrid.runtime.checkpoint import complete_checkpoints
from hybrid.runtime.placement import Placement
from hybrid.runtime.trainer import train, train_in_one_process


def main(folder: Path, precision: str, kind: str) -> None:
    (folder / "text.txt").write_text("\n".join(f"line {i} of {i * i % 97} and {i**3 % 89}" for i in range(4000)))
    islands = [
        {"name": "host", "device": "cpu"},
        {"name": "core", "device": "trn2", "backend": "neuron"},
        {"name": "gpu", "device": "h100"},
    ]
    job = parse_job(
        {
            "model": {"num_blocks": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
            | {"intermediate_size": 48, "vocab_size": 320, "sequence_length": 16},
            "data": {"source": "text", "path": str(folder / "text.txt"), "held_out_share": 0.1},
            "batch": {"global_batch": 8, "microbatch": 2},
            "steps": 8,
            "precision": precision,
            "num_stages": 3,
            "fleet": {"islands": islands},
            "emulation": {"pace": False},
            "evaluate": {"num_microbatches": 2},
            "checkpoint": {"every_steps": 4},
            "runtime": {"placement": "threads"} if kind == "threads" else {},
            "runs_dir": str(folder / "runs"),
        }
    )
    job, fleet = fleet_of(job, None)
    plan = plan_of(job, fleet)
    # The planner would give all stages to the fastest devices; here each kind takes one.
    stages = []
    for stage, row in zip(plan.stages, islands, strict=True):
        island = fleet.island(row["name"])
        stages.append(replace(stage, island=island.name, chip=island.chip.name, backend=island.backend))
    plan = replace(plan, replicas=(replace(plan.replica, stages=tuple(stages)),))
    events: list[Event] = []
    wanted: list[Event] = []
    train(job, fleet, plan, _placement(kind), resume=None, sink=events.append, started_s=time.monotonic())
    run = max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    resumed: list[Event] = []
    if kind == "threads":  # a checkpoint of the device goes on in one process on the CPU
        halfway = next(path for path in complete_checkpoints(run) if path.name.endswith("4"))
        train_in_one_process(job, resume=halfway, sink=resumed.append, started_s=time.monotonic())
    train_in_one_process(job, resume=None, sink=wanted.append, started_s=time.monotonic())
    names = {"found": events, "wanted": wanted, "resumed": resumed}
    report = {name: [_row(event) for event in rows if _row(event)] for name, rows in names.items()}
    print(json.dumps({**report, "backends": [stage.backend for stage in plan.stages]}))


def _row(event: Event) -> list[float]:
    if isinstance(event, StepEvent):
        return [event.loss, event.grad_norm]
    return [event.loss] if isinstance(event, EvalEvent) else []


def _placement(kind: str) -> Placement:
    if kind == "processes":
        from hybrid.testing.process_placement import ProcessPlacement

        return ProcessPlacement(fake_neuron=True)
    from hybrid.runtime.local import ThreadPlacement
    from hybrid.testing import fake_neuron

    fake_neuron.install()
    return ThreadPlacement(threads_per_rank=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
