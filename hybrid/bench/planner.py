"""`hybrid bench planner`: optimality on small problems, Sailor's published problem, and how the time grows.

Times are printed as wall seconds and as seconds of this process's processor; the summary holds the latter, since
the machine may be shared. No torch, no network.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.bench.planner_mid import middle_gaps
from hybrid.bench.planner_oracle import least_step_s, random_problem
from hybrid.bench.result import Result, Row
from hybrid.config import ModelConfig
from hybrid.errors import PlanError
from hybrid.hardware.catalog import load_catalog
from hybrid.models.profile import build_profile
from hybrid.scheduler.search.analytic import analytic_table
from hybrid.scheduler.search.choice import Choice
from hybrid.scheduler.search.confirm import confirm
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.problem import MemoryModel, Pool, Problem, Vocabulary
from hybrid.scheduler.search.sailor import (
    SAILOR_BUCKET_BYTES,
    SAILOR_MEMORY,
    read_sailor_network,
    read_sailor_profile,
    sailor_pool,
    sailor_vocabulary,
)
from hybrid.scheduler.search.search import search
from hybrid.scheduler.search.table import ProfileTable
from hybrid.scheduler.search.uniform import search_uniform

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Others' measurements, beside the checkout; see its README for sources."""
SAILOR_ITS = {(32, 96): 0.1700, (80, 240): 0.3609, (128, 384): 0.5229}
"""Steps a second of Sailor's own plans in its own simulator, by A100-40 and V100-16."""
_KINDS = ("h100", "h200", "b200", "trn2", "trn3")


def measure_planner(*, quick: bool) -> Result:
    """Return every figure of the planner; the benchmark's contract."""
    rows, summary = run(quick)
    shown = [{"part": str(row["part"]), "what": str(row["what"]), "found": str(row["found"])} for row in rows]
    goals = {
        "optimality_worst_gap": 0.01,
        "sailor_search_s_max": 1.0,
        "plan_s_3x256": 2.0,
        "plan_s_million": 10.0,
        "plan_gib_million": 2.0,
    }
    floors = {f"sailor_{a100}_{v100}_its": rate for (a100, v100), rate in SAILOR_ITS.items()}
    return Result(rows=rows, summary=summary, shown=shown, goals=goals, floors=floors | {"optimality_equal_share": 0.9})


def run(quick: bool, data: Path = DATA) -> tuple[list[Row], dict[str, float]]:
    """Return the rows and the summary.

    Args:
        quick: fewer random problems.
        data: folder with `sailor/`; where it is missing that part is skipped, visibly, and its keys are left out.
    """
    rows: list[Row] = []
    summary = dict(_optimality(24 if quick else 200, rows))
    summary |= _middle(4 if quick else 24, rows)
    if (data / "sailor").is_dir():
        summary |= _sailor(data / "sailor", rows)
    else:
        rows.append({"part": "sailor", "what": "skipped", "found": f"no folder {data / 'sailor'}"})
    summary |= _scale(rows, quick=quick)
    return rows, summary


def _timed(work: Callable[[Problem], Any], problem: Problem) -> tuple[Any, float, float]:
    """Return what the work returned, its processor seconds and its wall seconds."""
    processor, wall = time.process_time(), time.perf_counter()
    result = work(problem)
    return result, time.process_time() - processor, time.perf_counter() - wall


def _optimality(count: int, rows: list[Row]) -> Mapping[str, float]:
    """Compare with every plan of random small problems; memory binds in each second one."""
    worst, equal, solved = 0.0, 0, 0
    for seed in range(10_000):
        if solved == count:
            break
        problem = random_problem(seed, memory_binds=seed % 2 == 1)
        best = least_step_s(problem)
        try:
            found = confirm(search(problem).choice).step_s
        except PlanError:
            found = float("inf")
        if best == found == float("inf"):
            continue
        gap = found / best - 1
        solved, worst, equal = solved + 1, max(worst, gap), equal + (gap < 1e-9)
    rows.append(
        {"part": "optimality", "what": f"{count} random problems", "found": f"worst gap {worst:.2%}, {equal} equal"}
    )
    return {"optimality_worst_gap": max(worst, 0.0), "optimality_equal_share": equal / max(solved, 1)}


def _middle(count: int, rows: list[Row]) -> Mapping[str, float]:
    """Compare the coarse search with every shape, where the oracle is too slow and every shape still possible."""
    gaps = middle_gaps(count)
    equal = sum(gap < 1e-9 for gap in gaps)
    text = f"worst gap {max(gaps):.2%}, mean {sum(gaps) / count:.2%}, {equal} equal"
    rows.append({"part": "optimality", "what": f"{count} problems of 9 to 32 chips, coarse", "found": text})
    return {"middle_worst_gap": max(0.0, *gaps), "middle_equal_share": equal / count}


