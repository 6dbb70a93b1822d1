"""What a process that drives NeuronCores must have in its environment before it first imports torch.

Pure: from which cores, which communicator and which options to variables and values; and from the cores that a
cluster handed out to which rank takes which. The launcher applies the result by `hybrid.config.set_environment`. May
import only `errors`.

Source:
    AWS Neuron documentation, Neuron Runtime and TorchNeuron environment variables (SDK 2.33), read 2026-11;
    ray-project/ray#65070 for what a group over several instances lacks when nobody sets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybrid.errors import FleetError

COMPILER_FLAGS = ("--auto-cast=none", "--model-type=transformer")
"""Products stay in the format that the job asks for: parity across vendors needs it."""
EFA_VARIABLES: Mapping[str, str] = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_FORK_SAFE": "1"}
"""What collectives between instances need of libfabric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronProcess:
    """One process and the logical cores that it drives."""

    cores: tuple[int, ...]
    """Numbers of logical cores on their node, ascending and without a gap."""
    physical_cores_a_logical: int
    """LNC: must be the same when compiling and when running."""
    root_comm: str | None = None
    """HOST:PORT at which all processes of the island's group meet; None for a process alone."""
    spans_nodes: bool = False
    """Whether the group lies on several nodes, so that EFA carries it."""
    stochastic_rounding_seed: int | None = None
    """None rounds to nearest."""
    compile_cache: str | None = None
    """Folder of compiled graphs; None leaves the vendor's default."""
    max_inflight: int | None = None
    """Requests that the runtime queues ahead; None leaves the vendor's default."""


def neuron_environment(process: NeuronProcess) -> dict[str, str]:
    """Return the variables of a process and their values.

    Raises:
        FleetError: the cores have a gap.
    """
    lnc = str(process.physical_cores_a_logical)
    found = {
        "NEURON_RT_VISIBLE_CORES": cores_text(process.cores),
        "NEURON_LOGICAL_NC_CONFIG": lnc,
        "NEURON_CC_FLAGS": " ".join((*COMPILER_FLAGS, f"--lnc={lnc}")),
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "0" if process.stochastic_rounding_seed is None else "1",
        "NEURON_RT_STOCHASTIC_ROUNDING_SEED": str(process.stochastic_rounding_seed or 0),
    }
    if process.root_comm is not None:
        found["NEURON_RT_ROOT_COMM_ID"] = process.root_comm
    if process.spans_nodes:
        found.update(EFA_VARIABLES)
    if process.compile_cache is not None:
        found["TORCH_NEURONX_NEFF_CACHE_DIR"] = process.compile_cache
    if process.max_inflight is not None:
        found["NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"] = str(process.max_inflight)
    return found


def cores_text(cores: Sequence[int]) -> str:
    """Return cores as the runtime reads them: `4` or `4-7`.

    Raises:
        FleetError: none, or not ascending without a gap.
    """
    if not cores or list(cores) != list(range(cores[0], cores[0] + len(cores))):
        raise FleetError(
            "the cores of a Neuron process must be neighbours",
            value=", ".join(map(str, cores)) or "none",
            valid="ascending numbers without a gap",
            fix="give the job whole chips; restart Ray on the node if its cores are scattered over jobs",
        )
    return str(cores[0]) if len(cores) == 1 else f"{cores[0]}-{cores[-1]}"


def cores_of_text(text: str) -> tuple[int, ...]:
    """Return the cores in `NEURON_RT_VISIBLE_CORES`: numbers and ranges with commas between, as Ray or a user wrote.

    Raises:
        FleetError: not such a text.
    """
    cores: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise FleetError(
                "cannot read which cores are visible",
                value=text,
                valid="numbers and ranges: `0,1,2,3` or `0-3`",
                where="NEURON_RT_VISIBLE_CORES",
                fix="unset it, or write it so",
            )
        cores.extend(range(int(first), int(last or first) + 1))
    return tuple(cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedCores:
    """What a cluster gave one rank."""

    rank: int
    island: str
    node: str
    """The node's address; the first rank of an island listens there."""
    cores: tuple[int, ...]
    free_port: int
    """A port that was free on the node when it was asked."""


def processes_of_ranks(
    granted: Iterable[GrantedCores],
    *,
    cores_a_chip: int,
    physical_cores_a_logical: int,
    compile_cache: str | None = None,
    stochastic_rounding_seed: int | None = None,
) -> dict[int, NeuronProcess]:
    """Return what each rank drives: the cores of a node dealt again to the same ranks, in the ranks' order.

    A cluster hands cores out in any order. All of a node's cores that the job got are its ranks' together, so they can
    be dealt so that neighbouring ranks have neighbouring cores.

    Raises:
        FleetError: a node's cores are not whole chips, or the same core was handed out twice.
    """
    rows = sorted(granted, key=lambda row: row.rank)
    cores_of_rank: dict[int, tuple[int, ...]] = {}
    for node in dict.fromkeys(row.node for row in rows):
        there = [row for row in rows if row.node == node]
        cores = sorted(core for row in there for core in row.cores)
        _check_whole_chips(node, cores, [len(row.cores) for row in there], cores_a_chip)
        at = 0
        for row in there:
            cores_of_rank[row.rank] = tuple(cores[at : at + len(row.cores)])
            at += len(row.cores)
    processes = {}
    for row in rows:
        members = [other for other in rows if other.island == row.island]
        alone = len(members) == 1
        processes[row.rank] = NeuronProcess(
            cores=cores_of_rank[row.rank],
            physical_cores_a_logical=physical_cores_a_logical,
            root_comm=None if alone else f"{members[0].node}:{members[0].free_port}",
            spans_nodes=len({member.node for member in members}) > 1,
            compile_cache=compile_cache,
            stochastic_rounding_seed=stochastic_rounding_seed,
        )
    return processes


def _check_whole_chips(node: str, cores: Sequence[int], sizes: Sequence[int], cores_a_chip: int) -> None:
    twice = sorted({core for core in cores if cores.count(core) > 1})
    if twice:
        raise FleetError(
            f"node {node} gave one core to two ranks",
            value=", ".join(map(str, twice)),
            fix="set no NEURON_RT_VISIBLE_CORES of your own on the node before Ray starts",
        )
    chips: dict[int, int] = {}
    for core in cores:
        chips[core // cores_a_chip] = chips.get(core // cores_a_chip, 0) + 1
    # The last chip may be shared out in part: ranks that the plan left unused.
    parts = [chip for chip, count in chips.items() if count < cores_a_chip]
    if len(parts) > 1 or any(size < 1 for size in sizes):
        raise FleetError(
            f"node {node} gave the job parts of several chips",
            value=", ".join(map(str, cores)) or "no core",
            valid=f"whole chips of {cores_a_chip} logical cores",
            fix="end the jobs that hold single cores there, or restart Ray on the node",
        )


def merged_flags(ours: str, own: str) -> str:
    """Return our compiler flags and those of the user's NEURON_CC_FLAGS that name no option of ours."""
    names = {flag.partition("=")[0] for flag in ours.split()}
    # Both `--lnc 2` and `--lnc=2` are read.
    words = own.replace("--lnc ", "--lnc=").replace("--model-type ", "--model-type=").split()
    return " ".join((*ours.split(), *(word for word in words if word.partition("=")[0] not in names)))
