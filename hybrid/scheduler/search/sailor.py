"""Sailor's files: its profiles, layer sizes, network and plans, to and from ours.

Pure: takes parsed JSON, opens no file. Source of the format and of the rules: eth-easl/sailor, commit cf2c8e3
(MIT), the artefact of "Sailor", SOSP 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid.errors import PlanError
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import MemoryModel, Pool, Problem, Vocabulary
from hybrid.scheduler.search.table import Cell, ProfileTable, Sizes
from hybrid.scheduler.search.uniform import Members, UniformPlan, uniform_step_seconds

FLOAT_BYTES = 4
SAILOR_MEMORY = MemoryModel(
    bytes_per_parameter=24,
    fixed_bytes=2e9,
    fixed_bytes_split=3e9,
    margin=0.0,
    counts_buffers=False,
    capped_by_microbatches=False,
)
"""Weight, gradient, two Adam moments, two more copies; 2 or 3 GB a chip; no margin."""
SAILOR_BUCKET_BYTES = 5e8
MEMORY_GIB = {"A100-40": 40, "V100-16": 16, "GH-96": 96}
USD_PER_HOUR = {"A100-40": 3.673385, "V100-16": 2.859998, "GH-96": 11.06}


def sailor_vocabulary(*, max_stages: int = 10) -> Vocabulary:
    """Return the choices of Sailor's planner: 1F1B, one microbatch size, no recompute, degrees up to a node."""
    return Vocabulary(degrees=(1, 2, 4), recompute=False, max_stages=max_stages, step_law="sailor")


def read_sailor_profile(
    model: str,
    profiles: Mapping[str, Mapping[str, Any]],
    layer_sizes: Mapping[str, Any],
    *,
    sequence_length: int = 2048,
) -> ProfileTable:
    """Return the table in Sailor's `profile.json` of each chip and its layer sizes.

    Args:
        model: name in `layer_sizes`.
        profiles: chip to {microbatch: {degree: {layer: [forward s, backward s, update s]}}}.
        layer_sizes: {model: {degree: {layer: {params_floats, act_output_floats, act_mem_floats, …}}}}.
        sequence_length: tokens in a sample.
    """
    rows = layer_sizes.get(model)
    if rows is None:
        raise PlanError("no such model in the layer sizes", value=model, valid=layer_sizes, fix="name one of these")
    cells: dict[tuple[str, int, int], Cell] = {}
    for chip, by_microbatch in profiles.items():
        for microbatch, by_degree in by_microbatch.items():
            for degree, by_layer in by_degree.items():
                numbers = [by_layer[str(layer)] for layer in range(len(by_layer))]
                half = tuple(row[1] / 2 for row in numbers)
                cells[chip, int(degree), int(microbatch)] = Cell(
                    forward_s=tuple(row[0] for row in numbers),
                    input_gradient_s=half,
                    weight_gradient_s=half,
                    update_s=max(row[2] for row in numbers),
                )
    return ProfileTable(
        model=model,
        source="imported",
        note="Sailor's profiles (eth-easl/sailor cf2c8e3); a backward is split in halves",
        sequence_length=sequence_length,
        precision="fp32",
        layers=tuple(f"layer.{index:02d}" for index in range(len(next(iter(rows.values()))))),
        sizes={int(degree): _sizes(by_layer) for degree, by_layer in rows.items()},
        cells=cells,
    )


def _sizes(by_layer: Mapping[str, Mapping[str, int]]) -> Sizes:
    rows = [by_layer[str(layer)] for layer in range(len(by_layer))]
    return Sizes(
        num_parameters=tuple(row["params_floats"] for row in rows),
        saved_bytes=tuple(row["act_mem_floats"] * FLOAT_BYTES for row in rows),
        output_bytes=tuple(row["act_output_floats"] * FLOAT_BYTES for row in rows),
    )


