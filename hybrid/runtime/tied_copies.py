"""The two copies of a tied weight meeting within a replica, whoever holds which of their rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.models.stage import tied_parameters
from hybrid.runtime.axes import StageAxes
from hybrid.runtime.edges import Edges, tied_ends
from hybrid.runtime.exchange import add_tied_gradients
from hybrid.runtime.stage_sums import share_first_copy
from hybrid.scheduler.plan import ReplicaPlan


def meet_tied(
    model: ModelConfig,
    replica: ReplicaPlan,
    rank: int,
    parameters: Mapping[str, Tensor],
    edges: Edges,
    axes: StageAxes,
    *,
    step: int,
    timeout_s: float,
) -> None:
    """Give every holder of a tied weight's rows the sum of both copies' gradients; nothing where none is tied.

    The first copies of the two stages exchange their rows, and their stages' other copies get the sum from them.

    Args:
        parameters: this rank's, by their names in the whole model.

    Raises:
        CommTimeout, PeerLost: a rank was silent or has gone.
    """
    names = tied_parameters(model)
    if names is None:
        return
    ends = tied_ends(replica, rank, edges, model)
    one_rank_has_both = replica.rank_of_stage[0] == replica.rank_of_stage[-1]
    if ends or one_rank_has_both:
        add_tied_gradients(model, parameters, ends, step=step, timeout_s=timeout_s)
    for name in names if not one_rank_has_both else ():
        gradient = parameters[name].grad if name in parameters else None
        if gradient is not None:
            share_first_copy(gradient, axes)
