"""`hybrid bench kernels`: times and peak memory of the CPU kernels against plain torch.

Both sides run turn about in one process with the same inputs and threads, and a ratio is the
median of the turns' own ratios: what else the machine does then falls on both. Peak memory is the high-water mark of a
process of its own, above its inputs. The summary takes the worst row of the cross-entropy, and for packing the one of
`BUCKET_MIB`; smaller chunks, which plain torch too keeps in cache, are in the rows.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hybrid_kernels as hk
from hybrid.bench.result import Result

Step = Callable[[], object]
TOKENS, VOCAB = 4096, 32_000
BLOCK_SIZE = 128
BUCKET_MIB = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison."""

    kernel: str
    what: str
    plain_s: float
    ours_s: float
    time_vs_torch: float
    """Median over the turns of ours / plain; smaller is better."""
    turns: int
    plain_peak_bytes: int | None = None
    ours_peak_bytes: int | None = None
    memory_vs_torch: float | None = None


def measure_kernels(*, quick: bool) -> Result:
    """Return every measurement and the summary; quick takes under 50 s on two idle cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        losses = list(_cross_entropy_rows(quick))
        packs = list(_fp8_rows(quick))
        others = list(_other_rows(quick))
    finally:
        torch.set_num_threads(threads)
    memory = [row.memory_vs_torch for row in losses if row.memory_vs_torch is not None]
    summary = {
        "cross_entropy_time_vs_torch": max(row.time_vs_torch for row in losses),
        "fp8_pack_speedup": next(1.0 / r.time_vs_torch for r in packs if r.what.startswith(f"{BUCKET_MIB} MiB")),
    }
    if memory:
        summary["cross_entropy_memory_vs_torch"] = max(memory)
    rows = (*losses, *packs, *others)
    return Result(
        rows=[asdict(row) for row in rows],
        summary=summary,
        shown=[
            {
                "kernel": row.kernel,
                "time": f"{row.time_vs_torch:.2f}",
                "memory": "" if row.memory_vs_torch is None else f"{row.memory_vs_torch:.3f}",
                "plain": f"{row.plain_s * 1e3:.1f} ms",
                "ours": f"{row.ours_s * 1e3:.1f} ms",
                "what": row.what,
            }
            for row in rows
        ],
        goals={"cross_entropy_time_vs_torch": 1.0, "cross_entropy_memory_vs_torch": 0.25},
    )


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def compare(kernel: str, what: str, plain: Step, ours: Step, *, turns: int, warm: bool = True) -> Row:
    """Return both sides' median seconds and the median of their ratios, taken turn about."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    steps = {"plain": plain, "ours": ours}
    for turn in range(0 if warm else 1, turns + 1):
        # Who goes first changes, and turn 0 is thrown away: it warms caches and allocators.
        for name in list(steps) if turn % 2 else list(steps)[::-1]:
            start = time.perf_counter()
            steps[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ratios = [ours / plain for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)]
    return Row(
        kernel=kernel,
        what=what,
        plain_s=statistics.median(seconds["plain"]),
        ours_s=statistics.median(seconds["ours"]),
        time_vs_torch=statistics.median(ratios),
        turns=turns,
    )


def _loss_inputs(dtype: torch.dtype, hidden_size: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, hidden_size, generator=generator).mul_(0.02).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (tokens,), generator=generator)


def _loss_steps(inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Step]:
    hidden, weight, labels = inputs

    def step(loss: Callable[[], Tensor]) -> None:
        hidden.grad = weight.grad = None
        loss().backward()  # type: ignore[no-untyped-call]

    return {
        "plain": lambda: step(lambda: F.cross_entropy(F.linear(hidden, weight), labels)),
        "ours": lambda: step(lambda: hk.cross_entropy(hidden, weight, labels)),
    }


