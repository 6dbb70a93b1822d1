import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "golden.py"
SPEC = importlib.util.spec_from_file_location("golden_script", SCRIPT)
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)
TEXTS = golden.golden_texts()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(golden.FOLDER)))
def test_the_program_still_makes_the_golden_text(path):
    assert golden.difference(path, TEXTS[path]) == "", "run `make golden` and review the diff"


def test_every_golden_file_is_made_by_something():
    folders = {path.parent for path in TEXTS} - {golden.FOLDER}
    assert {path for folder in folders for path in folder.iterdir()} == {p for p in TEXTS if p.parent in folders}
