"""What a Neuron process's environment must hold, and who gets which cores: decided without a Trainium."""

import sys
from pathlib import Path

import pytest

from hybrid.config import FleetConfig, IslandConfig, parse_job
from hybrid.errors import FleetError, MachineError
from hybrid.hardware import build_fleet, load_catalog
from hybrid.hardware.bundles import bundles_of_ranks
from hybrid.hardware.discovery import NodeFacts, devices_seen, fleet_of_nodes
from hybrid.hardware.fleet import fleet_to_config
from hybrid.hardware.neuron_environment import (
    GrantedCores,
    NeuronProcess,
    cores_of_text,
    cores_text,
    merged_flags,
    neuron_environment,
    processes_of_ranks,
)
from hybrid.runtime import device_environment


def granted(rank: int, cores: tuple[int, ...], node: str = "10.0.0.1", island: str = "a") -> GrantedCores:
    return GrantedCores(rank=rank, island=island, node=node, cores=cores, free_port=40000 + rank)


def deal(*rows: GrantedCores, seed: int | None = None) -> dict[int, NeuronProcess]:
    return processes_of_ranks(rows, cores_a_chip=4, physical_cores_a_logical=2, stochastic_rounding_seed=seed)


def test_a_process_alone_gets_its_cores_and_no_meeting_point() -> None:
    found = neuron_environment(NeuronProcess(cores=(4, 5, 6, 7), physical_cores_a_logical=2))
    assert found == {
        "NEURON_RT_VISIBLE_CORES": "4-7",
        "NEURON_LOGICAL_NC_CONFIG": "2",
        "NEURON_CC_FLAGS": "--auto-cast=none --model-type=transformer --lnc=2",
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "0",
        "NEURON_RT_STOCHASTIC_ROUNDING_SEED": "0",
    }


def test_a_group_over_two_nodes_meets_at_its_first_rank_and_travels_by_efa() -> None:
    rows = [granted(rank, (rank % 4,), node=f"10.0.0.{1 + rank // 4}") for rank in range(8)]
    environments = {rank: neuron_environment(one) for rank, one in deal(*rows).items()}
    assert {e["NEURON_RT_ROOT_COMM_ID"] for e in environments.values()} == {"10.0.0.1:40000"}
    assert all(e["FI_PROVIDER"] == "efa" and e["FI_EFA_USE_DEVICE_RDMA"] == "1" for e in environments.values())
    assert [environments[rank]["NEURON_RT_VISIBLE_CORES"] for rank in range(8)] == list("01230123")


def test_a_group_on_one_node_needs_no_efa() -> None:
    found = neuron_environment(deal(*(granted(rank, (rank,)) for rank in range(4)))[3])
    assert "FI_PROVIDER" not in found
    assert found["NEURON_RT_ROOT_COMM_ID"] == "10.0.0.1:40000"


