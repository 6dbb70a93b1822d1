"""Native groups over several processes: gloo for the CPU, the fake `neuron` library for Trainium cores."""

import multiprocessing
import socket
from typing import Any

import pytest

from hybrid.backends.native_group import open_native_group
from hybrid.errors import CommTimeout, DeviceError


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _member(name: str, ranks: list[int], rank: int, port: int, answers: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if name == "neuron":
        from hybrid.testing import fake_neuron

        fake_neuron.install()
    from hybrid.backends import open_backend
    from hybrid.hardware import load_catalog
    from hybrid.runtime.capabilities import capabilities_of

    chip = load_catalog().chip("trn2" if name == "neuron" else "cpu")
    backend = open_backend(name, capabilities_of(chip, None))
    group = backend.native_group(ranks, rank=rank, address=f"127.0.0.1:{port}", timeout_s=60.0)
    x = backend.to_device(torch.full((3,), float(rank)))
    dist.all_reduce(x, group=group)
    row = [backend.to_device(torch.zeros(1)) for _ in ranks]
    dist.all_gather(row, backend.to_device(torch.full((1,), float(rank))), group=group)
    refused = ""
    if name == "neuron":
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            refused = str(error)
    dist.barrier()
    dist.destroy_process_group()
    answers.put((rank, backend.to_host(x).tolist(), [float(backend.to_host(y)) for y in row], refused))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("cpu", [2, 5]), ("neuron", [4, 5, 6, 7])])
def test_every_member_gets_the_sum_and_the_row(name: str, ranks: list[int]) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = _free_port()
    members = [context.Process(target=_member, args=(name, ranks, rank, port, answers)) for rank in ranks]
    for member in members:
        member.start()
    found = sorted(answers.get(timeout=90.0) for _ in ranks)
    for member in members:
        member.join(30.0)
    assert [row[0] for row in found] == ranks
    for _, total, row, refused in found:
        assert total == [float(sum(ranks))] * 3
        assert row == [float(rank) for rank in ranks]
        assert (name == "cpu") or "takes neuron tensors" in refused


def test_a_member_that_never_comes_is_a_timeout() -> None:
    with pytest.raises(CommTimeout, match=r"not all of 2 ranks joined the gloo group"):
        open_native_group("gloo", [0, 1], rank=0, address=f"127.0.0.1:{_free_port()}", timeout_s=0.5)


@pytest.mark.parametrize(("ranks", "rank"), [([1, 0], 0), ([0, 0], 0), ([0, 1], 2)])
def test_ranks_out_of_order_or_without_this_one_are_refused(ranks: list[int], rank: int) -> None:
    with pytest.raises(DeviceError, match="must be ascending and hold this one"):
        open_native_group("gloo", ranks, rank=rank, address="127.0.0.1:1", timeout_s=1.0)
