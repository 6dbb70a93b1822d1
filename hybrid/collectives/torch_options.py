"""What a user of the torch.distributed backend may set: `init_process_group("hybrid", pg_options=HybridOptions(…))`.

Pure: no torch. May import only `errors`.
"""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridOptions:
    """How a rank of a `hybrid` world meets the others; every field has a default that serves one host and many."""

    transport: str = AUTO
    """A name of `hybrid.transports.VARIANTS`, for all pairs of ranks; `auto`: the fastest that a pair has."""
    address: str = AUTO
    """The address or name of this host's interface that the others reach; `auto`: the one that reaches the store."""
    island: str = ""
    """Ranks with the same word and the same kind of accelerator use the vendor's own library among them."""
    native: bool = True
    """False: tensors of devices always go through the host."""
