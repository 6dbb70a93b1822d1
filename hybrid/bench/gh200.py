"""The fifteen plans that Sailor's authors ran on GH200 nodes, predicted: OPT-350M under Megatron-DeepSpeed.

Pure: takes parsed JSON. Nothing here is fitted to the fifteen; each constant names its source, and docs/simulator.md
says what is known of it and where the model falls short. What was measured (read in eth-easl/sailor, commit cf2c8e3):
seconds of `train_batch` on rank 0, mean of the steps from the fourth of ten; `max_mem`, the most that nvidia-smi shows
on any device after the last step, so that the allocator's cache, the CUDA context and NCCL's buffers count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hybrid.scheduler.schedules import build_schedule
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.sailor import read_sailor_network, read_sailor_profile
from hybrid.scheduler.search.table import ProfileTable
from hybrid.scheduler.step.build import all_reduce_s
from hybrid.scheduler.step.engine import simulate_step
from hybrid.scheduler.step.facts import EdgeCost, Message, Pipeline, Reduction, StageCost, StageMemory, TrainingStep
from hybrid.scheduler.step.result import StepResult

CHIP = "GH-96"
NODE_SIZE = 4
HBM_BYTES_PER_S = 4.0e12
"""NVIDIA GH200 data sheet, 96 GB HBM3."""
HOST_BYTES_PER_S = 20.9e9
"""One server core filling memory: Arm's published single-core DRAM rate (learn.arm.com, "Measure single-core
bandwidth", Graviton2). An older core than Grace's; no published figure for one Grace core was found."""
HOST_TO_DEVICE_BYTES_PER_S = 342e9
"""GH200's measured copy rate (vllm-project/vllm pull request 6496)."""
OUTSIDE_TORCH_BYTES = 4.76e9 + 0.3e9
"""CUDA context, kernels and NCCL's buffers as nvidia-smi shows them on this platform, as Sailor's artefact states it
(`get_memory_footprint_on_gpu`: kernel loading, plus 300 MB)."""
PROFILED_BLOCKS = 2
"""Sailor profiles a model of two blocks (`profile.sh`, `--num_prof_layers 2`): its update column is of that model."""
FLOAT_BYTES = 4
STATE_FLOATS = 4
"""Float32 Adam: weight, gradient, two moments."""
SCORE_MATRICES = 2
"""Attention's score matrices that live beside the saved ones: the preallocated product and the scores in a forward, the
gradients of probabilities and of scores in a backward (Megatron's attention without fused kernels)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the predictions are made from; all of it from Sailor's artefact."""

    table: ProfileTable
    between_nodes: Network
    inside_node: Mapping[int, LinkModel]
    """By chips of the node that take part; the bandwidth is that of all their pairs together."""
    sequence_length: int
    hidden_size: int
    num_heads: int

    @property
    def activation_bytes(self) -> int:
        """Between two layers, for one sample, whole."""
        return self.sequence_length * self.hidden_size * FLOAT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One of the fifteen plans, and what was measured."""

    name: str
    cuts: tuple[tuple[int, int], ...]
    """(first layer, end) by stage."""
    degree: int
    num_replicas: int
    microbatch: int
    num_microbatches: int
    step_s: float
    memory_bytes: float


def read_setup(
    profile: Mapping[str, Any],
    layer_sizes: Mapping[str, Any],
    inter_node: Mapping[str, Any],
    intra_node: Mapping[str, Any],
    training: Mapping[str, Any],
) -> Setup:
    """Return the set-up from the artefact's parsed files."""
    table = read_sailor_profile(
        training["model"], {CHIP: profile}, layer_sizes, sequence_length=training["sequence_length"]
    )
    return Setup(
        table=table,
        between_nodes=read_sailor_network({CHIP: {k: {CHIP: v[CHIP]} for k, v in inter_node[CHIP].items()}}),
        inside_node={int(n): LinkModel(polynomial=tuple(row[0])) for n, row in intra_node[CHIP].items()},
        sequence_length=training["sequence_length"],
        hidden_size=training["hidden_size"],
        num_heads=training["heads"],
    )


