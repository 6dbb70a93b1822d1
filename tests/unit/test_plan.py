from dataclasses import dataclass, fields, replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import PlanError, UnsupportedFormat
from hybrid.scheduler.plan import EdgePlan, Plan, ReplicaPlan, StagePlan
from hybrid.scheduler.plan_check import check_consistent
from hybrid.scheduler.planner import plan
from hybrid.scheduler.profile import LayerProfile, ModelProfile
from hybrid.scheduler.schedules import SCHEDULE_NAMES

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    name: str
    flops_of_format: dict
    hbm_bytes_per_s: float = 1e12

    def peak_flops(self, precision):
        if precision not in self.flops_of_format:
            raise UnsupportedFormat("no such format", value=precision)
        return self.flops_of_format[precision]


@dataclass(frozen=True)
class Island:
    name: str
    chip: Chip
    num_chips: int = 1
    memory_bytes: int = 16 * GIB
    speed: float = 1.0
    backend: str = "emulated"


@dataclass(frozen=True)
class Link:
    bandwidth_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Fleet:
    islands: tuple
    between: Link = Link(1e9, 1e-4)

    @property
    def num_chips(self):
        return sum(island.num_chips for island in self.islands)

    def chips(self):
        islands = [island for island in self.islands for _ in range(island.num_chips)]
        return ((rank, island, 0) for rank, island in enumerate(islands))

    def rank_link(self, a, b):
        island_of = {rank: island.name for rank, island, _ in self.chips()}
        return Link(1e11, 1e-6) if island_of[a] == island_of[b] else self.between


SLOW = Chip("slow", {"fp32": 1e13, "bf16": 2e13})
FAST = Chip("fast", {"fp32": 2e13, "bf16": 4e13, "fp8": 8e13})
MIXED = Fleet((Island("left", SLOW, 2), Island("right", FAST, 2)))


def model(num_blocks=10, *, num_parameters=10_000_000, saved=4_000_000) -> ModelProfile:
    def layer(name, kind, flops):
        return LayerProfile(
            name=name,
            kind=kind,
            num_parameters=num_parameters,
            forward_flops=flops,
            backward_flops=2 * flops,
            saved_activation_bytes=saved,
            output_bytes=1_000_000,
        )

    blocks = [layer(f"block {index}", "block", 1e11) for index in range(num_blocks)]
    return ModelProfile(
        model="toy",
        microbatch=4,
        sequence_length=128,
        precision="bf16",
        bytes_per_parameter=16,
        source="analytic",
        layers=(layer("embedding", "embedding", 1e6), *blocks, layer("head", "head", 2e11)),
    )


def plan_toy(profile=None, fleet=MIXED, **changes) -> Plan:
    request = {"schedule": "1f1b", "num_microbatches": 8, "precision": "bf16", "efficiency": 0.5}
    return plan(profile or model(), fleet, **{**request, **changes})


def test_each_chip_gets_a_stage_in_the_fleets_order():
    found = plan_toy()
    assert [stage.island for stage in found.stages] == ["left", "left", "right", "right"]
    assert [stage.ranks for stage in found.stages] == [(0,), (1,), (2,), (3,)]
    assert found.stages[0].first_layer == 0
    assert found.stages[-1].end_layer == 12
    assert [a.end_layer for a in found.stages[:-1]] == [b.first_layer for b in found.stages[1:]]


def test_a_chip_twice_as_fast_gets_twice_the_layers():
    # The embedding costs next to nothing and the head as much as two blocks.
    found = plan_toy(model(10))
    assert [len(stage.layers) for stage in found.stages] == [1 + 2, 2, 4, 2 + 1]
    assert max(s.forward_s + s.backward_s for s in found.stages) == pytest.approx(0.06, rel=0.01)


def test_the_predicted_step_is_the_simulated_one():
    found = plan_toy()
    timeline = found.replica.simulate()
    assert found.step_s == timeline.step_s > 8 * max(s.forward_s + s.backward_s for s in found.stages)
    assert found.idle_share == timeline.idle_share


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_every_schedule_can_be_planned(schedule):
    found = check_consistent(plan_toy(model(14), schedule=schedule), where="plan")
    work_s = [8 * sum(s.forward_s + s.backward_s for s in found.stages_of_rank(rank)) for rank in range(4)]
    assert max(work_s) < found.step_s < 2 * max(work_s)
    busy = [sum(span.end_s - span.start_s for span in spans) for spans in found.replica.simulate().spans_of_rank]
    assert busy == pytest.approx(work_s)
    assert bool(found.replica.order) == (schedule == "auto")


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v", "auto"])
def test_ranks_of_several_stages_get_layers_by_their_speed(schedule):
    found = plan_toy(model(28), schedule=schedule, stages_per_rank=2)
    layers = [sum(len(stage.layers) for stage in found.stages_of_rank(rank)) for rank in range(4)]
    work_s = [sum(s.forward_s + s.backward_s for s in found.stages_of_rank(rank)) for rank in range(4)]
    assert min(layers[2:]) > max(layers[:2])
    assert max(work_s) < 1.4 * min(work_s)


