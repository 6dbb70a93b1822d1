"""`hybrid bench schedules`: bubble rates of the published settings and of unequal stages.

Pure: no torch, no network; the clock comes in as an argument. The published numbers are from Qi et al. 2024, "Zero
bubble pipeline parallelism" (ICLR), as printed there: four decimals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.auto import auto_schedule, fitting_by_hand
from hybrid.scheduler.interleaved import interleaved, round_layout
from hybrid.scheduler.pipeline_costs import PipelineCosts, equal_costs
from hybrid.scheduler.schedules import one_f_one_b
from hybrid.scheduler.simulate import simulate
from hybrid.scheduler.zero_bubble import v_layout, zb_h1, zb_h2

SEQUENCE_LENGTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One setting: milliseconds of F, B (input gradient), W and a transfer, and the printed bubble rates."""

    model: str
    num_stages: int
    num_microbatches: int
    forward_ms: float
    input_gradient_ms: float
    weight_gradient_ms: float
    transfer_ms: float
    hidden_size: int
    num_heads: int
    num_chunks: int
    rate_of: dict[str, float]

    @property
    def work_ms(self) -> float:
        """Compute of one microbatch on one stage."""
        return self.forward_ms + self.input_gradient_ms + self.weight_gradient_ms

    def costs(self, rank_of_stage: tuple[int, ...], *, num_forwards: float = math.inf) -> PipelineCosts:
        """Return the costs of stages that share the setting's stage evenly; times in ms.

        Args:
            rank_of_stage: the layout.
            num_forwards: how many of the setting's forwards a rank may hold.
        """
        chunks = len(rank_of_stage) // self.num_stages
        held = 34.0 * self.hidden_size + 5.0 * self.num_heads * SEQUENCE_LENGTH
        return equal_costs(
            rank_of_stage,
            forward_s=self.forward_ms / chunks,
            input_gradient_s=self.input_gradient_ms / chunks,
            weight_gradient_s=self.weight_gradient_ms / chunks,
            transfer_s=self.transfer_ms,
            held_bytes=held / chunks,
            kept_bytes=32.0 * self.hidden_size / chunks,
            limit_bytes=num_forwards * held,
        )

    def rate(self, period_ms: float) -> float:
        """Return the share of a period that is bubble."""
        return 1.0 - self.num_microbatches * self.work_ms / period_ms


def _published(model: str, size: tuple[int, int, int], *row: float) -> Published:
    hidden_size, num_heads, num_chunks = size
    num_microbatches, forward, input_gradient, weight_gradient, transfer, *rates = row
    names = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-1p", "zb-2p")
    return Published(
        model=model,
        num_stages=8,
        num_microbatches=int(num_microbatches),
        forward_ms=forward,
        input_gradient_ms=input_gradient,
        weight_gradient_ms=weight_gradient,
        transfer_ms=transfer,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_chunks=num_chunks,
        rate_of=dict(zip(names, rates, strict=True)),
    )


_SMALL, _LARGE = (2304, 24, 3), (4096, 32, 4)
PUBLISHED = (
    _published("1.5B", _SMALL, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1055, 0.1585, 0.1083, 0.1585, 0.0433),
    _published("1.5B", _SMALL, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.0818, 0.1242, 0.0837, 0.1242, 0.0039),
    _published("1.5B", _SMALL, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0443, 0.0674, 0.0444, 0.0674, 0.0026),
    _published("6.2B", _LARGE, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.0808, 0.1323, 0.0698, 0.1323, 0.0029),
    _published("6.2B", _LARGE, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.0628, 0.1045, 0.0559, 0.1045, 0.0022),
    _published("6.2B", _LARGE, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0320, 0.0554, 0.0294, 0.0554, 0.0010),
)


