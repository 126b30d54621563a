"""geglu_linear: errors against fp64, sizes, layouts, edge values, tiles, compilation, when the module uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.numerics import DTYPES, assert_bitwise_repeatable, assert_compiles, assert_no_worse_than_eager, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smpo_fast.kernels import geglu_linear as kernel_module
from smpo_fast.kernels._launch import INTERPRET
from smpo_fast.kernels.geglu_linear import (
    FusedGEGLULinear,
    _op,
    forward_only,
    geglu_linear,
    geglu_linear_reference,
    plain,
)

# leading dimensions, K, F; SDXL has K 640 and 1280 with F = 4 K, SD1.5 also 320
SHAPES = [((2, 5), 128, 160), ((70,), 64, 33), ((1,), 1, 1), ((131,), 37, 11), ((3, 7), 97, 65), ((150,), 128, 70)]
if not INTERPRET:
    SHAPES += [((2, 4096), 640, 2560), ((2, 1024), 1280, 5120), ((16, 1024), 1280, 5120), ((2, 4096), 320, 1280)]


def problem(lead: tuple[int, ...], depth: int, features: int, dtype: torch.dtype, device: Any) -> list[Tensor]:
    """x, weight and bias, with the magnitudes of a trained layer."""
    return [
        draw(*lead, depth, seed=0, dtype=dtype, device=device),
        (draw(2 * features, depth, seed=1) * depth**-0.5).to(device, dtype),
        draw(2 * features, seed=2, dtype=dtype, device=device),
    ]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(shape: Any, dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    inputs = problem(*shape, dtype, device)
    assert_no_worse_than_eager(geglu_linear, geglu_linear_reference, inputs if bias else inputs[:2])


@pytest.mark.parametrize("rows", [16, 64, 150])
@pytest.mark.parametrize("shared", [0, 227 * 1024], ids=["narrow", "wide"])
def test_every_tile(rows: int, shared: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRET and shared > torch.cuda.get_device_properties(device).shared_memory_per_block_optin:
        pytest.skip("more shared memory than this GPU has")
    monkeypatch.setattr(kernel_module, "_shared_memory", lambda x: shared)
    inputs = problem((rows,), 128, 130, torch.bfloat16, device)
    assert_no_worse_than_eager(geglu_linear, geglu_linear_reference, inputs)


def test_tiles_of_many_groups(device: torch.device) -> None:
    """More rows of tiles than fit into one group, and an incomplete last group: each tile is computed once."""
    rows = 32 * (kernel_module.GROUP + 3) - 5
    inputs = problem((rows,), 32, 70, torch.float32, device)
    assert_no_worse_than_eager(geglu_linear, geglu_linear_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 10.0, 100.0])
def test_small_and_large_values(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = problem((9,), 64, 20, torch.float32, device)
    inputs = [(t * s).to(dtype) for t, s in ((x, scale), (weight, 1.0), (bias, scale))]
    assert_no_worse_than_eager(geglu_linear, geglu_linear_reference, inputs)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
def test_layouts(which: int, layout: str, device: torch.device) -> None:
    inputs = problem((6,), 12, 9, torch.float32, device)
    x = inputs[which]
    if layout == "transposed" and x.ndim == 2:
        inputs[which] = x.t().contiguous().t()
    elif layout == "sliced":
        inputs[which] = x.repeat_interleave(2, dim=-1)[..., ::2]
    else:
        inputs[which] = x[:1].expand(x.shape)
    assert_no_worse_than_eager(geglu_linear, geglu_linear_reference, inputs)


def test_is_the_exact_gelu_and_takes_the_value_first(device: torch.device) -> None:
    x = draw(64, 40, seed=3, device=device)
    weight = torch.eye(40, device=device)
    value, gate = x.chunk(2, dim=-1)
    assert torch.allclose(geglu_linear(x, weight), value * F.gelu(gate), atol=1e-6)
    assert (geglu_linear(x, weight) - value * F.gelu(gate, approximate="tanh")).abs().max() > 1e-4


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_nonfinite_comes_through(dtype: torch.dtype, value: float, device: torch.device) -> None:
    """Only in its own row or column, also in a tile that extends beyond the end."""
    for which, place in ((0, (3, 5)), (1, (2, 5)), (1, (13, 5)), (2, (13,))):
        inputs = problem((21,), 37, 11, dtype, device)
        inputs[which][place] = value
        # in fp64: matrix products in bf16 on CPUs with AMX spread an infinity to rows that have none
        found, wanted = geglu_linear(*inputs), geglu_linear_reference(*(x.double() for x in inputs))
        assert torch.equal(found.isfinite(), wanted.isfinite()) and torch.equal(found.isnan(), wanted.isnan())
        assert not wanted.isfinite().all() and wanted.isfinite().any()


def test_repeatable_and_compilable(device: torch.device) -> None:
    inputs = problem((2, 30), 64, 33, torch.bfloat16, device)
    assert_bitwise_repeatable(geglu_linear, inputs)
    assert_compiles(geglu_linear, inputs)
    torch.library.opcheck(_op, tuple(inputs))
    torch.library.opcheck(_op, (*inputs[:2], None))


def test_no_rows(device: torch.device) -> None:
    assert geglu_linear(*problem((2, 0), 8, 4, torch.float32, device)).shape == (2, 0, 4)


def test_mistakes_are_named(device: torch.device) -> None:
    x, weight, bias = problem((2,), 8, 4, torch.float32, device)
    with pytest.raises(ValueError, match=r"the weight is \[2F, K\]"):
        geglu_linear(x, weight[:3], bias)
    with pytest.raises(ValueError, match=r"x is \[\.\.\., 8\]"):
        geglu_linear(x[:, :3], weight, bias)
    with pytest.raises(ValueError, match="the bias has"):
        geglu_linear(x, weight, bias[:1])
    with pytest.raises(ValueError, match="dtypes differ"):
        geglu_linear(x.half(), weight, bias)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 80), depth=st.integers(1, 130), features=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)  # fmt: skip
def test_any_shape(rows: int, depth: int, features: int, dtype: torch.dtype, bias: bool) -> None:
    inputs = problem((rows,), depth, features, dtype, "cpu" if INTERPRET else "cuda")
    assert_no_worse_than_eager(geglu_linear, geglu_linear_reference, inputs if bias else inputs[:2])


# --- the module ------------------------------------------------------------------------------------------------


class Stock(nn.Module):
    """The stock class behind the fused module; it counts its calls."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Linear(8, 12, device=device)
        self.calls = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Module(FusedGEGLULinear, Stock):
    pass


