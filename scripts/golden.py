"""Compare the golden texts under tests/golden with what the program makes now; `--update` rewrites them.

A module `tests/golden/golden_<topic>.py` defines `texts() -> dict[str, str]`: file name below tests/golden to
text. Exit code: 0 all equal or updated, 1 some differ.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden"


def golden_texts() -> dict[Path, str]:
    """Return every golden file's path and the text that it should hold."""
    found: dict[Path, str] = {}
    for module_path in sorted(FOLDER.glob("golden_*.py")):
        spec = importlib.util.spec_from_file_location(module_path.stem, module_path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {module_path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, text in module.texts().items():
            path = FOLDER / name
            if path in found:
                raise ValueError(f"two modules make {name}")
            found[path] = text if text.endswith("\n") else text + "\n"
    return found


def difference(path: Path, text: str) -> str:
    """Return a unified diff from the file to the text; empty when they are equal."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    return "".join(
        difflib.unified_diff(old.splitlines(True), text.splitlines(True), f"golden {path.name}", f"now {path.name}")
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite the files that differ")
    update = parser.parse_args().update
    num_different = 0
    for path, text in golden_texts().items():
        changes = difference(path, text)
        if not changes:
            continue
        num_different += 1
        print(changes, end="")
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(f"{num_different} golden files {'rewritten' if update else 'differ'}")
    return 1 if num_different and not update else 0


if __name__ == "__main__":
    sys.exit(main())
