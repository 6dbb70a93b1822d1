"""What the interpreter computes, and how it accounts for memory; what it refuses is in test_nki_mutants.py."""

import gc
import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hybrid.errors import DeviceError, UserError
from hybrid.testing.nki import NkiRefused, generations, interpreting, load_kernels, run_kernel
from hybrid.testing.nki.dtypes import cast

with interpreting("trn3"):
    import nki
    import nki.isa as nisa
    import nki.language as nl


@pytest.fixture
def trn2():
    with interpreting("trn2") as machine:
        yield machine


def _tile(values, dtype=None):
    """Return a tile in SBUF that holds an array."""
    array = np.asarray(values)
    tile = nl.ndarray(array.shape, dtype=dtype or str(array.dtype), buffer=nl.sbuf)
    tile.array()[...] = array
    tile.state()[...] = 1
    return tile


def _matmul(dst, left, right, **options):
    nisa.nc_matmul(dst=dst, stationary=_tile(left), moving=_tile(right), **options)


# ---- the stand-in modules --------------------------------------------------------------------------------------


def test_the_stand_in_modules_are_gone_after_the_context():
    before = dict(sys.modules)
    with interpreting("trn1"):
        assert "nki.isa" in sys.modules
    assert sys.modules == before


def test_the_modules_of_the_vendor_come_back_even_after_an_error(monkeypatch):
    vendor = type(sys)("nki")
    monkeypatch.setitem(sys.modules, "nki", vendor)
    seen = []

    def fail_inside():
        with interpreting("trn1"):
            seen.append(sys.modules["nki"])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert seen != [vendor]
    assert sys.modules["nki"] is vendor


def test_contexts_nest_and_each_has_its_own_limits():
    with interpreting("trn1"):
        outer = nl.tile_size.sbuf_fmax_bytes
        with interpreting("trn3"):
            assert nl.tile_size.sbuf_fmax_bytes > outer
        assert nl.tile_size.sbuf_fmax_bytes == outer
        assert nisa.get_nc_version() == nisa.nc_version.gen2


def test_an_unknown_generation_is_named_with_the_valid_ones():
    with pytest.raises(UserError, match="trn1, trn2, trn3"), interpreting("trn9"):
        pass


def test_the_limits_are_the_documented_ones():
    kib = {name: g.sbuf_partition_bytes // 1024 for name, g in generations().items()}
    assert kib == {"trn1": 192, "trn2": 224, "trn3": 256}
    assert {g.psum_partition_bytes for g in generations().values()} == {16 * 1024}
    having = {what: {name for name, g in generations().items() if what in g.has} for what in ("double_row", "mx")}
    assert having == {"double_row": {"trn2", "trn3"}, "mx": {"trn3"}}


def test_a_refusal_is_a_device_error_and_survives_pickling():
    with interpreting("trn2"), pytest.raises(DeviceError) as refused:
        nl.ndarray((200, 4), dtype=nl.float32, buffer=nl.sbuf)
    again = pickle.loads(pickle.dumps(refused.value))
    assert isinstance(again, NkiRefused)
    assert (again.rule, str(again)) == ("partitions-128", str(refused.value))


# ---- tiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ((0, 0, 10), (1, 1)),
        ((slice(None), 0), (64, 64)),
        ((slice(None), 0, 10), (64, 1)),
        ((slice(0, 64), 0, slice(0, 64)), (64, 64)),
        ((slice(None), slice(None), slice(None, None, 2)), (64, 64, 32)),
        (Ellipsis, (64, 64, 64)),
        ((0, Ellipsis, slice(None)), (1, 64, 64)),
        ((slice(-4, None), -1), (4, 64)),
    ],
)
def test_on_chip_indexing_keeps_two_dimensions(trn2, key, shape):
    assert nl.ndarray((64, 64, 64), dtype=nl.float32, buffer=nl.sbuf)[key].shape == shape


def test_hbm_indexing_drops_a_dimension(trn2):
    tensor = nl.ndarray((4, 128, 32), dtype=nl.float32, buffer=nl.shared_hbm)
    assert tensor[0].shape == (128, 32)
    assert tensor[0, 5, nl.ds(3, 4)].shape == (4,)