def by_hand_rates(setting: Published) -> dict[str, float]:
    """Return the bubble rates of the schedules by hand, by name.

    `interleaved` is the printed model's, `interleaved_every_wait` ours: the paper's calculation lets a
    message from the last rank to the first (and back) be waited for by the first microbatch of each group of
    num_stages only, so that one forward a step starts before its input is there. Waiting for
    every message costs num_stages transfers more.
    """
    sizes = (setting.num_stages, setting.num_microbatches)
    plain = setting.costs(tuple(range(setting.num_stages)))
    rates = {
        schedule.name: setting.rate(plain.simulate(schedule).period_s)
        for schedule in (one_f_one_b(*sizes), zb_h1(*sizes), zb_h2(*sizes))
    }
    chunked = interleaved((setting.num_chunks,) * setting.num_stages, setting.num_microbatches)
    costs = setting.costs(chunked.rank_of_stage)
    rates["interleaved"] = setting.rate(_printed_interleaved_ms(setting, chunked, costs))
    rates["interleaved_every_wait"] = setting.rate(costs.simulate(chunked).period_s)
    return rates


def _printed_interleaved_ms(setting: Published, schedule: Schedule, costs: PipelineCosts) -> float:
    ranks = setting.num_stages

    def transfer_ms(send: Action) -> float:
        is_wrap = send.stage % ranks == (ranks - 1 if send.kind is Kind.SEND_F else 0)
        return -math.inf if is_wrap and send.microbatch % ranks else setting.transfer_ms

    return simulate(schedule, seconds_of=costs.seconds_of, transfer_s=transfer_ms).period_s


def published_rows(
    settings: Sequence[Published] = PUBLISHED, *, clock: Callable[[], float], num_tries: int = 400
) -> Iterator[dict[str, object]]:
    """Yield a row for each published setting and schedule: ours, printed, and the seconds of a search."""
    for setting in settings:
        head = {"kind": "published", "model": setting.model, "num_microbatches": setting.num_microbatches}
        for name, rate in by_hand_rates(setting).items():
            yield {**head, "schedule": name, "rate": rate, "published": setting.rate_of.get(name)}
        for name, factor in (("zb-1p", 1), ("zb-2p", 2)):
            limit = factor * setting.num_stages
            costs = setting.costs(tuple(range(setting.num_stages)), num_forwards=limit)
            start_s = clock()
            found = auto_schedule(costs, setting.num_microbatches, barrier=False, num_tries=num_tries)
            search_s = clock() - start_s
            yield {
                **head,
                "schedule": f"auto-{factor}p",
                "rate": setting.rate(costs.simulate(found).period_s),
                "published": setting.rate_of[name],
                "search_s": search_s,
            }


SPEEDS_OF_IMBALANCE: dict[str, tuple[float, ...]] = {
    "equal": (1.0, 1.0, 1.0, 1.0),
    "first x1.5": (1.5, 1.0, 1.0, 1.0),
    "middle x1.5": (1.0, 1.5, 1.0, 1.0),
    "last x1.5": (1.0, 1.0, 1.0, 1.5),
    "ramp up": (0.7, 0.9, 1.1, 1.3),
    "ramp down": (1.3, 1.1, 0.9, 0.7),
    "slow then fast": (1.4, 1.4, 0.8, 0.8),
    "alternating": (1.3, 0.8, 1.3, 0.8),
}
"""Seconds of each rank's share, relative to the mean of an even pipeline."""


def unequal_rows(*, num_tries: int = 60) -> Iterator[dict[str, object]]:
    """Yield each schedule's bubble rate by imbalance, memory limit, transfer time and barrier."""
    for name, seconds_of_rank in SPEEDS_OF_IMBALANCE.items():
        for num_forwards in (1.0, 2.0):
            for transfer_s in (0.0, 0.1):
                for barrier in (True, False):
                    rates = _unequal_rates(
                        seconds_of_rank,
                        limit=num_forwards * len(seconds_of_rank),
                        transfer_s=transfer_s,
                        barrier=barrier,
                        num_tries=num_tries,
                    )
                    yield {
                        "kind": "unequal",
                        "imbalance": name,
                        "limit_forwards": num_forwards * len(seconds_of_rank),
                        "transfer_s": transfer_s,
                        "barrier": barrier,
                        "rates": rates,
                        "best_named": min(rate for key, rate in rates.items() if key != "auto"),
                    }


