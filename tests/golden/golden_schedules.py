"""Golden texts of the schedules: compute actions, lowered actions, and the time line of unequal stages."""

from hybrid.scheduler.actions import Kind
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.schedules import SCHEDULES, build_schedule
from hybrid.scheduler.simulate import simulate


def texts() -> dict[str, str]:
    found = {}
    for name in SCHEDULES:
        for num_stages, num_microbatches in ((2, 3), (4, 6)):
            schedule = build_schedule(name, num_stages, num_microbatches)
            lowered = lower_communication(schedule)
            timeline = simulate(
                lowered,
                seconds_of=lambda action: (1.0 + 0.5 * (action.stage == 1)) * (1 if action.kind is Kind.F else 2),
                transfer_s=lambda send: 0.25,
            )
            found[f"schedules/{name}_{num_stages}x{num_microbatches}.txt"] = "\n\n".join(
                [str(schedule), str(lowered), timeline.gantt(120), f"step {timeline.step_s:g} s"]
            )
    return found