def test_views_read_what_numpy_reads(trn2):
    values = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    tile = _tile(values)
    assert np.array_equal(tile.reshape((16, 4, 6)).permute((0, 2, 1)).array(), values.reshape(16, 4, 6).swapaxes(1, 2))
    assert np.array_equal(tile.reshape_dim(1, (4, -1)).flatten_dims(1, 2).array(), values)
    assert np.array_equal(tile.slice(1, 2, 20, 3).array(), values[:, 2:20:3])
    assert np.array_equal(tile.view(nl.uint16).array(), values.view(np.uint16))
    assert np.array_equal(tile.ap([[24, 16], [2, 12]], offset=1).array(), values[:, 1::2])
    assert np.array_equal(tile[:, 3].broadcast(1, 5).array(), np.repeat(values[:, 3:4], 5, axis=1))
    assert tile[:, 2:4].get_pattern() == [[24, 16], [1, 2]]
    assert tile[:, ::2].is_contiguous() is False


def test_a_view_shares_the_storage_of_its_tile(trn2):
    tile = _tile(np.zeros((8, 8), np.float32))
    nisa.memset(dst=tile.reshape((8, 2, 4))[:, 1, :], value=3.0)
    assert np.array_equal(tile.array()[:, 4:], np.full((8, 4), 3.0))
    assert np.array_equal(tile.array()[:, :4], np.zeros((8, 4)))


# ---- memory ----------------------------------------------------------------------------------------------------


def test_memory_returns_without_the_cyclic_collector(trn2):
    gc.disable()
    try:
        for _ in range(64):
            tile = nl.ndarray((128, 20000), dtype=nl.float32, buffer=nl.sbuf)
            view = tile.reshape((128, 100, 200))[:, 3]
            del tile
            assert view.shape == (128, 200)
            del view
        assert trn2.account.live_bytes[nl.sbuf] == 0
    finally:
        gc.enable()


def test_a_view_keeps_its_storage_alive(trn2):
    view = nl.ndarray((128, 1000), dtype=nl.float32, buffer=nl.sbuf)[:, 0:1]
    assert trn2.account.live_bytes[nl.sbuf] == 4000
    del view
    assert trn2.account.live_bytes[nl.sbuf] == 0


def test_a_refused_allocation_takes_nothing(trn2):
    with pytest.raises(NkiRefused):
        nl.ndarray((128, 60000), dtype=nl.float32, buffer=nl.sbuf)
    assert trn2.account.live_bytes[nl.sbuf] == 0
    nl.ndarray((128, 57344), dtype=nl.float32, buffer=nl.sbuf)
    assert trn2.usage().peak_sbuf_bytes == 229376


def test_the_first_matmul_overwrites_and_later_ones_accumulate_region_by_region(trn2):
    product = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.psum)
    a, b = np.eye(4, dtype=np.float32), np.full((4, 4), 2.0, np.float32)
    _matmul(product[:, 0:4], a, b)
    _matmul(product[:, 0:4], a, b)
    _matmul(product[:, 4:8], a, b)
    assert np.array_equal(product.array(), np.concatenate([b * 2, b], axis=1))


def test_accumulate_false_starts_again(trn2):
    product = nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.psum)
    a, b = np.eye(4, dtype=np.float32), np.full((4, 4), 2.0, np.float32)
    _matmul(product, a, b)
    _matmul(product, a, b, accumulate=False)
    _matmul(product, a, b, accumulate=True)
    assert np.array_equal(product.array(), b * 2)


def test_a_zero_filled_psum_tile_is_overwritten(trn2):
    product = nl.zeros((4, 4), dtype=nl.float32, buffer=nl.psum)
    a, b = np.eye(4, dtype=np.float32), np.full((4, 4), 2.0, np.float32)
    _matmul(product, a, b)
    _matmul(product, a, b)
    assert np.array_equal(product.array(), b * 2)


def test_double_row_contracts_over_both_rows():
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((128, 2, n)).astype(ml_dtypes.float8_e5m2) for n in (16, 32))
    with interpreting("trn2"):
        product = nl.ndarray((16, 32), dtype=nl.float32, buffer=nl.psum)
        _matmul(product, left, right, perf_mode=nisa.matmul_perf_mode.double_row)
        expected = np.einsum("krm,krn->mn", left.astype(np.float64), right.astype(np.float64))
        # 256 exact products of eight-bit floats, summed in float32.
        assert np.abs(product.array() - expected).max() < 1e-4