def read_sailor_network(inter_node: Mapping[str, Any]) -> Network:
    """Return the links in Sailor's `inter_node.json`; polynomials of the whole message, by lanes on both sides."""
    links = {}
    for chip, by_lanes in inter_node.items():
        for lanes, by_peer in by_lanes.items():
            for peer, by_peer_lanes in by_peer.items():
                for peer_lanes, (coefficients, saturated) in by_peer_lanes.items():
                    links[chip, int(lanes), peer, int(peer_lanes)] = LinkModel(
                        polynomial=tuple(coefficients),
                        smallest_bytes=_smallest_bytes(coefficients, saturated / 1e9),
                        source="imported: Sailor's network fits",
                    )
    return Network(links=links)


def _smallest_bytes(coefficients: Sequence[float], saturated_gb_per_s: float) -> float:
    """Return the size below which a fit leaves its range: where it gives less than a tenth of the saturated rate."""
    x = np.arange(0.0, -20.0, -0.25)
    low = np.polyval(coefficients, x) < 0.1 * saturated_gb_per_s
    return float(2.0 ** x[max(int(np.argmax(low)) - 1, 0)] * 1e6) if low.any() else 1.0


def sailor_pool(chip: str, num_chips: int, *, node_size: int = 4) -> Pool:
    """Return a pool of one of Sailor's chips with the memory and price that its artefact counts."""
    if chip not in MEMORY_GIB:
        raise PlanError("no such chip of Sailor's", value=chip, valid=MEMORY_GIB, fix="name one of these")
    return Pool(
        name=chip,
        chip=chip,
        num_chips=num_chips,
        node_size=node_size,
        memory_bytes=MEMORY_GIB[chip] * 2**30,
        usd_per_hour=USD_PER_HOUR[chip],
    )


def write_sailor_plan(plan: UniformPlan, problem: Problem, *, zone: str = "us-central1-a") -> dict[str, Any]:
    """Return the plan in Sailor's format: what its simulator takes."""
    stages = [
        [
            [[[problem.pools[group.pool].chip, group.degree, zone]], group.degree]
            for group in stage
            for _ in range(group.count)
        ]
        for stage in plan.members
    ]
    # Sailor writes [[[chip, chips of a node, zone]], degree] for each member.
    return {
        "zone": zone,
        "pipeline_list": [
            {
                "num_stages": plan.num_stages,
                "layers_per_stage": [
                    list(range(first, end)) for first, end in zip(plan.bounds, plan.bounds[1:], strict=False)
                ],
                "tmp_per_stage": stages,
                "dp": [plan.num_replicas] * plan.num_stages,
            }
        ],
        "mbs": plan.microbatch,
        "gbs": problem.global_batch,
    }


def read_sailor_plan(raw: Mapping[str, Any], problem: Problem) -> UniformPlan:
    """Return a plan of Sailor's, with its predicted step; one pipeline, as Sailor's own planner writes."""
    pipelines = raw["pipeline_list"]
    if len(pipelines) != 1:
        raise PlanError("a Sailor plan of one pipeline is needed", value=len(pipelines), valid="1")
    pipeline, place = pipelines[0], {pool.chip: index for index, pool in enumerate(problem.pools)}
    members = []
    for stage in pipeline["tmp_per_stage"]:
        counts: dict[tuple[int, int], int] = {}
        for machines, degree in stage:
            chip = machines[0][0]
            if chip not in place:
                raise PlanError("the fleet has no such chip", value=chip, valid=place, fix="add its pool")
            counts[place[chip], degree] = counts.get((place[chip], degree), 0) + 1
        members.append(tuple(Members(pool=p, degree=d, count=n) for (p, d), n in counts.items()))
    layers, replicas = pipeline["layers_per_stage"], pipeline["dp"][0]
    draft = {
        "microbatch": raw["mbs"],
        "num_microbatches": -(-raw["gbs"] // (raw["mbs"] * replicas)),
        "num_replicas": replicas,
        "bounds": (0, *(run[-1] + 1 for run in layers)),
        "members": tuple(members),
    }
    step_s = uniform_step_seconds(problem, UniformPlan(**draft, step_s=0.0))
    return UniformPlan(**draft, step_s=step_s)
