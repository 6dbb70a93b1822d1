"""What `import hybrid` promises: a frozen list of names. A change here is a change that users must be told of."""

import pytest

import hybrid

NAMES = [
    "Fleet",
    "HybridError",
    "JobConfig",
    "Plan",
    "__version__",
    "build_fleet",
    "build_profile",
    "load_catalog",
    "load_job",
    "plan",
]


def test_the_public_names_are_these():
    assert hybrid.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_documented(name):
    value = getattr(hybrid, name)
    if callable(value):
        assert value.__doc__, f"{name} has no docstring"
        assert not value.__module__.rpartition(".")[2].startswith("_")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'Fleets'; it has Fleet, HybridError"):
        _ = hybrid.Fleets


def test_every_error_that_users_meet_is_in_the_drawn_tree():
    from hybrid import errors

    classes = {
        name: value for name, value in vars(errors).items() if isinstance(value, type) and not name.startswith("_")
    }
    tree = errors.__doc__ or ""
    for name, cls in classes.items():
        if issubclass(cls, Exception):
            assert name in tree, f"draw {name} in the tree"
            assert issubclass(cls, hybrid.HybridError)


def test_an_error_says_fact_value_valid_and_fix_and_survives_the_way_to_another_process():
    import pickle

    from hybrid.errors import ConfigError

    error = ConfigError("not a size", value="big", valid=[1, 2], fix="write a number", where="job.yaml, line 3")
    assert str(error) == "job.yaml, line 3: not a size (got 'big'); valid: 1, 2. Write a number."
    assert str(ConfigError("odd", fix="did you mean even?")) == "odd. Did you mean even?"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (ConfigError, str(error), 2)
