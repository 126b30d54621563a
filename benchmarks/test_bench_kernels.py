"""Fused operations against eager PyTorch and torch.compile, forward, backward and both, at the shapes of SDXL."""

from __future__ import annotations

from typing import Any

import harness
import kernel_cases
import pytest
import torch
from architectures import SDXL

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.bfloat16, torch.float16) if ON_GPU else (torch.float32,)
IMPLEMENTATIONS = ("eager", "compiled", "fused")
CASES = list(kernel_cases.cases(SDXL, most=4 if ON_GPU else 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", kernel_cases.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))
def test_kernel(
    bench: Any, device: torch.device, case: kernel_cases.Case, dtype: torch.dtype, mode: str, implementation: str
) -> None:
    """On a CPU ``fused`` runs the operation's eager fallback, so its time shows the overhead of the wrapper."""
    torch.manual_seed(0)
    prepared = kernel_cases.Prepared(case, dtype, device)
    if mode not in prepared.modes:
        pytest.skip("this operation has no gradient")
    if implementation == "compiled" and not ON_GPU and mode != "forward":
        pytest.skip("on a CPU only the forward pass is compiled, to stay within minutes")
    run = {
        "eager": case.reference,
        "compiled": torch.compile(case.reference, dynamic=False),
        "fused": case.run,
    }[implementation]
    call = prepared.call(run, mode)
    bench(
        f"kernel {case.op}", f"{case.name} {str(dtype).removeprefix('torch.')} {mode}", implementation, call,
        baseline="eager", reference=prepared.call(case.reference, mode), tolerance=harness.TOLERANCE[dtype],
        moved=prepared.moved(mode), dtype=dtype, seconds=0.2 if ON_GPU else 0.1, graph=mode != "backward",
    )  # fmt: skip
