"""Refusals: what must change, and by how much, where no plan is found.

Pure.
"""

from __future__ import annotations

import numpy as np

from hybrid.errors import FleetError, PlanError
from hybrid.scheduler.search.choice import Choice
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.options import OptionTable
from hybrid.scheduler.search.problem import Problem


def check_hopes(problem: Problem) -> None:
    """Refuse a problem whose smallest stage fits nowhere, before any search.

    Raises:
        PlanError: a single layer at the smallest microbatch does not fit on any chip; says by how many bytes.
    """
    tables = [OptionTable(problem, size) for size in problem.vocabulary.microbatches]
    tables = [table for table in tables if table.options]
    if not tables:
        have = sorted({(chip, degree, size) for chip, degree, size in problem.table.cells})
        fix = "add a microbatch or a degree that the profile has to the vocabulary"
        raise PlanError("the profile has no cell that the vocabulary and the fleet's nodes allow", valid=have, fix=fix)
    layers = np.arange(problem.table.num_layers)
    lacks = []
    for table in tables:
        needed = (table.base_bytes + table.held_bytes)[:, layers, layers + 1] - table.limit_bytes[:, None]
        best = needed.min(axis=0)  # by layer: the option that comes closest
        lacks.append((float(best.max()), int(best.argmax()), table))
    lack, layer, table = min(lacks, key=lambda entry: entry[0])
    if lack > 0:
        option = int((table.base_bytes + table.held_bytes)[:, layer, layer + 1].argmin())
        raise _does_not_fit(problem, f"layer {layer} alone", lack, table.options[option].pool)


def _does_not_fit(problem: Problem, what: str, lack: float, pool: int) -> PlanError:
    missing = round(lack)
    margin = problem.memory.margin
    more = round(lack / (1 - margin)) if margin < 1 else missing
    return PlanError(
        f"the model fits nowhere: {what} misses {missing:,} bytes ({missing / 2**30:.3f} GiB) on the chip that comes "
        f"closest, {problem.pools[pool].chip} of pool {problem.pools[pool].name}, with a margin of {margin:.0%}",
        fix=f"give its chips {more:,} bytes more, or add a larger chip, a higher degree or a smaller microbatch",
    )


def refusal(problem: Problem, columns: list[Column]) -> Exception:
    """Return the error of a search without limits that found nothing: a link or memory, with the number."""
    missing = _missing_link(problem)
    if not columns:
        lack = _lack_bytes(problem)
        return missing if missing is not None and lack[0] <= 0 else _deepest(problem, *lack)
    return missing or _too_few_in_flight(problem, columns)


def _too_few_in_flight(problem: Problem, columns: list[Column]) -> PlanError:
    """Return what memory is missing where replicas fit only with fewer microbatches than the batch needs."""
    lacks = []
    for column in columns:
        table, chosen, bounds = column.table, np.array([column.chosen]), np.array([column.bounds])
        peak = table.peak_bytes(chosen, bounds, None) - table.limit_bytes[chosen]
        lacks.append((float(peak.max()), int(table.pool_of[chosen[0, int(peak.argmax())]])))
    lack, pool = min(lacks)
    if lack > 0:
        return _does_not_fit(problem, "the batch's microbatches in flight", lack, pool)
    return PlanError("no set of replicas takes the batch on this fleet", fix="add chips or lower the global batch")


def _missing_link(problem: Problem) -> FleetError | None:
    pools = problem.pools
    for index, a in enumerate(pools):
        for b in pools[index:]:
            if problem.link(a, b) is None:
                place = f"inside {a.name}" if a is b else f"between {a.name} and {b.name}"
                return FleetError(
                    f"the network has no link {place}, and every plan needs it", fix=f"add one link {place}"
                )
    return None


def _lack_bytes(problem: Problem) -> tuple[float, float]:
    """Return how many bytes the model needs beyond what all chips have, and how many it needs."""
    table = OptionTable(problem, min(problem.vocabulary.microbatches))
    unsplit = np.array([option.degree for option in table.options])
    need = float(((table.base_bytes[:, 0, -1] + table.held_bytes[:, 0, -1]) * unsplit).min())
    have = sum(
        pool.num_chips * float(table.limit_bytes[table.pool_of == index].max())
        for index, pool in enumerate(problem.pools)
        if np.any(table.pool_of == index)
    )
    return need - have, need


def _deepest(problem: Problem, lack: float, need: float) -> PlanError:
    """Return what all chips together miss, or that layers do not divide so finely."""
    if lack > 0:
        return PlanError(
            f"the model fits nowhere: it needs {round(need):,} bytes and the fleet has {round(need - lack):,} free",
            fix=f"add {round(lack):,} bytes ({lack / 2**30:.3f} GiB) of memory, or a smaller microbatch or model",
        )
    share = need / sum(pool.num_chips for pool in problem.pools)
    return PlanError(
        f"no split of the layers fits, although their sum does: {round(need):,} bytes of {round(need - lack):,}",
        fix=f"give each chip up to {round(share):,} bytes more, or add a chip",
    )


def limit_refusal(problem: Problem, choices: list[Choice]) -> PlanError:
    """Return which limit the closest choice breaks and by how much."""
    limits = problem.limits
    fastest = min(choices, key=lambda choice: choice.step_s)
    wanted = limits.wanted_tokens_per_s
    if wanted > fastest.tokens_per_s:
        name = "min_tokens_per_s" if limits.min_tokens_per_s == wanted else "deadline_s"
        lower = fastest.tokens_per_s
        fix = f"lower min_tokens_per_s by {wanted - lower:,.1f} to {lower:,.1f}"
        if name == "deadline_s" and limits.total_tokens is not None and limits.deadline_s is not None:
            least = limits.total_tokens / lower
            fix = f"move deadline_s by {least - limits.deadline_s:,.0f} s to {least:,.0f} s"
        caps = [n for n in ("max_usd_per_hour", "max_watts") if getattr(limits, n) is not None]
        also = f", or raise {' or '.join(caps)}" if caps else ""
        fact = f"no plan meets {name}: the fastest reaches {lower:,.1f} tokens/s, {wanted:,.1f} are wanted"
        return PlanError(fact, value=wanted, valid=f"at most {lower:,.1f} tokens/s", fix=fix + also)
    for name, value in (("max_usd_per_hour", "usd_per_hour"), ("max_watts", "watts")):
        limit = getattr(limits, name)
        least = min(getattr(choice, value) for choice in choices)
        if limit is not None and least > limit:
            return PlanError(
                f"no plan keeps to {name}: the cheapest that was found needs {least:,.2f}",
                value=limit,
                valid=f"{least:,.2f} or more",
                fix=f"raise {name} by {least - limit:,.2f}",
            )
    return PlanError("no plan keeps to all limits together", fix="relax one of them")
