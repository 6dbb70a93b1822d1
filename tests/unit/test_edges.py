"""To whom a rank talks: its stages' neighbours, its neighbours by number, the other end of a tied weight; each once."""

from dataclasses import replace

import pytest

from hybrid.config import ModelConfig
from hybrid.runtime.edges import emulated_links, open_edges, peer_pairs
from hybrid.scheduler.plan import EdgePlan, ReplicaPlan, StagePlan


def replica(*rank_of_stage: int, backend: str = "emulated", first_rank: int = 0) -> ReplicaPlan:
    stages = tuple(
        StagePlan(
            stage=number,
            ranks=(first_rank + rank,),
            island="a",
            chip="trn2",
            backend=backend,
            first_layer=number,
            end_layer=number + 1,
            tensor_parallel=1,
            width=1,
            recompute=False,
            forward_s=1.0,
            backward_s=2.0,
            weight_gradient_s=1.0,
            memory_bytes=1,
            memory_limit_bytes=9,
        )
        for number, rank in enumerate(rank_of_stage)
    )
    edges = tuple(
        EdgePlan(from_stage=i, to_stage=i + 1, size_bytes=8, transfer_s=0.5 + i, latency_s=0.1, codec="none")
        for i in range(len(stages) - 1)
    )
    return ReplicaPlan(
        replica=0,
        schedule="1f1b",
        order=(),
        num_microbatches=4,
        microbatch=1,
        first_sample=0,
        step_s=0.0,
        idle_share=0.0,
        stages=stages,
        edges=edges,
    )


@pytest.mark.parametrize(
    ("layout", "tied", "pairs"),
    [
        ((0,), True, ()),
        ((0, 1, 2), False, ((0, 1), (1, 2))),
        ((0, 1, 2), True, ((0, 1), (0, 2), (1, 2))),
        ((0, 1, 2, 2, 1, 0), True, ((0, 1), (1, 2))),
        ((0, 1, 2, 0, 1, 2), False, ((0, 1), (0, 2), (1, 2))),
        # Ranks 1 and 2 share no boundary, but norms travel between them.
        ((0, 1, 0, 2), False, ((0, 1), (0, 2), (1, 2))),
    ],
)
def test_each_pair_that_has_something_to_say_is_named_once(layout, tied, pairs):
    assert peer_pairs(replica(*layout), tied=tied) == pairs


class Node:
    """Notes whom it was asked to open."""

    def __init__(self) -> None:
        self.asked = []

    def open(self, peer, address, *, timeout_s):
        self.asked.append((peer, address))
        return f"edge to {peer}"


def test_edges_are_opened_by_the_jobs_ranks_and_known_by_the_pipelines():
    node, checks = Node(), []
    one = replica(0, 1, 2, 0, first_rank=5)
    addresses = {str(rank): f"at {rank}" for rank in range(5, 8)}
    edges = open_edges(
        one, 5, node, addresses, model=ModelConfig(), token_bytes=4, timeout_s=1.0, before_each=lambda: checks.append(1)
    )
    assert edges.activations == edges.leads == {1: "edge to 6", 2: "edge to 7"}
    assert node.asked == [(6, "at 6"), (7, "at 7")]
    assert len(checks) == 2


def test_links_are_emulated_where_both_ends_are():
    one = replica(0, 1, 2)
    assert {peer: link._transfer_s for peer, link in emulated_links(one, 1).items()} == {0: 0.5, 2: 1.5}
    assert emulated_links(replica(0, 1, backend="cpu"), 0) == {}
    mixed = replace(one, stages=(*one.stages[:2], replace(one.stages[2], backend="cpu")))
    assert list(emulated_links(mixed, 1)) == [0]
    assert emulated_links(mixed, 2) == {}


def test_two_stages_of_one_rank_need_no_link():
    assert list(emulated_links(replica(0, 1, 1, 0), 1)) == [0]
    assert emulated_links(replica(0, 0), 0) == {}
