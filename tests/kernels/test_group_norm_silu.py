"""group_norm_silu in both memory orders: errors against fp64, hard statistics, layouts kept, launches counted."""

from __future__ import annotations

from functools import partial
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
    slow_unless,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from smpo_fast.kernels._launch import INTERPRET
from smpo_fast.kernels.group_norm_silu import _bwd_op, _fwd_op, group_norm_silu, group_norm_silu_reference

# N, C, H, W, groups; SDXL's widths with few groups, because the interpreter is slow per group
SHAPES = [(2, 320, 3, 5, 2), (1, 640, 2, 2, 4), (1, 1280, 2, 3, 4), (3, 6, 7, 11, 3), (1, 3, 1, 1, 1),
          (2, 6, 1, 1, 2), (1, 7, 13, 17, 7), (1, 10, 37, 29, 1)]  # fmt: skip
if not INTERPRET:
    SHAPES += [(2, 320, 128, 128, 32), (2, 640, 64, 64, 32), (8, 1280, 32, 32, 32), (2, 960, 128, 128, 32),
               (2, 2560, 32, 32, 32), (2, 320, 64, 64, 32)]  # fmt: skip
LAYOUTS = ("contiguous", "channels_last")


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = x.repeat_interleave(2, dim=1).contiguous(memory_format=torch.channels_last)
        return wide[:, ::2]
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else x


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: Any, layout: str = "contiguous", *, mean: float = 0.0,
    scale: float = 1.0, of_weights: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    x = arrange((draw(*shape[:4], seed=0, device=device) * scale + mean).to(dtype), layout)
    w, b = ((1 + draw(shape[1], seed=s, device=device)).to(of_weights or dtype) for s in (1, 2))
    return [x, w, b]


