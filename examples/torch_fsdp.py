"""Fully sharded training with torch's FSDP2; of the backend only its name is said.

torchrun --nproc-per-node 2 examples/torch_fsdp.py --backend hybrid
"""

import argparse
import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def build_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 255), nn.GELU(), nn.Linear(255, 256), nn.GELU(), nn.Linear(256, 8))


def batch_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 32, generator=generator)
    return x, x[:, :8].sin()


def train(steps: int) -> tuple[list[float], str]:
    """Return each step's loss, averaged over the ranks, and the digest of the whole weights."""
    torch.manual_seed(0)
    model = build_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        x, y = batch_of(dist.get_rank(), step)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(total := loss.detach().clone())
        losses.append(total.item() / dist.get_world_size())
    wholes = [parameter.full_tensor().detach() for parameter in model.parameters()]
    return losses, hashlib.sha256(b"".join(whole.numpy().tobytes() for whole in wholes)).hexdigest()[:16]


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
