"""torch's own programs on the backend `hybrid`: examples beside gloo, `import torch` alone, what the backend needs."""

import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid.testing.rank_processes import RankProcesses

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
EXAMPLES = ("torch_ddp", "torch_fsdp", "torch_pipeline")
NOT_NEEDED = ("ray", "pydantic", "zmq", "yaml", "scipy", "tokenizers", "safetensors", "typer", "rich", "psutil")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _example(rank: int, size: int, name: str, port: int, backend: str) -> tuple[list[float], str]:
    import os
    import runpy

    import hybrid.distributed

    hybrid.distributed.register()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    result: tuple[list[float], str] = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](
        ["--backend", backend, "--steps", "5"]
    )
    return result


def _run(ranks: RankProcesses, name: str, backend: str) -> list[tuple[list[float], str]]:
    return ranks.run(_example, name, _free_port(), backend, timeout_s=100.0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_ranks_of_an_example_end_with_gloos_bits(two_ranks: RankProcesses, name: str) -> None:
    ours, theirs = _run(two_ranks, name, "hybrid"), _run(two_ranks, name, "gloo")
    assert ours == theirs
    assert len({digest for _, digest in ours}) == 1


@pytest.mark.slow
def test_four_ranks_of_the_examples_end_where_gloo_does() -> None:
    with RankProcesses(4) as ranks:
        for name in EXAMPLES:
            ours, theirs = _run(ranks, name, "hybrid"), _run(ranks, name, "gloo")
            assert len({digest for _, digest in ours}) == 1
            # Three additions have several orders, and gloo's is another: the losses agree to fp32's rounding.
            assert ours[0][0] == pytest.approx(theirs[0][0], rel=1e-5)
            if name == "torch_pipeline":  # sums nothing over ranks
                assert ours == theirs


def _python(code: str, *, path: Path | None = None, flags: dict[str, str] | None = None) -> str:
    import os

    before = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, str(ROOT), str(ROOT / "kernels")]), **(flags or {})}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_backend_imports_only_what_it_needs() -> None:
    code = f"import sys, hybrid.distributed; print([name for name in {NOT_NEEDED!r} if name in sys.modules])"
    assert _python(code).strip() == "[]"


WORLD_OF_ONE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"no module named {{name}}: this test took it away", name=name)
sys.meta_path.insert(0, Missing())
import torch, torch.distributed as dist
{more}
dist.init_process_group("hybrid", init_method="file://{store}", rank=0, world_size=1)
x = torch.ones(3)
dist.all_reduce(x)
names = [None]
dist.all_gather_object(names, "me")
print(x.tolist(), names, dist.get_backend())
dist.destroy_process_group()
"""


def _installed(folder: Path) -> Path:
    """Return a folder that holds what a wheel's metadata says to torch: the entry point of pyproject.toml."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = folder / "hybrid_backend_test-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hybrid-backend-test\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\nhybrid = {points['torch.backends']['hybrid']}\n")
    return folder


@pytest.mark.parametrize(
    "first",
    [
        "hybrid.distributed",
        pytest.param("torch", marks=pytest.mark.slow),
        pytest.param("hybrid.collectives", marks=pytest.mark.slow),
    ],
)
def test_torch_finds_the_backend_by_itself_whatever_is_imported_first(tmp_path: Path, first: str) -> None:
    code = f"import {first}; import torch; print('hybrid' in torch.distributed.Backend.backend_list)"
    assert _python(code, path=_installed(tmp_path)).strip() == "True"


def test_the_backend_works_where_nothing_else_of_hybrids_needs_is_installed(tmp_path: Path) -> None:
    more = "import hybrid.distributed"
    code = WORLD_OF_ONE.format(absent=NOT_NEEDED, more=more, store=tmp_path / "store")
    said = _python(code, flags={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert said.strip() == "[1.0, 1.0, 1.0] ['me'] hybrid"


def test_an_unknown_name_of_the_module_is_refused_with_the_known_ones() -> None:
    import hybrid.distributed

    assert hybrid.distributed.HybridOptions(transport="tcp").native
    with pytest.raises(AttributeError, match=r"no attribute 'Options'; it has HybridOptions, register"):
        _ = hybrid.distributed.Options


def _interrupted(rank: int, size: int, store: str) -> Any:
    import torch.distributed as dist

    import hybrid.distributed

    hybrid.distributed.register()
    if rank == 1:
        return None
    from datetime import timedelta

    try:
        dist.init_process_group("hybrid", init_method=store, rank=0, world_size=2, timeout=timedelta(seconds=1))
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_a_rank_that_never_comes_is_named(two_ranks: RankProcesses) -> None:
    kind, text = two_ranks.run(_interrupted, two_ranks.new_store(), timeout_s=60.0)[0]
    assert kind == "CommTimeout"
    assert "ranks 1 of 2 did not come within 1 s" in text
