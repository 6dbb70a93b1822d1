"""Collective algorithms by name: each is a function that returns a `Program`; one line here adds one.

Pure: no torch.
"""

from hybrid.collectives.algorithms import direct, halving, ring, tree
from hybrid.collectives.algorithms.program import Algorithm, Program, Step, Transfer

__all__ = ["ALGORITHMS", "Algorithm", "Program", "Step", "Transfer"]

ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "all_reduce": {
        "exchange": direct.exchange,
        "direct": direct.all_reduce,
        "ring": ring.all_reduce,
        "halving": halving.all_reduce,
        "doubling": halving.doubling,
        "tree": tree.all_reduce,
    },
    "reduce_scatter": {
        "direct": direct.reduce_scatter,
        "ring": ring.reduce_scatter,
        "halving": halving.reduce_scatter,
    },
    "all_gather": {"direct": direct.all_gather, "ring": ring.all_gather, "doubling": halving.all_gather},
    "broadcast": {"direct": direct.broadcast, "tree": tree.broadcast, "chain": tree.chain_broadcast},
    "reduce": {"direct": direct.reduce, "tree": tree.reduce},
    "gather": {"direct": direct.gather},
    "scatter": {"direct": direct.scatter},
    "all_to_all": {"direct": direct.all_to_all},
    "barrier": {"dissemination": direct.barrier},
}
"""The algorithms of each operation, by name."""
