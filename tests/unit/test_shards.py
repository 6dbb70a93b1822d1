"""Which part of each parameter a tensor-parallel rank holds, and which degrees a model refuses."""

import pytest

from hybrid.config import ModelConfig
from hybrid.errors import PlanError
from hybrid.models.shards import check_degree, shard_of

MODEL = ModelConfig(
    num_blocks=2, hidden_size=48, num_heads=6, num_kv_heads=2, intermediate_size=96, vocab_size=600, sequence_length=12
)
NAMES = {
    "weight": (600, 48),
    "attention_norm.weight": (48,),
    "attention.query.weight": (48, 48),
    "attention.key.weight": (16, 48),
    "attention.output.weight": (48, 48),
    "mlp.gate.weight": (96, 48),
    "mlp.down.weight": (48, 96),
}


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_together_hold_every_element_and_count_it_once(name: str, degree: int) -> None:
    model = MODEL.model_copy(update={"num_kv_heads": 3}) if degree == 3 else MODEL
    shape = (24, 48) if name == "attention.key.weight" and degree == 3 else NAMES[name]
    held, counted = [0] * 600, [0] * 600
    for rank in range(degree):
        shard = shard_of(model, name, degree=degree, rank=rank)
        assert shard.size == shape[shard.dim]
        for index in range(shard.first, shard.end):
            held[index] += 1
            counted[index] += shard.counted
        copies = shard.copies
    assert held[: shard.size] == [copies] * shard.size
    assert counted[: shard.size] == [1] * shard.size


def test_more_ranks_than_key_heads_hold_each_head_by_neighbours_that_have_its_queries() -> None:
    for rank in range(6):
        query = shard_of(MODEL, "attention.query.weight", degree=6, rank=rank)
        key = shard_of(MODEL, "attention.key.weight", degree=6, rank=rank)
        queries_of_a_key = MODEL.num_heads // MODEL.num_kv_heads
        assert query.first // MODEL.head_size // queries_of_a_key == key.first // MODEL.head_size
        assert (key.end - key.first, key.copies) == (MODEL.head_size, 3)


@pytest.mark.parametrize(
    ("changes", "degree", "layers", "sequence_parallel", "message"),
    [
        ({}, 4, [1], False, r"model.num_heads 6 is not a multiple of tensor_parallel 4.*num_heads 4 or 8"),
        ({"vocab_size": 601}, 2, [0], False, r"model.vocab_size 601 is not a multiple.*vocab_size 600 or 602"),
        ({"vocab_size": 601}, 2, [3], False, "model.vocab_size 601"),
        ({"intermediate_size": 97}, 2, [1, 2], False, "model.intermediate_size 97"),
        ({"sequence_length": 13}, 2, [1], True, r"model.sequence_length 13.*runtime.sequence_parallel to false"),
        ({"num_kv_heads": 3}, 2, [1], False, "model.num_kv_heads 3 is not a multiple of tensor_parallel 2"),
        (
            {"num_heads": 6, "num_kv_heads": 2},
            3,
            [1],
            False,
            "tensor_parallel 3 is not a multiple of model.num_kv_heads 2",
        ),
    ],
)
def test_an_impossible_degree_is_refused_with_the_number_that_would_have_to_change(
    changes: dict[str, int], degree: int, layers: list[int], sequence_parallel: bool, message: str
) -> None:
    model = MODEL.model_copy(update=changes)
    with pytest.raises(PlanError, match=message):
        check_degree(model, degree, layers, sequence_parallel=sequence_parallel, where="plan: stages[1]")


def test_only_what_the_stage_holds_must_divide() -> None:
    model = MODEL.model_copy(update={"vocab_size": 601, "sequence_length": 13})
    check_degree(model, 6, [1, 2], sequence_parallel=False, where="plan")
    check_degree(MODEL, 2, range(4), sequence_parallel=True, where="plan")
