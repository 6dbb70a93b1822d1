"""From what a cluster granted to each rank's environment, and its one place of application: before torch is imported.

TorchNeuron loads itself when torch is imported and reads its environment then. No torch, no Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from hybrid.config import environment, set_environment
from hybrid.errors import MachineError
from hybrid.hardware.catalog import Chip
from hybrid.hardware.neuron_environment import GrantedCores, merged_flags, neuron_environment, processes_of_ranks
from hybrid.runtime.placement import WorkerSpec


def environment_of_ranks(specs: Sequence[WorkerSpec], granted: Iterable[GrantedCores]) -> dict[int, dict[str, str]]:
    """Return the variables of every rank that drives NeuronCores.

    Args:
        specs: every rank's.
        granted: the cores of the ranks that drive some.

    Raises:
        FleetError: the cores are not whole chips.
    """
    chip_of_rank: dict[int, Chip] = {spec.rank: spec.chip for spec in specs}
    rows_of_chip: dict[str, list[GrantedCores]] = {}
    for row in granted:
        rows_of_chip.setdefault(chip_of_rank[row.rank].name, []).append(row)
    found: dict[int, dict[str, str]] = {}
    for rows in rows_of_chip.values():
        chip, job = chip_of_rank[rows[0].rank], specs[0].job
        cache = job.runtime.compile_cache
        processes = processes_of_ranks(
            rows,
            cores_a_chip=chip.ray_units_per_chip,
            physical_cores_a_logical=max(1, (chip.cores or 1) // chip.ray_units_per_chip),
            compile_cache=None if cache is None else str(cache),
            # The runtime reads a 32-bit seed.
            stochastic_rounding_seed=job.seed % 2**31 if job.runtime.stochastic_rounding else None,
        )
        found.update({rank: neuron_environment(one) for rank, one in processes.items()})
    return found


def apply_before_torch(variables: Mapping[str, str]) -> None:
    """Set a process's variables; nothing to do for none.

    Raises:
        MachineError: torch is imported already, so that they would come too late.
    """
    if not variables:
        return
    if "torch" in sys.modules:
        raise MachineError(
            "torch was imported before the environment of its Neuron device was set",
            value=", ".join(sorted(variables)),
            fix="import no torch in a worker_process_setup_hook or sitecustomize of the cluster",
        )
    flags = merged_flags(variables.get("NEURON_CC_FLAGS", ""), environment("NEURON_CC_FLAGS") or "")
    set_environment({**variables, "NEURON_CC_FLAGS": flags})
