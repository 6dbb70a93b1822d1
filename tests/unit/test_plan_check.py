"""A plan whose parts contradict one another is refused with the key that is wrong; one whose parts agree passes."""

from dataclasses import replace

import pytest

from hybrid.errors import PlanError
from hybrid.scheduler.interleaved import interleaved
from hybrid.scheduler.plan import EdgePlan, Plan, ReplicaPlan, StagePlan
from hybrid.scheduler.plan_check import check_consistent
from hybrid.scheduler.zero_bubble import zb_h2, zb_v


def stage(number: int, *ranks: int, **more) -> StagePlan:
    facts = {
        "island": "a",
        "chip": "trn2",
        "backend": "emulated",
        "tensor_parallel": len(ranks),
        "width": 1,
        "recompute": False,
        "forward_s": 1.0,
        "backward_s": 2.0,
        "weight_gradient_s": 1.0,
        "memory_bytes": 10,
        "memory_limit_bytes": 20,
    }
    return StagePlan(stage=number, ranks=ranks, first_layer=number, end_layer=number + 1, **facts | more)


def replica(number: int, *stages: StagePlan, **more) -> ReplicaPlan:
    edges = tuple(
        EdgePlan(from_stage=i, to_stage=i + 1, size_bytes=8, transfer_s=0.1, latency_s=0.0, codec="none")
        for i in range(len(stages) - 1)
    )
    facts = {"schedule": "1f1b", "order": (), "num_microbatches": 4, "microbatch": 2, "first_sample": 0}
    return ReplicaPlan(replica=number, stages=stages, step_s=0.0, idle_share=0.0, **{"edges": edges} | facts | more)


def plan(*replicas: ReplicaPlan, **more) -> Plan:
    facts = {"num_layers": replicas[0].num_stages if replicas else 1, "gradient_codec": "none"}
    facts["global_batch"] = sum(one.num_samples for one in replicas)
    return Plan(
        job="j",
        model="m",
        precision="fp32",
        source="test",
        objective="throughput",
        step_s=0.0,
        idle_share=0.0,
        replicas=replicas,
        **facts | more,
    )


def words(schedule) -> tuple[str, ...]:
    return tuple(" ".join(map(str, row)) for row in schedule.actions_of_rank)


SECOND = replica(1, stage(0, 2), stage(1, 3), first_sample=8)
RIGHT = {
    "one stage": plan(replica(0, stage(0, 0))),
    "two replicas of unequal shares": plan(
        replica(0, stage(0, 0), stage(1, 1)), replica(1, stage(0, 3), stage(1, 2), first_sample=8, num_microbatches=1)
    ),
    "degrees": plan(replica(0, stage(0, 0, 1), stage(1, 2, 3, 4, 5, tensor_parallel=2, width=2), stage(2, 6))),
    "interleaved of unequal depths": plan(
        replica(0, stage(0, 1), stage(1, 0), stage(2, 1), schedule="interleaved", num_microbatches=3)
    ),
    "a V": plan(replica(0, stage(0, 0), stage(1, 1), stage(2, 1), stage(3, 0), schedule="zb-v")),
    "an order by hand": plan(replica(0, stage(0, 0), stage(1, 1), schedule="auto", order=words(zb_h2(2, 4)))),
}


@pytest.mark.parametrize("what", RIGHT)
def test_a_plan_whose_parts_agree_passes_and_reads_back(what):
    one = RIGHT[what]
    assert check_consistent(one, where="plan") is one
    assert Plan.from_yaml(one.to_yaml()) == one


def test_a_replica_knows_its_pipeline_ranks():
    one = RIGHT["interleaved of unequal depths"].replica
    assert one.groups == ((1,), (0,))
    assert one.rank_of_stage == (0, 1, 0)
    assert one.build_schedule() == interleaved([2, 1], 3)
    assert RIGHT["a V"].replica.build_schedule() == zb_v(2, 4)
    assert replace(zb_h2(2, 4), name="auto") == RIGHT["an order by hand"].replica.build_schedule()


def test_a_plan_knows_what_lies_on_a_rank():
    one = RIGHT["two replicas of unequal shares"]
    assert (one.num_ranks, one.replica_of_rank(3).replica) == (4, 1)
    assert [stage.stage for stage in one.stages_of_rank(2)] == [1]
    assert [stage.stage for stage in RIGHT["a V"].stages_of_rank(0)] == [0, 3]
    with pytest.raises(PlanError, match="not a plan of one replica"):
        _ = one.replica


def one_replica(*stages: StagePlan, **more) -> Plan:
    return plan(replica(0, *stages, **more))