def judge(inputs: list[Tensor], groups: int, silu: bool = True, eps: float = 1e-5) -> None:
    op, reference = (
        partial(f, num_groups=groups, silu=silu, eps=eps) for f in (group_norm_silu, group_norm_silu_reference)
    )
    assert_no_worse_than_eager(op, reference, inputs, wrt=[0, 1, 2])


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    slow_unless(lambda shape, dtype, _: dtype == torch.float32 or shape in SHAPES[3:6], SHAPES, DTYPES, LAYOUTS),
)
def test_no_worse_than_eager(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> None:
    judge(problem(shape, dtype, device, layout), shape[4])


@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced", "transposed"])
@pytest.mark.parametrize("silu", [False, True], ids=["norm", "norm+silu"])
def test_layouts(layout: str, silu: bool, device: torch.device) -> None:
    judge(problem((2, 12, 5, 9), torch.float32, device, layout), 3, silu)


@pytest.mark.parametrize("shape", [(2, 12, 7), (2, 12, 3, 5, 2)], ids=str)
def test_other_numbers_of_dimensions(shape: tuple[int, ...], device: torch.device) -> None:
    x, (w, b) = draw(*shape, seed=0, device=device), draw(2, 12, seed=1, device=device)
    judge([x, w, b], 3)


@pytest.mark.parametrize(
    ("mean_scale", "dtype", "layout"),
    slow_unless(
        lambda _, dtype, layout: dtype == torch.float32 or layout == "channels_last",
        [(1000.0, 1.0), (-30.0, 1e-3), (0.0, 300.0), (0.0, 1e-4)], DTYPES, LAYOUTS,
    ),
)  # fmt: skip
def test_hard_statistics(
    mean_scale: tuple[float, float], dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    """A mean far above the deviation, and squares beyond fp16."""
    mean, scale = mean_scale
    judge(problem((1, 6, 20, 31), dtype, device, layout, mean=mean, scale=scale), 2)


def test_channels_of_very_different_means(device: torch.device) -> None:
    """Tile statistics are combined from means and deviations, not from sums of squares."""
    x, w, b = problem((1, 8, 30, 30), torch.float32, device, "channels_last")
    judge([x + torch.arange(8, device=device)[:, None, None] * 1e4, w, b], 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1, -3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_image_gives_the_bias_exactly(
    value: float, dtype: torch.dtype, layout: str, device: torch.device
) -> None:
    _, w, b = problem((1, 6, 1, 1), dtype, device)
    x = arrange(torch.full((2, 6, 23, 9), value, dtype=dtype, device=device), layout)
    y = group_norm_silu(x, w, b, num_groups=2, silu=False)
    assert torch.equal(y, b[None, :, None, None].expand(2, 6, 23, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_activations_with_fp32_weights(dtype: torch.dtype, device: torch.device) -> None:
    """As under autocast."""
    judge(problem((2, 6, 9, 9), dtype, device, "channels_last", of_weights=torch.float32), 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_memory_order_of_the_input(layout: str, device: torch.device) -> None:
    x, w, b = problem((2, 6, 4, 5), torch.float16, device, layout)
    y = group_norm_silu(x.requires_grad_(), w, b, num_groups=2)
    y.backward(y.detach().contiguous())  # a gradient in the other memory order
    assert x.grad is not None and y.stride() == x.stride() == x.grad.stride()


@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_gradients_in_any_order(of_x: str, of_gradient: str, device: torch.device) -> None:
    x, w, b = problem((2, 6, 4, 5), torch.float32, device, of_x)
    g = arrange(draw(2, 6, 4, 5, seed=5, device=device), of_gradient)
    found, wanted = (
        torch.autograd.grad(f(x.requires_grad_(), w, b, num_groups=2), x, g)[0]
        for f in (group_norm_silu, group_norm_silu_reference)
    )
    assert torch.allclose(found, wanted, atol=2e-6)


def test_a_image_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    x, w, b = problem((3, 6, 19, 23), torch.float16, device, "channels_last")
    whole = group_norm_silu(x, w, b, num_groups=2)
    assert all(torch.equal(whole[i : i + 1], group_norm_silu(x[i : i + 1], w, b, num_groups=2)) for i in range(3))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", range(3))
def test_the_nonfinite_comes_through(place: int, value: float, device: torch.device) -> None:
    inputs = problem((2, 6, 4, 5), torch.float32, device)
    inputs[place].view(-1)[-1] = value
    found, eager = (
        run(partial(f, num_groups=2), inputs, range(3)) for f in (group_norm_silu, group_norm_silu_reference)
    )
    for name, wanted in eager.items():
        assert torch.equal(found[name].isfinite(), wanted.isfinite()), name


def test_repeatable_and_compilable(device: torch.device) -> None:
    for layout in LAYOUTS:
        inputs = problem((2, 6, 9, 7), torch.bfloat16, device, layout)
        assert_bitwise_repeatable(partial(group_norm_silu, num_groups=3), inputs, wrt=range(3))
        assert_compiles(partial(group_norm_silu, num_groups=3), inputs, wrt=range(3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_pass_opcheck(layout: str, device: torch.device) -> None:
    x, w, b = problem((2, 6, 3, 4), torch.float16, device, layout)
    torch.library.opcheck(_fwd_op, (x, w, b, 3, 1e-5, True))
    mean, rstd = draw(2, 3, seed=8, device=device), draw(2, 3, seed=9, device=device)
    torch.library.opcheck(_bwd_op, (x, x, w, b, mean, rstd, 3, True))


def test_launches_and_programs(launches: list[str], device: torch.device) -> None:
    x, w, b = problem((2, 6, 8, 8), torch.float16, device)
    group_norm_silu(x.requires_grad_(), w, b, num_groups=2).sum().backward()
    assert launches == ["_statistics_kernel", "_groups_kernel", "_apply_kernel", "_bwd_sums_kernel",
                        "_bwd_groups_kernel", "_bwd_apply_kernel"]  # fmt: skip


def test_second_derivatives_are_refused(device: torch.device) -> None:
    """Autograd cannot differentiate the backward kernels; without the error second derivatives would be wrong."""
    inputs = problem((2, 6, 3, 4), torch.float32, device)
    assert_second_derivatives_are_refused(partial(group_norm_silu, num_groups=3), inputs, range(3))


def test_no_images(device: torch.device) -> None:
    x = torch.zeros(0, 8, 2, 2, device=device, requires_grad=True)
    w = torch.ones(8, device=device, requires_grad=True)
    group_norm_silu(x, w, torch.zeros(8, device=device), num_groups=2).sum().backward()
    assert w.grad is not None and (w.grad == 0).all()


def test_mistakes_are_named(device: torch.device) -> None:
    x, w = torch.zeros(2, 8, 4, 4, device=device), torch.zeros(8, device=device)
    with pytest.raises(ValueError, match="3 groups for a tensor"):
        group_norm_silu(x, w, w, num_groups=3)
    with pytest.raises(ValueError, match="num_groups is at least 1; found 0"):
        group_norm_silu(x, w, w, num_groups=0)
    with pytest.raises(ValueError, match="8 channels"):
        group_norm_silu(x, w[:4], w[:4], num_groups=2)


@settings(max_examples=12)
@given(
    images=st.integers(1, 2), groups=st.integers(1, 4), size=st.integers(1, 23), height=st.integers(1, 20),
    width=st.integers(1, 20), dtype=st.sampled_from(DTYPES), layout=st.sampled_from([*LAYOUTS, "sliced", "transposed"]),
    silu=st.booleans(), mean=st.floats(-50, 50), scale=st.floats(1e-2, 100),
)  # fmt: skip
def test_any_shape(
    images: int, groups: int, size: int, height: int, width: int, dtype: torch.dtype, layout: str, silu: bool,
    mean: float, scale: float,
) -> None:  # fmt: skip
    assume(
        size * height * width > 2
    )  # with two numbers the gradient is only rounding error; with one there is no variance
    device = "cpu" if INTERPRET else "cuda"
    shape = (images, groups * size, height, width)
    judge(problem(shape, dtype, device, layout, mean=mean, scale=scale), groups, silu)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    images = 2**31 // (320 * 128 * 128) + 3
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(images, 320, 128, 128, device="cuda", dtype=torch.float16, memory_format=form).normal_()
    w, b = torch.randn(2, 320, device="cuda", dtype=torch.float16)
    y = group_norm_silu(x.requires_grad_(), w, b, num_groups=32)
    y.backward(y.detach())
    last = x.detach()[-2:].clone(memory_format=form).requires_grad_()
    alone = group_norm_silu(last, w, b, num_groups=32)
    alone.backward(alone.detach())
    assert torch.equal(y[-2:], alone) and same_bits(x.grad[-2:], last.grad)  # type: ignore[index, arg-type]
