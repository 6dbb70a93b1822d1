"""Error feedback: small numbers get through in time, and its state survives a checkpoint."""

import pytest
import torch

from hybrid.collectives.codecs import open_codec
from hybrid.collectives.error_feedback import ErrorFeedback
from hybrid.errors import CheckpointError


def _decoded(feedback: ErrorFeedback, x: torch.Tensor, bucket: str = "b") -> torch.Tensor:
    data = torch.empty(feedback.codec.encoded_bytes(x.numel()), dtype=torch.uint8)
    feedback.encode(bucket, x, data)
    back = torch.empty_like(x)
    feedback.codec.decode(data, back)
    return back


def test_a_number_too_small_for_its_block_gets_through_in_time() -> None:
    x = torch.tensor([7.0, 0.1])
    plain = torch.empty(2)
    codec = open_codec("int4")
    data = torch.empty(codec.encoded_bytes(2), dtype=torch.uint8)
    codec.encode(x, data)
    codec.decode(data, plain)
    assert plain.tolist() == [7.0, 0.0]
    feedback = ErrorFeedback(codec)
    total = sum(_decoded(feedback, x) for _ in range(100))
    assert total[1].item() == pytest.approx(10.0, abs=1.0)


def test_buckets_do_not_share_what_they_lost() -> None:
    feedback = ErrorFeedback(open_codec("fp8"))
    _decoded(feedback, torch.full((3,), 1.01), "one")
    assert torch.equal(_decoded(feedback, torch.zeros(3), "other"), torch.zeros(3))
    assert set(feedback.state()) == {"one", "other"}


def test_a_loaded_state_goes_on_with_the_same_bytes() -> None:
    chance = torch.Generator().manual_seed(3)
    xs = [torch.randn(300, generator=chance) for _ in range(6)]
    whole = ErrorFeedback(open_codec("int4"))
    first = [_decoded(whole, x) for x in xs[:3]]
    again = ErrorFeedback(open_codec("int4"))
    again.load(whole.state())
    for x in xs[3:]:
        assert torch.equal(_decoded(whole, x), _decoded(again, x))
    assert len(first) == 3


def test_a_damaged_state_is_refused_whole() -> None:
    feedback = ErrorFeedback(open_codec("fp8"))
    with pytest.raises(CheckpointError, match="error feedback of bucket b is damaged"):
        feedback.load({"a": torch.zeros(2), "b": torch.full((2,), torch.nan)})
    assert feedback.state() == {}


def test_a_codec_that_loses_nothing_keeps_no_state() -> None:
    feedback = ErrorFeedback(open_codec("none"))
    x = torch.randn(5, dtype=torch.float64)
    data = torch.empty(40, dtype=torch.uint8)
    feedback.encode("b", x, data)
    assert feedback.state() == {}
