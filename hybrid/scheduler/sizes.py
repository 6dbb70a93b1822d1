"""The sizes that a schedule can be built for.

Pure: no torch, no clock, no network.
"""

from __future__ import annotations

from hybrid.errors import ScheduleError


def check_sizes(num_stages: int, num_microbatches: int) -> None:
    """Raise ScheduleError when a size is below one."""
    for name, value in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
        if value < 1:
            raise ScheduleError(f"{name} is below one", value=value, valid="1 or more")
