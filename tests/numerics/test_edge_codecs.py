"""A codec on an edge: the pipeline computes what one process does that rounds the same numbers at the same edges."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid.collectives.codecs import open_codec
from hybrid.commands.job import fleet_of, plan_of
from hybrid.errors import PlanError
from hybrid.models.stage import build_stage, compute_context, microbatch_loss, named_state
from hybrid.models.tokens import prepare_data
from hybrid.observe.events import EvalEvent, StepEvent
from hybrid.runtime.coded_edge import CodedEdge
from hybrid.runtime.optimizer import AdamW, global_norm
from hybrid.runtime.stage_state import squares_of_layers
from hybrid.runtime.worker_data import batch_of
from hybrid.scheduler.actions import Kind
from hybrid.transports import open_node
from tests.numerics.replica_plans import job_of, run_replicas


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def planned(job, codecs):
    """Return the fleet and the job's plan with these codecs on its edges."""
    _, fleet = fleet_of(job, None)
    plan = plan_of(job.model_copy(update={"num_stages": len(codecs) + 1}), fleet)
    edges = tuple(replace(edge, codec=name) for edge, name in zip(plan.replica.edges, codecs, strict=True))
    return fleet, replace(plan, replicas=(replace(plan.replica, edges=edges),))


def travelled(x, codec):
    """Return numbers as they come out at the other end."""
    data = torch.empty(codec.encoded_bytes(x.numel(), x.dtype), dtype=torch.uint8)
    out = torch.empty_like(x)
    codec.encode(x.detach().contiguous().view(-1), data)
    codec.decode(data, out.view(-1))
    return out


def train_by_hand(job, plan):
    """Train stage after stage in this process; return the weights."""
    tokens, replica = prepare_data(job.data, job.model), plan.replica
    stages = [
        build_stage(job.model, one.first_layer, one.end_layer, seed=job.seed, dtype=torch.float32)
        for one in replica.stages
    ]
    optimizers = [AdamW(named_state(stage), job.optimizer, job.steps) for stage in stages]
    codecs = [open_codec(edge.codec) for edge in replica.edges]
    for step in range(job.steps):
        batch = batch_of(job, replica, tokens, step)
        with compute_context(job.precision):
            for microbatch in range(replica.num_microbatches):
                ids, targets = batch(microbatch)
                leaves, outs = [], [stages[0](ids)]
                for stage, codec in zip(stages[1:], codecs, strict=True):
                    leaves.append(travelled(outs[-1], codec).requires_grad_())
                    outs.append(stage(leaves[-1]))
                outs[-1] = microbatch_loss(outs[-1], targets) / replica.num_microbatches
                torch.autograd.backward(outs[-1])
                for place in reversed(range(len(codecs))):
                    torch.autograd.backward(outs[place], travelled(leaves[place].grad, codecs[place]))
        squares = {layer: square for stage in stages for layer, square in squares_of_layers(stage).items()}
        norm = global_norm([squares[layer] for layer in sorted(squares)])
        for optimizer in optimizers:
            optimizer.step(step, norm)
    return {name: x.detach() for stage in stages for name, x in named_state(stage).items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("codecs", [("fp8",), ("bf16", "none"), ("fp8", "bf16")], ids=",".join)
def test_weights_are_the_bits_of_one_process_that_rounds_at_the_same_edges(codecs, precision, tmp_path):
    job = job_of(tmp_path, precision=precision, steps=3, model__tied_embeddings=False)
    fleet, plan = planned(job, codecs)
    found, events = run_replicas(job, fleet, plan)
    wanted = train_by_hand(job, plan)
    files = sorted(Path(found.checkpoint).glob("layer-*"))
    got = {key.removeprefix("weight:"): x for file in files for key, x in load_file(file).items() if "weight:" in key}
    assert [name for name, x in wanted.items() if not torch.equal(got[name], x)] == []
    assert sum(isinstance(event, EvalEvent) for event in events) == 1


def test_eight_bits_on_the_edge_train_nearly_as_well(tmp_path):
    losses = {}
    for codec in ("none", "fp8"):
        fleet, plan = planned(job := job_of(tmp_path, steps=20), (codec,))
        _, events = run_replicas(job, fleet, plan)
        losses[codec] = [event.loss for event in events if isinstance(event, StepEvent)][-1]
    assert losses["fp8"] != losses["none"]
    assert losses["fp8"] == pytest.approx(losses["none"], rel=0.02)


def test_only_the_named_edges_messages_are_coded_and_stamps_pass_whole():
    nodes = [open_node("inproc", rank) for rank in range(2)]
    low, high = None, None
    try:
        import threading

        opened = {}
        threads = [
            threading.Thread(
                target=lambda rank=rank: opened.__setitem__(
                    rank, nodes[rank].open(1 - rank, nodes[1 - rank].address, timeout_s=10)
                )
            )
            for rank in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        codec_of = {(1, Kind.F): open_codec("fp8")}
        low, high = (CodedEdge(opened[rank], codec_of, torch.float32) for rank in range(2))
        x = torch.linspace(-1, 1, 300)
        for tag, is_coded in (("7/1F0", True), ("7/1B0", False), ("eval/1/0", False), ("7/2F0", False)):
            got, stamp = torch.empty(300), bytearray(8)
            receiving = high.recv(tag, [got.numpy().view("uint8").data, memoryview(stamp)])
            low.send(tag, [x.numpy().view("uint8").data, b"12345678"]).wait(10)
            receiving.wait(10)
            receiving.wait(10)
            assert bytes(stamp) == b"12345678"
            assert torch.equal(got, x) != is_coded
            torch.testing.assert_close(got, x, rtol=0.07, atol=0.01)
    finally:
        for node in nodes:
            node.close()


def test_narrow_activations_of_float64_are_refused_before_anything_is_placed(tmp_path):
    fleet, plan = planned(job := job_of(tmp_path, precision="fp64"), ("fp8",))
    with pytest.raises(PlanError, match="narrow activations of float64"):
        run_replicas(job, fleet, plan)
