"""Each rung of the ladder: the UNet's no-gradient call, three quarters of a pair's arithmetic."""

from __future__ import annotations

from typing import Any

import harness
import ladder
import pytest
import torch
from architectures import SD15, SD15_TOY, SDXL, SDXL_TOY, Architecture
from counting import flops, unet_call

ON_GPU = torch.cuda.is_available()
NETWORKS = (SDXL, SD15) if ON_GPU else (SDXL_TOY, SD15_TOY)
BATCHES = (2, 16) if ON_GPU else (2,)


@pytest.fixture(scope="module")
def ladders(device: torch.device) -> Any:
    """The ladder of an architecture, one at a time: two of SDXL would not fit into memory."""
    kept: dict[str, ladder.Ladder] = {}

    def get(architecture: Architecture) -> ladder.Ladder:
        if architecture.name not in kept:
            kept.clear()
            ladder.release(device)
            kept[architecture.name] = ladder.Ladder(architecture, device)
        return kept[architecture.name]

    return get


@pytest.fixture(scope="module")
def wanted(device: torch.device) -> Any:
    """Output and FLOPs of the released script's call, by architecture and batch size."""
    known: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}

    def get(architecture: Architecture, steps: ladder.Ladder, images: int) -> tuple[torch.Tensor, int]:
        key = (architecture.name, images)
        if key not in known:
            with torch.no_grad(), ladder.free_after(device), steps.autocast(images) as call:
                known[key] = (call().clone(), flops(unet_call(architecture, images)))
        return known[key]

    return get


@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda a: a.name)
def test_autocast(
    bench: Any, device: torch.device, ladders: Any, wanted: Any, architecture: Architecture, images: int
) -> None:
    steps = ladders(architecture)
    out, count = wanted(architecture, steps, images)
    half = torch.float16 if ON_GPU else torch.bfloat16
    with ladder.free_after(device), steps.autocast(images) as call:
        bench(
            f"no-gradient call {architecture.name}", f"{images} pictures", ladder.AUTOCAST, call,
            baseline=ladder.AUTOCAST, reference=lambda: out, tolerance=harness.TOLERANCE[half], flops=count, dtype=half,
        )  # fmt: skip


@pytest.mark.parametrize("images", BATCHES)
@pytest.mark.parametrize("rung", ladder.RUNGS, ids=lambda r: r.name)
@pytest.mark.parametrize("architecture", NETWORKS, ids=lambda a: a.name)
def test_rung(
    bench: Any, device: torch.device, ladders: Any, wanted: Any, architecture: Architecture, rung: ladder.Rung,
    images: int,
) -> None:  # fmt: skip
    steps = ladders(architecture)
    out, count = wanted(architecture, steps, images)
    try:
        with ladder.free_after(device), steps.call(rung, images) as call:
            bench(
                f"no-gradient call {architecture.name}", f"{images} pictures", rung.name, call,
                baseline=ladder.AUTOCAST, reference=lambda: out, tolerance=rung.tolerance, flops=count,
                dtype=steps.dtype,
            )  # fmt: skip
    except ladder.Unavailable as reason:
        pytest.skip(str(reason))
