"""A simulated step as a trace that Perfetto and Chrome's `about:tracing` open (the Trace Event Format, JSON).

Pure: makes plain data; writing it is the caller's. A pipeline is a process, a rank a thread; messages are arrows and
memory is a counter. Times are microseconds.
"""

from __future__ import annotations

from typing import Any

from hybrid.scheduler.step.result import StepResult

_MICRO = 1e6
_COLOR_OF_WHAT = {
    "forward": "thread_state_running",
    "backward": "rail_response",
    "input gradient": "rail_response",
    "weight gradient": "rail_animation",
    "receive": "thread_state_iowait",
    "send": "thread_state_iowait",
    "reduce": "rail_load",
    "update": "good",
    "idle": "generic_work",
}


def trace_of_step(result: StepResult, *, with_idle: bool = False) -> dict[str, Any]:
    """Return the trace of one simulated step.

    Each kind of pipeline is shown once, its name saying how many there are.

    Args:
        with_idle: also show idle time as an interval.
    """
    events: list[dict[str, Any]] = []
    for index, run in enumerate(result.runs):
        pipeline = run.pipeline
        replicas = f" ({pipeline.count} of these)" if pipeline.count > 1 else ""
        events.append(_name("process_name", index, 0, f"{pipeline.name}{replicas}"))
        for rank in range(pipeline.schedule.num_ranks):
            stages = [s for s, owner in enumerate(pipeline.schedule.rank_of_stage) if owner == rank]
            devices = pipeline.ranks_of_rank[rank]
            label = f"rank {rank}: {', '.join(pipeline.stages[s].name for s in stages)}"
            events.append(_name("thread_name", index, rank, label + (f" × {devices}" if devices > 1 else "")))
            for interval in result.intervals(index, rank):
                if interval.what != "idle" or with_idle:
                    events.append(
                        {
                            "name": interval.label or interval.what,
                            "cat": interval.what,
                            "ph": "X",
                            "pid": index,
                            "tid": rank,
                            "ts": interval.start_s * _MICRO,
                            "dur": interval.seconds * _MICRO,
                            "cname": _COLOR_OF_WHAT[interval.what],
                        }
                    )
            for at_s, held in run.memory(rank):
                name = f"memory of rank {rank}"
                events.append(
                    {"name": name, "ph": "C", "pid": index, "ts": at_s * _MICRO, "args": {"GiB": held / 2**30}}
                )
        for number, transfer in enumerate(run.timeline.transfers):
            arrow = {"name": str(transfer.action), "cat": "message", "id": f"{index}.{number}", "pid": index}
            events.append({**arrow, "ph": "s", "tid": transfer.from_rank, "ts": transfer.start_s * _MICRO})
            events.append({**arrow, "ph": "f", "bp": "e", "tid": transfer.to_rank, "ts": transfer.end_s * _MICRO})
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"source": result.step.source, "step_s": result.step_s, "devices": result.step.num_devices},
    }


def _name(what: str, process: int, thread: int, text: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": text}}
