"""Every rule refuses a planted wrong kernel, by its own name; sound kernels beside them run."""

from pathlib import Path

import pytest

from hybrid.testing.nki import NkiRefused, interpreting, load_kernels, rules

with interpreting("trn2"):
    _FILES = [load_kernels(Path(__file__).parent / f"nki_mutant_{name}.py") for name in ("kernels", "engines")]
_MUTANTS = [mutant for file in _FILES for mutant in file.MUTANTS]
_SOUND = [sound for file in _FILES for sound in file.SOUND]

# Refused outside a kernel's body; their tests are below.
_ELSEWHERE = {"jit-arguments", "spmd-grid", "outside-interpreter"}


@pytest.mark.parametrize(
    ("rule", "generation", "kernel", "args"),
    _MUTANTS,
    ids=[f"{m[0]}:{m[2].__name__}" for m in _MUTANTS],
)
def test_a_wrong_kernel_is_refused_by_its_rule(rule, generation, kernel, args):
    with interpreting(generation), pytest.raises(NkiRefused) as refused:
        kernel(*args)
    assert refused.value.rule == rule
    assert rule in str(refused.value)
    assert refused.value.fix


@pytest.mark.parametrize(("generation", "kernel", "args"), _SOUND, ids=[m[1].__name__ for m in _SOUND])
def test_its_sound_twin_runs(generation, kernel, args):
    with interpreting(generation):
        kernel(*args)


def test_every_rule_has_a_wrong_kernel():
    assert {rule for rule, *_ in _MUTANTS} | _ELSEWHERE == set(rules())


def test_every_rule_says_where_it_is_from():
    for rule in rules().values():
        assert rule.basis in ("documented", "conservative", "subset")
        assert bool(rule.source) == (rule.basis != "subset")
        assert rule.says


def test_jit_refuses_the_removed_arguments():
    with interpreting("trn2"), pytest.raises(NkiRefused) as refused:
        _FILES[0].nki.jit(mode="simulation")
    assert refused.value.rule == "jit-arguments"


def test_a_launch_on_two_cores_is_refused():
    with interpreting("trn2"), pytest.raises(NkiRefused) as refused:
        _SOUND[0][1][2]
    assert refused.value.rule == "spmd-grid"


def test_a_kernel_does_not_run_outside_the_interpreter():
    with pytest.raises(NkiRefused) as refused:
        _SOUND[0][1]()
    assert refused.value.rule == "outside-interpreter"
