"""The arm that one would use instead: torch's own Schedule1F1B over gloo; nothing of our runtime runs in a step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from hybrid.bench.arm import WAIT_S, Arm, build_layers, samples
from hybrid.bench.workload import Workload
from hybrid.models.stage import boundary_shape, microbatch_loss


@final
class TorchRank(Arm):
    """One rank, set up as well as torch allows.

    Shapes are given ahead, so that no step infers them; outputs are not gathered; the loss is divided by the number of
    microbatches, which spares the pass over all gradients that `scale_grads` would make, and gives our numbers' bits.

    Args:
        store: a path for the rendezvous; must not exist.
    """

    def __init__(self, rank: int, num_ranks: int, store: str) -> None:
        super().__init__()
        self._rank, self._num_ranks = rank, num_ranks
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, num_ranks),  # type: ignore[attr-defined] # exported, but not by `__all__`
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=WAIT_S),
        )

    def load(self, workload: Workload) -> None:
        self._workload = workload
        self._stage = build_layers(workload, workload.layers(self._rank))
        self.stages = (self._stage,)
        shape = boundary_shape(workload.model, workload.microbatch)
        boundary = torch.empty(shape, requires_grad=True)
        ids = torch.zeros(shape[:2], dtype=torch.int64)
        logits = torch.empty((*shape[:2], workload.model.vocab_size), requires_grad=True)
        pipeline_stage = PipelineStage(
            self._stage,
            self._rank,
            self._num_ranks,
            torch.device("cpu"),
            input_args=ids if self._stage.is_first else boundary,
            output_args=logits if self._stage.is_last else boundary,
        )
        self._schedule = Schedule1F1B(
            pipeline_stage, workload.num_microbatches, loss_fn=self._share_of_loss, scale_grads=False
        )

    def prepare(self, step: int) -> None:
        self._ids, self._targets = samples(self._workload, step)

    def step(self, step: int) -> float | None:
        inputs = (self._ids,) if self._stage.is_first else ()
        targets = self._targets if self._stage.is_last else None
        losses: list[Tensor] = []
        self._schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        # Shares of a power of two of microbatches: their sum has the bits of the mean.
        return sum(share.item() for share in losses) if self._stage.is_last else None

    def answer(self, message: object) -> Any:
        raise TypeError(f"a rank of torch is asked for {message}")

    def _share_of_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return microbatch_loss(logits, targets) / self._workload.num_microbatches
