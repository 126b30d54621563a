"""Each rung of the ladder: the UNet's no-gradient call, three quarters of a pair's arithmetic."""

from __future__ import annotations

from typing import Any

import harness
import ladder
import pytest
import torch
from architectures import SD15, SD15_TOY, SDXL, SDXL_TOY, Architecture

ON_GPU = torch.cuda.is_available()
NETWORKS = (SDXL, SD15) if ON_GPU else (SDXL_TOY, SD15_TOY)
BATCHES = (2, 16) if ON_GPU else (2,)


@pytest.fixture(scope="module")
def wanted(device: torch.device) -> Any:
    """Output and FLOPs of the released script's call, by architecture and batch size."""
    from counting import flops, unet_call

    known: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}

    def get(architecture: Architecture, images: int) -> tuple[torch.Tensor, int]:
        key = (architecture.name, images)
        if key not in known:
            with torch.no_grad(), ladder.free_after(device):
                out = ladder.autocast_call(architecture, device, images)().clone()
                known[key] = (out, flops(unet_call(architecture, images)))
        return known[key]

    return get


@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda a: a.name)
def test_autocast(bench: Any, device: torch.device, wanted: Any, architecture: Architecture, images: int) -> None:
    out, flops = wanted(architecture, images)
    with ladder.free_after(device):
        call = ladder.autocast_call(architecture, device, images)
        half = torch.float16 if ON_GPU else torch.bfloat16
        bench(
            f"no-gradient call {architecture.name}", f"{images} pictures", ladder.AUTOCAST, call,
            baseline=ladder.AUTOCAST, reference=lambda: out, tolerance=harness.TOLERANCE[half], flops=flops, dtype=half,
        )  # fmt: skip


@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("rung", ladder.RUNGS, ids=lambda r: r.name)
@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda a: a.name)
def test_rung(
    bench: Any, device: torch.device, wanted: Any, architecture: Architecture, rung: ladder.Rung, images: int
) -> None:
    out, flops = wanted(architecture, images)
    with ladder.free_after(device):
        try:
            unet = ladder.HalfUNet(architecture, device, rung)
            call = unet.call(images)
        except ladder.Unavailable as reason:
            pytest.skip(str(reason))
        bench(
            f"no-gradient call {architecture.name}", f"{images} pictures", rung.name, call, baseline=ladder.AUTOCAST,
            reference=lambda: out, tolerance=rung.tolerance, flops=flops, dtype=unet.dtype,
        )  # fmt: skip
