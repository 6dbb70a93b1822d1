"""Printing what the search found: a table of stages with memory bars, predictions, alternatives, reasons."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hybrid.commands.figures import num_bytes, seconds
from hybrid.commands.planned import Planned, alternatives, stage_rows
from hybrid.scheduler.search.choice import Choice
from hybrid.scheduler.search.explain import Bottleneck, Explanation
from hybrid.scheduler.search.worth import Worth

_BAR = 6


def print_planned(planned: Planned, console: Console) -> None:
    """Print a found plan."""
    choice = planned.choice
    _print_stages(planned, console)
    lines = [_shares(choice), *_codecs(planned), *_predictions(choice), f"seconds: {planned.problem.table.label}"]
    if planned.misfit is not None:
        lines.append(f"on paper only: {planned.misfit}")
    elif planned.plan is None:
        lines.append("too large to name each rank: `--out plan.json` writes groups of like replicas")
    if planned.found.method != "exact":
        lines.append(f"found by {planned.found.method}: no proof that nothing is better")
    _say(console, lines)
    if planned.worth is not None:
        _print_alternatives(planned.worth, console)
    if planned.explanation is not None:
        _print_reasons(planned.explanation, [group.num_replicas for group in choice.groups], console)


def _print_reasons(reasons: Explanation, replicas: list[int], console: Console) -> None:
    lines = ["why this plan:", *(_bottleneck(one, replicas) for one in reasons.bottlenecks)]
    better = [f"{effect.what} ({effect.gain:.1%})" for effect in reasons.binding if effect.gain is not None]
    lines.append(f"  better with: {'; '.join(better) or 'nothing that was tried'}")
    same = [effect.what for effect in reasons.effects if not effect.binds]
    lines.append(f"  no better with: {'; '.join(same) or 'nothing that was tried'}")
    _say(console, [*lines, *(f"  {sentence}" for sentence in reasons.left_out)])


def _say(console: Console, lines: list[str]) -> None:
    if lines:
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _print_stages(planned: Planned, console: Console) -> None:
    choice, problem = planned.choice, planned.problem
    title = f"{problem.table.model}, {problem.table.precision}, for {problem.objective}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("×", "stage", "chips", "layers", "F", "B", "memory", "idle"):
        table.add_column(name, justify="left" if name in ("chips", "memory") else "right", no_wrap=True)
    for row in stage_rows(choice):
        table.add_row(
            f"{row['replicas']:,}" if row["stage"] == 0 else "",
            str(row["stage"]) if row["rank"] == row["stage"] else f"{row['stage']} on {row['rank']}",
            _chips(row),
            f"{row['first_layer']}–{row['end_layer'] - 1}",
            seconds(row["forward_s"]),
            seconds(row["backward_s"]) + (" r" if row["recompute"] else ""),
            f"{_bar(row['memory_bytes'] / row['memory_limit_bytes'])} {num_bytes(row['memory_bytes'])}",
            f"{row['idle_share']:.0%}",
        )
    console.print(table)
    if any(row["recompute"] for row in stage_rows(choice)):
        _say(console, ["r: keeps only its input and runs its forward again"])


def _chips(row: dict[str, Any]) -> str:
    count = row["tensor_parallel"] * row["width"]
    split = [f"tp {row['tensor_parallel']}"] if row["tensor_parallel"] > 1 else []
    split += [f"width {row['width']}"] if row["width"] > 1 else []
    words = f"{count} × {row['pool']}" if count > 1 else row["pool"]
    kind = "" if row["chip"] == row["pool"] else f" {row['chip']}"
    return f"{words}{kind}{' (' + ', '.join(split) + ')' if split else ''}"


def _bar(share: float) -> str:
    full = min(_BAR, max(0, round(share * _BAR)))
    return "█" * full + "░" * (_BAR - full)


def _shares(choice: Choice) -> str:
    words = [
        f"{group.num_replicas:,} × {group.num_microbatches} microbatches of {group.column.samples} on "
        f"{group.schedule_name}"
        for group in choice.groups
    ]
    used = ", ".join(
        f"{n:,} of {pool.num_chips:,} {pool.name}" for n, pool in zip(choice.chips, choice.problem.pools, strict=True)
    )
    return f"shares: {'; '.join(words)}\nchips: {used}"


def _codecs(planned: Planned) -> list[str]:
    """Return how many edges carry which narrower codec, where any does."""
    edges = [] if planned.plan is None else [edge.codec for r in planned.plan.replicas for edge in r.edges]
    narrow = sorted({codec for codec in edges if codec != "none"})
    return (
        [f"edges: {', '.join(f'{codec} on {edges.count(codec)}' for codec in narrow)} of {len(edges)}"]
        if narrow
        else []
    )


def _predictions(choice: Choice) -> list[str]:
    reduce = f", of it {seconds(choice.reduce_s)} to reduce gradients" if choice.reduce_s else ""
    lines = [f"predicted: step {seconds(choice.step_s)}{reduce}, {choice.tokens_per_s:,.4g} tokens/s"]
    priced = [pool.usd_per_hour > 0 for n, pool in zip(choice.chips, choice.problem.pools, strict=True) if n]
    if all(priced):
        egress = f", ${choice.egress_usd_per_step:.3g} a step leaves sites" if choice.egress_usd_per_step else ""
        lines.append(
            f"  ${choice.usd_per_hour:,.2f} an hour, ${choice.usd_per_token * 1e6:.4g} a million tokens{egress}"
        )
    else:
        lines.append("  no price: the catalog has none for some of the chips (docs/catalog.md)")
    powered = [pool.watts > 0 for n, pool in zip(choice.chips, choice.problem.pools, strict=True) if n]
    if all(powered):
        lines.append(f"  {choice.watts / 1e3:,.4g} kW rated, {choice.joules_per_token:.3g} J a token")
    return lines


def _print_alternatives(worth: Worth, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("plan", "step", "tokens/s", "$/h", "objective"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=name != "objective")
    for row in alternatives(worth):
        if row["refusal"]:
            table.add_row(row["plan"], "–", "–", "–", row["refusal"].split(". ")[0][:60])
            continue
        worse = row["worse_by"]
        judged = "–" if row["plan"] == "this plan" else f"{abs(worse):.1%} {'worse' if worse >= 0 else 'better'}"
        usd = f"{row['usd_per_hour']:,.2f}" if row["usd_per_hour"] else "–"
        table.add_row(row["plan"], seconds(row["step_s"]), f"{row['tokens_per_s']:,.4g}", usd, judged)
    console.print(table)
    _say(console, [f"is the mix worth it? {worth.recommendation}"])


def _bottleneck(one: Bottleneck, replicas: list[int]) -> str:
    stages = " and ".join(map(str, one.stages))
    return (
        f"  {replicas[one.group]:,} × replica {one.group}: stage {stages} on {one.pool} sets the pace, busy "
        f"{one.busy_share:.0%} of the step; without messages it would be {one.message_share:.1%} shorter; fullest "
        f"memory {one.memory_share:.0%}"
    )
