"""Golden texts of the schedules: compute actions, lowered actions, and the time line of unequal stages."""

from functools import partial

from hybrid.scheduler.actions import Kind
from hybrid.scheduler.interleaved import interleaved
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.schedules import SCHEDULES, build_schedule
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.zero_bubble import zb_v


def texts() -> dict[str, str]:
    found = {}
    builders = {name: partial(build_schedule, name) for name in SCHEDULES}
    builders["zb-v"] = zb_v
    builders["interleaved"] = lambda num_ranks, num_microbatches: interleaved((2,) * num_ranks, num_microbatches)
    builders["interleaved-uneven"] = lambda num_ranks, num_microbatches: interleaved(
        (2,) * (num_ranks - 1) + (1,), num_microbatches
    )
    for name, build in builders.items():
        for num_stages, num_microbatches in ((2, 3), (4, 6)):
            schedule = build(num_stages, num_microbatches)
            lowered = lower_communication(schedule)
            timeline = simulate(
                lowered,
                seconds_of=lambda action: (1.0 + 0.5 * (action.stage == 1)) * (2 if action.kind is Kind.B else 1),
                transfer_s=lambda send: 0.25,
            )
            found[f"schedules/{name}_{num_stages}x{num_microbatches}.txt"] = "\n\n".join(
                [str(schedule), str(lowered), timeline.gantt(120), f"step {timeline.step_s:g} s"]
            )
    return found
