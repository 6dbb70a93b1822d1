"""What a worker reads: the job's token file, and each step's microbatches out of it."""

from __future__ import annotations

import socket

import torch
from torch import Tensor

from hybrid.config import JobConfig
from hybrid.errors import DataError
from hybrid.models.sampler import batch_at
from hybrid.models.tokens import TokenData, open_tokens, prepare_data
from hybrid.runtime.interpreter import Batch
from hybrid.runtime.placement import WorkerSpec
from hybrid.scheduler.plan import ReplicaPlan


def batch_of(
    job: JobConfig, replica: ReplicaPlan, tokens: TokenData, step: int, *, copy: int = 0, width: int = 1
) -> Batch:
    """Return what gives a step's microbatches: a pure function of the seed, the step and the sample.

    Args:
        copy, width: of each microbatch, one stage's copy takes the `copy`-th of `width` equal parts.
    """
    num_samples = replica.microbatch // width

    def batch(microbatch: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batch_at(
            tokens.train_tokens,
            seed=job.seed,
            step=step,
            global_batch=job.batch.global_batch,
            first_sample=replica.first_sample + microbatch * replica.microbatch + copy * num_samples,
            num_samples=num_samples,
            sequence_length=job.model.sequence_length,
        )
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    return batch


def tokens_of(spec: WorkerSpec) -> TokenData:
    """Return the job's token file: the driver's where this host sees it, else one made here from the same corpus.

    Raises:
        DataError: this host's corpus gives other tokens, for example by another Python version.
    """
    shared = spec.tokens_dir.is_dir()
    tokens = open_tokens(spec.tokens_dir) if shared else prepare_data(spec.job.data, spec.job.model)
    if tokens.sha256 != spec.data_digest:
        raise DataError(
            f"host {socket.gethostname()} makes other tokens than the driver",
            value=tokens.sha256[:12],
            valid=spec.data_digest[:12],
            fix="use the same release of Python on every node, or `data.path` on a shared folder",
        )
    return tokens