def _sailor(folder: Path, rows: list[Row]) -> Mapping[str, float]:
    """Plan Sailor's problem in its vocabulary and conventions, and with more choices."""
    table, network = read_sailor(folder, ("A100-40", "V100-16"))
    summary, slowest = {}, 0.0
    for (a100, v100), published in SAILOR_ITS.items():
        problem = Problem(
            table=table,
            pools=(sailor_pool("A100-40", a100), sailor_pool("V100-16", v100)),
            network=network,
            global_batch=1024,
            memory=SAILOR_MEMORY,
            vocabulary=sailor_vocabulary(),
            reduce_bucket_bytes=SAILOR_BUCKET_BYTES,
        )
        plan, processor_s, wall_s = _timed(search_uniform, problem)
        summary[f"sailor_{a100}_{v100}_its"] = 1 / plan.step_s
        slowest = max(slowest, processor_s)
        text = (
            f"{1 / plan.step_s:.4f} it/s (Sailor's plan {published:.4f}) in {processor_s:.2f} s ({wall_s:.2f} s wall)"
        )
        rows.append({"part": "sailor", "what": f"{a100}+{v100}, its vocabulary", "found": text})
        full = replace(problem, vocabulary=replace(problem.vocabulary, recompute=True))
        more, processor_s, _ = _timed(search, full)
        text = f"{1 / more.choice.step_s:.4f} it/s by the same law in {processor_s:.2f} s: {_describe(more.choice)}"
        rows.append({"part": "sailor", "what": f"{a100}+{v100}, unequal replicas and recompute", "found": text})
    return summary | {"sailor_search_s_max": slowest}


def read_sailor(folder: Path, chips: Iterable[str]) -> tuple[ProfileTable, Network]:
    """Return Sailor's profiles of OPT-350M and its network, from its published files."""

    def read(path: str) -> Any:
        return json.loads((folder / path).read_text(encoding="utf-8"))

    profiles = {chip: read(f"profiles/OPT-350/{chip}/profile.json") for chip in chips}
    table = read_sailor_profile("OPT-350", profiles, read("layer_sizes_opt350.json"))
    return table, read_sailor_network(read("network/inter_node.json"))


def _scale(rows: list[Row], *, quick: bool) -> Mapping[str, float]:
    """Time the search by chips, kinds and layers, on analytic tables."""
    summary = {}
    cases = [("3 kinds × 256", 3, (256,), 34), ("5 kinds × 200,000, 3 sites", 5, (200_000,), 34)]
    if not quick:
        cases += [(f"3 kinds × {n:,}", 3, (n,), 34) for n in (64, 1024, 16_384)]
        cases += [(f"{k} kinds × 256", k, (256,), 34) for k in (1, 2, 4, 5)]
        cases += [(f"3 kinds × 256, {n} layers", 3, (256,), n) for n in (18, 66)]
    for what, kinds, (chips,), layers in cases:
        problem = scale_problem(kinds, chips, layers)
        found, processor_s, wall_s = _timed(search, problem)
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        text = f"{processor_s:.2f} s ({wall_s:.2f} s wall), peak {gib:.2f} GiB: {_describe(found.choice)}"
        rows.append({"part": "scale", "what": what, "found": text})
        if what == cases[0][0]:
            summary["plan_s_3x256"] = processor_s
        if what == cases[1][0]:
            summary |= {"plan_s_million": processor_s, "plan_gib_million": gib}
    return summary


def scale_problem(num_kinds: int, num_chips: int, num_layers: int) -> Problem:
    """Return a problem of so many kinds with so many chips each, several sites where they are many."""
    catalog = load_catalog(None)
    chips = [catalog.chip(name) for name in _KINDS[:num_kinds]]
    model = ModelConfig(
        num_blocks=num_layers - 2,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14_336,
        vocab_size=128_256,
        sequence_length=8192,
    )
    sizes = (1, 2, 4)
    profiles = [build_profile(model, microbatch=size, precision="bf16") for size in sizes]
    sites = ("east", "west", "north") if num_chips >= 100_000 else ("east",)
    pools = tuple(
        Pool(
            name=f"{chip.name} pool",
            chip=chip.name,
            num_chips=num_chips,
            node_size=8,
            memory_bytes=chip.memory_bytes,
            site=sites[index % len(sites)],
        )
        for index, chip in enumerate(chips)
    )
    links = {}
    for index, one in enumerate(pools):
        for other in pools[index:]:
            near = one.site == other.site
            links[one.name, 1, other.name, 1] = LinkModel(
                latency_s=2e-5 if near else 3e-2, bytes_per_s=5e10 if near else 1e9
            )
    return Problem(
        table=analytic_table(profiles, chips, degrees=(1, 2, 4, 8)),
        pools=pools,
        network=Network(links=links),
        global_batch=4 * num_chips * num_kinds,
        memory=MemoryModel(bytes_per_parameter=18, fixed_bytes=2e9),
        vocabulary=Vocabulary(degrees=(1, 2, 4, 8), microbatches=sizes, max_stages=10),
    )


def _describe(choice: Choice) -> str:
    """Return the plan in a few words."""
    groups = "; ".join(
        f"{group.num_replicas} × {len(group.column.chosen)} stages, {group.num_microbatches} × {group.column.samples}"
        for group in choice.groups
    )
    return f"step {choice.step_s:.3f} s, chips {choice.chips}, {groups}"
