"""The pipeline computes what one process computes: the same bits in fp64, and in fp32 since all sums have its order."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.backends import open_backend
from hybrid.backends.base import Backend
from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import JobConfig, parse_job
from hybrid.hardware.fleet import Fleet
from hybrid.models.stage import boundary_dtype, boundary_shape, build_stage, named_state
from hybrid.models.tokens import TokenData, prepare_data
from hybrid.observe.events import EvalEvent, Event, StepEvent
from hybrid.runtime.capabilities import capabilities_of
from hybrid.runtime.edges import open_edges, tied_ends
from hybrid.runtime.exchange import add_tied_gradients
from hybrid.runtime.held_stages import build_held_stages, parameters_of
from hybrid.runtime.interpreter import Interpreter
from hybrid.runtime.local import ThreadPlacement
from hybrid.runtime.messages import ControlAddress
from hybrid.runtime.placement import WorkerSpec
from hybrid.runtime.reference import accumulate_gradients
from hybrid.runtime.trainer import train, train_in_one_process
from hybrid.runtime.worker_data import batch_of
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.plan import Plan
from hybrid.transports import open_node
from hybrid.transports.arrival import ArrivalHistory

TIMEOUT_S = 30.0
MEDIA = {"inproc": ("inproc", "ipc"), "zmq-ipc": ("zmq", "ipc"), "zmq-tcp": ("zmq", "tcp")}


def _job(tmp_path: Path, **changes: Any) -> JobConfig:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("\n".join(f"line {i} of {i * i % 97} and {i**3 % 89} apples" for i in range(4000)))
    raw: dict[str, Any] = {
        "name": "parity",
        "model": {
            "num_blocks": 3,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 320,
            "sequence_length": 16,
        },
        "data": {"source": "text", "path": str(tmp_path), "held_out_share": 0.1},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
        "batch": {"global_batch": 12, "microbatch": 2},
        "steps": 20,
        "fleet": {"islands": [{"name": "host", "device": "cpu", "count": 4}]},
        "evaluate": {"num_microbatches": 2},
        "checkpoint": {"at_end": False},
        "runtime": {"placement": "threads", "timeout_s": TIMEOUT_S},
        "runs_dir": str(tmp_path / "runs"),
    }
    for key, value in changes.items():
        where = raw
        *parents, last = key.split("__")
        for parent in parents:
            where = where.setdefault(parent, {})
        where[last] = value
    return parse_job(raw)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def _pipeline_gradients(job: JobConfig, tokens: TokenData, medium: str) -> dict[str, torch.Tensor]:
    """Run one step's actions on a thread a rank; return every parameter's gradient."""
    _, fleet = fleet_of(job, None)
    plan = plan_of(job, fleet)
    replica = plan.replica
    schedule = lower_communication(replica.build_schedule())
    nodes = [open_node(medium, rank, token=b"t") for rank in replica.ranks]
    addresses = {str(rank): node.address for rank, node in enumerate(nodes)}
    found: dict[str, torch.Tensor] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            own, _ = replica.place_of_rank(rank)
            edges = open_edges(
                replica, rank, nodes[rank], addresses, model=job.model, token_bytes=0, timeout_s=TIMEOUT_S
            )
            held = build_held_stages(_spec(job, fleet, plan, rank), _backend(fleet, plan, rank))
            interpreter = Interpreter(
                schedule,
                own,
                {one.plan.stage: one.compute for one in held},
                edges.activations,
                shape=boundary_shape(job.model, job.batch.microbatch),
                dtype=boundary_dtype(job.precision),
                seconds_of=replica.seconds_of,
                waits=ArrivalHistory(fixed_s=TIMEOUT_S),
            )
            interpreter.run(0, batch_of(job, replica, tokens, 0))
            parameters = parameters_of(held)
            ends = tied_ends(replica, rank, edges, job.model)
            add_tied_gradients(job.model, parameters, ends, step=0, timeout_s=TIMEOUT_S)
            found.update({name: parameter.grad.clone() for name, parameter in parameters.items()})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in replica.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for node in nodes:
        node.close()
    if failures:
        raise failures[0]
    return found


def _backend(fleet: Fleet, plan: Plan, rank: int) -> Backend:
    stage = plan.stages_of_rank(rank)[0]
    return open_backend(stage.backend, capabilities_of(fleet.island(stage.island).chip, None))


def _spec(job: JobConfig, fleet: Fleet, plan: Plan, rank: int) -> WorkerSpec:
    return WorkerSpec(
        rank=rank,
        job=job,
        plan=plan,
        chip=fleet.island(plan.stages_of_rank(rank)[0].island).chip,
        memory_bytes=2**40,
        control=ControlAddress(endpoint="", server_key=b"", token=b""),
        tokens_dir=Path(),
        data_digest="",
        run_dir=Path(),
        resume=None,
        host="",
        owns_process=False,
    )


def _check_gradients(job: JobConfig, medium: str) -> None:
    tokens = prepare_data(job.data, job.model)
    whole = build_stage(job.model, 0, job.model.num_layers, seed=job.seed, dtype=torch.float64)
    accumulate_gradients(whole, job, tokens, 0)
    wanted = {name: parameter.grad for name, parameter in named_state(whole).items()}
    found = _pipeline_gradients(job, tokens, medium)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"gradients differ: {different}"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_gradients_are_the_bits_of_the_whole_model_in_fp64(
    num_stages: int, medium: str, schedule: str, tied: bool, tmp_path: Path
) -> None:
    job = _job(tmp_path, precision="fp64", num_stages=num_stages, schedule=schedule, model__tied_embeddings=tied)
    _check_gradients(job, medium)


SPLIT_OR_SEVERAL = {
    "zb-h1 1": ("zb-h1", [1]),
    "zb-h1 2": ("zb-h1", [1, 1]),
    "zb-h1 3": ("zb-h1", [1, 1, 1]),
    "zb-h1 4": ("zb-h1", [1, 1, 1, 1]),
    "zb-h2 1": ("zb-h2", [1]),
    "zb-h2 2": ("zb-h2", [1, 1]),
    "zb-h2 3": ("zb-h2", [1, 1, 1]),
    "zb-h2 4": ("zb-h2", [1, 1, 1, 1]),
    "interleaved 1": ("interleaved", [3]),
    "interleaved 2": ("interleaved", [2, 2]),
    "interleaved 3": ("interleaved", [2, 2, 2]),
    "interleaved 4": ("interleaved", [2, 2, 2, 2]),
    "interleaved unequal 2": ("interleaved", [3, 1]),
    "interleaved unequal 3": ("interleaved", [1, 3, 2]),
    "zb-v 1": ("zb-v", [2]),
    "zb-v 2": ("zb-v", [2, 2]),
    "zb-v 3": ("zb-v", [2, 2, 2]),
    "zb-v 4": ("zb-v", [2, 2, 2, 2]),
    "auto 1": ("auto", [1]),
    "auto 2": ("auto", [1, 1]),
    "auto 3": ("auto", [1, 1, 1]),
    "auto 4": ("auto", [1, 1, 1, 1]),
    "auto of several 2": ("auto", [2, 2]),
    "auto unequal 3": ("auto", [3, 1, 2]),
}
"""Name to schedule and stages of each rank, of a model of eight layers."""
QUICK = {"zb-h1 3", "zb-h2 4", "interleaved 2", "interleaved unequal 3", "zb-v 3", "auto 3", "auto unequal 3"}


def _cases() -> list[Any]:
    """Return every case over every medium, with and without tied weights; all but a few marked slow."""
    return [
        pytest.param(
            what,
            medium,
            tied,
            id=f"{what}-{medium}-{'tied' if tied else 'untied'}".replace(" ", "_"),
            marks=() if what in QUICK and medium == "inproc" and tied else pytest.mark.slow,
        )
        for what in SPLIT_OR_SEVERAL
        for medium in MEDIA
        for tied in (True, False)
    ]


@pytest.mark.parametrize(("what", "medium", "tied"), _cases())
def test_split_backwards_and_several_stages_a_rank_have_the_bits_of_the_whole_model_in_fp64(
    what: str, medium: str, tied: bool, tmp_path: Path
) -> None:
    schedule, counts = SPLIT_OR_SEVERAL[what]
    job = _job(
        tmp_path,
        precision="fp64",
        schedule=schedule,
        stages_per_rank=counts,
        model__num_blocks=6,
        model__tied_embeddings=tied,
    )
    _check_gradients(job, medium)


def test_a_tied_gradient_equals_one_shared_parameters_within_rounding(tmp_path: Path) -> None:
    """Autograd sums (head + embedding) within each microbatch, the pipeline sums each over the microbatches first."""
    job = _job(tmp_path, precision="fp64")
    tokens = prepare_data(job.data, job.model)
    model = build_stage(job.model, 0, job.model.num_layers, seed=job.seed, dtype=torch.float64)
    accumulate_gradients(model, job, tokens, 0)
    ours = named_state(model)["embedding.weight"].grad.clone()
    shared = build_stage(job.model, 0, job.model.num_layers, seed=job.seed, dtype=torch.float64)
    shared.layers[job.model.num_layers - 1].weight = shared.layers[0].weight
    untied = job.model_copy(update={"model": job.model.model_copy(update={"tied_embeddings": False})})
    accumulate_gradients(shared, untied, tokens, 0)
    theirs = shared.layers[0].weight.grad
    assert not torch.equal(ours, torch.zeros_like(ours))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def _events(job: JobConfig, *, reference: bool) -> list[Event]:
    events: list[Event] = []
    if reference:
        train_in_one_process(job, resume=None, sink=events.append, started_s=time.monotonic())
    else:
        job, fleet = fleet_of(job, None)
        placement = ThreadPlacement(threads_per_rank=1)
        train(job, fleet, plan_of(job, fleet), placement, resume=None, sink=events.append, started_s=time.monotonic())
    return events


def _columns(events: list[Event]) -> list[tuple[float, ...]]:
    steps = [(e.loss, e.grad_norm, e.learning_rate) for e in events if isinstance(e, StepEvent)]
    return steps + [(e.loss,) for e in events if isinstance(e, EvalEvent)]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("medium", ["inproc", "zmq-tcp"])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_twenty_steps_have_the_losses_of_the_reference_bit_for_bit(
    num_stages: int, medium: str, schedule: str, precision: str, tmp_path: Path
) -> None:
    transport, zmq_medium = MEDIA[medium]
    job = _job(
        tmp_path,
        precision=precision,
        num_stages=num_stages,
        schedule=schedule,
        runtime__transport=transport,
        runtime__zmq_medium=zmq_medium,
    )
    wanted = _columns(_events(job, reference=True))
    found = _columns(_events(job, reference=False))
    assert len(wanted) == 21
    assert wanted[0][0] > wanted[19][0], "nothing was learned"
    assert found == wanted


@pytest.mark.parametrize("medium", ["inproc", pytest.param("zmq-tcp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        pytest.param("zb-h1", [1, 1, 1], marks=pytest.mark.slow),
        pytest.param("zb-h2", [1, 1, 1, 1], marks=pytest.mark.slow),
        ("interleaved", [3, 1, 2]),
        ("zb-v", [2, 2, 2]),
        pytest.param("auto", [2, 2], marks=pytest.mark.slow),
        pytest.param("auto", [1, 1, 1, 1], marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_of_every_schedule_have_the_losses_of_the_reference_bit_for_bit(
    schedule: str, counts: list[int], medium: str, tmp_path: Path
) -> None:
    transport, zmq_medium = MEDIA[medium]
    job = _job(
        tmp_path,
        schedule=schedule,
        stages_per_rank=counts,
        model__num_blocks=6,
        runtime__transport=transport,
        runtime__zmq_medium=zmq_medium,
    )
    assert _columns(_events(job, reference=False)) == _columns(_events(job, reference=True))


@pytest.mark.parametrize("num_stages", [2, 4])
def test_twenty_steps_over_shared_memory_have_the_losses_of_the_reference_bit_for_bit(
    num_stages: int, tmp_path: Path
) -> None:
    job = _job(tmp_path, precision="fp32", num_stages=num_stages, schedule="1f1b", runtime__transport="shm")
    assert _columns(_events(job, reference=False)) == _columns(_events(job, reference=True))


def test_twenty_bf16_steps_have_the_losses_of_the_reference_bit_for_bit(tmp_path: Path) -> None:
    job = _job(tmp_path, precision="bf16", num_stages=3, runtime__transport="inproc")
    assert _columns(_events(job, reference=False)) == _columns(_events(job, reference=True))


def test_a_mixed_emulated_fleet_has_the_losses_of_the_reference_bit_for_bit(tmp_path: Path) -> None:
    islands = [{"name": "a", "device": "trn2", "count": 2}, {"name": "b", "device": "h100", "count": 2}]
    job = _job(tmp_path, fleet={"islands": islands}, emulation={"pace": False}, runtime__transport="inproc")
    assert _columns(_events(job, reference=False)) == _columns(_events(job, reference=True))


def test_tied_weights_stay_equal_on_the_first_and_the_last_stage(tmp_path: Path) -> None:
    from hybrid.runtime import checkpoint

    job = _job(tmp_path, checkpoint={"at_end": True}, runtime__transport="inproc", steps=5)
    _events(job, reference=False)
    run = next((tmp_path / "runs").iterdir())
    manifest = checkpoint.read_manifest(checkpoint.find_checkpoint(run))
    embedding = checkpoint.read_layer(manifest, 0)["weight"]["embedding.weight"]
    head = checkpoint.read_layer(manifest, job.model.num_layers - 1)["weight"]["head.weight"]
    assert torch.equal(embedding, head)


def test_a_recomputed_stage_changes_no_bit_and_holds_less(tmp_path: Path) -> None:
    job, fleet = fleet_of(_job(tmp_path, num_stages=3, schedule="gpipe", runtime__transport="inproc", steps=4), None)
    plan = plan_of(job, fleet)
    stages = tuple(replace(stage, recompute=True) for stage in plan.stages)
    again = replace(plan, replicas=(replace(plan.replica, stages=stages),))
    columns, peaks = [], []
    for one in (plan, again):
        events: list[Event] = []
        summary = train(
            job,
            fleet,
            one,
            ThreadPlacement(threads_per_rank=1),
            resume=None,
            sink=events.append,
            started_s=time.monotonic(),
        )
        columns.append(_columns(events))
        peaks.append(summary.peak_bytes_of_rank)
    assert columns[0] == columns[1]
    assert all(less < more for less, more in zip(peaks[1], peaks[0], strict=True))


@pytest.mark.parametrize(
    "after",
    [
        {"num_stages": 1},
        {"num_stages": 4},
        {"num_stages": None, "schedule": "zb-v", "stages_per_rank": (2, 2)},
        {"num_stages": None, "schedule": "interleaved", "stages_per_rank": (1, 3)},
    ],
    ids=["1", "4", "zb-v", "interleaved"],
)
def test_a_run_resumed_on_another_split_goes_on_with_the_same_bits(after: dict[str, Any], tmp_path: Path) -> None:
    whole = _job(tmp_path, num_stages=3, runtime__transport="inproc", steps=12)
    wanted = _columns(_events(whole, reference=False))
    first = whole.model_copy(update={"checkpoint": whole.checkpoint.model_copy(update={"every_steps": 7})})
    events: list[Event] = []
    first, fleet = fleet_of(first, None)
    train(
        first,
        fleet,
        plan_of(first, fleet),
        ThreadPlacement(threads_per_rank=1),
        resume=None,
        sink=events.append,
        started_s=time.monotonic(),
    )
    run = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    second = whole.model_copy(update=after)
    second, fleet = fleet_of(second, None)
    resumed: list[Event] = []
    train(
        second,
        fleet,
        plan_of(second, fleet),
        ThreadPlacement(threads_per_rank=1),
        resume=run,
        sink=resumed.append,
        started_s=time.monotonic(),
    )
    assert _columns(resumed) == wanted[7:]
