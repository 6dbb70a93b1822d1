"""The stand-in's names and parameters are the documented ones, and our kernels use no others."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from hybrid.testing.nki import interpreting, lint_file
from hybrid.testing.nki.signatures import check_source, documented_parameters, parameters_of, signature_table
from hybrid.testing.nki.standin import ISA, LANGUAGE
from hybrid.testing.nki.tile import Tile

_ROOT = Path(next(iter(find_spec("hybrid_kernels").submodule_search_locations)))
_KERNEL_FILES = sorted(_ROOT.glob("*/nki.py"))


@pytest.mark.parametrize("name", sorted(ISA))
def test_an_instruction_has_the_documented_parameters(name):
    assert parameters_of(ISA[name]) == documented_parameters("isa", name)


@pytest.mark.parametrize("name", sorted(LANGUAGE))
def test_a_language_function_has_the_documented_parameters(name):
    assert parameters_of(LANGUAGE[name]) == documented_parameters("language", name)


@pytest.mark.parametrize("name", sorted(signature_table()["tensor_methods"]))
def test_a_tensor_method_has_the_documented_parameters(name):
    assert parameters_of(getattr(Tile, name))[1:] == signature_table()["tensor_methods"][name]


def test_operators_have_the_documented_parameters():
    with interpreting("trn2"):
        import nki.language as nl

        for name in ("add", "maximum", "exp", "rsqrt", "bitwise_and"):
            assert parameters_of(getattr(nl, name)) == documented_parameters("language", name)


def test_every_documented_name_is_there_even_where_it_is_not_interpreted():
    with interpreting("trn2"):
        import nki.isa as nisa
        import nki.language as nl

        for section, module in (("isa", nisa), ("language", nl)):
            missing = [name for name in signature_table()[section] if not hasattr(module, name)]
            assert missing == []


def test_the_table_has_the_whole_api():
    counts = {name: len(signature_table()[name]) for name in ("nki", "isa", "language", "tensor_methods")}
    assert counts == {"nki": 2, "isa": 52, "language": 103, "tensor_methods": 17}


@pytest.mark.parametrize("path", _KERNEL_FILES, ids=lambda path: path.parent.name)
def test_our_kernels_use_only_documented_names_and_parameters(path):
    assert check_source(path) == []


@pytest.mark.parametrize("path", _KERNEL_FILES, ids=lambda path: path.parent.name)
def test_our_kernels_keep_to_the_python_subset(path):
    assert lint_file(path) == []


def test_there_is_a_kernel_for_every_operation():
    assert {path.parent.name for path in _KERNEL_FILES} == {
        "rmsnorm", "rope", "swiglu", "cross_entropy", "attention", "fp8_pack", "reduce_add", "adamw",
    }  # fmt: skip


def test_a_wrong_name_a_wrong_keyword_and_a_missing_one_are_found(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text("nisa.tensor_product(dst=1)\nnisa.tensor_copy(dst=1, source=2)\nnl.ndarray(dtype=nl.float99)\n")
    found = {(f.rule, f.what) for f in check_source(path)}
    assert found == {
        ("unknown-name", "isa.tensor_product"),
        ("unknown-parameter", "isa.tensor_copy(source=)"),
        ("unknown-parameter", "isa.tensor_copy without src"),
        ("unknown-parameter", "language.ndarray without shape"),
        ("unknown-name", "language.float99"),
    }
