"""FP8 packing: bytes against ml_dtypes' own encoders, variants against each other, and the policies."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import hybrid_kernels as hk
from hybrid_kernels.fp8_pack import cpu, ref

MODULES = {"ref": ref, "cpu": cpu}
MAXIMUM = {"e4m3": 240.0, "e4m3fn": 448.0}
ENCODER = {"e4m3": ml_dtypes.float8_e4m3, "e4m3fn": ml_dtypes.float8_e4m3fn}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def expected_bytes(scaled: np.ndarray, fp8_format: str) -> np.ndarray:
    clipped = np.clip(scaled, -MAXIMUM[fp8_format], MAXIMUM[fp8_format])
    return clipped.astype(ENCODER[fp8_format]).view(np.uint8)


def random_finite(count: int, seed: int) -> torch.Tensor:
    """Return float32 values of uniformly random bits: every exponent, denormals too; NaN and inf made 1."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed))
    x = bits.to(torch.int32).view(torch.float32)
    return x.where(x.isfinite(), 1.0)


def edges() -> torch.Tensor:
    """Return every e4m3fn value, every midpoint of two, their float32 neighbours, both signs, and the extremes."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat((values, (values[1:] + values[:-1]) / 2, torch.tensor([1e-45, 1e-38, 3e38, 464.0, 248.0])))
    around = [points, torch.nextafter(points, torch.tensor(9e9)), torch.nextafter(points, torch.tensor(-9e9))]
    return torch.cat([sign * x for sign in (1, -1) for x in around])


def check_bytes_of_encode(x: torch.Tensor, fp8_format: str) -> None:
    assert np.array_equal(ref.encode(x, fp8_format=fp8_format).numpy(), expected_bytes(x.numpy(), fp8_format))


def check_bytes_of_pack(x: torch.Tensor, fp8_format: str, block_size: int, variant: str) -> None:
    packed = hk.fp8_pack(x, block_size=block_size, fp8_format=fp8_format, variant=variant)
    scales = packed.scales.repeat_interleave(block_size)[: len(x)]
    # A power of two: the quotient is exact, so ml_dtypes rounds once what was rounded nowhere before.
    scaled = x.numpy() / scales.numpy()
    assert np.array_equal(packed.payload.numpy(), expected_bytes(scaled, fp8_format))


@pytest.mark.parametrize("fp8_format", ["e4m3", "e4m3fn"])
def test_encode_gives_the_bytes_of_ml_dtypes_on_every_edge(fp8_format: str) -> None:
    check_bytes_of_encode(edges(), fp8_format)


@pytest.mark.parametrize("fp8_format", ["e4m3", "e4m3fn"])
@pytest.mark.parametrize("variant", MODULES)
def test_pack_gives_the_bytes_of_ml_dtypes_on_every_edge(variant: str, fp8_format: str) -> None:
    maximum = MAXIMUM[fp8_format]
    x = edges()
    within = x[x.abs() <= maximum]
    # With the maximum in each block its scale is 1, so that the edges are met where they are.
    blocks = torch.cat([torch.cat((part, torch.tensor([maximum]))) for part in within.split(63) if len(part) == 63])
    assert (hk.fp8_pack(blocks, block_size=64, fp8_format=fp8_format, variant=variant).scales == 1.0).all()
    check_bytes_of_pack(blocks, fp8_format, 64, variant)
    check_bytes_of_pack(x, fp8_format, 1, variant)


@pytest.mark.parametrize("fp8_format", ["e4m3", "e4m3fn"])
@pytest.mark.parametrize("variant", MODULES)
def test_pack_gives_the_bytes_of_ml_dtypes_on_200_thousand_random_inputs(variant: str, fp8_format: str) -> None:
    x = random_finite(100_000, seed=1)
    check_bytes_of_encode(x, fp8_format)
    for block_size in (1, 7, 128):
        check_bytes_of_pack(x, fp8_format, block_size, variant)
    check_bytes_of_pack(torch.randn(100_001), fp8_format, 128, variant)


@pytest.mark.slow
@pytest.mark.parametrize("fp8_format", ["e4m3", "e4m3fn"])
def test_pack_gives_the_bytes_of_ml_dtypes_on_ten_million_random_inputs(fp8_format: str) -> None:
    for seed in range(10):
        x = random_finite(1_000_000, seed)
        check_bytes_of_encode(x, fp8_format)
        check_bytes_of_pack(x, fp8_format, 1, "cpu")
        check_bytes_of_pack(x, fp8_format, 4, "cpu")
        normal = torch.randn(1_000_000, generator=torch.Generator().manual_seed(seed))
        check_bytes_of_pack(normal, fp8_format, 128, "cpu")


def test_what_trainium_packs_the_h100_reads_and_packs_again_to_the_same_bytes() -> None:
    x = torch.cat((edges(), random_finite(100_000, 2), torch.randn(100_000)))
    x = x[x.abs() <= 240.0]
    of_trainium = ref.encode(x, fp8_format="e4m3")
    # Trainium's own reading of the byte, the H100's reading of it, and the byte that each makes of that value.
    as_trainium = of_trainium.numpy().view(ml_dtypes.float8_e4m3).astype(np.float32)
    as_h100 = ref.decode(of_trainium)
    assert np.array_equal(as_trainium.view(np.uint32), as_h100.numpy().view(np.uint32))
    assert torch.equal(ref.encode(as_h100, fp8_format="e4m3fn"), of_trainium)
    assert torch.equal(ref.encode(x, fp8_format="e4m3fn"), of_trainium)


def test_a_chunk_goes_from_trn2_to_h100_and_back_with_the_same_bytes() -> None:
    x = torch.randn(10_000) * 37
    there = hk.fp8_pack(x, block_size=128)
    values = hk.fp8_unpack(there.payload, there.scales, block_size=128)
    back = hk.fp8_pack(values, block_size=128)
    again = hk.fp8_unpack(back.payload, back.scales, block_size=128)
    assert torch.equal(again, values)


@pytest.mark.parametrize("num_elements", [0, 1, 127, 128, 129, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cpu_variant_gives_what_the_reference_gives(num_elements: int, dtype: torch.dtype) -> None:
    x = (torch.randn(num_elements) * torch.exp(4 * torch.randn(num_elements))).to(dtype)
    x[1000:2000] = 0.0
    if num_elements > 5000:
        x[3000], x[4500] = float("nan"), float("-inf")
    for fp8_format, error, seed in (
        ("e4m3", None, None),
        ("e4m3fn", torch.randn(num_elements), None),
        ("e4m3", torch.randn(num_elements), -(2**40) + 3),
    ):
        want, got = (
            module.fp8_pack(x, block_size=128, fp8_format=fp8_format, error=error, seed=seed) for module in (ref, cpu)
        )
        assert torch.equal(got.payload, want.payload)
        assert torch.equal(got.scales.view(torch.int32), want.scales.view(torch.int32))
        assert (got.error is None) == (want.error is None)
        if got.error is not None and want.error is not None:
            assert torch.equal(got.error, want.error)
        for out in (torch.float32, torch.bfloat16):
            back = [m.fp8_unpack(want.payload, want.scales, block_size=128, dtype=out) for m in (ref, cpu)]
            assert torch.equal(back[0].nan_to_num(), back[1].nan_to_num())
            assert torch.equal(back[0].isnan(), back[1].isnan())


@pytest.mark.parametrize("fp8_format", ["e4m3", "e4m3fn"])
@pytest.mark.parametrize("variant", MODULES)
def test_a_scale_is_the_smallest_power_of_two_that_brings_the_block_within_the_format(
    variant: str, fp8_format: str
) -> None:
    amax = torch.cat((random_finite(5_000, 3).abs(), edges().abs(), torch.tensor([240.0, 448.0, 240.00002, 448.0001])))
    scales = MODULES[variant].fp8_pack(amax, block_size=1, fp8_format=fp8_format).scales.double()
    assert torch.equal(torch.frexp(scales)[0], torch.full_like(scales, 0.5))
    assert (amax.double() / scales <= MAXIMUM[fp8_format]).all()
    could_be_halved = amax.double() / (scales / 2) <= MAXIMUM[fp8_format]
    assert not (could_be_halved & (scales > 2.0**-126)).any()


@pytest.mark.parametrize("variant", MODULES)
def test_a_block_with_nan_or_inf_is_refused_or_decodes_to_nan_and_spares_its_neighbours(variant: str) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(400)
        x[130] = bad
        with pytest.raises(FloatingPointError, match=r"1 of 4 blocks .* from 128"):
            hk.fp8_pack(x, block_size=128, variant=variant)
        packed = hk.fp8_pack(x, block_size=128, error=torch.zeros(400), check=False, variant=variant)
        values = hk.fp8_unpack(packed.payload, packed.scales, block_size=128, variant=variant)
        assert values[128:256].isnan().all()
        assert values[:128].isfinite().all()
        assert values[256:].isfinite().all()
        assert packed.error is not None
        assert not packed.error[128:256].any()


def test_a_finite_input_whose_sum_with_the_error_overflows_is_refused_too() -> None:
    with pytest.raises(FloatingPointError):
        hk.fp8_pack(torch.full((4,), 3e38), block_size=4, error=torch.full((4,), 3e38))


def test_error_feedback_loses_nothing_over_steps() -> None:
    grad, error, received = torch.randn(1000) * 1e-3, torch.zeros(1000), torch.zeros(1000)
    grad[0] = 1.0  # keeps its block's scale so coarse that small elements vanish without feedback
    for _ in range(200):
        packed = hk.fp8_pack(grad, block_size=1000, error=error)
        assert packed.error is not None
        error = packed.error
        received += hk.fp8_unpack(packed.payload, packed.scales, block_size=1000)
    assert torch.allclose(received + error, 200 * grad, atol=2e-4)
    bare = hk.fp8_pack(grad, block_size=1000)
    without = 200 * hk.fp8_unpack(bare.payload, bare.scales, block_size=1000)
    assert (received - 200 * grad).abs().sum() < 0.1 * (without - 200 * grad).abs().sum()


def test_stochastic_rounding_is_unbiased_and_lands_on_a_neighbour() -> None:
    x = torch.rand(500) * 200
    down, up = (torch.tensor(a) for a in _neighbours(x.numpy()))
    total, draws = torch.zeros(500), 2000
    for seed in range(draws):
        packed = hk.fp8_pack(torch.cat((x, torch.tensor([240.0]))), block_size=501, seed=seed)
        values = hk.fp8_unpack(packed.payload, packed.scales, block_size=501)[:500]
        assert ((values == down) | (values == up)).all()
        total += values
    spacing = up - down
    # The mean of n draws of a two-valued variable strays by at most half a spacing over root n; 5 of those.
    assert ((total / draws - x).abs() <= 5 * 0.5 * spacing / draws**0.5 + 1e-6).all()


def _neighbours(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    above = np.searchsorted(table, x, side="right")
    return table[above - 1], table[above]


def test_a_seed_gives_the_same_bytes_again_and_another_seed_others() -> None:
    x = torch.randn(5_000)
    first, second, other = (hk.fp8_pack(x, block_size=128, seed=seed).payload for seed in (7, 7, 8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_relative_error_is_at_most_a_sixteenth_within_fourteen_binades_of_the_largest() -> None:
    x = torch.randn(100_000)
    packed = hk.fp8_pack(x, block_size=128)
    values = hk.fp8_unpack(packed.payload, packed.scales, block_size=128)
    amax = torch.nn.functional.pad(x, (0, 128 - len(x) % 128)).view(-1, 128).abs().amax(1).repeat_interleave(128)
    near = x.abs() >= amax[: len(x)] * 2.0**-13
    assert ((values - x).abs()[near] <= x.abs()[near] / 16).all()
    assert ((values - x).norm() / x.norm()).item() == pytest.approx(0.0264, abs=0.0005)


def test_wrong_arguments_are_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match="e5m2"):
        hk.fp8_pack(torch.zeros(4), block_size=4, fp8_format="e5m2")
    for x, block_size in (
        (torch.zeros(2, 2), 4),
        (torch.zeros(4), 0),
        (torch.zeros(4).double(), 4),
        (torch.zeros(4).int(), 4),
    ):
        with pytest.raises(ValueError, match="fp8_pack takes"):
            hk.fp8_pack(x, block_size=block_size)
    with pytest.raises(ValueError, match="error must be float32"):
        hk.fp8_pack(torch.zeros(4), block_size=4, error=torch.zeros(3))