def test_the_stages_of_a_rank_share_its_memory():
    loose = plan_toy(model(28), schedule="zb-v")
    tight = max(sum(s.memory_bytes for s in loose.stages_of_rank(rank)) for rank in range(4))
    islands = tuple(replace(island, memory_bytes=round(tight * 1.3)) for island in MIXED.islands)
    found = check_consistent(plan_toy(model(28), fleet=Fleet(islands), schedule="zb-v"), where="plan")
    assert found.replica.rank_of_stage == (0, 1, 2, 3, 3, 2, 1, 0)
    with pytest.raises(PlanError, match="misses"):
        plan_toy(model(28), fleet=Fleet(tuple(replace(i, memory_bytes=tight // 3) for i in islands)), schedule="zb-v")


def test_auto_is_no_slower_than_a_named_schedule_and_keeps_within_memory():
    named = plan_toy(schedule="1f1b")
    limit = max(stage.memory_bytes for stage in named.stages)
    fleet = Fleet(tuple(replace(island, memory_bytes=limit) for island in MIXED.islands))
    found = check_consistent(plan_toy(fleet=fleet, schedule="auto"), where="plan")
    assert found.step_s <= named.step_s
    assert max(stage.memory_bytes for stage in found.stages) <= limit


def test_stages_of_one_rank_have_a_free_edge_between_them():
    edges = plan_toy(model(14), schedule="zb-v").replica.edges
    assert [edge.transfer_s > 0 for edge in edges] == [True, True, True, False, True, True, True]
    assert edges[3].size_bytes == 1_000_000


def test_edges_take_the_link_of_their_islands():
    found = plan_toy()
    assert [edge.transfer_s for edge in found.replica.edges] == pytest.approx([1.1e-5, 1.1e-3, 1.1e-5])
    assert found.replica.link_busy_s(found.replica.simulate().transfers[0].action) == pytest.approx(1e-5)


def test_memory_counts_parameters_activations_in_flight_and_buffers():
    found = plan_toy(fleet=Fleet((Island("a", FAST, 2),)), num_microbatches=8)
    layers = [len(stage.layers) for stage in found.stages]
    # The first stage of two holds two microbatches, the last one; 2 receives are posted ahead.
    in_flight = [2, 1]
    for stage, count, held in zip(found.stages, layers, in_flight, strict=True):
        bare = count * (10_000_000 * 16 + held * 4_000_000)
        assert 0 < stage.memory_bytes - bare <= 4 * 1_000_000


def test_gpipe_needs_more_memory_than_1f1b():
    gpipe, one_f_one_b = plan_toy(schedule="gpipe"), plan_toy()
    assert gpipe.stages[-1].memory_bytes > one_f_one_b.stages[-1].memory_bytes


def test_layers_move_away_from_a_chip_without_memory():
    small = Fleet((Island("small", FAST, 1, memory_bytes=GIB // 2), Island("large", FAST, 1)))
    found = plan_toy(fleet=small)
    assert len(found.stages[0].layers) < len(found.stages[1].layers)
    assert all(stage.memory_bytes <= stage.memory_limit_bytes for stage in found.stages)


def test_a_model_that_does_not_fit_names_the_missing_bytes_and_they_suffice():
    def fleet(memory_bytes):
        return Fleet((Island("a", FAST, 2, memory_bytes=memory_bytes),))

    with pytest.raises(PlanError, match=r"stage \d.*misses [\d,]+ bytes") as caught:
        plan_toy(fleet=fleet(GIB // 2))
    missing = int(str(caught.value).split("misses ")[1].split(" bytes")[0].replace(",", ""))
    with pytest.raises(PlanError):
        plan_toy(fleet=fleet(GIB // 2 + missing - 1))
    assert plan_toy(fleet=fleet(GIB // 2 + missing)).replica.num_stages == 2


def test_fewer_stages_than_chips_take_the_fastest_neighbours():
    assert {stage.island for stage in plan_toy(num_stages=2).stages} == {"right"}
    assert [stage.island for stage in plan_toy(num_stages=3).stages] == ["left", "right", "right"]


def test_a_window_that_does_not_fit_is_passed_over():
    fleet = Fleet((Island("large", SLOW, 2), Island("tiny", FAST, 2, memory_bytes=1000)))
    assert {stage.island for stage in plan_toy(fleet=fleet, num_stages=2).stages} == {"large"}


def test_one_stage_needs_no_edge():
    found = plan_toy(num_stages=1)
    assert (found.replica.num_stages, found.replica.edges, found.idle_share) == (1, (), 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_stages": 5}, r"got 5.*1 to 4"),
        ({"num_stages": 0}, r"got 0.*1 to 4"),
        ({"schedule": "2f2b"}, r"got '2f2b'.*1f1b"),
        ({"num_microbatches": 0}, "num_microbatches is below one"),
        ({"profile": model(1)}, r"4 chips but only 3 layers.*num_stages 1 to 3"),
        ({"efficiency": 2.0}, "efficiency"),
        ({"fleet": Fleet(())}, "chip"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(changes, message):
    with pytest.raises(PlanError, match=message):
        plan_toy(**changes)


def test_a_chip_without_the_precision_is_named_with_its_formats():
    with pytest.raises(UnsupportedFormat, match=r"chip slow of island left has no fp8.*bf16, fp32"):
        plan_toy(precision="fp8")


@st.composite
def plans(draw) -> Plan:
    words = st.text(min_size=1, max_size=8)
    num_layers = draw(st.integers(3, 9))
    replicas: list[ReplicaPlan] = []
    for number in range(draw(st.integers(1, 3))):
        first_rank = sum(len(replica.ranks) for replica in replicas)
        first_sample = sum(replica.num_samples for replica in replicas)
        replicas.append(draw(replica_plans(number, num_layers, first_rank, first_sample)))
    return Plan(
        job=draw(words),
        model=draw(words),
        num_layers=num_layers,
        precision="bf16",
        source=draw(words),
        objective="throughput",
        global_batch=sum(replica.num_samples for replica in replicas),
        gradient_codec=draw(st.sampled_from(["none", "bf16", "fp8"])),
        step_s=draw(NUMBERS),
        idle_share=draw(st.floats(0, 1)),
        replicas=tuple(replicas),
    )


NUMBERS = st.floats(0, 1e6, allow_nan=False)


@st.composite
def replica_plans(draw, number, num_layers, first_rank, first_sample) -> ReplicaPlan:
    words = st.text(min_size=1, max_size=8)
    cuts = [0, *sorted(draw(st.sets(st.integers(1, num_layers - 1), max_size=2))), num_layers]
    degree, width = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    stages = []
    for stage in range(len(cuts) - 1):
        memory_bytes, backward_s = draw(st.integers(0, 2**50)), draw(NUMBERS)
        stages.append(
            StagePlan(
                stage=stage,
                ranks=tuple(first_rank + stage * degree * width + k for k in range(degree * width)),
                island=draw(words),
                chip=draw(words),
                backend=draw(words),
                first_layer=cuts[stage],
                end_layer=cuts[stage + 1],
                tensor_parallel=degree,
                width=width,
                recompute=draw(st.booleans()),
                forward_s=draw(NUMBERS),
                backward_s=backward_s,
                weight_gradient_s=draw(st.floats(0, backward_s)),
                memory_bytes=memory_bytes,
                memory_limit_bytes=memory_bytes + draw(st.integers(0, 99)),
            )
        )
    edges = [
        EdgePlan(
            from_stage=stage,
            to_stage=stage + 1,
            size_bytes=draw(st.integers(0, 2**40)),
            transfer_s=draw(NUMBERS),
            latency_s=0.0,
            codec=draw(st.sampled_from(["none", "bf16", "fp8"])),
        )
        for stage in range(len(stages) - 1)
    ]
    return ReplicaPlan(
        replica=number,
        schedule="1f1b",
        order=(),
        num_microbatches=draw(st.integers(1, 9)),
        microbatch=3 * draw(st.integers(1, 9)),
        first_sample=first_sample,
        step_s=draw(NUMBERS),
        idle_share=draw(st.floats(0, 1)),
        stages=tuple(stages),
        edges=tuple(edges),
    )


@settings(max_examples=25, deadline=None)
@given(plans())
def test_a_plan_reads_back_from_its_yaml(one):
    assert Plan.from_yaml(one.to_yaml()) == one
    assert one.diff(Plan.from_yaml(one.to_yaml())) == []


def edited(**changes) -> str:
    """Return the toy's YAML with values changed: `stages__0__chip` of its replica, `version` of the plan."""
    raw = yaml.safe_load(plan_toy().to_yaml())
    for path, value in changes.items():
        *parents, key = (int(part) if part.isdigit() else part for part in path.split("__"))
        first = parents[0] if parents else key
        target = raw if first in raw or first in ("colour", "version") else raw["replicas"][0]
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[key]
        else:
            target[key] = value
    return yaml.safe_dump(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edited(version=3), r"unknown plan version \(got 3\); valid: 2, or 1"),
        (edited(version=None), "unknown plan version"),
        (edited(colour="red"), r"unknown key \(got 'colour'\); valid: job, model"),
        (edited(stages__1__colour="red"), r"mine.yaml: replicas\[0\]: stages\[1\]: unknown key \(got 'colour'\)"),
        (edited(job=None), "key 'job' is missing"),
        (edited(stages__0__ranks=["0"]), r"stages\[0\]: ranks\[0\]: not a whole number \(got '0'\)"),
        (edited(stages__0__recompute=0), r"stages\[0\]: recompute: not true or false \(got 0\)"),
        (edited(num_microbatches=2.5), "num_microbatches: not a whole number"),
        (edited(num_microbatches=True), "num_microbatches: not a whole number"),
        (edited(step_s="fast"), "step_s: not a number"),
        (edited(step_s=-1.0), "step_s: not zero or more"),
        (edited(step_s=float("nan")), "step_s: not zero or more"),
        (edited(model=7), "model: not a text"),
        (edited(stages={}), "stages: not a list"),
        (edited(stages__0=7), r"stages\[0\]: not a mapping"),
        ("[1, 2", "line 1: not YAML"),
        ("7", "not a mapping"),
    ],
)
def test_a_wrong_plan_file_is_refused_with_its_key(text, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_yaml(text, where="mine.yaml")


def version_1() -> dict:
    one = plan_toy()
    raw = yaml.safe_load(one.to_yaml())
    replica = raw.pop("replicas")[0]
    for key in ("objective", "global_batch", "gradient_codec"):
        del raw[key]
    for key in ("replica", "order", "first_sample"):
        del replica[key]
    for stage in replica["stages"]:
        stage["rank"] = stage.pop("ranks")[0]
        for key in ("tensor_parallel", "width", "recompute", "weight_gradient_s"):
            del stage[key]
    for edge in replica["edges"]:
        del edge["codec"]
    return raw | replica | {"version": 1}


def test_a_plan_of_version_1_is_read_as_one_replica():
    assert Plan.from_yaml(yaml.safe_dump(version_1())) == plan_toy()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("colour", "red", "unknown key"),
        ("schedule", None, "'schedule' is missing"),
        ("stages", 3, "stages: not a list"),
        ("stages", [3], "not a mapping"),
        ("num_microbatches", "many", "num_microbatches: not a whole number"),
        ("job", None, "'job' is missing"),
    ],
)
def test_a_wrong_plan_of_version_1_is_refused_with_its_key(key, value, message):
    raw = version_1() | {key: value}
    if value is None:
        del raw[key]
    with pytest.raises(PlanError, match=message):
        Plan.from_yaml(yaml.safe_dump(raw))


def test_a_diff_names_what_changed():
    one = plan_toy()
    stages = (replace(one.stages[0], chip="new"), *one.stages[1:])
    other = replace(one, replicas=(replace(one.replica, schedule="gpipe", stages=stages),))
    assert one.diff(other) == ["replicas[0].schedule: 1f1b -> gpipe", "replicas[0].stages[0].chip: slow -> new"]
    assert "replicas[0].stages: 4 entries -> 2" in one.diff(plan_toy(num_stages=2))


def test_rows_hold_every_field_of_a_stage_and_its_edge():
    found = plan_toy()
    rows = found.rows()
    assert len(rows) == 4
    assert {field.name for field in fields(StagePlan)} < set(rows[0])
    assert rows[0]["send_bytes"] == 1_000_000
    assert rows[3]["send_bytes"] == 0


def test_a_plan_prints_as_a_table():
    lines = str(plan_toy()).split("\n")
    assert len(lines) == 1 + 1 + 1 + 4 + 1
    assert "uncalibrated" in lines[-1]
    assert max(map(len, lines)) <= 110
