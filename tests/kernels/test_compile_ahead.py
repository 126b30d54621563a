"""Every kernel compiled for GPUs this machine does not have: registers, spills, shared memory, access widths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import triton
from helpers.paths import ROOT

SCRIPT = ROOT / "tests" / "helpers" / "compile_ahead.py"
CAPABILITIES = ("80", "89", "90", "100")
# With nothing in Triton's cache, sm_90 alone took 31 s of processor time: these tests are slow, and CI runs them.
MARKED = [pytest.param(c, marks=pytest.mark.slow) for c in CAPABILITIES]
# Register counts depend on Triton's version: with any other than this one, only spills and widths are checked.
TABLE_OF = "3.9."
# case: kernel -> (most registers over the architectures, bytes of shared memory)
CEILINGS = {
    "pair_loss: pair_loss": (38, 16),
    "pair_loss: pair_loss_bwd": (40, 0),
    "pair_loss channels-last: pair_loss": (48, 16),
    "pair_loss channels-last: pair_loss_bwd": (48, 0),
    "pair_loss errors given: pair_loss": (34, 16),
    "pair_errors: pair_loss": (34, 16),
    "renoise_step: predict": (38, 0),
    "renoise_step: correct": (40, 4096),
    "renoise_step channels-last: predict": (40, 0),
    "renoise_step channels-last: correct": (40, 4096),
    "group_norm_silu 320: statistics": (70, 512),
    "group_norm_silu 320: groups": (40, 512),
    "group_norm_silu 320: apply": (80, 0),
    "group_norm_silu 320: bwd_sums": (80, 512),
    "group_norm_silu 320: bwd_groups": (43, 512),
    "group_norm_silu 320: bwd_apply": (89, 0),
    "group_norm_silu 1280: statistics": (70, 512),
    "group_norm_silu 1280: groups": (40, 1024),
    "group_norm_silu 1280: apply": (80, 0),
    "group_norm_silu 1280: bwd_sums": (80, 512),
    "group_norm_silu 1280: bwd_groups": (43, 1024),
    "group_norm_silu 1280: bwd_apply": (89, 0),
    "group_norm_silu contiguous: statistics": (62, 16),
    "group_norm_silu contiguous: groups": (40, 0),
    "group_norm_silu contiguous: apply": (56, 0),
    "group_norm_silu contiguous: bwd_sums": (72, 16),
    "group_norm_silu contiguous: bwd_groups": (43, 256),
    "group_norm_silu contiguous: bwd_apply": (80, 0),
    "layer_norm 640: layer_norm_fwd": (35, 16),
    "layer_norm 640: layer_norm_bwd": (110, 4096),
    "layer_norm 640: layer_norm_sums": (40, 512),
    "layer_norm add 1280: layer_norm_fwd": (48, 16),
    "layer_norm add 1280: layer_norm_bwd": (118, 8192),
    "layer_norm add 1280: layer_norm_sums": (40, 512),
    "geglu: geglu_fwd": (39, 0),
    "geglu: geglu_bwd": (42, 0),
    "geglu_linear: geglu_linear": (140, 98336),
    "geglu_linear wide: geglu_linear": (190, 147488),
    "adamw8bit fp32: step": (92, 4096),
    "adamw8bit fp32: block_max": (40, 16),
    "adamw8bit bf16: step": (92, 16),
    "adamw8bit bf16: block_max": (40, 16),
    "adamw8bit all bf16: step": (92, 16),
    "adamw8bit all bf16: block_max": (40, 16),
    "ema fp32: update": (40, 0),
    "ema bf16: update": (56, 0),
}
# kernel of a case: most machine instructions per element of its tile, over the architectures
INSTRUCTIONS = {
    "group_norm_silu 320: statistics": 10.2,
    "group_norm_silu 320: apply": 13.0,
    "group_norm_silu 320: bwd_sums": 35.8,
    "group_norm_silu 320: bwd_apply": 34.0,
    "group_norm_silu contiguous: statistics": 8.0,
    "group_norm_silu contiguous: apply": 12.4,
    "layer_norm 640: layer_norm_bwd": 21.5,
    "layer_norm add 1280: layer_norm_bwd": 26.9,
}
# These move a few numbers per program; the channels-last cases read one tensor across its memory order.
NARROW = ("groups", "bwd_groups")
# These write one number per channel, block or program.
SUMMING = ("pair_loss", "statistics", "_sums", "block_max")
# Bytes of shared memory that a program may use; every launch must fit.
SHARED = {"80": 163 * 1024, "89": 99 * 1024, "90": 227 * 1024, "100": 227 * 1024}
WIDE = "geglu_linear wide: geglu_linear"  # chosen only on GPUs with enough shared memory
FROM_90 = ("90", "100")


@cache
def compiled(capability: str, which: str = "") -> dict[str, dict[str, Any]]:
    """compile_ahead.py's output for one GPU; from its own process, since kernels may be interpreted in this one."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), capability, *([which] if which else [])]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    table = json.loads(run.stdout)
    return {name: by_capability[capability] for name, by_capability in table.items() if by_capability}


