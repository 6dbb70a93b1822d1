"""Who may import whom: the design's rules, read from the source of every file, and from what a process has imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = {"hybrid": ROOT, "hybrid_kernels": ROOT / "kernels"}

CONFIG = ("hybrid.config_base", "hybrid.config_diloco", "hybrid.config_planner", "hybrid.config")
GROUND = ("hybrid.errors", "hybrid.complaints", "hybrid.marked_yaml", *CONFIG, "hybrid.wire", "hybrid.host_memory")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    # A package or module of ours may import these of ours, and itself; the longest name that fits an importer is its
    # rule. What is not listed may import all.
    "hybrid.errors": (),
    "hybrid.complaints": ("hybrid.errors",),
    "hybrid.marked_yaml": ("hybrid.errors",),
    "hybrid.config_base": (),
    "hybrid.config_diloco": ("hybrid.config_base",),
    "hybrid.config_planner": ("hybrid.config_base",),
    "hybrid.config": ("hybrid.errors", "hybrid.complaints", "hybrid.marked_yaml", *CONFIG),
    "hybrid.wire": ("hybrid.errors",),
    "hybrid.host_memory": ("hybrid.errors",),
    "hybrid.hardware": GROUND,
    "hybrid.transports": GROUND,
    "hybrid.scheduler": (*GROUND, "hybrid.hardware"),
    "hybrid.collectives": (*GROUND, "hybrid.transports.base", "hybrid.transports.arrival", "hybrid_kernels"),
    # What makes a torch.distributed world out of transports also opens them.
    "hybrid.collectives.torch_world": (*GROUND, "hybrid.collectives", "hybrid.transports"),
    "hybrid.distributed": ("hybrid.collectives",),
    "hybrid.backends": (*GROUND, "hybrid.transports.base", "hybrid.collectives.base", "hybrid_kernels"),
    "hybrid.models": (*GROUND, "hybrid.scheduler.profile", "hybrid.scheduler.reshard", "hybrid_kernels"),
    "hybrid_kernels": (),
}
HOMES: dict[str, tuple[str, ...]] = {
    # A library may be imported by these alone.
    "zmq": ("hybrid.transports.zmq*", "hybrid.runtime.coordinator", "hybrid.runtime.control"),
    "ray": ("hybrid.runtime.launcher",),
    "msgpack": ("hybrid.wire",),
    "cryptography": ("hybrid.transports.tcp_secret",),
    "pydantic": CONFIG,
    "pickle": (),
    "cloudpickle": (),
    "marshal": (),
    "shelve": (),
}
NO_TORCH = ("hybrid.scheduler", "hybrid.transports", "hybrid.hardware", *GROUND)


@dataclass(frozen=True)
class Import:
    """One import of a module."""

    importer: str
    imported: str
    line: int
    at_import_time: bool
    """False inside a function and under TYPE_CHECKING."""
    for_types: bool


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, root in SOURCE_ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(name: str, path: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, runs: bool, types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, runs, types)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(name, inner if inner in modules() else base, node.lineno, runs, types)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False, True)
            for child in node.orelse:
                yield from visit(child, runs, types)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, runs and not inside, types)

    return visit(ast.parse(path.read_text(encoding="utf-8")), True, False)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(each for name, path in modules().items() for each in _imports(name, path))


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _ours(name: str) -> bool:
    return any(_is_in(name, package) for package in SOURCE_ROOTS)


def test_the_reader_of_imports_sees_ours_and_others():
    assert len(modules()) > 60
    seen = {(each.importer, each.imported) for each in imports()}
    assert ("hybrid.wire", "msgpack") in seen
    assert ("hybrid.cli", "hybrid.errors") in seen
    assert ("hybrid.runtime.worker", "hybrid.runtime.checkpoint") in seen
    lazy = {(each.importer, each.imported) for each in imports() if not each.at_import_time}
    assert ("hybrid.runtime.trainer", "hybrid.runtime.coordinator") in lazy


def test_the_reader_of_imports_knows_when_an_import_runs_and_whose_it_is(tmp_path):
    source = tmp_path / "x.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch.nn\n"
        "from . import plan\n"
        "from .cost import bytes_of\n"
        "if TYPE_CHECKING:\n    from hybrid.runtime import worker\n"
        "def f():\n    import ray\n"
        "class C:\n    import zmq\n"
    )
    found = {(i.imported, i.at_import_time, i.for_types) for i in _imports("hybrid.scheduler.x", source)}
    assert found == {
        ("typing", True, False),
        ("torch.nn", True, False),
        ("hybrid.scheduler.plan", True, False),
        ("hybrid.scheduler.cost", True, False),
        ("hybrid.runtime.worker", False, True),
        ("ray", False, False),
        ("zmq", True, False),
    }


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_the_design_allows(package):
    allowed = (package, *MAY_IMPORT[package])
    wrong = [
        f"{each.importer}:{each.line} imports {each.imported}"
        for each in imports()
        if _is_in(each.importer, package)
        and _ours(each.imported)
        and max((name for name in MAY_IMPORT if _is_in(each.importer, name)), key=len) == package
        and not any(_is_in(each.imported, name) for name in allowed)
    ]
    assert not wrong, f"{package} may import {', '.join(allowed)} only"


def test_the_commands_are_imported_only_by_those_who_stand_above_them():
    wrong = [
        f"{each.importer}:{each.line}"
        for each in imports()
        if _is_in(each.imported, "hybrid.commands")
        and not each.importer.startswith(("hybrid.commands", "hybrid.bench", "hybrid.testing"))
        and each.importer != "hybrid.cli"
    ]
    assert not wrong


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library):
    def at_home(importer: str) -> bool:
        return any(
            importer.startswith(home[:-1]) if home.endswith("*") else importer == home for home in HOMES[library]
        )

    wrong = [
        f"{each.importer}:{each.line}"
        for each in imports()
        if _is_in(each.imported, library) and not each.for_types and not at_home(each.importer)
    ]
    assert not wrong, f"{library} belongs in {HOMES[library] or 'no file'}"
    if HOMES[library]:
        assert any(_is_in(each.imported, library) for each in imports()), "nobody imports it: strike the rule"


@pytest.mark.parametrize("package", NO_TORCH)
def test_no_torch_where_plans_are_made_and_bytes_are_moved(package):
    wrong = [
        f"{each.importer}:{each.line} imports {each.imported}"
        for each in imports()
        if _is_in(each.importer, package) and _is_in(each.imported, "torch")
    ]
    assert not wrong


def test_only_the_config_reads_the_environment():
    wrong = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            word = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if word in ("os.environ", "os.getenv", "os.putenv") and name != "hybrid.config":
                wrong.append(f"{name}:{node.lineno} {word}")  # type: ignore[attr-defined]
    assert not wrong, "parse the environment in hybrid.config, and pass values"


def test_nothing_is_unpickled():
    wrong = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                word = ast.unparse(node.func)
                unpickles = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
                if word in ("torch.load", "eval", "exec") or unpickles or word.endswith(".recv_pyobj"):
                    wrong.append(f"{name}:{node.lineno} {word}")
    assert not wrong


def test_modules_do_not_import_each_other_in_a_ring():
    wanted: dict[str, set[str]] = {name: set() for name in modules()}
    for each in imports():
        if each.at_import_time and each.imported in wanted and each.imported != each.importer:
            wanted[each.importer].add(each.imported)
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"ring: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for other in sorted(wanted[name]):
            walk(other, (*path, name))
        done.add(name)

    for name in wanted:
        walk(name, ())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import hybrid", ("torch", "ray", "pydantic", "yaml", "numpy", "zmq", "rich")),
        ("import hybrid.cli", ("torch", "ray", "pydantic", "yaml", "numpy", "zmq")),
        ("import hybrid; hybrid.JobConfig", ("torch", "ray", "numpy", "zmq")),
        (
            "import hybrid.scheduler.planner, hybrid.scheduler.simulate, hybrid.scheduler.lowering",
            ("torch", "ray", "zmq"),
        ),
        ("import hybrid; [getattr(hybrid, name) for name in hybrid.__all__]", ("torch", "ray", "zmq")),
        ("import hybrid.transports.base, hybrid.transports.inproc", ("torch", "ray", "zmq", "numpy", "yaml")),
        # The driver of `hybrid train`, up to where it takes devices.
        ("import hybrid.commands.train, hybrid.runtime.trainer, hybrid.runtime.coordinator", ("torch", "ray")),
        ("import hybrid.commands.plan, hybrid.commands.submit, hybrid.commands.export", ("torch", "ray")),
    ],
)
def test_a_process_imports_no_more_than_it_needs(code, absent):
    report = f"import sys; {code}; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
