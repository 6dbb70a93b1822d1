"""Every codec keeps every clause of the contract, and the kit refuses every planted fault. A new variant is one id."""

import pytest

from hybrid.collectives.codecs import VARIANTS, open_codec
from hybrid.errors import ConfigError, UnsupportedFormat
from hybrid.testing.codec_kit import CLAUSES, CodecClauseBroken, check_codec
from hybrid.testing.faulty_codec import CLAUSE_OF_FAULT, CodecFault, FaultyCodec

NAMES = ("none", "bf16", "fp8", "int4")


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("name", NAMES)
def test_the_codec_keeps_the_clause(name: str, clause: str) -> None:
    check_codec(open_codec(name), clause)


def test_every_codec_of_the_table_is_put_through_the_kit() -> None:
    assert set(NAMES) == set(VARIANTS)
    assert [open_codec(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("fault", CodecFault)
def test_a_planted_fault_is_refused_by_its_clause(fault: CodecFault) -> None:
    with pytest.raises(CodecClauseBroken) as refusal:
        check_codec(FaultyCodec(open_codec("fp8"), fault), CLAUSE_OF_FAULT[fault])
    assert refusal.value.clause == CLAUSE_OF_FAULT[fault]


@pytest.mark.parametrize("clause", CLAUSES)
def test_the_same_wrapper_without_a_fault_keeps_every_clause(clause: str) -> None:
    check_codec(FaultyCodec(open_codec("fp8"), None), clause)


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no such codec \(got 'fp6'\); valid: none, bf16, fp8, int4"):
        open_codec("fp6")


def test_a_codec_that_loses_something_refuses_float64() -> None:
    import torch

    codec = open_codec("fp8")
    with pytest.raises(UnsupportedFormat, match="codec fp8 does not take this format"):
        codec.encode(torch.zeros(4, dtype=torch.float64), torch.empty(8, dtype=torch.uint8))