def read_measured(name: str, raw: Mapping[str, Any]) -> Measured:
    """Return one of the artefact's measured plans."""
    pipeline = raw["pipeline_list"][0]
    replicas = pipeline["dp"][0]
    return Measured(
        name=name,
        cuts=tuple((layers[0], layers[-1] + 1) for layers in pipeline["layers_per_stage"]),
        degree=pipeline["tmp_per_stage"][0][0][1],
        num_replicas=replicas,
        microbatch=raw["mbs"],
        num_microbatches=raw["gbs"] // (raw["mbs"] * replicas),
        step_s=raw["real"],
        memory_bytes=raw["max_mem"],
    )


def predict(setup: Setup, plan: Measured) -> StepResult:
    """Return the plan's simulated step."""
    stages = tuple(_stage(setup, plan, stage) for stage in range(len(plan.cuts)))
    message = _message(setup, plan)
    pipeline = Pipeline(
        name=plan.name,
        schedule=build_schedule("1f1b", len(stages), plan.num_microbatches),
        stages=stages,
        edges=tuple(EdgeCost(activation=message, gradient=message) for _ in pairwise(stages)),
        samples=plan.microbatch,
        count=plan.num_replicas,
    )
    # The engine calls dist.barrier() first (`_exec_reduce_tied_grads`), so that all stages reduce at the same time.
    everywhere = Reduction(
        name="gradients",
        members=tuple((0, stage) for stage in range(len(stages))),
        seconds=max(_reduce_s(setup, plan, cut) for cut in plan.cuts),
    )
    return simulate_step(
        TrainingStep(
            pipelines=(pipeline,),
            reductions=(everywhere,),
            tokens_per_sample=setup.sequence_length,
            source=setup.table.label,
        )
    )


def layer_seconds(setup: Setup, degree: int, microbatch: int, layer: int) -> tuple[float, float]:
    """Return a layer's forward and backward, the table's contradictions taken out.

    Where kernels are small the profile holds the time in which the host launched them, which jitters: one sample
    takes 2.38 ms on four chips, but 1.44 on two, and two samples 1.51 on four. Less work a rank (fewer samples, or a
    larger degree with the same kernels and all-reduces) can't take longer: the least is taken. Degree 1 has no
    all-reduce and is left out. Cells that the device's work decides are not changed by this.
    """
    cells = setup.table.cells
    more = [
        cell
        for (_, other, size), cell in cells.items()
        if (size >= microbatch and 1 < other <= degree) or (other, size) == (degree, microbatch)
    ]
    return min(cell.forward_s[layer] for cell in more), min(cell.backward_s[layer] for cell in more)


def _stage(setup: Setup, plan: Measured, stage: int) -> StageCost:
    first, end = plan.cuts[stage]
    layers = range(first, end)
    seconds = [layer_seconds(setup, plan.degree, plan.microbatch, layer) for layer in layers]
    backward_s = sum(row[1] for row in seconds)
    if plan.num_microbatches > 1:
        # The profile ran one microbatch a step; with more, each adds its gradients: two reads and a write.
        backward_s += 3 * _gradient_bytes(setup, plan, (first, end)) / HBM_BYTES_PER_S
    return StageCost(
        name=f"{plan.degree} {CHIP}",
        forward_s=sum(row[0] for row in seconds),
        input_gradient_s=backward_s / 2,
        weight_gradient_s=backward_s / 2,
        update_s=_update_s(setup, plan, (first, end)),
        num_ranks=plan.degree,
        memory=_memory(setup, plan, stage),
    )


def _gradient_bytes(setup: Setup, plan: Measured, cut: tuple[int, int]) -> int:
    return sum(setup.table.sizes[plan.degree].num_parameters[slice(*cut)]) * FLOAT_BYTES


