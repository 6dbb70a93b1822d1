"""Compiles every Triton kernel for NVIDIA GPUs on a machine that has none, and says what each one takes.

`python -m hybrid_kernels.aot` prints the table; `--json` prints it for a program. It compiles, it cannot run:
registers, spills and shared memory are facts of the binary, speed is not. Needs Triton, outside its interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybrid_kernels.selection import OPS
from hybrid_kernels.triton_launch import Specimen, interpreting

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities: A100, H100/H200, B200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What one kernel takes on one architecture."""

    kernel: str
    architecture: str
    registers: int
    """Of one thread."""
    spill_bytes: int
    """Local memory of one thread: where registers that do not fit are spilled."""
    shared_bytes: int
    """Of one block, static and dynamic."""


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, ops: tuple[str, ...] = OPS) -> Iterator[Compiled]:
    """Yield what every kernel of these operations takes on each architecture.

    Raises:
        RuntimeError: Triton was imported as an interpreter, which compiles nothing.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET was set when Triton was imported; unset it to compile")
    for op in ops:
        for specimen in import_module(f"hybrid_kernels.{op}.triton").SPECIMENS:
            for architecture in architectures:
                yield compile_one(specimen, architecture)


def compile_one(specimen: Specimen, architecture: int) -> Compiled:
    """Return what one kernel takes on one architecture."""
    # torch's allocator aligns every tensor, and a launch tells Triton so; of sizes nothing is assumed.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(specimen.signature.values())
        if kind.startswith("*")
    }
    signature = specimen.signature | dict.fromkeys(specimen.constants, "constexpr")
    source = ASTSource(fn=specimen.kernel, signature=signature, constexprs=specimen.constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": specimen.num_warps})
    registers, local = _resources(compiled.asm["cubin"])
    return Compiled(
        kernel=specimen.name,
        architecture=f"sm_{architecture}",
        registers=registers,
        spill_bytes=local,
        shared_bytes=compiled.metadata.shared,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of local memory of a binary, as NVIDIA's own tool reads them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump named no resources: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def table(rows: list[Compiled]) -> str:
    """Return the rows as text, one kernel on one architecture a line."""
    lines = [f"{'kernel':<52} {'arch':<7} {'registers':>9} {'spill_bytes':>11} {'shared_bytes':>12}"]
    lines += [
        f"{r.kernel:<52} {r.architecture:<7} {r.registers:>9} {r.spill_bytes:>11} {r.shared_bytes:>12}" for r in rows
    ]
    return "\n".join([f"triton {triton.__version__}", *lines]) + "\n"


def main(arguments: list[str]) -> None:
    """Compile what is asked for and print it."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="only this capability")
    parser.add_argument("--op", action="append", choices=OPS, help="only this operation")
    options = parser.parse_args(arguments)
    rows = list(compile_all(tuple(options.arch or ARCHITECTURES), tuple(options.op or OPS)))
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
