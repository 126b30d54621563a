"""renoise_step: predictor and corrector against eager code in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.numerics import DTYPES, assert_bitwise_repeatable, assert_compiles, assert_no_worse_than_eager, draw, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smpo_fast.kernels._launch import INTERPRET
from smpo_fast.kernels.renoise_step import (
    _correct_op,
    _predict_op,
    correct_,
    correct_reference,
    predict_,
    predict_reference,
)

SHAPES = [(1, 4, 33, 32), (3, 4, 17, 13), (5, 1, 1, 1)] + ([] if INTERPRET else [(1, 4, 128, 128), (64, 4, 128, 128)])
LAYOUTS = ("plain", "channels_last", "sliced")
SOLVERS = ("ddim", "last", "mean", "ab2")


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: Any, layout: str = "plain") -> Tensor:
    b, c, h, w = shape
    x = draw(b, 2, c, h, w, seed=seed, dtype=dtype, device=device)
    if layout == "channels_last":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "sliced":
        return x.repeat_interleave(2, dim=0).repeat_interleave(2, dim=3)[::2, :, :, ::2]
    return x


def numbers(count: int, seed: int, device: Any) -> Tensor:
    """Coefficients in the inversion's shape."""
    return draw(count, 1, 1, 1, 1, seed=seed, device=device)


def predictor(op: Callable[..., None], like: Tensor, *, rest: bool) -> Callable[..., Any]:
    """``op`` as a pure function: writes into copies and returns them. ``like``: the layout and dtype of x."""

    def call(x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor, *more: Tensor) -> Any:
        x = like.clone() if x_0.dtype != torch.float64 else like.double()
        if not more:
            op(x, x_0, total, signal, inverse_start)
            return x
        estimate, h, *sums = more
        kept = sums[0].clone() if rest else None
        op(x, x_0, total, signal, inverse_start, estimate, h, kept)
        return (x, kept) if rest else x

    return call


def corrector(op: Callable[..., None], like: Tensor) -> Callable[..., Any]:
    def call(x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor, estimate: Tensor, h: Tensor,
             *more: Tensor) -> Any:  # fmt: skip
        x = like.clone() if x_0.dtype != torch.float64 else like.double()
        total = total.clone()
        rest, weights = (more[0], (more[1], more[2])) if more else (None, None)
        op(x, x_0, total, signal, inverse_start, estimate, h, rest, weights)
        return total, x

    return call


def state(shape: tuple[int, ...], device: Any, layout: str = "plain") -> list[Tensor]:
    """x_0, total, signal, inverse_start."""
    packed = layout if layout != "sliced" else "plain"
    x_0 = images(shape, 0, torch.float32, device, layout)
    total = images(shape, 1, torch.float32, device, packed)
    return [x_0, total, numbers(shape[0], 2, device), numbers(shape[0], 3, device)]


def move(shape: tuple[int, ...], solver: str, dtype: torch.dtype, device: Any, layout: str = "plain") -> list[Tensor]:
    """estimate, h and, for solvers that use earlier estimates, the sum of earlier estimates and two weights."""
    inputs = [images(shape, 4, dtype, device, layout), numbers(shape[0], 5, device)]
    if solver == "ddim":
        return inputs
    ones = torch.ones(shape[0], 1, 1, 1, 1, device=device)
    ratio = numbers(shape[0], 6, device)
    weights = {"last": [ones, 0 * ones], "mean": [ones / 3, ones / 3], "ab2": [1 + ratio / 2, -ratio / 2]}[solver]
    return [*inputs, images(shape, 7, dtype, device, layout), *weights]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_corrector_no_worse_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, solver: str, device: torch.device
) -> None:
    like = images(shape, 9, dtype, device)
    inputs = state(shape, device) + move(shape, solver, dtype, device)
    assert_no_worse_than_eager(corrector(correct_, like), corrector(correct_reference, like), inputs)


