"""The pipeline computes what one process computes: the same bits in fp64, and in fp32 since all sums have its order."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.backends import open_backend
from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import JobConfig, parse_job
from hybrid.models.stage import boundary_dtype, boundary_shape, build_stage, named_state, parameter_dtype
from hybrid.models.tokens import TokenData, prepare_data
from hybrid.observe.events import EvalEvent, Event, StepEvent
from hybrid.runtime.capabilities import capabilities_of
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.exchange import add_tied_gradients
from hybrid.runtime.interpreter import Interpreter
from hybrid.runtime.local import ThreadPlacement
from hybrid.runtime.reference import accumulate_gradients
from hybrid.runtime.trainer import train, train_in_one_process
from hybrid.runtime.worker_data import batch_of
from hybrid.scheduler.lowering import lower_communication
from hybrid.transports import open_node

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
    plan = plan_of(job, fleet).replica
    schedule = lower_communication(plan.build_schedule())
    nodes = [open_node(medium, rank, token=b"t") for rank in plan.ranks]
    stages: dict[int, Any] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            edges = {}
            last = plan.num_stages - 1
            pairs = {(i, i + 1) for i in range(last)} | ({(0, last)} if last else set())
            for pair in sorted(pairs):
                if rank in pair:
                    peer = pair[1 - pair.index(rank)]
                    edges[peer] = nodes[rank].open(peer, nodes[peer].address, timeout_s=TIMEOUT_S)
            mine = plan.stages[rank]
            dtype = parameter_dtype(job.precision)
            stage = build_stage(job.model, mine.first_layer, mine.end_layer, seed=job.seed, dtype=dtype)
            island = fleet.island(mine.island)
            backend = open_backend(mine.backend, capabilities_of(island.chip, None))
            count = job.batch.num_microbatches
            compute = StageCompute(stage, backend, precision=job.precision, num_microbatches=count)
            interpreter = Interpreter(
                schedule,
                rank,
                {mine.stage: compute},
                edges,
                shape=boundary_shape(job.model, job.batch.microbatch),
                dtype=boundary_dtype(job.precision),
                seconds_of=plan.seconds_of,
                timeout_s=TIMEOUT_S,
            )
            interpreter.run(0, batch_of(job, plan, tokens, 0))
            other_end = edges.get(last if rank == 0 else 0)
            add_tied_gradients(job.model, named_state(stage), other_end, step=0, timeout_s=TIMEOUT_S)
            stages[rank] = stage
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in plan.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for node in nodes:
        node.close()
    if failures:
        raise failures[0]
    return {
        name: parameter.grad.clone() for rank in sorted(stages) for name, parameter in named_state(stages[rank]).items()
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_gradients_are_the_bits_of_the_whole_model_in_fp64(
    num_stages: int, medium: str, schedule: str, tied: bool, tmp_path: Path
) -> None:
    job = _job(tmp_path, precision="fp64", num_stages=num_stages, schedule=schedule, model__tied_embeddings=tied)
    tokens = prepare_data(job.data, job.model)
    whole = build_stage(job.model, 0, job.model.num_layers, seed=job.seed, dtype=torch.float64)
    accumulate_gradients(whole, job, tokens, 0)
    wanted = {name: parameter.grad for name, parameter in named_state(whole).items()}
    found = _pipeline_gradients(job, tokens, medium)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"gradients differ: {different}"


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


@pytest.mark.parametrize("stages_after", [1, 2, 4])
def test_a_run_resumed_on_another_split_goes_on_with_the_same_bits(stages_after: int, tmp_path: Path) -> None:
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
    second = whole.model_copy(update={"num_stages": stages_after})
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
