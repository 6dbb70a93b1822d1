"""The vendor's published kernels, unmodified, from a folder outside the repository; and the runner itself.

Set HYBRID_NKI_EXAMPLES to the `nki` folder of a checkout of aws-neuron/aws-neuron-sdk; without it the published kernels
are skipped, visibly.
"""

import os
import sys
from pathlib import Path

import pytest

from hybrid.config import environment
from hybrid.errors import UserError
from hybrid.testing.nki import examples
from hybrid.testing.nki.example_cases import CASES, ExampleCase
from hybrid.testing.nki.examples import format_results, run_examples

_FOLDER = environment("HYBRID_NKI_EXAMPLES")


@pytest.mark.skipif(_FOLDER is None, reason="HYBRID_NKI_EXAMPLES is not set: the published NKI kernels are not here")
def test_the_published_kernels_compute_what_they_must():
    results = run_examples(Path(_FOLDER))
    print(format_results(results))
    assert [r for r in results if not r.ok] == []
    assert len({(r.file, r.kernel) for r in results if r.outcome == "matches"}) >= 12


def test_at_least_twelve_published_kernels_are_expected():
    assert len({(case.file, case.kernel) for case in CASES if case.refused_by is None}) >= 12


def test_a_folder_without_examples_is_refused(tmp_path):
    with pytest.raises(UserError, match="aws-neuron-sdk"):
        run_examples(tmp_path)


_KERNEL = """
import os
import nki
import nki.isa as nisa
import nki.language as nl
from neighbour import FACTOR

os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = "trn1"


@nki.jit
def scale(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.load(x)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=FACTOR)
    nl.store(out, tile)
    return out


@nki.jit
def too_large(x):
    nl.ndarray((256, 4), dtype=nl.float32, buffer=nl.sbuf)
"""


def _case(kernel, factor=2.0, **more):
    return ExampleCase(
        file="examples/own.py",
        kernel=kernel,
        inputs=lambda rng: (rng.standard_normal((4, 4)).astype("float32"),),
        expected=lambda x: (x * factor,),
        generations=("trn2",),
        **more,
    )


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "own.py").write_text(_KERNEL)
    (folder / "neighbour.py").write_text("FACTOR = 2.0\n")

    def run(case):
        monkeypatch.setattr(examples, "CASES", (case,))
        (result,) = run_examples(tmp_path)
        return result

    return run


def test_a_right_kernel_matches(outcome):
    result = outcome(_case("scale"))
    assert result.ok
    assert result.outcome == "matches"
    assert "scale" in format_results((result,))


def test_a_wrong_result_is_told(outcome):
    result = outcome(_case("scale", factor=3.0))
    assert (result.ok, result.outcome) == (False, "differs")
    assert result.error > 0.3


def test_a_refusal_is_right_only_by_the_expected_rule(outcome):
    assert outcome(_case("too_large", refused_by="partitions-128")).outcome == "refused"
    assert outcome(_case("too_large", refused_by="empty-shape")).outcome == "refused by partitions-128"
    assert outcome(_case("too_large")).outcome == "refused by partitions-128"
    assert outcome(_case("scale", refused_by="partitions-128")).outcome == "not refused"


def test_a_missing_file_is_told(outcome):
    case = _case("scale")
    object.__setattr__(case, "file", "examples/none.py")
    assert (outcome(case).ok, outcome(case).outcome) == (False, "missing")


def test_what_a_file_does_to_the_process_is_undone(outcome):
    environment_before, path_before, modules_before = dict(os.environ), list(sys.path), set(sys.modules)
    outcome(_case("scale"))
    assert (dict(os.environ), sys.path, set(sys.modules)) == (environment_before, path_before, modules_before)