TWO = (stage(0, 0), stage(1, 1))
WRONG = {
    "no replica": (plan(), "replicas: a plan needs a replica"),
    "no stage": (one_replica(), r"replicas\[0\].stages: a replica needs a stage"),
    "a missing edge": (one_replica(*TWO, edges=()), r"replicas\[0\].edges: 2 stages need 1 edges"),
    "an edge that jumps": (
        one_replica(*TWO, edges=(replace(replica(0, *TWO).edges[0], to_stage=2),)),
        r"edges\[0\]: an edge leads to the next stage",
    ),
    "a stage out of order": (one_replica(TWO[0], replace(TWO[1], stage=3)), "stage out of order"),
    "replicas out of order": (plan(replica(1, *TWO)), r"replicas\[0\]: replica out of order"),
    "a gap": (one_replica(TWO[0], replace(TWO[1], first_layer=0)), r"stages\[1\]: first_layer must follow"),
    "no layer": (one_replica(TWO[0], replace(TWO[1], end_layer=1)), r"stages\[1\].end_layer: a stage needs a layer"),
    "another model": (plan(replica(0, *TWO), num_layers=99), "another number of layers"),
    "a lack of memory": (one_replica(stage(0, 0, memory_bytes=1021)), r"stages\[0\]: stage 0 lacks 1,001 bytes"),
    "a lack of memory for two stages": (
        one_replica(stage(0, 0, memory_bytes=15), stage(1, 0, memory_bytes=15), schedule="interleaved"),
        r"stages\[0\]: stages 0 and 1 lack 10 bytes",
    ),
    "an unknown schedule": (one_replica(*TWO, schedule="2f2b"), r"replicas\[0\].schedule: no such schedule"),
    "no microbatch": (one_replica(*TWO, num_microbatches=0), r"replicas\[0\].num_microbatches"),
    "no sample": (one_replica(*TWO, microbatch=0), r"replicas\[0\].microbatch"),
    "too few samples": (plan(replica(0, *TWO), global_batch=9), r"global_batch: .*\(got 8\); valid: 9"),
    "a share twice": (
        plan(replica(0, *TWO), replace(SECOND, first_sample=0)),
        r"replicas\[1\].first_sample: .*\(got 0\); valid: 8",
    ),
    "a rank in two replicas": (
        plan(replica(0, *TWO), replace(SECOND, stages=(stage(0, 2), stage(1, 1)))),
        "rank 1 is used twice",
    ),
    "a rank twice in a stage": (one_replica(stage(0, 0, 0)), "rank 0 is used twice"),
    "a rank left out": (one_replica(stage(0, 0), stage(1, 2)), "rank 1 is missing"),
    "ranks shared in part": (
        one_replica(stage(0, 0, 1), stage(1, 1, 2)),
        r"stages\[1\].ranks: stages 0 and 1 are both on rank 1 but differ in ranks",
    ),
    "one rank on two chips": (
        one_replica(stage(0, 0), stage(1, 0, chip="h100"), schedule="interleaved"),
        r"stages\[1\].chip: .*differ in chip",
    ),
    "a degree without ranks": (
        one_replica(stage(0, 0, tensor_parallel=2)),
        r"stages\[0\].ranks: .*\(got 1\); valid: 2",
    ),
    "a degree of none": (one_replica(stage(0, 0, tensor_parallel=0)), r"stages\[0\].tensor_parallel"),
    "a microbatch that does not divide": (
        one_replica(stage(0, 0, 1, 2, tensor_parallel=1, width=3)),
        r"stages\[0\].width: .*a divisor of 2",
    ),
    "a part larger than the whole": (
        one_replica(stage(0, 0, weight_gradient_s=2.5)),
        r"stages\[0\].weight_gradient_s: weight_gradient_s is a part",
    ),
    "an unknown codec": (plan(replica(0, *TWO), gradient_codec="int4"), "gradient_codec: no such codec"),
    "an unknown codec on an edge": (
        one_replica(*TWO, edges=(replace(replica(0, *TWO).edges[0], codec="int4"),)),
        r"edges\[0\].codec: no such codec",
    ),
    "one stage a rank that are two": (
        one_replica(stage(0, 0), stage(1, 0)),
        r"replicas\[0\].schedule: 1f1b needs its stages elsewhere",
    ),
    "a V that is none": (one_replica(*TWO, schedule="zb-v"), "zb-v needs its stages elsewhere"),
    "auto without an order": (one_replica(*TWO, schedule="auto"), "auto is an order that was searched for"),
    "an order of other words": (
        one_replica(*TWO, schedule="auto", order=("0F0", "1G0")),
        r"replicas\[0\].order: no such action \(got '1G0'\)",
    ),
    "an order of too few ranks": (one_replica(*TWO, schedule="auto", order=("0F0",)), "a text for each pipeline rank"),
    "an order that forgets a backward": (
        one_replica(*TWO, schedule="auto", order=words(zb_h2(2, 3))),
        r"order, rank 0: stage 0 does not compute microbatch 3 once",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_plan_whose_parts_contradict_one_another_is_refused_with_the_key(what):
    one, message = WRONG[what]
    with pytest.raises(PlanError, match=message):
        check_consistent(one, where="mine.yaml")