@pytest.mark.slow
def test_every_kernel_is_in_the_table() -> None:
    assert set(compiled("90")) == set(CEILINGS)


@pytest.mark.parametrize("capability", MARKED)
@pytest.mark.parametrize("name", CEILINGS)
def test_no_spills_and_no_more_than_before(name: str, capability: str) -> None:
    if name == WIDE and capability not in FROM_90:
        assert name not in compiled(capability)
        return
    found = compiled(capability)[name]
    allowed = 0 if triton.__version__.startswith(TABLE_OF) else 8
    assert found["spills"] <= allowed, f"{name}, sm_{capability}: {found['spills']} bytes of spills"
    if allowed == 0:
        registers, shared = CEILINGS[name]
        assert found["registers"] <= registers, (
            f"{name}, sm_{capability}: registers {registers} -> {found['registers']}"
        )
        assert found["shared"] <= shared, f"{name}, sm_{capability}: shared memory {shared} -> {found['shared']} bytes"
    assert found["shared"] <= SHARED[capability], f"{name} cannot start on sm_{capability}"
    if not name.startswith("geglu_linear"):  # a matrix multiplication hides latency with its pipeline stages
        most = 65536 // 2
        assert found["registers"] * 32 * found["warps"] <= most, "fewer than two programs fit on a multiprocessor"


@pytest.mark.parametrize("capability", MARKED)
@pytest.mark.parametrize("name", [n for n in CEILINGS if not n.endswith(NARROW) and "channels-last" not in n])
def test_global_accesses_are_16_bytes_wide(name: str, capability: str) -> None:
    if name == WIDE and capability not in FROM_90:
        return
    found = compiled(capability)[name]
    assert "16" in found["loads"], f"{name}, sm_{capability}: loads {found['loads']}"
    if not name.endswith(SUMMING):
        assert "16" in found["stores"], f"{name}, sm_{capability}: stores {found['stores']}"


@pytest.mark.parametrize("capability", MARKED)
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_no_more_instructions_per_element_than_before(name: str, capability: str) -> None:
    """Kernels that move few bytes per instruction are limited by instructions rather than by memory."""
    if not triton.__version__.startswith(TABLE_OF):
        pytest.skip(f"the table is of Triton {TABLE_OF}x")
    found = compiled(capability)[name]["instructions"]
    assert 0.7 * INSTRUCTIONS[name] < found <= INSTRUCTIONS[name], f"{name}, sm_{capability}: {found:.1f}"


def test_the_harness_sees_a_narrow_access() -> None:
    """A tensor read across its memory order is not read 16 bytes at a time, and the counts must show it."""
    loads = compiled("90")["pair_loss channels-last: pair_loss"]["loads"]
    assert loads["4"] > loads["16"]


@pytest.mark.parametrize("capability", MARKED)
@pytest.mark.parametrize("name", [n for n in CEILINGS if n.endswith(": pair_loss")])
def test_the_last_arriving_program_sees_what_the_others_stored(name: str, capability: str) -> None:
    """Stores, barrier, one acquire-release atomic at GPU scope, barrier, loads that bypass L1."""
    order = compiled(capability)[name]["order"]
    assert [o for o in order if o.startswith(("atom", "red"))] == ["atom.global.gpu.acq_rel.add.u32"]
    before, after = (order[s] for s in (slice(order.index("atom.global.gpu.acq_rel.add.u32")),
                                        slice(order.index("atom.global.gpu.acq_rel.add.u32") + 1, None)))  # fmt: skip
    assert before[-2:] == ["st", "barrier"]
    assert after[0] == "barrier" and "ld.cg" in after
    # only what this launch did not write may be read through L1: given errors and the weight
    assert all(o in ("barrier", "st", "ld", "ld.cg") for o in after)
    assert ("ld" in after) == (not name.startswith("pair_errors"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sizes_of_one_fp32_and_odd_widths_compile_without_spills(capability: str) -> None:
    for name, found in compiled(capability, "edges").items():
        assert found["spills"] == 0, f"{name}, sm_{capability}: {found['spills']} bytes of spills"