# ---- instructions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value", "stored"),
    [
        ("int8", 200.0, 127),
        ("uint8", -3.0, 0),
        ("int32", 2.5, 2),
        ("int32", 3.5, 4),
        ("bfloat16", 1.00390625, 1.0),
        ("tfloat32", 1.00048828125, 1.0),
        ("tfloat32", 1.0009765625, 1.0009765625),
        ("float8_e4m3", 239.0, 240.0),
    ],
)
def test_a_cast_rounds_to_nearest_even_and_integers_saturate(dtype, value, stored):
    assert float(cast(np.array([value], np.float32), dtype)[0]) == stored


def test_integer_tensor_tensor_is_exact_beyond_float32(trn2):
    big = _tile(np.full((2, 2), 2**24 + 1, np.int32))
    nisa.tensor_tensor(dst=big, data1=big, data2=big, op=nl.add)
    assert (big.array() == 2**25 + 2).all()


def test_vector_arithmetic_on_integers_goes_through_float32(trn2):
    big = _tile(np.full((2, 2), 2**24 + 1, np.int32))
    nisa.tensor_scalar(dst=big, data=big, op0=nl.add, operand0=0.0)
    assert (big.array() == 2**24).all()


def test_tensor_scalar_reverses_and_chains(trn2):
    tile = _tile(np.full((2, 2), 3.0, np.float32))
    nisa.tensor_scalar(
        dst=tile, data=tile, op0=nl.subtract, operand0=10.0, reverse0=True, op1=nl.multiply, operand1=2.0
    )
    assert (tile.array() == 14.0).all()


def test_activation_scales_adds_and_reduces_over_several_instructions(trn2):
    data, res = _tile(np.ones((2, 3), np.float32)), nl.ndarray((2, 1), dtype=nl.float32, buffer=nl.sbuf)
    bias = _tile(np.array([[1.0], [2.0]], np.float32))
    for command in (nisa.reduce_cmd.reset_reduce, nisa.reduce_cmd.reduce):
        nisa.activation(
            dst=data, op=nl.square, data=data, bias=bias, reduce_op=nl.add, reduce_res=res, reduce_cmd=command
        )
    # (1+1)^2 = 4, (4+1)^2 = 25; (1+2)^2 = 9, (9+2)^2 = 121.
    assert res.array().tolist() == [[3 * (4 + 25)], [3 * (9 + 121)]]


def test_a_nan_passes_an_activation_with_a_range(trn2):
    tile = _tile(np.full((2, 2), np.nan, np.float32))
    nisa.activation(dst=tile, op=nl.sqrt, data=tile)
    assert np.isnan(tile.array()).all()


def test_iota_counts_along_pattern_and_partitions(trn2):
    tile = nl.ndarray((3, 2, 4), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=tile, pattern=[[100, 2], [1, 4]], offset=7, channel_multiplier=1000)
    p, i, j = np.meshgrid(range(3), range(2), range(4), indexing="ij")
    assert np.array_equal(tile.array(), 7 + 1000 * p + 100 * i + j)


