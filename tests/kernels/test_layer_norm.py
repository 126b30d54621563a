"""layer_norm with and without a residual: errors against fp64, hard statistics, which gradients are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.numerics import (
    DTYPES,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_no_worse_than_eager,
    assert_second_derivatives_are_refused,
    draw,
    run,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smpo_fast.kernels import layer_norm as kernel_module
from smpo_fast.kernels._launch import INTERPRET
from smpo_fast.kernels.layer_norm import MAX_FEATURES, _bwd_op, _fwd_op, layer_norm, layer_norm_reference

SHAPES = [(2, 3, 320), (5, 640), (2, 2, 1280), (7, 1), (3, 5, 37), (1, 127), (2, 1, 2049)]
if not INTERPRET:
    SHAPES += [(2, 4096, 640), (2, 1024, 1280), (16, 1024, 1280), (2, 4096, 320), (1, 4096)]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: Any, *, residual: bool, mean: float = 0.0, scale: float = 1.0,
    of_weights: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    x = (draw(*shape, seed=0, device=device) * scale + mean).to(dtype)
    w, b = ((1 + draw(shape[-1], seed=s, device=device)).to(of_weights or dtype) for s in (1, 2))
    return [x, w, b] + ([(draw(*shape, seed=3, device=device) * scale).to(dtype)] if residual else [])


@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add+norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(shape: tuple[int, ...], dtype: torch.dtype, residual: bool, device: torch.device) -> None:
    inputs = problem(shape, dtype, device, residual=residual)
    assert_no_worse_than_eager(layer_norm, layer_norm_reference, inputs, wrt=range(len(inputs)))


@pytest.mark.parametrize(("mean", "scale"), [(1000.0, 1.0), (-30.0, 1e-3), (0.0, 300.0), (0.0, 1e-4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_statistics(mean: float, scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """A mean far above the deviation, and squares beyond fp16."""
    inputs = problem((4, 640), dtype, device, residual=False, mean=mean, scale=scale)
    assert_no_worse_than_eager(layer_norm, layer_norm_reference, inputs, wrt=[0, 1, 2])


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1, -3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_row_gives_the_bias_exactly(value: float, dtype: torch.dtype, device: torch.device) -> None:
    _, w, b = problem((1, 641), dtype, device, residual=False)
    y = layer_norm(torch.full((3, 641), value, dtype=dtype, device=device), w, b)
    assert torch.equal(y, b.expand(3, 641))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_activations_with_fp32_weights(dtype: torch.dtype, device: torch.device) -> None:
    """As under autocast."""
    inputs = problem((3, 5, 320), dtype, device, residual=True, of_weights=torch.float32)
    assert_no_worse_than_eager(layer_norm, layer_norm_reference, inputs, wrt=range(4))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_layouts(layout: str, device: torch.device) -> None:
    x = draw(6, 10, 12, seed=2, device=device)
    x = {"transposed": x.transpose(0, 2), "sliced": x[::2, :, ::3], "expanded": x[:, :1].expand(6, 10, 12)}[layout]
    _, w, b = problem((1, x.shape[-1]), torch.float32, device, residual=False)
    assert_no_worse_than_eager(layer_norm, layer_norm_reference, [x, w, b, x.flip(0)], wrt=range(4))


def test_the_sum_is_eagers_sum(device: torch.device) -> None:
    """The sum that is returned is rounded as in eager code, and the norm is computed from the rounded sum."""
    x, w, b, r = problem((4, 320), torch.bfloat16, device, residual=True)
    total, y = layer_norm(x, w, b, r)
    assert torch.equal(total, x + r) and torch.equal(y, layer_norm(x + r, w, b))


@pytest.mark.parametrize("used", ["sum", "norm"])
def test_either_output_alone_may_be_used(used: str, device: torch.device) -> None:
    inputs = problem((5, 37), torch.float32, device, residual=True)

    def half(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *t: op(*t)[0 if used == "sum" else 1]

    wrt = [0, 3] if used == "sum" else range(4)
    assert_no_worse_than_eager(half(layer_norm), half(layer_norm_reference), inputs, wrt=wrt)


def test_frozen_weights_cost_no_sums(launches: list[str], device: torch.device) -> None:
    """As with LoRA: only x needs a gradient, and it equals the one with trained weights."""
    inputs = problem((70, 320), torch.float32, device, residual=False)
    alone, both = run(layer_norm, inputs, [0]), run(layer_norm, inputs, [0, 1, 2])
    assert torch.equal(alone["gradient of input 0"], both["gradient of input 0"])
    forward_and_backward = ["_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"]
    assert launches == [*forward_and_backward, *forward_and_backward, "_layer_norm_sums_kernel"]


@pytest.mark.parametrize("processors", [1, 7])
@pytest.mark.parametrize("rows", [1, 63, 331])
def test_weight_gradients_whatever_the_number_of_programs(
    rows: int, processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program for all rows, or several of several rows each, the last of which has fewer."""
    monkeypatch.setattr(kernel_module, "multiprocessors", lambda device: processors)
    inputs = problem((rows, 300), torch.float32, device, residual=True)
    assert_no_worse_than_eager(layer_norm, layer_norm_reference, inputs, wrt=range(4))


