"""The stages that a rank holds: each with its compute, its optimizer and its state on disk.

Builds them from the plan; opens no edge, runs no step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hybrid.backends.base import Backend
from hybrid.backends.number_emulation import emulate_matmuls
from hybrid.models.stage import Stage, build_stage, named_state, parameter_dtype
from hybrid.models.tensor_parallel import TensorParallel
from hybrid.runtime.axes import SINGLE, StageAxes
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.optimizer import STATE_NAMES, AdamW
from hybrid.runtime.ownership import owned_slices, shared_layers
from hybrid.runtime.placement import WorkerSpec
from hybrid.runtime.stage_numerics import declared_numerics
from hybrid.runtime.stage_state import StageState, squares_of_layers
from hybrid.scheduler.actions import Kind, Schedule
from hybrid.scheduler.plan import StagePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldStage:
    """One stage at work on this rank."""

    plan: StagePlan
    stage: Stage
    compute: StageCompute
    optimizer: AdamW
    state: StageState


def build_held_stages(spec: WorkerSpec, backend: Backend, axes: StageAxes = SINGLE) -> tuple[HeldStage, ...]:
    """Return the rank's stages, in pipeline order, on its device.

    Args:
        axes: over which ranks they are shared out.

    Raises:
        torch.OutOfMemoryError: weights, gradients and optimizer state do not fit.
    """
    return tuple(_build(spec, plan, backend, axes) for plan in spec.plan.stages_of_rank(spec.rank))


def _build(spec: WorkerSpec, plan: StagePlan, backend: Backend, axes: StageAxes) -> HeldStage:
    job = spec.job
    dtype = parameter_dtype(job.precision)
    parallel = None
    if axes.tensor is not None:
        parallel = TensorParallel(axis=axes.tensor, sequence_parallel=job.runtime.sequence_parallel)
    stage = build_stage(job.model, plan.first_layer, plan.end_layer, seed=job.seed, dtype=dtype, parallel=parallel)
    # With DiLoCo each replica runs an optimizer of its own, over everything.
    owned = None if job.diloco else owned_slices(shared_layers(job, spec.plan, spec.rank), stage)
    backend.allocate(_state_bytes(stage, owned), "weights, gradients and optimizer state")
    stage = backend.place(stage)
    numerics = declared_numerics(job, island=plan.island, chip=spec.chip, backend=plan.backend)
    if numerics is not None:
        emulate_matmuls(stage, numerics, seed=job.seed + plan.stage)
    replica = spec.plan.replica_of_rank(spec.rank)
    samples = replica.num_samples if job.diloco else spec.plan.global_batch
    compute = StageCompute(
        stage,
        backend,
        precision=job.precision,
        # Each copy of the stage sees its part of a microbatch's samples; the step's loss is the mean over all.
        num_microbatches=samples / replica.microbatch * plan.width,
        # A compiled backward is one function: its two parts cannot come apart.
        splits=not job.runtime.compile and splits_backward(replica.build_schedule(), plan.stage),
        recompute=plan.recompute,
    )
    optimizer = AdamW(named_state(stage), job.optimizer, job.steps, owned)
    state = StageState(stage, optimizer, place=plan.ranks.index(spec.rank), width=plan.width)
    return HeldStage(plan=plan, stage=stage, compute=compute, optimizer=optimizer, state=state)


def _state_bytes(stage: Stage, owned: Mapping[str, slice] | None) -> int:
    """Return the bytes of weights and gradients, and of the moments of what the rank owns."""
    size_of_element = next(stage.parameters()).element_size()
    elements = sum(p.numel() for p in stage.parameters())
    moments = elements if owned is None else sum(part.stop - part.start for part in owned.values())
    return size_of_element * (2 * elements + len(STATE_NAMES) * moments)


def splits_backward(schedule: Schedule, stage: int) -> bool:
    """Return whether a schedule runs any of a stage's backwards in two parts."""
    actions = schedule.actions_of_rank[schedule.rank_of_stage[stage]]
    return any(action.stage == stage and action.kind is Kind.I for action in actions)


def parameters_of(held: tuple[HeldStage, ...]) -> dict[str, Tensor]:
    """Return the parameters of all of a rank's stages by their names in the whole model."""
    return {name: tensor for one in held for name, tensor in named_state(one.stage).items()}


def squares_of(held: tuple[HeldStage, ...], axes: StageAxes) -> Mapping[int, float]:
    """Return the sum of squared gradients of each layer of a rank's stages, of all the ranks that hold its parts."""
    return {layer: square for one in held for layer, square in squares_of_layers(one.stage, axes).items()}
