"""The codec kit: runs every clause of `hybrid.collectives.codecs` on a variant. Needs no pytest.

One line puts a new variant through it::

    @pytest.mark.parametrize("clause", CLAUSES)
    def test_fp6_keeps_the_contract(clause):
        check_codec(Fp6Codec(), clause)

`faulty_codec.py` has the mistakes that the kit must refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.collectives.codecs import NARROW_FORMATS, Codec
from hybrid.collectives.error_feedback import ErrorFeedback

_GUARD_BYTES = 16
_GUARD = 0xA5
_SMALLEST_AMAX = 2.0**-120


class CodecClauseBroken(AssertionError):
    """A codec does not keep a clause of the contract."""

    def __init__(self, clause: str, what: str) -> None:
        self.clause, self.what = clause, what
        super().__init__(f"clause {clause!r} is broken: {what}")


def check_codec(codec: Codec, clause: str) -> None:
    """Run one of `CLAUSES` on a codec.

    Raises:
        CodecClauseBroken: the codec does not keep it; says how.
    """
    try:
        CHECK_OF_CLAUSE[clause](codec)
    except _Broken as what:
        raise CodecClauseBroken(clause, str(what)) from None
    except Exception as error:
        raise CodecClauseBroken(clause, f"{type(error).__name__}: {error}") from error


class _Broken(Exception):
    pass


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Broken(otherwise)


def _sizes(codec: Codec) -> tuple[int, ...]:
    block = codec.block_size
    return tuple(sorted({0, 1, 2, 3, 17, max(0, block - 1), block, block + 1, 3 * block + 5, 10_007}))


def _numbers(num_elements: int, *, seed: int = 0) -> Tensor:
    """Return numbers over many magnitudes, with zeros and both signs among them."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(num_elements, generator=chance)
    magnitude = torch.randint(-12, 8, (num_elements,), generator=chance)
    return torch.ldexp(x, magnitude).where(torch.rand(num_elements, generator=chance) > 0.05, 0.0)


def _encoded(codec: Codec, x: Tensor, *, offset: int = 0) -> Tensor:
    """Return the bytes of `x`, written between guards from an address of this offset on."""
    size_bytes = codec.encoded_bytes(x.numel(), x.dtype)
    room = torch.full((offset + size_bytes + 2 * _GUARD_BYTES,), _GUARD, dtype=torch.uint8)
    start = _GUARD_BYTES + offset
    codec.encode(x, room[start : start + size_bytes])
    outside = torch.cat([room[:start], room[start + size_bytes :]])
    _demand(bool((outside == _GUARD).all()), "encode wrote outside its bytes")
    return room[start : start + size_bytes]


