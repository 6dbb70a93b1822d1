"""The emulated link: when a message over the real chips' link would arrive, at the job's time scale.

The sender stamps each message with its arrival; the receiving emulated chip starts no sooner. Messages queue behind
each other for the time that they fill the link. The real transfer between the two processes is hidden in it as long
as it is shorter.
"""

from __future__ import annotations

import struct
import time

from hybrid.backends.emulated import Clock

STAMP_BYTES = 8
_STAMP = struct.Struct("<d")


class EmulatedLink:
    """One direction of an edge between two emulated chips.

    Args:
        transfer_s: from a send's start to its arrival, on the real link.
        busy_s: the part of it during which the link takes no other message.
    """

    def __init__(self, *, transfer_s: float, busy_s: float, clock: Clock | None = None) -> None:
        self._transfer_s, self._busy_s = transfer_s, busy_s
        self._clock: Clock = clock if clock is not None else time
        self._free_at = float("-inf")
        self.time_scale = 0.0
        """Wall seconds for one second of the real link; 0 delivers at once."""

    def stamp(self) -> bytes:
        """Return the stamp of a message that is sent now."""
        now_s = self._clock.monotonic()
        start = max(now_s, self._free_at)
        self._free_at = start + self._busy_s * self.time_scale
        arrival_s = start + self._transfer_s * self.time_scale
        # Wall time on the wire: two processes, perhaps on two hosts, share no monotonic clock.
        return _STAMP.pack(arrival_s - now_s + time.time())


def arrival_s(stamp: bytes | bytearray) -> float:
    """Return when a stamped message arrives, on this process's `time.monotonic`."""
    (wall_s,) = _STAMP.unpack(stamp)
    return float(wall_s) - time.time() + time.monotonic()
