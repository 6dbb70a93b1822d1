"""Our NKI kernels put through the kernels' kit on the interpreter, with faults planted, and the documented table."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from hybrid.testing.nki import NkiRefused, interpreting, load_kernels
from hybrid.testing.nki.own_kernels import check_own_kernels, format_own_results
from hybrid_kernels import kit
from hybrid_kernels.selection import OPS

# A few roundings of 2^-24 and float32 sums of some hundred terms, relative to the largest exact value.
_FP32 = 5e-6
_ROOT = Path(next(iter(find_spec("hybrid_kernels").submodule_search_locations)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("generation", ["trn1", "trn2", "trn3"])
def test_the_kernels_kit_passes_at_the_limits_of_a_generation(op, generation, monkeypatch):
    # The kit asks the machine for NKI and imports by name; here the files are loaded under the interpreter instead.
    monkeypatch.setattr(kit, "choose", lambda *_, **__: None)
    monkeypatch.setattr(kit, "import_module", _interpreted_module)
    with interpreting(generation):
        outcomes = list(kit.run_kit("nki", "cpu", ops=(op,)))
    assert len(outcomes) >= 15
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def _interpreted_module(name):
    op, variant = name.split(".")[1:]
    return load_kernels(_ROOT / op / "nki.py") if variant == "nki" else import_module(name)


_FAULTS = [
    ("rmsnorm", "operand0=1.0 / features, op1=nl.add", "operand0=1.0, op1=nl.add"),
    ("rmsnorm", "reset_reduce if start == 0 else nisa.reduce_cmd.reduce", "reset_reduce"),
    ("rmsnorm", "data1=push, data2=pull, op=nl.subtract", "data1=push, data2=pull, op=nl.add"),
    ("rope", "(nl.subtract, nl.add) if direction == 1", "(nl.add, nl.subtract) if direction == 1"),
    ("swiglu", "op=nl.silu_dx", "op=nl.sigmoid"),
    ("cross_entropy", "accumulate=(i > 0)", "accumulate=True"),
    ("cross_entropy", "accumulate=(i > 0)", "accumulate=False"),
    ("cross_entropy", "nisa.tensor_copy(dst=highest, src=new_highest)", "pass"),
    ("cross_entropy", "offset=first, channel_multiplier=0", "offset=0, channel_multiplier=0"),
    ("attention", "pattern=[[-1, columns]]", "pattern=[[-2, columns]]"),
    ("attention", "nisa.tensor_scalar(dst=sums, data=sums, op0=nl.multiply, operand0=shrink)", "pass"),
    ("attention", "head // group", "head"),
    ("fp8_pack", "(0x0FFFFF, 7.0)", "(0x1FFFFF, 7.0)"),
    ("fp8_pack", "0x846CA68B", "0x846CA68A"),
    ("fp8_pack", "op0=nl.maximum, operand0=121.0", "op0=nl.maximum, operand0=119.0"),
    ("fp8_pack", "op0=nl.greater_equal, operand0=248.0", "op0=nl.greater_equal, operand0=250.0"),
    ("reduce_add", "for rank in range(1, num_ranks)", "for rank in range(num_ranks - 1, 0, -1)"),
    ("adamw", "op0=nl.power, operand0=0.5", "op0=nl.power, operand0=0.51"),
    ("adamw", "factor[0:rows, 2:3]", "factor[0:rows, 4:5]"),
]


@pytest.mark.parametrize(("op", "right", "wrong"), _FAULTS, ids=[f"{op}:{wrong}" for op, _, wrong in _FAULTS])
def test_a_fault_planted_in_a_kernel_is_seen(op, right, wrong, tmp_path, monkeypatch):
    text = (_ROOT / op / "nki.py").read_text()
    assert right in text
    path = tmp_path / "nki.py"
    path.write_text(text.replace(right, wrong))
    monkeypatch.setattr(kit, "choose", lambda *_, **__: None)
    monkeypatch.setattr(
        kit, "import_module", lambda name: load_kernels(path) if name.endswith(".nki") else import_module(name)
    )
    with interpreting("trn2"):
        assert any(_fails(case) for case in (*kit.CASES, *_WIDE_CASES) if case.op == op)


def _fails(case):
    try:
        return not kit.run_case(case, variant="nki", device="cpu", dtype=torch.float32).passed
    except (NkiRefused, IndexError):
        return True


def _normal(*shape):
    return lambda generator: torch.randn(*shape, generator=generator)


# Wider than one instruction, longer than one tile: what the kit, made for short runs, does not reach.
_WIDE_CASES = (
    kit.Case(
        op="rmsnorm",
        name="wide",
        build=lambda g: {
            "x": _normal(3, 2500)(g),
            "weight": _normal(2500)(g),
            "grad": _normal(3, 2500)(g),
            "eps": 1e-5,
        },
    ),
    kit.Case(
        op="cross_entropy",
        name="wide",
        build=lambda g: {
            "hidden": _normal(5, 200)(g),
            "weight": _normal(700, 200)(g) / 8,
            "labels": torch.tensor([1, 600, 3, 699, 0]),
        },
    ),
    kit.Case(
        op="attention",
        name="long",
        build=lambda g: {
            "query": _normal(1, 2, 140, 8)(g),
            "key": _normal(1, 2, 140, 8)(g),
            "value": _normal(1, 2, 140, 8)(g),
            "grad": _normal(1, 2, 140, 8)(g),
        },
    ),
)


@pytest.mark.slow
def test_ten_million_float32_patterns_pack_to_the_ieee_codes_on_the_interpreter():
    rng = np.random.default_rng(20261121)
    with interpreting("trn2"):
        kernel = load_kernels(_ROOT / "fp8_pack" / "nki.py")
        for _ in range(5):
            bits = rng.integers(0, 2**32, 2_048_000, dtype=np.uint64).astype(np.uint32)
            values = bits.view(np.float32)
            # Every value on its own scale of 1: NaN and infinity have their own test, and 240 starts the block.
            values = np.where(np.isfinite(values), np.clip(values, -240.0, 240.0), 0.0).astype(np.float32)
            values[::2048] = 240.0
            packed = kernel.fp8_pack(torch.from_numpy(values), block_size=2048)
            assert (packed.scales == 1.0).all()
            assert np.array_equal(packed.payload.numpy(), values.astype(ml_dtypes.float8_e4m3).view(np.uint8))


@pytest.mark.slow
def test_the_documented_table_is_what_the_kernels_take_and_err():
    page = Path(__file__).parents[2] / "docs" / "nki.md"
    results = check_own_kernels()
    # Everything but the error, whose digit depends on how a BLAS sums.
    told = [row.split("|")[:6] for row in format_own_results(results).splitlines() if row.startswith("| `")]
    documented = [row.split("|")[:6] for row in page.read_text().splitlines() if row.startswith("| `")]
    assert [row for row in documented if row in told] == told
    assert all(result.error <= _FP32 for result in results)
    assert all(result.error == 0 for result in results if result.case.exact)