def test_programs_fill_the_device_and_leave_no_row_out() -> None:
    cpu = torch.device("cpu")
    for features in (1, 300, 640, 1280, 4096):
        tile = kernel_module._bwd_tile(torch.empty(1, features))
        for rows in (0, 1, 17, 256, 2048, 8192, 32768, 100_003):
            programs, each = kernel_module._bwd_split(rows, tile, cpu)
            assert programs * each >= rows > (programs - 1) * each or rows == programs == 0
            assert each % tile["ROWS"] == 0 and programs * tile["num_warps"] <= 132 * kernel_module.WARPS_EACH
    assert kernel_module._bwd_split(8192, kernel_module._bwd_tile(torch.empty(1, 640)), cpu) == (512, 16)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", range(4))
def test_the_nonfinite_comes_through(place: int, value: float, device: torch.device) -> None:
    inputs = problem((3, 37), torch.float32, device, residual=True)
    inputs[place].view(-1)[-1] = value
    found, eager = (run(op, inputs, range(4)) for op in (layer_norm, layer_norm_reference))
    for name, wanted in eager.items():
        assert torch.equal(found[name].isfinite(), wanted.isfinite()), name


def test_repeatable_and_compilable(device: torch.device) -> None:
    inputs = problem((2, 9, 320), torch.bfloat16, device, residual=True)
    assert_bitwise_repeatable(layer_norm, inputs, wrt=range(4))
    assert_compiles(layer_norm, inputs, wrt=range(4))
    assert_compiles(layer_norm, inputs[:3], wrt=[0])


def test_operators_pass_opcheck(device: torch.device) -> None:
    x, w, b, r = problem((3, 2, 10), torch.float16, device, residual=True)
    torch.library.opcheck(_fwd_op, (x, None, w, b, 1e-5))
    torch.library.opcheck(_fwd_op, (x, r, w, b, 1e-5))
    mean, rstd = draw(3, 2, seed=8, device=device), draw(3, 2, seed=9, device=device)
    torch.library.opcheck(_bwd_op, (r, x, x, w, mean, rstd, True))
    torch.library.opcheck(_bwd_op, (r, None, x, w, mean, rstd, False))


def test_second_derivatives_are_refused(device: torch.device) -> None:
    """Autograd cannot differentiate the backward kernels; without the error second derivatives would be wrong."""
    for residual in (False, True):
        inputs = problem((3, 10), torch.float32, device, residual=residual)
        assert_second_derivatives_are_refused(layer_norm, inputs, range(len(inputs)))


def test_no_rows(device: torch.device) -> None:
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    w = torch.ones(8, device=device, requires_grad=True)
    layer_norm(x, w, torch.zeros(8, device=device)).sum().backward()
    assert w.grad is not None and (w.grad == 0).all()


def test_mistakes_are_named(device: torch.device) -> None:
    x, w = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    with pytest.raises(ValueError, match="weights"):
        layer_norm(x, w[:4], w[:4])
    with pytest.raises(ValueError, match="x and residual differ"):
        layer_norm(x, w, w, x.half())
    wide = torch.zeros(MAX_FEATURES + 1, device=device)
    with pytest.raises(ValueError, match="at most 4096"):
        layer_norm(wide[None], wide, wide)


@settings(max_examples=12)
@given(
    rows=st.lists(st.integers(1, 7), max_size=3),
    features=st.integers(1, 1300),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    mean=st.floats(-100, 100),
    scale=st.floats(1e-2, 100),
)
def test_any_shape(
    rows: list[int], features: int, dtype: torch.dtype, residual: bool, mean: float, scale: float
) -> None:
    device = "cpu" if INTERPRET else "cuda"
    inputs = problem((*rows, features), dtype, device, residual=residual, mean=mean, scale=scale)
    assert_no_worse_than_eager(layer_norm, layer_norm_reference, inputs, wrt=range(len(inputs)))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.randn(2**31 // 1280 + 3, 1280, device="cuda", dtype=torch.float16).requires_grad_()
    w, b = torch.randn(2, 1280, device="cuda", dtype=torch.float16)
    y = layer_norm(x, w, b)
    y.backward(y.detach())  # type: ignore[union-attr]
    last = x.detach()[-2:].clone().requires_grad_()
    alone = layer_norm(last, w, b)
    alone.backward(alone.detach())  # type: ignore[union-attr]
    assert torch.equal(y[-2:], alone) and same_bits(x.grad[-2:], last.grad)  # type: ignore[index, arg-type]
