import pytest

from hybrid.errors import FleetError, PlanError
from hybrid.scheduler.plan import EdgePlan, Plan, ReplicaPlan, StagePlan
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import MemoryModel, Pool
from hybrid.scheduler.search.table import Cell, ProfileTable, Sizes
from hybrid.scheduler.step.build import ReplicaSpec, StageSpec, all_reduce_s, build_step, step_of_plan
from hybrid.scheduler.step.engine import simulate_step

LAYERS = 4


def table():
    cells = {}
    for chip, speed in (("fast", 1.0), ("slow", 2.0)):
        for degree in (1, 2):
            for microbatch in (1, 2):
                seconds = tuple(speed * microbatch / degree for _ in range(LAYERS))
                cells[chip, degree, microbatch] = Cell(
                    forward_s=seconds, input_gradient_s=seconds, weight_gradient_s=seconds, update_s=0.5
                )
    sizes = {
        degree: Sizes(
            num_parameters=(1000 // degree,) * LAYERS, saved_bytes=(64,) * LAYERS, output_bytes=(32,) * LAYERS
        )
        for degree in (1, 2)
    }
    return ProfileTable(
        model="m",
        source="measured",
        note="here",
        sequence_length=10,
        precision="fp32",
        layers=tuple("abcd"),
        sizes=sizes,
        cells=cells,
    )


POOLS = tuple(
    Pool(name=name, chip=name, num_chips=8, node_size=1, memory_bytes=100_000, usd_per_hour=3.0, watts=100.0)
    for name in ("fast", "slow")
)
NETWORK = Network(
    links={(a, 1, b, 1): LinkModel(bytes_per_s=1000.0) for a in ("fast", "slow") for b in ("fast", "slow")}
)
MEMORY = MemoryModel(bytes_per_parameter=16, fixed_bytes=7, counts_buffers=False)


def replica(*stages, name="r", microbatch=1, num_microbatches=4, **more):
    return ReplicaSpec(name=name, stages=stages, microbatch=microbatch, num_microbatches=num_microbatches, **more)


def whole(pool, **more):
    return StageSpec(pool=pool, first_layer=0, end_layer=LAYERS, **more)


def test_one_stage_costs_its_layers_on_its_chip():
    step = build_step(table(), POOLS, NETWORK, MEMORY, [replica(whole("slow", degree=2))])
    stage = step.pipelines[0].stages[0]
    assert (stage.forward_s, stage.backward_s, stage.num_ranks) == (4.0, 8.0, 2)
    assert stage.memory.state_bytes == 4 * 500 * 16
    assert stage.memory.held_bytes == 4 * 64
    assert simulate_step(step).step_s == pytest.approx(4 * 12 + 0.5)
    assert simulate_step(step).usd_per_hour == 6.0
    assert step.source.startswith("measured")


def test_width_shares_out_the_samples_and_recompute_runs_the_forward_again():
    step = build_step(table(), POOLS, NETWORK, MEMORY, [replica(whole("fast", width=2, recompute=True), microbatch=2)])
    stage = step.pipelines[0].stages[0]
    assert (stage.forward_s, stage.backward_s) == (4.0, 12.0)
    assert (stage.memory.held_bytes, stage.memory.backward_bytes) == (0, 4 * 64)


def test_replicas_with_other_cuts_reduce_every_run_of_layers_between_any_two_cuts():
    one = replica(
        StageSpec(pool="fast", first_layer=0, end_layer=3), StageSpec(pool="fast", first_layer=3, end_layer=4), name="a"
    )
    two = replica(
        StageSpec(pool="slow", first_layer=0, end_layer=1), StageSpec(pool="slow", first_layer=1, end_layer=4), name="b"
    )
    step = build_step(table(), POOLS, NETWORK, MEMORY, [one, two])
    assert [(r.name, r.members) for r in step.reductions] == [
        ("layers 0-0", ((0, 0), (1, 0))),
        ("layers 1-2", ((0, 0), (1, 1))),
        ("layers 3-3", ((0, 1), (1, 1))),
    ]
    # Two ranks exchange everything once: 2 (P - 1) / P of the bytes.
    assert [r.seconds for r in step.reductions] == pytest.approx([4.0, 8.0, 4.0])


def test_many_replicas_reduce_inside_their_kind_first():
    step = build_step(
        table(), POOLS, NETWORK, MEMORY, [replica(whole("fast"), name="a", count=4), replica(whole("slow"), name="b")]
    )
    link = LinkModel(bytes_per_s=1000.0)
    wanted = all_reduce_s(link, 16_000, 4) + all_reduce_s(link, 16_000, 2)
    assert step.reductions[0].seconds == pytest.approx(wanted)
    assert all_reduce_s(link, 16_000, 4) == pytest.approx(2 * 3 / 4 * 16)
    assert all_reduce_s(link, 16_000, 1) == 0


def test_a_million_chips_are_as_many_actions_as_one_replica_of_each_kind():
    step = build_step(table(), POOLS, NETWORK, MEMORY, [replica(whole("fast"), count=500_000), replica(whole("slow"))])
    assert step.num_devices == 500_001
    assert sum(len(run.timeline.spans_of_rank) for run in simulate_step(step).runs) == 2


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        (replica(StageSpec(pool="fast", first_layer=0, end_layer=3)), PlanError, "follow one another over all 4"),
        (replica(whole("none")), PlanError, "no such pool"),
        (replica(whole("fast", degree=8)), PlanError, "no cell for fast at tensor-parallel degree 8"),
        (replica(whole("fast", width=2)), PlanError, "no cell"),
    ],
)
def test_what_does_not_fit_the_profile_is_refused(spec, error, words):
    with pytest.raises(error, match=words):
        build_step(table(), POOLS, NETWORK, MEMORY, [spec])


def test_a_missing_link_is_refused():
    two = replica(
        StageSpec(pool="fast", first_layer=0, end_layer=1), StageSpec(pool="slow", first_layer=1, end_layer=4)
    )
    with pytest.raises(FleetError, match="no link between fast and slow"):
        build_step(table(), POOLS, Network(links={}), MEMORY, [two])


def test_a_plan_file_steps_as_it_predicts():
    stages = tuple(
        StagePlan(
            stage=i,
            ranks=(i,),
            tensor_parallel=1,
            width=1,
            recompute=False,
            weight_gradient_s=1.0,
            island="x",
            chip="c",
            backend="cpu",
            first_layer=i,
            end_layer=i + 1,
            forward_s=1.0 + i,
            backward_s=2.0,
            memory_bytes=10,
            memory_limit_bytes=20,
        )
        for i in range(2)
    )
    replica = ReplicaPlan(
        replica=0,
        schedule="1f1b",
        order=(),
        num_microbatches=4,
        microbatch=3,
        first_sample=0,
        step_s=0,
        idle_share=0,
        stages=stages,
        edges=(EdgePlan(from_stage=0, to_stage=1, size_bytes=8, transfer_s=0.5, latency_s=0.1, codec="none"),),
    )
    plan = Plan(
        job="j",
        model="m",
        num_layers=2,
        precision="fp32",
        source="analytic",
        objective="throughput",
        global_batch=12,
        gradient_codec="none",
        step_s=0,
        idle_share=0,
        replicas=(replica,),
    )
    step = step_of_plan(plan, tokens_per_sample=7, usd_per_hour_of_chip={"c": 2.0}, watts_of_chip={"c": 50.0})
    result = simulate_step(step)
    assert result.step_s == pytest.approx(plan.replica.simulate().step_s)
    assert (result.step.tokens, result.usd_per_hour, result.watts) == (84, 4.0, 100.0)
    assert result.peak_bytes == 10
