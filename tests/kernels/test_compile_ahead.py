"""Every kernel compiled for GPUs that are not here: registers, spills, shared memory, widths of global accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton

SCRIPT = Path(__file__).with_name("compile_ahead.py")
CAPABILITIES = ("80", "89", "90", "100")
# Triton's version decides registers; the table was made with this one, and others are held to spills and widths only.
TABLE_OF = "3.9."
# case: kernel -> (most registers over the architectures, bytes of shared memory)
CEILINGS = {
    "pair_loss: partial_sums": (40, 16),
    "pair_loss: pair_loss": (39, 0),
    "pair_loss: errors": (27, 0),
    "pair_loss: pair_loss_bwd": (40, 0),
    "pair_loss trajectory: partial_sums": (44, 16),
    "pair_loss trajectory: pair_loss": (39, 0),
    "pair_loss trajectory: errors": (27, 0),
    "pair_loss trajectory: pair_loss_bwd": (48, 0),
    "pair_loss channels-last: partial_sums": (48, 16),
    "pair_loss channels-last: pair_loss": (39, 0),
    "pair_loss channels-last: errors": (27, 0),
    "pair_loss channels-last: pair_loss_bwd": (48, 0),
    "renoise_step: predict": (38, 0),
    "renoise_step: correct": (40, 4096),
    "renoise_step channels-last: predict": (40, 0),
    "renoise_step channels-last: correct": (40, 4096),
    "group_norm_silu 320: statistics": (66, 1024),
    "group_norm_silu 320: groups": (40, 512),
    "group_norm_silu 320: apply": (64, 0),
    "group_norm_silu 320: bwd_sums": (102, 1024),
    "group_norm_silu 320: bwd_groups": (43, 512),
    "group_norm_silu 320: bwd_apply": (128, 0),
    "group_norm_silu 1280: statistics": (66, 1024),
    "group_norm_silu 1280: groups": (44, 1024),
    "group_norm_silu 1280: apply": (64, 0),
    "group_norm_silu 1280: bwd_sums": (102, 1024),
    "group_norm_silu 1280: bwd_groups": (48, 1024),
    "group_norm_silu 1280: bwd_apply": (128, 0),
    "group_norm_silu contiguous: statistics": (35, 32),
    "group_norm_silu contiguous: groups": (40, 256),
    "group_norm_silu contiguous: apply": (40, 0),
    "group_norm_silu contiguous: bwd_sums": (48, 32),
    "group_norm_silu contiguous: bwd_groups": (43, 256),
    "group_norm_silu contiguous: bwd_apply": (48, 0),
    "layer_norm 640: layer_norm_fwd": (35, 16),
    "layer_norm 640: layer_norm_bwd": (64, 4096),
    "layer_norm add 1280: layer_norm_fwd": (48, 16),
    "layer_norm add 1280: layer_norm_bwd": (123, 4096),
    "geglu: geglu_fwd": (39, 0),
    "geglu: geglu_bwd": (42, 0),
}
# Two of these move a few numbers a program; the channels-last ones read one tensor across its order.
NARROW = ("pair_loss", "errors", "groups", "bwd_groups")


@cache
def compiled(which: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """What compile_ahead.py prints; a process of its own, since here kernels may be interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *CAPABILITIES, *([which] if which else [])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_kernel_is_in_the_table() -> None:
    assert set(compiled()) == set(CEILINGS)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CEILINGS)
def test_no_spills_and_no_more_than_before(name: str, capability: str) -> None:
    found = compiled()[name][capability]
    allowed = 0 if triton.__version__.startswith(TABLE_OF) else 8
    assert found["spills"] <= allowed, f"{name}, sm_{capability}: {found['spills']} bytes of spills"
    if allowed == 0:
        registers, shared = CEILINGS[name]
        assert found["registers"] <= registers, (
            f"{name}, sm_{capability}: registers {registers} -> {found['registers']}"
        )
        assert found["shared"] <= shared, f"{name}, sm_{capability}: shared memory {shared} -> {found['shared']} bytes"
    assert found["registers"] * 32 * found["warps"] <= 65536 // 2, "fewer than two programs fit on a multiprocessor"


@pytest.mark.parametrize("name", [n for n in CEILINGS if not n.endswith(NARROW) and "channels-last" not in n])
def test_global_accesses_are_16_bytes_wide(name: str) -> None:
    for capability, found in compiled()[name].items():
        assert "16" in found["loads"], f"{name}, sm_{capability}: loads {found['loads']}"
        if not name.endswith(("partial_sums", "statistics", "bwd_sums")):  # these write a number a channel or program
            assert "16" in found["stores"], f"{name}, sm_{capability}: stores {found['stores']}"


def test_the_harness_sees_a_narrow_access() -> None:
    """A tensor read across its order is not read 16 bytes at a time, and the count above says so."""
    loads = compiled()["pair_loss channels-last: partial_sums"]["90"]["loads"]
    assert loads["4"] > loads["16"]


@pytest.mark.slow
def test_sizes_of_one_fp32_and_odd_widths_compile_without_spills() -> None:
    for name, by_capability in compiled("edges").items():
        for capability, found in by_capability.items():
            assert found["spills"] == 0, f"{name}, sm_{capability}: {found['spills']} bytes of spills"