def test_runs_only_without_gradients_and_where_it_may(launches: list[str], device: torch.device) -> None:
    torch.manual_seed(0)
    module, x = Module(device), draw(3, 8, seed=0, device=device)
    with forward_only():
        wanted = module(x)  # the weight needs a gradient
        assert (module.calls, launches) == (1, [])
        with torch.no_grad():
            assert torch.allclose(module(x), wanted, atol=1e-6)
        module.requires_grad_(False)
        assert torch.allclose(module(x), wanted, atol=1e-6)
        assert (module.calls, launches) == (1, ["_geglu_linear_kernel"] * 2)
        module(x.clone().requires_grad_()).sum().backward()
        assert (module.calls, len(launches)) == (2, 2)
    assert torch.equal(module(x), wanted) and (module.calls, len(launches)) == (3, 2), "outside: as in training"


def test_a_projection_that_is_more_than_linear_is_left_alone(launches: list[str], device: torch.device) -> None:
    """Also if changed after patching: LoRA, hooks, a replaced forward, weights stored elsewhere."""
    x = draw(3, 8, seed=0, device=device)

    def changed(change: Any) -> Module:
        module = Module(device).requires_grad_(False)
        change(module)
        return module

    def partition(module: Module) -> None:  # as ZeRO 3 does between calls
        weight = module.proj.weight.data
        module.proj.weight.data = torch.empty(0, device=device)
        module.proj.register_forward_pre_hook(lambda m, _: setattr(m.weight, "data", weight))

    cases = [
        lambda m: m.proj.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.proj, "forward", lambda x: F.linear(x, m.proj.weight)),
        lambda m: setattr(m, "proj", nn.Sequential(m.proj)),
        lambda m: nn.utils.parametrizations.weight_norm(m.proj),
        partition,
    ]
    for number, change in enumerate(cases):
        module = changed(change)
        assert not plain(module.proj), number
        with forward_only():
            module(x)
        assert (module.calls, launches) == (1, []), number


def test_under_autocast(launches: list[str], device: torch.device) -> None:
    module, x = Module(device).requires_grad_(False), draw(30, 8, seed=0, device=device)
    with torch.autocast(device.type, torch.bfloat16), forward_only():
        found = module(x)
    assert found.dtype == torch.bfloat16 and launches == ["_geglu_linear_kernel"]
    assert (found.float() - Stock.forward(module, x)).abs().max() < 0.03
