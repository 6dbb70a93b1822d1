"""Device tensors in a `hybrid` world: a rank on a (fake) Trainium core beside one on the CPU, and two on such cores."""

from collections.abc import Iterator
from typing import Any

import pytest

from hybrid.collectives.torch_facts import RankFacts
from hybrid.collectives.torch_native import native_device
from hybrid.testing.rank_processes import RankProcesses

pytestmark = pytest.mark.timeout(180)


def _facts(rank: int, accelerator: str, island: str = "") -> RankFacts:
    return RankFacts(rank=rank, host="a", transport="auto", accelerator=accelerator, island=island)


@pytest.mark.parametrize(
    ("members", "device"),
    [
        ([_facts(0, "cuda"), _facts(1, "cuda")], "cuda"),
        ([_facts(0, "cuda"), _facts(1, "neuron")], ""),
        ([_facts(0, "cuda", "here"), _facts(1, "cuda", "there")], ""),
        ([_facts(0, "neuron", "x"), _facts(1, "neuron", "x")], "neuron"),
        ([_facts(0, ""), _facts(1, "")], ""),
        ([_facts(0, "cuda"), _facts(1, "")], ""),
    ],
)
def test_the_vendors_library_is_used_where_it_reaches_every_member(members: list[RankFacts], device: str) -> None:
    assert native_device(members) == device


# New processes for each test: the fake device is installed before the first backward.
@pytest.fixture
def ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks


def _on_devices(rank: int, size: int, store: str, neuron_ranks: list[int]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from hybrid.testing import fake_neuron
    from hybrid.testing.c10d_kit import world

    if rank in neuron_ranks:
        fake_neuron.install()
    device = "neuron" if rank in neuron_ranks else "cpu"
    found: dict[str, Any] = {}
    with world("hybrid", rank, size, store):
        x = torch.arange(5.0, device="cpu").add(rank).to(device)
        dist.all_reduce(x)
        found["sum"] = x.cpu().tolist()
        y = torch.full((2, 3), float(rank)).to(device)
        dist.broadcast(y, src=1)
        found["root"] = y.cpu().flatten().tolist()
        outs = [torch.zeros(2).to(device) for _ in range(size)]
        dist.all_gather(outs, torch.full((2,), float(rank)).to(device))
        found["gathered"] = [out.cpu().tolist() for out in outs]
        z = torch.full((3,), 7.0 + rank).to(device)
        dist.send(z, dst=1) if rank == 0 else dist.recv(z, src=0)
        found["sent"] = z.cpu().tolist()
        on_host = torch.ones(2)
        dist.all_reduce(on_host)
        found["host"] = on_host.tolist()
        names: list[Any] = [None] * size
        dist.all_gather_object(names, device)
        found["objects"] = names
        work = dist.all_reduce(torch.ones(2).to(device), async_op=True)
        work.wait()
        dist.barrier()
        native = dist.group.WORLD._native_group
        found["native"] = None if native is None else native.getBackendName()
        found["weights"] = _ddp(rank, device)
    return found


def _ddp(rank: int, device: str) -> list[float]:
    import torch
    from torch import nn

    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        x = torch.full((2, 4), 0.1 * (rank + step)).to(device)
        wrapped.zero_grad()
        wrapped(x).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()]).tolist()


def _check(found: list[dict[str, Any]], native: str | None, devices: list[str]) -> None:
    for each in found:
        assert each["sum"] == [1.0, 3.0, 5.0, 7.0, 9.0]
        assert each["root"] == [1.0] * 6
        assert each["gathered"] == [[0.0, 0.0], [1.0, 1.0]]
        assert each["sent"] == [7.0] * 3
        assert each["host"] == [2.0, 2.0]
        assert each["objects"] == devices
        assert each["native"] == native
    assert found[0]["weights"] == found[1]["weights"]


@pytest.mark.slow
def test_a_rank_on_trainium_and_one_on_the_cpu_train_one_model_through_the_host(ranks: RankProcesses) -> None:
    found = ranks.run(_on_devices, ranks.new_store(), [0], timeout_s=90.0)
    _check(found, None, ["neuron", "cpu"])


@pytest.mark.slow
def test_two_ranks_on_trainium_use_its_own_library(ranks: RankProcesses) -> None:
    found = ranks.run(_on_devices, ranks.new_store(), [0, 1], timeout_s=90.0)
    _check(found, "neuron", ["neuron", "neuron"])