def _decoded(codec: Codec, data: Tensor, num_elements: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers in `data`, written between guards."""
    guards = 4
    room = torch.full((num_elements + 2 * guards,), 77.0, dtype=dtype)
    codec.decode(data, room[guards : guards + num_elements])
    outside = torch.cat([room[:guards], room[guards + num_elements :]])
    _demand(bool((outside == 77.0).all()), "decode wrote outside its numbers")
    return room[guards : guards + num_elements].clone()


def _round_trip(codec: Codec, x: Tensor) -> Tensor:
    return _decoded(codec, _encoded(codec, x), x.numel(), x.dtype)


def _size(codec: Codec) -> None:
    for size in _sizes(codec):
        for x in (_numbers(size), torch.zeros(size), torch.full((size,), math.nan)):
            for offset in (0, 1, 2, 3):
                data = _encoded(codec, x, offset=offset)
                again = _decoded(codec, data, size, x.dtype)
                _demand(
                    _same(again, _round_trip(codec, x)), f"{size} numbers at an odd address decode to something else"
                )
    sizes = [codec.encoded_bytes(size) for size in range(2 * codec.block_size + 2)]
    _demand(sizes == sorted(sizes) and sizes[0] == 0, "more numbers make fewer bytes")


def _input_kept(codec: Codec) -> None:
    for size in _sizes(codec):
        x = _numbers(size)
        kept = x.clone()
        data = _encoded(codec, x)
        _demand(_same(x, kept), "encode changed its input")
        bytes_kept = data.clone()
        _decoded(codec, data, size, x.dtype)
        _demand(torch.equal(data, bytes_kept), "decode changed its input")


def _same_bytes(codec: Codec) -> None:
    for size in _sizes(codec):
        x = _numbers(size)
        first = _encoded(codec, x)
        for _ in range(2):
            _demand(torch.equal(first, _encoded(codec, x.clone())), "equal numbers made other bytes")


def _close(codec: Codec) -> None:
    for size in _sizes(codec):
        for seed in range(3):
            x = _numbers(size, seed=seed)
            back = _round_trip(codec, x)
            worst = _worst(back - x, _amax_of_block(codec, x))
            _demand(
                worst <= codec.max_error,
                f"an error of {worst:.4g} of the block's amax, more than {codec.max_error:.4g}",
            )
            _demand(bool((back[x == 0] == 0).all()), "a zero did not stay a zero")
    for extreme in (1e-40, 1e-38, 1e30, 3e38):
        x = torch.tensor([extreme, -extreme, 0.0, extreme / 2])
        worst = _worst(_round_trip(codec, x) - x, torch.full_like(x, extreme))
        _demand(worst <= codec.max_error, f"{extreme} comes back wrong by {worst:.3g} of itself")


def _formats(codec: Codec) -> None:
    for dtype in NARROW_FORMATS:
        x = _numbers(3 * codec.block_size + 5).to(dtype)
        back = _round_trip(codec, x)
        if codec.max_error == 0.0:
            _demand(_same(back, x), f"{dtype} does not come back as it was")
            continue
        data = _encoded(codec, x)
        _demand(torch.equal(data, _encoded(codec, x.float())), f"{dtype} makes other bytes than its float32 values")
        wide = _decoded(codec, data, x.numel(), torch.float32)
        _demand(_same(back, wide.to(dtype)), f"{dtype} is not the float32 result rounded once")


def _not_finite(codec: Codec) -> None:
    size = 3 * codec.block_size + 5
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, codec.block_size, size - 1):
            x = _numbers(size)
            clean = _round_trip(codec, x)
            x[place] = bad
            back = _round_trip(codec, x)
            _demand(not bool(back[place].isfinite()), f"{bad} became the number {float(back[place])}")
            first = place // codec.block_size * codec.block_size
            outside = torch.ones(size, dtype=torch.bool)
            outside[first : first + codec.block_size] = False
            _demand(_same(back[outside], clean[outside]), f"{bad} changed numbers outside its block")


def _any_bytes(codec: Codec) -> None:
    chance = torch.Generator().manual_seed(9)
    for size in _sizes(codec):
        for _ in range(5):
            data = torch.randint(0, 256, (codec.encoded_bytes(size),), dtype=torch.uint8, generator=chance)
            _decoded(codec, data, size, torch.float32)


def _feedback(codec: Codec) -> None:
    """Check that with error feedback what was lost comes later: the sums differ by the last error alone."""
    feedback, size = ErrorFeedback(codec), 2 * codec.block_size + 3
    given, taken = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for step in range(20):
        x = _numbers(size, seed=step) if step != 7 else torch.full((size,), math.inf)
        data = torch.empty(codec.encoded_bytes(size), dtype=torch.uint8)
        feedback.encode("bucket", x, data)
        if step == 7:
            given.copy_(taken)  # a step that is not finite is told, counts for nothing and leaves no error behind
            continue
        given += x
        taken += _decoded(codec, data, size, torch.float32)
    left = feedback.state().get("bucket", torch.zeros(size))
    _demand(bool(left.isfinite().all()), "the error that is kept is not finite")
    gap = float((given - taken - left).abs().max())
    _demand(gap <= 1e-3, f"with error feedback {gap:.3g} is lost for good")


def _worst(error: Tensor, amax: Tensor) -> float:
    return max((error.abs() / amax.clamp(min=_SMALLEST_AMAX)).tolist(), default=0.0)


def _amax_of_block(codec: Codec, x: Tensor) -> Tensor:
    if codec.block_size == 1:
        return x.abs()
    parts = [part.abs().max().expand(len(part)) for part in torch.split(x, codec.block_size) if len(part)]
    return torch.cat(parts) if parts else x.abs()


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num()))


CHECK_OF_CLAUSE: dict[str, Callable[[Codec], None]] = {
    "size": _size,
    "input kept": _input_kept,
    "same bytes": _same_bytes,
    "close": _close,
    "formats": _formats,
    "not finite": _not_finite,
    "any bytes": _any_bytes,
    "feedback": _feedback,
}
"""By name, in the contract's order; `feedback` is `ErrorFeedback`'s promise for this codec."""

CLAUSES: tuple[str, ...] = tuple(CHECK_OF_CLAUSE)
"""The names of the clauses."""
