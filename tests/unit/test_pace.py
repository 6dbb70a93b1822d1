"""The emulation's time scale: the smallest at which this machine keeps up, and none where nothing is paced."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.runtime.pace import time_scale
from hybrid.scheduler.plan import Plan, ReplicaPlan, StagePlan


def _stage(stage: int, forward_s: float, backward_s: float, backend: str = "emulated") -> StagePlan:
    return StagePlan(
        stage=stage,
        ranks=(stage,),
        tensor_parallel=1,
        width=1,
        recompute=False,
        weight_gradient_s=backward_s / 2,
        island="a",
        chip="trn2",
        backend=backend,
        first_layer=stage,
        end_layer=stage + 1,
        forward_s=forward_s,
        backward_s=backward_s,
        memory_bytes=1,
        memory_limit_bytes=2,
    )


def _plan(*stages: StagePlan) -> Plan:
    replica = ReplicaPlan(
        replica=0,
        schedule="1f1b",
        order=(),
        num_microbatches=4,
        microbatch=1,
        first_sample=0,
        step_s=1.0,
        idle_share=0.0,
        stages=stages,
        edges=(),
    )
    return Plan(
        job="j",
        model="m",
        num_layers=len(stages),
        precision="fp32",
        source="test",
        objective="throughput",
        global_batch=4,
        gradient_codec="none",
        step_s=1.0,
        idle_share=0.0,
        replicas=(replica,),
    )


def _scale(plan: Plan, forward_s: list[float], backward_s: list[float], **changes: object) -> float:
    options = {"wanted": "auto", "pace": True, "num_cores": 64} | changes
    seconds = [
        {f"{plan.stages_of_rank(rank)[0].stage}F": f, f"{plan.stages_of_rank(rank)[0].stage}B": b}
        for rank, (f, b) in enumerate(zip(forward_s, backward_s, strict=True))
    ]
    return time_scale(plan, seconds, **options)  # type: ignore[arg-type]


PLAN = _plan(_stage(0, 1e-3, 2e-3), _stage(1, 1e-3, 2e-3))


def test_with_cores_for_all_the_tightest_action_decides():
    # Rank 1's forward takes the CPU 12 ms, and may take 60% of its paced time: 20 ms for 1 ms.
    assert _scale(PLAN, [6e-3, 12e-3], [6e-3, 12e-3]) == 16.0


def test_the_backward_counts_like_the_forward():
    assert _scale(PLAN, [1e-3, 1e-3], [1e-3, 48e-3]) == 32.0


def test_with_few_cores_the_arithmetic_of_all_ranks_decides():
    # 36 ms of arithmetic on one core, of which 70% is ours, beside a slowest stage of 3 ms.
    assert _scale(PLAN, [6e-3, 6e-3], [12e-3, 12e-3], num_cores=1) == pytest.approx(18.0, abs=1.0)
    assert _scale(PLAN, [6e-3, 6e-3], [12e-3, 12e-3], num_cores=2) == 8.6


def test_a_scale_that_the_user_wants_is_taken_as_it_is():
    assert _scale(PLAN, [1.0, 1.0], [1.0, 1.0], wanted=3.25) == 3.25


def test_nothing_is_paced_without_pace_or_without_emulated_chips():
    assert _scale(PLAN, [1.0, 1.0], [1.0, 1.0], pace=False, wanted=5.0) == 0.0
    real = _plan(_stage(0, 1e-3, 1e-3, backend="cpu"), _stage(1, 1e-3, 1e-3, backend="cpu"))
    assert _scale(real, [1.0, 1.0], [1.0, 1.0]) == 0.0


def test_a_real_rank_among_emulated_ones_takes_cores_but_sets_no_pace():
    mixed = _plan(_stage(0, 1e-3, 2e-3, backend="cpu"), _stage(1, 1e-3, 2e-3))
    assert _scale(mixed, [10.0, 6e-3], [10.0, 6e-3], num_cores=10**6) == 8.0


def test_actions_that_a_plan_says_take_no_time_are_not_divided_by():
    assert _scale(_plan(_stage(0, 0.0, 2e-3)), [1.0], [12e-3], num_cores=10**6) == 8.0
    assert _scale(_plan(_stage(0, 0.0, 0.0)), [1.0], [1.0]) == 0.0


SECONDS = st.floats(1e-6, 10.0)


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), min_size=1, max_size=8), st.integers(1, 64))
def test_at_the_scale_every_action_fits_and_a_tenth_less_would_not_do(rows, num_cores):
    plan = _plan(*(_stage(i, forward_s, backward_s) for i, (forward_s, backward_s, _, _) in enumerate(rows)))
    forward_s, backward_s = [row[2] for row in rows], [row[3] for row in rows]
    scale = _scale(plan, forward_s, backward_s, num_cores=num_cores)

    def fits(scale: float) -> bool:
        actions = all(
            cpu_s <= 0.75 * paced_s * scale * (1 + 1e-9)
            for stage in plan.stages
            for cpu_s, paced_s in (
                (forward_s[stage.stage], stage.forward_s),
                (backward_s[stage.stage], stage.backward_s),
            )
        )
        slowest_s = max(stage.forward_s + stage.backward_s for stage in plan.stages)
        return actions and sum(forward_s) + sum(backward_s) <= 0.7 * num_cores * slowest_s * scale * (1 + 1e-9)

    assert fits(scale)
    assert not fits(scale / 1.11)
    assert float(f"{scale:.1e}") == scale


def test_a_rank_is_looked_up_by_its_number():
    swapped = _plan(replace(_stage(0, 1e-3, 1e-3), ranks=(1,)), replace(_stage(1, 10e-3, 10e-3), ranks=(0,)))
    assert _scale(swapped, [6e-3, 6e-3], [6e-3, 6e-3]) == 8.0


def test_a_rank_of_two_stages_does_the_work_of_both():
    plan = _plan(_stage(0, 1e-3, 1e-3), replace(_stage(1, 2e-3, 2e-3), ranks=(0,)))
    seconds = [{"0F": 1e-3, "0B": 1e-3, "1F": 1e-3, "1I": 1e-3, "1W": 3e-3}]
    # The W of stage 1 takes 3 ms and is paced at 1 ms; with one core: 7 ms within 70% of 6 ms.
    assert time_scale(plan, seconds, wanted="auto", pace=True, num_cores=64) == 4.0
    assert time_scale(plan, seconds, wanted="auto", pace=True, num_cores=1) == 4.0
    assert time_scale(plan, [{**seconds[0], "1W": 0.5e-3}], wanted="auto", pace=True, num_cores=1) == 1.4
