"""What `hybrid plan` found by the search, as plain rows: stages, predictions, alternatives, reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hybrid.commands.problem import Brought, misfit_of, problem_of
from hybrid.config import JobConfig
from hybrid.errors import PlanError
from hybrid.hardware.fleet import Fleet
from hybrid.scheduler.plan import Plan
from hybrid.scheduler.search.choice import Choice
from hybrid.scheduler.search.confirm import costs_of
from hybrid.scheduler.search.emit import MOST_RANKS, places_of_fleet, places_of_pools, plan_of_choice
from hybrid.scheduler.search.explain import Explanation, explain
from hybrid.scheduler.search.fleet_plan import write_fleet_plan
from hybrid.scheduler.search.problem import Problem
from hybrid.scheduler.search.search import Found, search
from hybrid.scheduler.search.worth import Alternative, Worth, is_the_mix_worth_it
from hybrid.scheduler.simulate import simulate

_QUICK_CHIPS = 4096
"""Fleets up to which alternatives are looked for without being asked: each is a search of its own."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A found plan and what is told of it."""

    problem: Problem
    found: Found
    plan: Plan | None
    """None where it is too large to name each rank."""
    worth: Worth | None
    explanation: Explanation | None
    misfit: str | None
    """Why the job cannot train by it; None where it can."""

    @property
    def choice(self) -> Choice:
        """What was chosen."""
        return self.found.choice


def search_plan(job: JobConfig, fleet: Fleet | None, brought: Brought, *, reasons: bool) -> Planned:
    """Return the best plan for the job's `planner` section.

    Args:
        job: see `problem_of`.
        fleet: None where pools were brought.
        brought: files that stand in for the job's.
        reasons: explain it too, and look for alternatives however large the fleet is.

    Raises:
        PlanError, FleetError: no plan; says which number would have to change and by how much.
    """
    problem = problem_of(job, fleet, brought)
    found = search(problem)
    places = places_of_pools(problem) if brought.pools is not None or fleet is None else places_of_fleet(fleet)
    large = sum(found.choice.chips) > MOST_RANKS
    misfit = misfit_of(job, problem.table)
    if misfit is None and brought.pools is not None:
        misfit = "the pools are not the job's fleet"
    quick = problem.num_chips <= _QUICK_CHIPS
    return Planned(
        problem=problem,
        found=found,
        plan=None if large else plan_of_choice(problem, found.choice, places, job=job.name),
        worth=is_the_mix_worth_it(problem, found) if quick or reasons else None,
        explanation=explain(problem, found) if reasons else None,
        misfit=misfit,
    )


def stage_rows(choice: Choice) -> list[dict[str, Any]]:
    """Return a row a stage of each group of like replicas."""
    rows = []
    for group in choice.groups:
        column, table = group.column, group.column.table
        seconds_of, transfer_s, link_busy_s = costs_of(column)
        line = simulate(group.build_schedule(), seconds_of=seconds_of, transfer_s=transfer_s, link_busy_s=link_busy_s)
        for stage, index in enumerate(column.chosen):
            option, run = table.options[index], (column.bounds[stage], column.bounds[stage + 1])
            fixed = table.fixed_bytes(index)
            pool = choice.problem.pools[option.pool]
            rows.append(
                {
                    "replicas": group.num_replicas,
                    "stage": stage,
                    "rank": column.rank_of_stage[stage],
                    "pool": pool.name,
                    "chip": pool.chip,
                    "tensor_parallel": option.degree,
                    "width": option.width,
                    "recompute": option.recompute,
                    "first_layer": run[0],
                    "end_layer": run[1],
                    "forward_s": float(table.forward_s[(index, *run)]),
                    "backward_s": float(table.backward_s[(index, *run)]),
                    "memory_bytes": round(fixed + column.peak_bytes_of_stage(stage, group.num_microbatches)),
                    "memory_limit_bytes": round(fixed + float(table.limit_bytes[index])),
                    "idle_share": line.idle_share_of_rank[column.rank_of_stage[stage]],
                }
            )
    return rows


def predicted(choice: Choice) -> dict[str, float]:
    """Return what is predicted of the whole."""
    return {
        "step_s": choice.step_s,
        "tokens_per_s": choice.tokens_per_s,
        "usd_per_hour": choice.usd_per_hour,
        "egress_usd_per_step": choice.egress_usd_per_step,
        "usd_per_token": choice.usd_per_token,
        "watts": choice.watts,
        "joules_per_token": choice.joules_per_token,
        "reduce_s": choice.reduce_s,
    }


def alternatives(worth: Worth) -> list[dict[str, Any]]:
    """Return a row a plan: what was found, each kind alone, the even split, all without one pool."""
    rows = [_alternative("this plan", worth.mix.choice, worth, "")]
    rows += [_row(entry.name, entry, worth) for entry in worth.alone if len(worth.alone) > 1]
    rows.append(_row(worth.uniform.name, worth.uniform, worth))
    if len(worth.without) > 1:
        rows += [_row(f"without {entry.name}", entry, worth) for entry in worth.without]
    return rows


def _row(name: str, entry: Alternative, worth: Worth) -> dict[str, Any]:
    return _alternative(name, entry.choice, worth, entry.refusal)


def _alternative(name: str, choice: Choice | None, worth: Worth, refusal: str) -> dict[str, Any]:
    row: dict[str, Any] = {"plan": name, "refusal": refusal, "worse_by": None}
    if choice is not None:
        row |= {key: predicted(choice)[key] for key in ("step_s", "tokens_per_s", "usd_per_hour", "usd_per_token")}
        row |= {"joules_per_token": choice.joules_per_token, "worse_by": choice.score / worth.mix.choice.score - 1.0}
    return row


def as_json(planned: Planned) -> dict[str, Any]:
    """Return everything as plain data."""
    choice, worth, reasons = planned.choice, planned.worth, planned.explanation
    return {
        "objective": planned.problem.objective,
        "source": planned.problem.table.label,
        "method": planned.found.method,
        "trainable": planned.misfit is None and planned.plan is not None,
        "not_trainable_because": planned.misfit,
        "plan": None if planned.plan is None else asdict(planned.plan),
        "fleet_plan": write_fleet_plan(choice),
        "rows": stage_rows(choice),
        "alternatives": [] if worth is None else alternatives(worth),
        "recommendation": None if worth is None else worth.recommendation,
        "leave_out": [] if worth is None else list(worth.leave_out),
        "explain": None
        if reasons is None
        else asdict(reasons) | {"binding": [effect.what for effect in reasons.binding]},
        "summary": predicted(choice) | {"num_replicas": choice.num_replicas, "num_chips": sum(choice.chips)},
    }


def check_words(job: JobConfig, brought: Brought) -> None:
    """Refuse pools without what they need.

    Raises:
        PlanError: pools without a profile or without links.
    """
    words = job.planner
    for name in ("profile", "links"):
        own = None if words is None else getattr(words, name)
        if brought.pools is not None and getattr(brought, name) is None and own is None:
            raise PlanError(f"pools need {name}", value=str(brought.pools), fix=f"give --{name} FILE")