def test_each_island_meets_at_a_place_of_its_own() -> None:
    rows = [granted(rank, (rank,), island="ab"[rank // 4]) for rank in range(8)]
    found = deal(*rows)
    assert [found[rank].root_comm for rank in (0, 7)] == ["10.0.0.1:40000", "10.0.0.1:40004"]


def test_scattered_cores_of_whole_chips_are_dealt_so_that_neighbours_are_neighbours() -> None:
    rows = [granted(rank, (core,)) for rank, core in enumerate((6, 3, 1, 4, 0, 7, 2, 5))]
    assert [deal(*rows)[rank].cores for rank in range(8)] == [(core,) for core in range(8)]


def test_the_last_chip_may_be_used_in_part() -> None:
    rows = [granted(rank, (rank,)) for rank in range(6)]
    assert [deal(*rows)[rank].cores for rank in range(6)] == [(core,) for core in range(6)]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([granted(0, (3,)), granted(1, (4,))], r"parts of several chips.*3, 4.*whole chips of 4"),
        ([granted(0, (0,)), granted(1, (0,))], r"one core to two ranks.*'0'"),
        ([granted(0, ())], "no core"),
    ],
)
def test_cores_that_are_no_whole_chips_are_refused(rows: list[GrantedCores], told: str) -> None:
    with pytest.raises(FleetError, match=told):
        deal(*rows)


@pytest.mark.parametrize(("cores", "text"), [((0,), "0"), ((4, 5), "4-5"), (tuple(range(64)), "0-63")])
def test_cores_are_written_as_a_range_and_read_back(cores: tuple[int, ...], text: str) -> None:
    assert cores_text(cores) == text
    assert cores_of_text(text) == cores
    assert cores_of_text(",".join(map(str, cores))) == cores


@pytest.mark.parametrize("cores", [(), (0, 2), (3, 2)])
def test_cores_with_a_gap_are_refused(cores: tuple[int, ...]) -> None:
    with pytest.raises(FleetError, match="must be neighbours"):
        cores_text(cores)


@pytest.mark.parametrize("text", ["a", "1-", "1;2", "-3"])
def test_unreadable_cores_are_refused_by_name(text: str) -> None:
    with pytest.raises(FleetError, match="NEURON_RT_VISIBLE_CORES"):
        cores_of_text(text)


def test_the_users_compiler_flags_stay_where_they_name_no_option_of_ours() -> None:
    ours = "--auto-cast=none --lnc=2"
    assert merged_flags(ours, "--auto-cast=all --optlevel=3 --lnc 1") == "--auto-cast=none --lnc=2 --optlevel=3"


def test_chance_cache_and_queue_are_set_where_they_are_asked_for() -> None:
    process = NeuronProcess(
        cores=(0,),
        physical_cores_a_logical=1,
        stochastic_rounding_seed=7,
        compile_cache="/shared/neff",
        max_inflight=4,
    )
    found = neuron_environment(process)
    assert (found["NEURON_RT_STOCHASTIC_ROUNDING_EN"], found["NEURON_RT_STOCHASTIC_ROUNDING_SEED"]) == ("1", "7")
    assert found["TORCH_NEURONX_NEFF_CACHE_DIR"] == "/shared/neff"
    assert found["NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"] == "4"


def _island(device: str, backend: str, count: int = 1):
    config = FleetConfig(islands=(IslandConfig(name="a", device=device, backend=backend, count=count),))
    return build_fleet(config).island("a")


def test_a_trainium_is_as_many_ranks_as_it_has_logical_cores() -> None:
    chip, part = _island("trn2", "emulated"), _island("trn2", "neuron", count=2)
    assert (part.num_chips, part.ranks_per_chip) == (8, 4)
    assert part.memory_bytes == chip.memory_bytes // 4 == 24 * 2**30
    assert part.speed == 0.25
    whole = _island("trn2.48xlarge", "neuron")
    assert whole.num_chips == 64


@pytest.mark.parametrize(("device", "backend"), [("trn2", "neuron"), ("trn2.48xlarge", "neuron"), ("h100", "cuda")])
def test_a_fleet_with_real_backends_survives_its_own_yaml(device: str, backend: str) -> None:
    config = FleetConfig(islands=(IslandConfig(name="a", device=device, backend=backend, count=2),))
    fleet = build_fleet(config)
    assert build_fleet(fleet_to_config(fleet)) == fleet


@pytest.mark.parametrize(
    ("device", "backend", "told"),
    [
        ("trn1", "neuron", r"neuron cannot play the chip trn1.*valid: auto, emulated\."),
        ("h100", "neuron", r"neuron cannot play the chip h100.*auto, emulated, cuda"),
        ("trn2", "cuda", r"cuda cannot play the chip trn2.*auto, emulated, neuron"),
        ("cpu", "cuda", r"cuda cannot play the chip cpu.*auto, emulated, cpu"),
    ],
)
def test_a_backend_that_cannot_drive_the_chip_is_refused(device: str, backend: str, told: str) -> None:
    with pytest.raises(FleetError, match=told):
        _island(device, backend)


def test_ranks_of_one_chip_share_a_bundle_of_the_whole_chip() -> None:
    neuron, cuda = _island("trn2", "neuron", count=2), _island("h100", "cuda", count=2)
    found = bundles_of_ranks([neuron] * 6 + [cuda] * 2)
    assert found.resources == ({"neuron_cores": 4.0}, {"neuron_cores": 4.0}, {"GPU": 1.0}, {"GPU": 1.0})
    assert found.bundle_of_rank == (0, 0, 0, 0, 1, 1, 2, 3)
    assert found.share_of_rank[5:7] == ({"neuron_cores": 1.0}, {"GPU": 1.0})


def test_an_emulated_chip_in_a_real_ones_place_takes_all_of_it() -> None:
    found = bundles_of_ranks([_island("trn2", "emulated", count=2)] * 2, ["neuron_cores", "CPU"])
    assert found.bundle_of_rank == (0, 1)
    assert found.share_of_rank == ({"neuron_cores": 4.0}, {"neuron_cores": 4.0})


def test_a_device_is_real_where_it_was_seen_and_rehearsed_where_it_was_only_declared(tmp_path: Path) -> None:
    (tmp_path / "neuron0").touch()
    (tmp_path / "nvidiactl").touch()
    assert devices_seen(tmp_path) == {"neuron_cores"}
    (tmp_path / "nvidia0").touch()
    assert devices_seen(tmp_path) == {"neuron_cores", "GPU"}
    catalog = load_catalog()

    def backend(resources: dict[str, float], chip: str, seen: frozenset[str]) -> str:
        node = NodeFacts(node_id="n", address="10.0.0.1", resources=resources, labels={"hybrid.chip": chip}, seen=seen)
        return fleet_of_nodes([node], catalog).islands[0].backend

    assert backend({"neuron_cores": 8}, "trn2", frozenset({"neuron_cores"})) == "neuron"
    assert backend({"neuron_cores": 8}, "trn2", frozenset()) == "auto"
    assert backend({"neuron_cores": 2}, "trn1", frozenset({"neuron_cores"})) == "auto"
    assert backend({"GPU": 8}, "h100", frozenset({"GPU"})) == "cuda"


def test_variables_come_before_torch_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: dict[str, str] = {}
    monkeypatch.setattr(device_environment, "set_environment", applied.update)
    monkeypatch.setenv("NEURON_CC_FLAGS", "--optlevel=1")
    monkeypatch.setitem(sys.modules, "torch", sys)
    device_environment.apply_before_torch({})
    with pytest.raises(MachineError, match=r"torch was imported before.*NEURON_LOGICAL_NC_CONFIG"):
        device_environment.apply_before_torch({"NEURON_LOGICAL_NC_CONFIG": "2"})
    assert applied == {}
    monkeypatch.delitem(sys.modules, "torch")
    device_environment.apply_before_torch({"NEURON_CC_FLAGS": "--lnc=2"})
    assert applied == {"NEURON_CC_FLAGS": "--lnc=2 --optlevel=1"}


def test_a_job_asks_for_graphs_caches_and_chance_by_its_runtime_keys() -> None:
    job = parse_job(
        {
            "fleet": {"islands": [{"name": "a", "device": "trn2", "backend": "neuron"}]},
            "runtime": {"compile": True, "compile_cache": "/neff", "stochastic_rounding": True},
        }
    )
    assert (job.runtime.compile, job.runtime.compile_timeout_s) == (True, 1800.0)
