"""Every kernel that executes on a CPU against its float64 reference, and the references against gradcheck."""

from __future__ import annotations

import pytest
import torch

from hybrid_kernels import kit
from hybrid_kernels.kit_cases import CASES

CPU_DTYPES = (*kit.DTYPES, torch.float64)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["ref", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}".replace(" ", "_"))
def test_a_kernel_stays_within_its_tolerance_of_the_float64_reference(
    case: kit.Case, variant: str, dtype: torch.dtype
) -> None:
    outcome = kit.run_case(case, variant=variant, device="cpu", dtype=dtype)
    assert outcome.passed, outcome