def _unequal_rates(
    seconds_of_rank: tuple[float, ...], *, limit: float, transfer_s: float, barrier: bool, num_tries: int
) -> dict[str, float]:
    """Return the bubble rate of each named schedule that fits and of `auto`, the best over the layouts."""
    num_ranks, num_microbatches = len(seconds_of_rank), 3 * len(seconds_of_rank)
    rates: dict[str, float] = {}
    for layout in (tuple(range(num_ranks)), round_layout((2,) * num_ranks), v_layout(num_ranks)):
        share = num_ranks / len(layout)
        costs = PipelineCosts(
            rank_of_stage=layout,
            forward_s=tuple(share * seconds_of_rank[rank] for rank in layout),
            input_gradient_s=tuple(share * seconds_of_rank[rank] for rank in layout),
            weight_gradient_s=tuple(0.8 * share * seconds_of_rank[rank] for rank in layout),
            transfer_s=(transfer_s,) * (len(layout) - 1),
            held_bytes=(share,) * len(layout),
            kept_bytes=(0.4 * share,) * len(layout),
            limit_bytes=(limit,) * num_ranks,
        )
        found = auto_schedule(costs, num_microbatches, barrier=barrier, num_tries=num_tries)
        for schedule in (*fitting_by_hand(costs, num_microbatches), found):
            timeline = costs.simulate(schedule)
            seconds = timeline.step_s if barrier else timeline.period_s
            rate = 1.0 - max(costs.work_s_of_rank) * num_microbatches / seconds
            rates[schedule.name] = min(rate, rates.get(schedule.name, 1.0))
    return rates


def bench_schedules(
    *, clock: Callable[[], float], quick: bool = False
) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Return every measurement and the summary.

    Summary:
        published_max_abs_diff: largest difference from the printed rates of 1F1B, interleaved, H1 and H2,
            ours rounded as they are.
        auto_over_zb1p_max, auto_over_zb2p_max: largest ratio of `auto`'s rate to the printed one, ours
        rounded
            as they are.
        unequal_auto_over_best_named_max: largest ratio of `auto`'s rate to the best named schedule's.
    """
    published = list(published_rows(clock=clock, num_tries=250 if quick else 400))
    unequal = list(unequal_rows(num_tries=24 if quick else 60))

    def ratios(name: str) -> list[float]:
        rows = [row for row in published if row["schedule"] == name]
        return [_ratio(round(_number(row["rate"]), 4), _number(row["published"])) for row in rows]

    differences = [
        abs(round(_number(row["rate"]), 4) - _number(row["published"]))
        for row in published
        if row["published"] is not None and not str(row["schedule"]).startswith("auto")
    ]
    summary = {
        "published_max_abs_diff": round(max(differences), 6),
        "auto_over_zb1p_max": max(ratios("auto-1p")),
        "auto_over_zb2p_max": max(ratios("auto-2p")),
        "unequal_auto_over_best_named_max": max(_unequal_ratio(row) for row in unequal),
        "auto_search_s_max": max(_number(row["search_s"]) for row in published if "search_s" in row),
    }
    return [*published, *unequal], summary


def _unequal_ratio(row: dict[str, object]) -> float:
    rates = row["rates"]
    assert isinstance(rates, dict)
    return _ratio(rates["auto"], _number(row["best_named"]))


def _ratio(ours: float, theirs: float) -> float:
    """Return ours over theirs; no bubble on either side counts as equal."""
    if abs(ours) < 1e-9:
        return 0.0 if abs(theirs) > 1e-9 else 1.0
    return ours / theirs if theirs > 1e-9 else math.inf


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
