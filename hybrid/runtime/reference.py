"""The reference: the same job in one process, the whole model micro-batch by micro-batch, no pipeline, no wire.

Readable before fast: every pipeline result is compared with this one. The order of every sum is the pipeline's:
a parameter's gradient over a replica's microbatches in their order; a tied weight's as (head's sum) + (embedding's
sum); then over the replicas in theirs; the norm over blocks and layers in theirs. So the numbers are the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hybrid.config import JobConfig
from hybrid.errors import TrainingDiverged
from hybrid.models.sampler import batch_at, held_out_batch
from hybrid.models.stage import (
    Stage,
    build_stage,
    compute_context,
    microbatch_loss,
    named_state,
    parameter_dtype,
)
from hybrid.models.tokens import TokenData
from hybrid.observe.events import CheckpointEvent, EvalEvent, PhaseEvent, Sink, StepEvent
from hybrid.runtime import checkpoint
from hybrid.runtime.exchange import add_tied_gradients
from hybrid.runtime.optimizer import AdamW, global_norm, learning_rate
from hybrid.runtime.stage_state import StageState, is_due, squares_of_layers


class Share(Protocol):
    """One replica's share of the global batch; a `ReplicaPlan` is one."""

    @property
    def first_sample(self) -> int:
        """Where it starts."""

    @property
    def num_microbatches(self) -> int:
        """How many it has."""

    @property
    def microbatch(self) -> int:
        """Samples in one."""


def train_reference(
    job: JobConfig,
    tokens: TokenData,
    *,
    run_dir: Path,
    resume: Path | None,
    sink: Sink,
    replicas: Sequence[Share] | None = None,
) -> None:
    """Train the job in this process, with the events, metrics and checkpoints of a pipeline run.

    Args:
        replicas: whose order of sums to follow; None: one, of the job's microbatches.
    """
    started_s = time.monotonic()
    torch.set_num_threads(job.runtime.threads_per_rank)
    model = build_stage(job.model, 0, job.model.num_layers, seed=job.seed, dtype=parameter_dtype(job.precision))
    optimizer = AdamW(named_state(model), job.optimizer, job.steps)
    state = StageState(model, optimizer)
    first_step = 0 if resume is None else state.load(resume)
    sink(PhaseEvent(name="model built", since_start_s=time.monotonic() - started_s))
    for step in range(first_step, job.steps):
        step_started_s = time.monotonic()
        loss = accumulate_gradients(model, job, tokens, step, replicas)
        norm = global_norm(list(squares_of_layers(model).values()))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDiverged.at(step, loss, norm)
        optimizer.step(step, norm)
        seconds = time.monotonic() - step_started_s
        sink(
            StepEvent(
                step=step,
                loss=loss,
                grad_norm=norm,
                learning_rate=learning_rate(job.optimizer, step, job.steps),
                seconds=seconds,
                tokens_per_s=job.batch.global_batch * job.model.sequence_length / seconds,
                idle_share_of_rank=(0.0,),
                overrun_s=0.0,
                since_start_s=time.monotonic() - started_s,
            )
        )
        done = step + 1
        if is_due(job.evaluate.every_steps, at_end=job.evaluate.at_end and done == job.steps, steps_done=done):
            sink(EvalEvent(steps_done=done, loss=held_out_loss(model, job, tokens)))
        if is_due(job.checkpoint.every_steps, at_end=job.checkpoint.at_end and done == job.steps, steps_done=done):
            _write(state, job, tokens, run_dir, done, sink)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    first_sample: int
    num_microbatches: int
    microbatch: int


def accumulate_gradients(
    model: Stage, job: JobConfig, tokens: TokenData, step: int, replicas: Sequence[Share] | None = None
) -> float:
    """Leave the step's gradients in the parameters; return its loss, the mean over its samples.

    Args:
        replicas: see `train_reference`.
    """
    batch = job.batch
    whole = _Whole(first_sample=0, num_microbatches=batch.num_microbatches, microbatch=batch.microbatch)
    parameters = list(model.parameters())
    total, sums = 0.0, list[Tensor | None]()
    for share in replicas or (whole,):
        total += _accumulate_share(model, job, tokens, step, share)
        if job.model.tied_embeddings:
            add_tied_gradients(job.model, named_state(model), (), step=step, timeout_s=0.0)
        grads = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        sums = [_sum(*pair) for pair in zip(sums, grads, strict=True)] if sums else grads
    for parameter, grad in zip(parameters, sums, strict=True):
        parameter.grad = grad
    return total


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one.add_(other)


def _accumulate_share(model: Stage, job: JobConfig, tokens: TokenData, step: int, share: Share) -> float:
    """Add one replica's gradients to the parameters'; return its share of the step's loss."""
    # Microbatches of this size in the whole step.
    divisor = job.batch.global_batch / share.microbatch
    total = 0.0
    with compute_context(job.precision):
        for microbatch in range(share.num_microbatches):
            inputs, targets = batch_at(
                tokens.train_tokens,
                seed=job.seed,
                step=step,
                global_batch=job.batch.global_batch,
                first_sample=share.first_sample + microbatch * share.microbatch,
                num_samples=share.microbatch,
                sequence_length=job.model.sequence_length,
            )
            loss = microbatch_loss(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
            torch.autograd.backward(loss / divisor)
            total += loss.item()
    return total / divisor


@torch.no_grad()
def held_out_loss(model: Stage, job: JobConfig, tokens: TokenData) -> float:
    """Return the mean loss over the job's held-out microbatches, in nats a token."""
    total = 0.0
    for number in range(job.evaluate.num_microbatches):
        inputs, targets = held_out_batch(
            tokens.held_out_tokens,
            first_sample=number * job.batch.microbatch,
            num_samples=job.batch.microbatch,
            sequence_length=job.model.sequence_length,
        )
        with compute_context(job.precision):
            loss: Tensor = microbatch_loss(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
        total += loss.item()
    return total / job.evaluate.num_microbatches


def _write(state: StageState, job: JobConfig, tokens: TokenData, run_dir: Path, steps_done: int, sink: Sink) -> None:
    folder = checkpoint.checkpoint_folder(run_dir, steps_done)
    files: Mapping[str, checkpoint.FileFact] = state.write(folder)
    facts = checkpoint.job_facts(job, tokens.sha256)
    checkpoint.commit_checkpoint(folder, steps_done=steps_done, facts=facts, files=files, keep=job.checkpoint.keep)
    sink(CheckpointEvent(steps_done=steps_done, num_bytes=sum(fact.size_bytes for fact in files.values())))
