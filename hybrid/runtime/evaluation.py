"""Evaluation: the held-out loss, forwards only, over the stages of a pipeline.

A rank takes the microbatches one after the other, each through its stages in order: what a forward waits for comes
earlier in that order on every rank, so that no two can wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybrid.backends.base import Backend
from hybrid.config import JobConfig
from hybrid.models.sampler import held_out_batch
from hybrid.models.stage import boundary_dtype
from hybrid.models.tokens import TokenData
from hybrid.runtime.held_stages import HeldStage
from hybrid.runtime.interpreter import host_bytes
from hybrid.transports.base import Pending, Transport


def evaluate(
    held: Sequence[HeldStage],
    edges: Mapping[int, Transport],
    rank_of_stage: Sequence[int],
    *,
    rank: int,
    job: JobConfig,
    tokens: TokenData,
    backend: Backend,
    steps_done: int,
    timeout_s: float,
) -> float | None:
    """Return the mean held-out loss of this copy's samples where the last stage is held, else None.

    Args:
        held: this rank's stages, in pipeline order.
        edges: by pipeline rank.
        rank_of_stage: each stage's pipeline rank.
        rank: this one's number in the job.

    Raises:
        CommTimeout, PeerLost: a neighbour was silent or has gone.
    """
    own, total = rank_of_stage[held[0].plan.stage], 0.0
    plan = held[0].plan
    copy, num_samples = plan.ranks.index(rank) // plan.tensor_parallel, job.batch.microbatch // plan.width
    shape, dtype = held[0].stage.boundary_shape(num_samples), boundary_dtype(job.precision)
    sends: list[tuple[Pending, Tensor]] = []
    for number in range(job.evaluate.num_microbatches):
        inputs, targets = _held_out(job, tokens, number * job.batch.microbatch + copy * num_samples, num_samples)
        local: dict[int, Tensor] = {0: inputs}
        for one in held:
            stage = one.plan.stage
            borrowed = stage not in local
            if borrowed:
                local[stage] = backend.host_buffer(shape, dtype)
                tag = f"eval/{steps_done}/{stage}/{number}"
                edges[rank_of_stage[stage - 1]].recv(tag, [host_bytes(local[stage])]).wait(timeout_s)
            x = local.pop(stage)
            with one.compute.context():
                out = backend.to_host(one.compute.evaluate(backend.to_device(x), targets))
            if borrowed:
                backend.recycle(x)
            if one.compute.is_last:
                total += out.item()
            elif rank_of_stage[stage + 1] == own:
                local[stage + 1] = out
            else:
                edge = edges[rank_of_stage[stage + 1]]
                sends.append((edge.send(f"eval/{steps_done}/{stage + 1}/{number}", [host_bytes(out)]), out))
    for pending, _ in sends:
        pending.wait(timeout_s)
    return total / job.evaluate.num_microbatches if held[-1].compute.is_last else None


def _held_out(job: JobConfig, tokens: TokenData, first_sample: int, num_samples: int) -> tuple[Tensor, Tensor]:
    inputs, targets = held_out_batch(
        tokens.held_out_tokens,
        first_sample=first_sample,
        num_samples=num_samples,
        sequence_length=job.model.sequence_length,
    )
    return torch.from_numpy(inputs), torch.from_numpy(targets)