@pytest.mark.parametrize("what", ["start", "estimate", "rest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predictor_no_worse_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, what: str, device: torch.device
) -> None:
    like, inputs = images(shape, 9, dtype, device), state(shape, device)
    if what != "start":
        inputs += move(shape, "ddim", dtype, device)
    if what == "rest":
        inputs.append(images(shape, 8, torch.float32, device))
    op, reference = (predictor(f, like, rest=what == "rest") for f in (predict_, predict_reference))
    assert_no_worse_than_eager(op, reference, inputs)


@pytest.mark.parametrize("of_estimate", LAYOUTS)
@pytest.mark.parametrize("of_state", LAYOUTS)
@pytest.mark.parametrize("of_x", ["plain", "channels_last"])
def test_layouts(of_x: str, of_state: str, of_estimate: str, device: torch.device) -> None:
    shape = (3, 4, 6, 10)
    like = images(shape, 9, torch.float16, device, of_x)
    inputs = state(shape, device, of_state) + move(shape, "mean", torch.float32, device, of_estimate)
    assert_no_worse_than_eager(corrector(correct_, like), corrector(correct_reference, like), inputs)
    op, reference = (predictor(f, like, rest=False) for f in (predict_, predict_reference))
    assert_no_worse_than_eager(op, reference, inputs[:6])
    assert_no_worse_than_eager(op, reference, inputs[:4])


@pytest.mark.parametrize("of_total", ["plain", "channels_last"])
def test_clean_latents_in_another_order_than_the_state(of_total: str, device: torch.device) -> None:
    shape = (2, 4, 6, 10)
    like = images(shape, 9, torch.float32, device)
    inputs = state(shape, device, of_total) + move(shape, "mean", torch.float32, device)
    inputs[0] = images(shape, 0, torch.float32, device, "plain" if of_total == "channels_last" else "channels_last")
    assert_no_worse_than_eager(corrector(correct_, like), corrector(correct_reference, like), inputs)
    op, reference = (predictor(f, like, rest=False) for f in (predict_, predict_reference))
    assert_no_worse_than_eager(op, reference, inputs[:6])


def test_a_pair_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    shape = (4, 4, 19, 23)
    inputs = state(shape, device) + move(shape, "mean", torch.float16, device)
    like = images(shape, 9, torch.float16, device)
    whole = corrector(correct_, like)(*inputs)
    for i in range(4):
        alone = corrector(correct_, like[i : i + 1])(*(x[i : i + 1] for x in inputs))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", range(9))
def test_the_nonfinite_comes_through(place: int, value: float, device: torch.device) -> None:
    shape = (2, 4, 5, 7)
    inputs = state(shape, device) + move(shape, "mean", torch.float32, device)
    inputs[place].view(2, -1)[1, -1] = value
    like = images(shape, 9, torch.float32, device)
    found, eager = (run(corrector(f, like), inputs, []) for f in (correct_, correct_reference))
    for name, wanted in eager.items():
        assert torch.equal(found[name].isnan(), wanted.isnan()), name
        assert torch.equal(found[name].isinf(), wanted.isinf()), name
        assert torch.isfinite(found[name][0]).all()


def test_repeatable_and_compilable(device: torch.device) -> None:
    shape = (2, 4, 40, 40)
    like = images(shape, 9, torch.bfloat16, device)
    inputs = state(shape, device) + move(shape, "mean", torch.bfloat16, device)
    assert_bitwise_repeatable(corrector(correct_, like), inputs)
    assert_compiles(corrector(correct_, like), inputs)
    assert_compiles(predictor(predict_, like, rest=True), [*inputs[:6], images(shape, 8, torch.float32, device)])


def test_operators_pass_opcheck(device: torch.device) -> None:
    shape = (2, 4, 6, 6)
    x_0, total, signal, inverse_start = state(shape, device)
    estimate, h, rest, last, earlier = move(shape, "mean", torch.float16, device)
    x, sums = images(shape, 9, torch.float16, device), rest.float()
    torch.library.opcheck(_predict_op, (x, x_0, total, signal, inverse_start, None, None, None))
    torch.library.opcheck(_predict_op, (x, x_0, total, signal, inverse_start, estimate, h, sums))
    arguments = (x, x_0, total, signal, inverse_start, estimate, h)
    torch.library.opcheck(_correct_op, (*arguments, None, None, None))
    torch.library.opcheck(_correct_op, (*arguments, rest, last, earlier))


def test_one_launch_each(launches: list[str], device: torch.device) -> None:
    shape = (5, 4, 64, 64)
    inputs, like = (
        state(shape, device) + move(shape, "mean", torch.float16, device),
        images(shape, 9, DTYPES[1], device),
    )
    predictor(predict_, like, rest=False)(*inputs[:6])
    corrector(correct_, like)(*inputs)
    assert launches == ["_predict_kernel", "_correct_kernel"]


def test_no_pairs(device: torch.device) -> None:
    x, c = torch.zeros(0, 2, 4, 8, 8, device=device), torch.zeros(0, device=device)
    correct_(x, x.clone(), x.clone(), c, c, x.clone(), c)


def test_mistakes_are_named(device: torch.device) -> None:
    x = torch.zeros(2, 2, 4, 8, 8, device=device)
    c = torch.zeros(2, device=device)
    with pytest.raises(ValueError, match="differ in shape"):
        predict_(x, x[:1], x, c, c)
    with pytest.raises(ValueError, match="one number per pair"):
        predict_(x, x, x, c[:1], c)
    with pytest.raises(ValueError, match="fp32"):
        predict_(x, x, x.half(), c, c)
    with pytest.raises(ValueError, match="rest, the running sum of estimates, is fp32; found torch.float16"):
        predict_(x, x, x, c, c, x, c, x.half())
    with pytest.raises(ValueError, match="needs its h"):
        predict_(x, x, x, c, c, x)
    with pytest.raises(ValueError, match="needs its weights"):
        correct_(x, x, x, c, c, x, c, x)
    with pytest.raises(ValueError, match="no gaps"):
        predict_(x[:, :, :, ::2], x[:, :, :, ::2], x[:, :, :, ::2], c, c)


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 13)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    solver=st.sampled_from(SOLVERS),
    layouts=st.tuples(st.sampled_from(LAYOUTS[:2]), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_any_shape_and_layout(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], solver: str, layouts: tuple[str, str, str]
) -> None:
    device = "cpu" if INTERPRET else "cuda"
    like = images(shape, 9, dtypes[0], device, layouts[0])
    inputs = state(shape, device, layouts[1]) + move(shape, solver, dtypes[1], device, layouts[2])
    assert_no_worse_than_eager(corrector(correct_, like), corrector(correct_reference, like), inputs)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    pairs = 2**31 // (2 * 4 * 128 * 128) + 3
    x = torch.empty(pairs, 2, 4, 128, 128, device="cuda", dtype=torch.float16)
    estimate, x_0 = torch.randn_like(x), torch.randn(x.shape, device="cuda")
    total, c = torch.zeros_like(x_0), torch.rand(pairs, device="cuda")
    correct_(x, x_0, total, c, c, estimate, c)
    alone = (x[-2:].clone(), x_0[-2:].clone(), torch.zeros_like(x_0[-2:]))
    correct_(*alone, c[-2:], c[-2:], estimate[-2:].clone(), c[-2:])
    assert torch.equal(x[-2:], alone[0]) and torch.equal(total[-2:], alone[2])