def _cross_entropy_rows(quick: bool) -> list[Row]:
    every = [(dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in (512, 1024)]
    rows = []
    for dtype, hidden_size in every[::2] if quick else every:
        name = str(dtype).removeprefix("torch.")
        for step in _loss_steps(_loss_inputs(dtype, hidden_size, tokens=16)).values():
            step()
        steps = _loss_steps(_loss_inputs(dtype, hidden_size))
        what = f"forward and backward, {TOKENS} tokens, vocabulary {VOCAB}, hidden {hidden_size}, {name}"
        # A step of several seconds needs no warm-up of its own.
        turns = 5 if not quick else 1 if dtype == torch.float32 else 3
        row = compare("cross_entropy", what, steps["plain"], steps["ours"], turns=turns, warm=False)
        if quick and dtype == torch.float32:  # the share is smaller than in bfloat16
            rows.append(row)
            continue
        plain_peak, ours_peak = (_peak_bytes(side, name, hidden_size) for side in ("plain", "ours"))
        if plain_peak and ours_peak:
            peaks = {"plain_peak_bytes": plain_peak, "ours_peak_bytes": ours_peak}
            row = Row(**{**asdict(row), **peaks, "memory_vs_torch": ours_peak / plain_peak})
        rows.append(row)
    return rows


def _peak_bytes(side: str, dtype: str, hidden_size: int) -> int | None:
    """Return how far one step raises a fresh process's high-water mark; None where there is no /proc to read it."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "hybrid.bench.kernels", side, dtype, str(hidden_size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout)


def _print_peak(side: str, dtype: str, hidden_size: int) -> None:
    torch.set_num_threads(1)
    _loss_steps(_loss_inputs(getattr(torch, dtype), hidden_size, tokens=4))[side]()
    step = _loss_steps(_loss_inputs(getattr(torch, dtype), hidden_size))[side]
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the high-water mark so far
    before = _high_water_bytes()
    step()
    print(_high_water_bytes() - before)


def _high_water_bytes() -> int:
    return next(int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith("VmHWM")) * 1024


def _plain_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = x.view(-1, BLOCK_SIZE)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 240.0
    codes = (blocks / scales).clamp(-240.0, 240.0).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


def _plain_unpack(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).view(-1, BLOCK_SIZE).float() * scales


def _fp8_rows(quick: bool) -> list[Row]:
    rows = []
    for size_mib in (BUCKET_MIB,) if quick else (4, 16, BUCKET_MIB, 256):
        x = torch.randn(size_mib << 18)
        what = f"{size_mib} MiB of float32, blocks of {BLOCK_SIZE}, nearest even"
        steps = (partial(_plain_pack, x), partial(hk.fp8_pack, x, block_size=BLOCK_SIZE))
        rows.append(compare("fp8_pack", what, *steps, turns=9 if quick else 15))
        codes, scales = _plain_pack(x)
        unpack = partial(hk.fp8_unpack, codes.view(-1), scales.view(-1), block_size=BLOCK_SIZE)
        rows.append(compare("fp8_unpack", what, partial(_plain_unpack, codes, scales), unpack, turns=5))
    return rows


def _gradients(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    leaves = [x.detach().requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def _plain_rmsnorm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def _plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _plain_sum(chunks: list[Tensor]) -> Tensor:
    return torch.stack([chunk.float() for chunk in chunks]).sum(0)


def _other_rows(quick: bool) -> list[Row]:
    rows = []
    turns = 3 if quick else 7
    cos, sin = hk.rope_tables(512, 64, theta=1e4)
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        x, weight = torch.randn(4096, 1024).to(dtype), torch.ones(1024).to(dtype)
        heads, kv = torch.randn(4, 16, 512, 64).to(dtype), torch.randn(4, 4, 512, 64).to(dtype)
        many = kv.repeat_interleave(4, dim=1)
        pairs: dict[str, tuple[Step, Step]] = {
            "rmsnorm": (
                _gradients(_plain_rmsnorm, x, weight),
                _gradients(lambda a, w: hk.rmsnorm(a, w, eps=1e-5), x, weight),
            ),
            "rope": (
                _gradients(lambda a: _plain_rope(a, cos, sin), heads),
                _gradients(lambda a: hk.rope(a, cos, sin), heads),
            ),
            "swiglu": (_gradients(lambda a, b: F.silu(a) * b, x, x), _gradients(hk.swiglu, x, x)),
            "attention": (_gradients(_plain_attention, heads, many, many), _gradients(hk.attention, heads, kv, kv)),
        }
        for kernel, (plain, ours) in pairs.items():
            rows.append(compare(kernel, f"forward and backward, {name}", plain, ours, turns=turns))
        chunks = [torch.randn(4 << 20).to(dtype) for _ in range(4)]
        steps = (partial(_plain_sum, chunks), partial(hk.reduce_add, chunks))
        rows.append(compare("reduce_add", f"4 chunks of 4 Mi, {name}", *steps, turns=turns))
    rows.append(_adamw_row(turns))
    return rows


def _adamw_row(turns: int) -> Row:
    size = 4 << 20
    theirs = torch.randn(size, requires_grad=True)
    theirs.grad = torch.randn(size)
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    param, first, second = torch.randn(size), torch.zeros(size), torch.zeros(size)
    grad = theirs.grad

    def ours() -> None:
        hk.adamw_(
            param, grad, first, second, step=1, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1
        )

    return compare("adamw", "4 Mi float32, against torch's foreach", optimizer.step, ours, turns=turns)


if __name__ == "__main__":  # the child that `_peak_bytes` starts
    _print_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]))
