"""Emulated numerics have the properties of their formats, and parity finds what is wrong where it is wrong."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from hybrid.backends.number_emulation import (
    GRID_OF_FORMAT,
    MatmulNumerics,
    emulate_matmuls,
    emulated_matmuls,
    quantize,
    round_to_format,
)
from hybrid.cli import main
from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import dump_job, parse_job
from hybrid.errors import ConfigError, UnsupportedFormat
from hybrid.hardware.catalog import load_catalog
from hybrid.hardware.numerics import load_numerics
from hybrid.models.stage import build_stage, compute_context
from hybrid.models.tokens import prepare_data
from hybrid.observe.events import Event, StepEvent
from hybrid.runtime.local import ThreadPlacement
from hybrid.runtime.parity import run_parity
from hybrid.runtime.parity_cause import Product, likely_cause, replay
from hybrid.runtime.parity_report import Errors, ParityReport, ratio_of
from hybrid.runtime.trainer import train

E5M2 = MatmulNumerics(matmul="fp8", fp8_format="e5m2")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def _raw(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of {i * i % 97} and {i**3 % 89} apples" for i in range(2000)))
    islands = [{"name": "a", "device": "trn2", "count": 2}, {"name": "b", "device": "h100", "count": 2}]
    model = {"num_blocks": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
    return {
        "name": "parity",
        "model": {**model, "vocab_size": 320, "sequence_length": 16},
        "data": {"source": "text", "path": str(tmp_path), "held_out_share": 0.1},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
        "batch": {"global_batch": 4, "microbatch": 2},
        "steps": 10,
        "precision": "bf16",
        "fleet": {"islands": islands},
        "runtime": {"placement": "threads", "transport": "inproc"},
        "runs_dir": str(tmp_path / "runs"),
        **changes,
    }


def _parity(
    tmp_path: Path, *, steps: int = 2, instead: dict[str, MatmulNumerics] | None = None, **changes: Any
) -> ParityReport:
    job, fleet = fleet_of(parse_job(_raw(tmp_path, **changes)), None)
    tokens = prepare_data(job.data, job.model)
    return run_parity(job, fleet, plan_of(job, fleet), tokens, steps=steps, instead=instead)


BF16 = {"matmul": "bf16"}
BF16_BY_CHANCE = {"matmul": "bf16", "rounding": "stochastic"}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("numerics", [{}, {"a": BF16, "b": BF16}, {"a": BF16_BY_CHANCE, "b": BF16}])
def test_a_clean_bf16_run_on_a_mixed_fleet_raises_no_alarm(numerics: dict[str, Any], seed: int, tmp_path: Path) -> None:
    report = _parity(tmp_path, emulation={"numerics": numerics}, seed=seed)
    assert report.in_band, report
    assert {row.chip for row in report.rows} == {"trn2", "h100"}
    assert [row.layer for row in report.rows] == ["embedding", "block.00", "block.01", "block.02", "head"]
    # A run that computes nothing in bf16 would be in the band as well.
    assert all(0.5 < row.output.l2 < 2 for row in report.rows)
    assert all(0.5 < row.end_to_end_gradient.l2 < 2 for row in report.rows)


def test_a_clean_fp32_run_has_no_error_at_all(tmp_path: Path) -> None:
    report = _parity(tmp_path, precision="fp32")
    assert report.in_band
    assert all(row.judged().linf == 0 and row.end_to_end_gradient.linf == 0 for row in report.rows)


@pytest.mark.parametrize("layer", ["block.01", "head"])
@pytest.mark.parametrize(
    ("precision", "numerics", "kind", "words"),
    [
        ("bf16", E5M2, "format", "e5m2"),
        ("bf16", MatmulNumerics(matmul="fp8", fp8_format="e4m3"), "format", "e4m3"),
        ("bf16", MatmulNumerics(matmul="fp8", fp8_format="e4m3fn"), "format", "e4m3fn"),
        ("fp32", MatmulNumerics(matmul="tf32"), "tf32", "TF32"),
        ("fp32", MatmulNumerics(matmul="bf16"), "auto-cast", "bf16"),
        ("fp32", MatmulNumerics(matmul="bf16", rounding="stochastic"), "rounding", "chance"),
        (
            "bf16",
            MatmulNumerics(matmul="fp8", fp8_format="e4m3", rounding="stochastic"),
            "rounding",
            "e4m3fn rounded by",
        ),
        ("bf16", MatmulNumerics(matmul="bf16", output_factor=2.0), "scale", "2 times"),
        ("bf16", MatmulNumerics(matmul="fp8", fp8_format="e4m3", amax_factor=1 / 16), "scale", "0.0625"),
    ],
)
def test_a_planted_fault_is_found_in_its_layer_with_its_cause(
    precision: str, numerics: MatmulNumerics, kind: str, words: str, layer: str, tmp_path: Path
) -> None:
    report = _parity(tmp_path, precision=precision, instead={layer: numerics}, steps=1)
    assert report.first_layer == layer
    assert report.cause is not None
    assert (report.cause.kind, words in report.cause.detail) == (kind, True), report.cause
    limits = report.max_linf_ratio, report.max_l2_ratio
    assert [row.layer for row in report.rows if not row.judged().within(limits)] == [layer]


@pytest.mark.parametrize("weight", ["attention.key.weight", "mlp.down.weight"])
@pytest.mark.parametrize(
    ("precision", "numerics", "kind"), [("bf16", E5M2, "format"), ("fp32", MatmulNumerics(matmul="tf32"), "tf32")]
)
def test_a_fault_in_one_product_is_found_in_that_product(
    weight: str, precision: str, numerics: MatmulNumerics, kind: str, tmp_path: Path
) -> None:
    report = _parity(tmp_path, precision=precision, instead={f"block.01.{weight}": numerics}, steps=1)
    assert (report.first_layer, report.weights) == ("block.01", (weight,))
    assert report.cause is not None
    assert report.cause.kind == kind


def test_a_fault_from_the_jobs_own_words_is_found_on_its_island_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exit_code(raw: dict[str, Any], *words: str) -> Any:
        (tmp_path / "job.yaml").write_text(dump_job(parse_job(raw)))
        with pytest.raises(SystemExit) as end:
            main(["parity", str(tmp_path / "job.yaml"), "--steps", "1", *words])
        return end.value.code

    wrong = _raw(tmp_path, precision="fp32", emulation={"numerics": {"b": {"matmul": "tf32"}}})
    assert exit_code(wrong) == 1
    told = capsys.readouterr().out
    assert "likely cause: tf32" in told
    assert exit_code(_raw(tmp_path), "--json") == 0
    assert '"in_band": true' in capsys.readouterr().out


def test_stochastic_rounding_keeps_what_rounding_to_nearest_loses() -> None:
    nearest, chance = torch.ones(4096), torch.ones(4096)
    generator = torch.Generator().manual_seed(7)
    for _ in range(100):
        nearest = round_to_format(nearest + 1e-3, "bf16", rounding="nearest")
        chance = round_to_format(chance + 1e-3, "bf16", rounding="stochastic", generator=generator)
    assert torch.equal(nearest, torch.ones(4096))
    # The standard deviation of one sum is about 0.027: of the mean of 4096, 0.0004.
    assert chance.mean().item() == pytest.approx(1.1, abs=0.002)


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [("e4m3", ml_dtypes.float8_e4m3), ("e4m3fn", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)],
)
def test_fp8_values_are_those_of_ml_dtypes(fmt: str, dtype: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200_000, generator=generator) * torch.logspace(-9, 5, 200_000)
    maximum = GRID_OF_FORMAT[fmt][2]
    assert maximum is not None
    wanted = x.clamp(-maximum, maximum).numpy().astype(dtype).astype(np.float32)
    assert np.array_equal(round_to_format(x, fmt, rounding="nearest").numpy(), wanted)


def test_trainiums_e4m3_clips_where_the_open_one_goes_on() -> None:
    x = torch.tensor([239.0, 250.0, 300.0, 448.0, 1000.0])
    assert round_to_format(x, "e4m3", rounding="nearest").tolist() == [240.0] * 5
    assert round_to_format(x, "e4m3fn", rounding="nearest").tolist() == [240.0, 256.0, 288.0, 448.0, 448.0]


def test_tf32_keeps_ten_bits_rounded_or_cut() -> None:
    x = torch.tensor([1.0 + 2.0**-11 + 2.0**-20, 1.0 + 2.0**-11])
    assert round_to_format(x, "tf32", rounding="nearest").tolist() == [1.0 + 2.0**-10, 1.0]
    assert round_to_format(x, "tf32", rounding="truncate").tolist() == [1.0, 1.0]


def test_an_fp8_tensor_that_holds_infinity_is_not_a_number() -> None:
    assert quantize(torch.tensor([1.0, float("inf")]), E5M2).isnan().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_emulation_of_the_jobs_own_format_has_the_accuracy_of_torch_and_is_taken_back(
    precision: Any, tmp_path: Path
) -> None:
    model = parse_job(_raw(tmp_path)).model
    stage = build_stage(model, 0, model.num_layers, seed=1, dtype=torch.float32)
    names = [name for name, _ in stage.named_parameters()]
    ids = torch.arange(32).view(2, 16)
    with compute_context(precision):
        before = stage(ids)
        restore = emulate_matmuls(stage, MatmulNumerics(matmul=precision), seed=1)
        assert [name for name, _ in stage.named_parameters()] == names
        during = stage(ids)
        restore()
        assert torch.equal(stage(ids), before)
        with emulated_matmuls(stage, E5M2, seed=1):
            assert not torch.equal(stage(ids), before)
    assert during.dtype == before.dtype
    torch.testing.assert_close(during, before, atol=2e-2 if precision == "bf16" else 1e-6, rtol=0)


def test_the_table_agrees_with_the_emulation_and_the_catalog() -> None:
    table, catalog = load_numerics(), load_catalog()
    grids = {name: (row.mantissa_bits, row.min_exponent, row.maximum) for name, row in table.encodings.items()}
    assert grids == GRID_OF_FORMAT
    for chip in catalog.chips.values():
        fp8 = table.of(chip.generation).fp8
        assert (None if fp8 is None else GRID_OF_FORMAT[fp8][2]) == chip.fp8_max, chip.name


def test_wrong_words_about_numerics_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no island: c; valid: a, b"):
        parse_job(_raw(tmp_path, emulation={"numerics": {"c": {"matmul": "fp8"}}}))
    with pytest.raises(UnsupportedFormat, match="h100 does not have this rounding"):
        _parity(tmp_path, emulation={"numerics": {"b": BF16_BY_CHANCE}})
    host = {"name": "a", "device": "cpu", "count": 2}
    numerics = {"numerics": {"a": BF16}}
    with pytest.raises(ConfigError, match="numerics are emulated on emulated chips alone"):
        _parity(tmp_path, fleet={"islands": [host]}, emulation=numerics)
    emulated = {"islands": [{**host, "backend": "emulated"}]}
    with pytest.raises(ConfigError, match="narrower than the job's precision"):
        _parity(tmp_path, fleet=emulated, precision="fp64", emulation=numerics)
    with pytest.raises(ConfigError, match="judged in units of bf16's error"):
        _parity(tmp_path, fleet=emulated, precision="fp64")
    with pytest.raises(ConfigError, match=r"valid: embedding, block\.00"):
        _parity(tmp_path, instead={"block.07": E5M2})


def test_a_ratio_without_a_yardstick_or_without_a_number_is_infinite() -> None:
    none, nan = Errors(linf=0.0, l2=0.0), Errors(linf=float("nan"), l2=float("nan"))
    one = Errors(linf=1.0, l2=1.0)
    assert ratio_of(none, none).l2 == 0.0
    assert ratio_of(one, none).l2 == float("inf")
    assert ratio_of(nan, one).linf == float("inf")


def _losses(raw: dict[str, Any]) -> list[float]:
    events: list[Event] = []
    job, fleet = fleet_of(parse_job(raw), None)
    placement = ThreadPlacement(threads_per_rank=1)
    train(job, fleet, plan_of(job, fleet), placement, resume=None, sink=events.append, started_s=time.monotonic())
    return [event.loss for event in events if isinstance(event, StepEvent)]


def test_a_job_trains_under_emulated_numerics_to_losses_of_its_own(tmp_path: Path) -> None:
    def losses(**numerics: Any) -> list[float]:
        return _losses(_raw(tmp_path, steps=10, emulation={"pace": False, "numerics": numerics}))

    plain = losses()
    emulated = losses(a={"matmul": "fp8", "rounding": "stochastic"}, b={"matmul": "fp8"})
    assert plain != emulated
    assert emulated[-1] < emulated[0]
    assert emulated[-1] == pytest.approx(plain[-1], rel=0.02)


@pytest.mark.parametrize("fault", [MatmulNumerics(matmul="tf32"), MatmulNumerics(matmul="bf16"), E5M2])
def test_a_cause_is_found_on_a_chip_that_sums_in_another_order(fault: MatmulNumerics) -> None:
    generator = torch.Generator().manual_seed(5)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((64, 512), (48, 512), (64, 48)))
    exact = Product(x=x, weight=weight, grad=grad, y=x @ weight.T, grad_weight=grad.T @ x)

    def summed_otherwise(numerics: MatmulNumerics) -> Product:
        seen_x, seen_weight = quantize(x, numerics).double(), quantize(weight, numerics).double()
        seen_grad = quantize(grad, numerics, is_gradient=True).double()
        return replace(exact, y=(seen_x @ seen_weight.T).float(), grad_weight=(seen_grad.T @ seen_x).float())

    cause = likely_cause(exact, summed_otherwise(fault), "fp32", seed=1)
    wanted = replay(exact, fault, "fp32", seed=1)
    alone = likely_cause(exact, wanted, "fp32", seed=1)
    assert (cause.kind, cause.detail) == (alone.kind, alone.detail)
    assert cause.distance < 0.05
    # The other order alone is no fault: it stays in the band of fp32.
    near = replay(exact, None, "bf16", seed=1)
    limits = load_numerics().parity.limits("fp32")
    for name in ("y", "grad_weight"):
        wide, right = getattr(summed_otherwise(MatmulNumerics()), name), getattr(exact, name)
        ratio = float((wide - right).norm() / (getattr(near, name) - right).norm())
        assert 0 < ratio < limits[1] / 10
