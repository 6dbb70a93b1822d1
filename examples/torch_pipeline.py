"""Pipeline training with torch.distributed.pipelining, one stage a rank; of the backend only its name is said.

torchrun --nproc-per-node 2 examples/torch_pipeline.py --backend hybrid
"""

import argparse
import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

MICROBATCHES = 4


def build_stage(rank: int, size: int) -> nn.Module:
    """Return this rank's part: stages of other widths, so that every edge carries another shape."""
    torch.manual_seed(rank)
    wide = [32, *(64 + 32 * stage for stage in range(size - 1)), 8]
    return nn.Sequential(nn.Linear(wide[rank], 128), nn.GELU(), nn.Linear(128, wide[rank + 1]))


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 32, generator=generator)
    return x, x[:, :8].sin()


def train(steps: int) -> tuple[list[float], str]:
    """Return each step's loss and the digest of all stages' weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    module = build_stage(rank, size)
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = batch_of(step)
        optimizer.zero_grad()
        parts: list[torch.Tensor] = []
        if rank == 0 and size == 1:
            schedule.step(x, target=y, losses=parts)
        elif rank == 0:
            schedule.step(x)
        elif rank == size - 1:
            schedule.step(target=y, losses=parts)
        else:
            schedule.step()
        optimizer.step()
        shared = [sum(part.item() for part in parts) / MICROBATCHES]
        dist.broadcast_object_list(shared, src=size - 1)
        losses.append(shared[0])
    own = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()
    all_stages: list[str] = [""] * size
    dist.all_gather_object(all_stages, own)
    return losses, hashlib.sha256("".join(all_stages).encode()).hexdigest()[:16]


def main(words: list[str] | None = None) -> tuple[list[float], str]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["gloo", "hybrid"], default="hybrid")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args(words)
    dist.init_process_group(arguments.backend)
    losses, digest = train(arguments.steps)
    if dist.get_rank() == 0:
        print(f"{dist.get_backend()}: loss {losses[0]:.6f} to {losses[-1]:.6f}, weights {digest}")
    dist.destroy_process_group()
    return losses, digest


if __name__ == "__main__":
    main()