def test_affine_select_makes_a_causal_mask(trn2):
    tile = _tile(np.ones((4, 4), np.float32))
    nisa.affine_select(
        dst=tile,
        pattern=[[-1, 4]],
        channel_multiplier=1,
        on_true_tile=tile,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    assert np.array_equal(tile.array(), np.tril(np.ones((4, 4))))


def test_bn_stats_and_aggr_give_mean_and_variance(trn2):
    values = np.random.default_rng(1).standard_normal((5, 700)).astype(np.float32)
    stats = nl.ndarray((5, 2, 6), dtype=nl.float32, buffer=nl.sbuf)
    nisa.bn_stats(dst=stats[:, 0, :], data=_tile(values[:, :512]))
    nisa.bn_stats(dst=stats[:, 1, :], data=_tile(values[:, 512:]))
    out = nl.ndarray((5, 2), dtype=nl.float32, buffer=nl.sbuf)
    nisa.bn_aggr(dst=out, data=stats)
    expected = np.stack([values.mean(axis=1), values.var(axis=1)], axis=1)
    assert np.allclose(out.array(), expected, atol=1e-6)


def test_a_scan_is_a_recurrence(trn2):
    rng = np.random.default_rng(2)
    a, b = rng.random((3, 50)).astype(np.float32), rng.random((3, 50)).astype(np.float32)
    out = nl.ndarray((3, 50), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor_scan(dst=out, data0=_tile(a), data1=_tile(b), initial=1.0, op0=nl.multiply, op1=nl.add)
    state, expected = np.ones(3), np.zeros((3, 50))
    for i in range(50):
        state = a[:, i] * state + b[:, i]
        expected[:, i] = state
    assert np.allclose(out.array(), expected, rtol=1e-6)


def test_a_predicated_copy_leaves_the_rest(trn2):
    dst = _tile(np.zeros((2, 2), np.float32))
    nisa.tensor_copy_predicated(dst=dst, src=5.0, predicate=_tile(np.array([[1, 0], [0, 2]], np.uint8)))
    assert dst.array().tolist() == [[5, 0], [0, 5]]


def test_exponential_sums_over_instructions():
    with interpreting("trn3"):
        tile, res = _tile(np.zeros((2, 4), np.float32)), nl.ndarray((2, 1), dtype=nl.float32, buffer=nl.sbuf)
        out = nl.ndarray((2, 4), dtype=nl.float32, buffer=nl.sbuf)
        nisa.exponential(dst=out, src=tile, reduce_cmd=nisa.reduce_cmd.reset_reduce)
        nisa.exponential(dst=out, src=tile, reduce_res=res, reduce_cmd=nisa.reduce_cmd.reduce)
        assert res.array().tolist() == [[8.0], [8.0]]


def test_quantised_mx_values_come_back_within_their_format():
    values = np.random.default_rng(3).standard_normal((64, 8 * 4)).astype(ml_dtypes.bfloat16)
    with interpreting("trn3"):
        packed = nl.ndarray((64, 8), dtype=nl.float8_e4m3fn_x4, buffer=nl.sbuf)
        scales = nl.ndarray((64, 8), dtype=nl.uint8, buffer=nl.sbuf)
        nisa.quantize_mx(dst=packed, src=_tile(values), dst_scale=scales)
        elements = packed.array().view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(8, 8, 8, 4)
        rows = [0, 1, 2, 3, 32, 33, 34, 35]
        spread = np.exp2(scales.array()[rows].astype(np.float64) - 127)[:, None, :, None]
        back = (elements * spread).reshape(64, 32)
        # e4m3 has four significant bits: half a unit is 1/16 of the value, or of the group's smallest normal.
        wide = values.astype(np.float64)
        assert (np.abs(back - wide) <= np.abs(wide) / 16 + spread.max() * 2.0**-10).all()
        assert not scales[4:32].state().any()


# ---- kernels ---------------------------------------------------------------------------------------------------


def _write_kernel(folder: Path, body: str) -> Path:
    path = folder / "kernel.py"
    path.write_text("import nki\nimport nki.isa as nisa\nimport nki.language as nl\n\n\n@nki.jit\n" + body)
    return path


def test_run_kernel_returns_outputs_and_usage(tmp_path):
    path = _write_kernel(
        tmp_path,
        "def double(x, factor):\n"
        "    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)\n"
        "    tile = nl.load(x)\n"
        "    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=factor)\n"
        "    nl.store(out, tile)\n"
        "    return out\n",
    )
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    run = run_kernel(path, "double", x, 2.0, on="trn1")
    assert np.array_equal(run.outputs, x * 2)
    assert run.usage.peak_sbuf_bytes == 16
    assert run.usage.dma_bytes == 2 * 48
    assert run.usage.instructions == {"dma_copy": 2, "tensor_scalar": 1}
    assert "SBUF" in str(run.usage)


def test_an_argument_that_the_kernel_wrote_is_written_back_and_others_are_not(tmp_path):
    path = _write_kernel(tmp_path, "def copy(a, b):\n    nl.store(b, nl.load(a))\n")
    a, b = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    a.flags.writeable = False
    run_kernel(path, "copy", a, b)
    assert (b == 1).all()


def test_a_missing_kernel_file_is_a_user_error(tmp_path):
    with interpreting("trn2"), pytest.raises(UserError, match="no such kernel file"):
        load_kernels(tmp_path / "none.py")


def test_loading_kernels_leaves_no_module_behind(tmp_path):
    before = set(sys.modules)
    path = _write_kernel(tmp_path, "def nothing(x):\n    return x\n")
    with interpreting("trn2"):
        load_kernels(path)
    assert set(sys.modules) == before


def test_simulate_runs_a_plain_function(trn2):
    def twice(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.add(nl.load(x), nl.load(x)))
        return out

    x = np.ones((2, 3), np.float32)
    assert (nki.simulate(twice)(x) == 2).all()