def _update_s(setup: Setup, plan: Measured, cut: tuple[int, int]) -> float:
    """Return the update's seconds: the profile's a parameter, times the stage's parameters."""
    parameters = setup.table.sizes[plan.degree].num_parameters
    profiled = parameters[0] + PROFILED_BLOCKS * parameters[1] + parameters[-1]
    cell = setup.table.cells[CHIP, plan.degree, plan.microbatch]
    return cell.update_s / profiled * sum(parameters[slice(*cut)])


def _message(setup: Setup, plan: Measured) -> Message:
    """Return a message as DeepSpeed's pipeline engine handles it, blocking both ends.

    Each tensor-parallel rank sends its part (`PartitionedTensor`), all at once over an interface each. The receiver
    fills a whole activation with zeros on the host and copies it to the device, lays the part into it, gathers the
    others' parts inside the node, and clones the whole (`reconstruct_tensor`).
    """
    whole = setup.activation_bytes * plan.microbatch
    part = whole / plan.degree
    link = setup.between_nodes.find((CHIP,), (CHIP,), plan.degree, plan.degree)
    assert link is not None, "the artefact has the chip's own links"
    # The fit is of all lanes' bandwidth by one rank's bytes.
    wire_s = whole / _rate(link, part)
    host_s = whole / HOST_BYTES_PER_S + whole / HOST_TO_DEVICE_BYTES_PER_S
    # Bytes read and written: the part cloned twice and laid in (6 of it), the whole cloned (2 of it).
    copy_s = (6 * part + 2 * whole) / HBM_BYTES_PER_S
    return Message(sender_s=wire_s, receiver_s=wire_s + host_s + copy_s + _gather_s(setup, plan, part))


def _gather_s(setup: Setup, plan: Measured, part_bytes: float) -> float:
    """Return the seconds in which the ranks of a node gather one another's parts: a ring of degree - 1 messages."""
    if plan.degree == 1:
        return 0.0
    link = setup.inside_node[plan.degree]
    # The fit is of all pairs' bandwidth: half as many pairs as ranks.
    return (plan.degree - 1) * part_bytes / (_rate(link, part_bytes) / (plan.degree / 2))


def _reduce_s(setup: Setup, plan: Measured, cut: tuple[int, int]) -> float:
    """Return DeepSpeed's fallback all-reduce: gradients flattened into one buffer, reduced in a ring, copied back."""
    size = _gradient_bytes(setup, plan, cut)
    link = setup.between_nodes.find((CHIP,), (CHIP,), 1, 1)
    assert link is not None, "the artefact has the chip's own links"
    return all_reduce_s(link, size, plan.num_replicas) + 4 * size / HBM_BYTES_PER_S


def _rate(link: LinkModel, size_bytes: float) -> float:
    """Return the bytes/s of a message of this size."""
    return size_bytes / link.seconds(size_bytes)


def _memory(setup: Setup, plan: Measured, stage: int) -> StageMemory:
    """Return what a rank holds; the allocator keeps what it ever took: the reduction's buffer counts throughout."""
    first, end = plan.cuts[stage]
    sizes = setup.table.sizes[plan.degree]
    gradients = _gradient_bytes(setup, plan, (first, end))
    saved = sum(sizes.saved_bytes[first:end])
    taken = setup.activation_bytes if stage else 0
    scores = setup.num_heads // plan.degree * setup.sequence_length**2 * FLOAT_BYTES
    # The gradient of the logits lives beside them.
    logits = sizes.output_bytes[-1] if end == setup.table.num_layers else 0
    working = (SCORE_MATRICES * scores + logits) * plan.microbatch
    return StageMemory(
        fixed_bytes=OUTSIDE_TORCH_BYTES + gradients,
        state_bytes=STATE_FLOATS * gradients,
        held_bytes=(saved + taken) * plan.microbatch,
        forward_bytes=working,
        backward_bytes=working,
    )
