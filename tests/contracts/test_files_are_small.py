"""No file of the program is longer than 400 lines: the largest file is also the ugliest."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 400


def test_no_file_is_longer_than_four_hundred_lines():
    files = [*(ROOT / "hybrid").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 100
    lines_of = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {name: lines for name, lines in lines_of.items() if lines > MAX_LINES}
    assert not long, f"part these: {long}"


def test_every_module_says_what_it_is():
    import ast

    for path in [*(ROOT / "hybrid").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
            f"{path.relative_to(ROOT)} has no docstring"
        )
