"""The linter finds what leaves the Python subset, in kernels and in what they call, and nothing else."""

import pytest

from hybrid.testing.nki import lint_file

_HEAD = "import nki\nimport nki.language as nl\n\n"


def _rules(tmp_path, text):
    path = tmp_path / "kernel.py"
    path.write_text(_HEAD + text)
    return [finding.rule for finding in lint_file(path)]


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("def k(x, *, flag=True):\n    return x", "keyword-only"),
        ("def k(x, flag=None):\n    return x if flag is None else flag", "is-operator"),
        ("def k(x, flag=None):\n    return x if flag is not None else flag", "is-operator"),
        ("def k(x, sizes=[1]):\n    return x", "list-argument"),
        ("def k(x, sizes={}):\n    return x", "unhashable-argument"),
        ("def k(x):\n    try:\n        return x\n    finally:\n        pass", "python-subset"),
        ("def k(x):\n    yield x", "python-subset"),
        ("def k(x):\n    f = lambda y: y\n    return f(x)", "python-subset"),
        ("def k(x):\n    return [i for i in range(3)]", "python-subset"),
        ("def k(x):\n    global y\n    y = 1", "python-subset"),
        ("def k(x):\n    return {1: x}", "dict-keys"),
        ("def k(x):\n    class A:\n        pass\n    return A()", "class-base"),
        ("def k(x):\n    import neuronxcc.nki.language", "neuronxcc-namespace"),
    ],
)
def test_a_construct_outside_the_subset_is_found(tmp_path, body, rule):
    assert _rules(tmp_path, f"@nki.jit\n{body}\n") == [rule]


def test_a_helper_is_linted_when_a_kernel_calls_it(tmp_path):
    helper = "def helper(x):\n    return x is None\n\n\n"
    assert _rules(tmp_path, helper + "@nki.jit\ndef k(x):\n    return helper(x)\n") == ["is-operator"]
    assert _rules(tmp_path, helper + "@nki.jit\ndef k(x):\n    return x\n") == []


def test_removed_arguments_of_jit_are_found(tmp_path):
    assert _rules(tmp_path, "@nki.jit(mode='simulation')\ndef k(x):\n    return x\n") == ["jit-arguments"]


def test_an_import_of_the_old_namespace_is_found(tmp_path):
    assert _rules(tmp_path, "import neuronxcc.nki as old\n") == ["neuronxcc-namespace"]


def test_what_the_language_guide_shows_is_allowed(tmp_path):
    kernel = (
        "@nki.jit\n"
        "def k(x, sizes=(1, 2), flag=False):\n"
        "    tiles = []\n"
        "    options = {'a': 1}\n"
        "    for i in range(4):\n"
        "        if i % 2 == 0 and flag != True:\n"
        "            tiles.append(i)\n"
        "    while len(tiles) > 3:\n"
        "        tiles.pop()\n"
        "    assert len(tiles) == 2, f'{options}'\n"
        "    class A(nl.NKIObject):\n"
        "        x: int = 1\n"
        "    return x\n"
    )
    assert _rules(tmp_path, kernel) == []


def test_a_finding_names_file_line_and_function(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(_HEAD + "@nki.jit\ndef k(x):\n    return x is None\n")
    (finding,) = lint_file(path)
    assert finding.where == "kernel.py:6"
    assert finding.fact.startswith("k: ")
