"""geglu: errors against fp64, the exact GELU, edge values, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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

from smpo_fast.kernels._launch import INTERPRET
from smpo_fast.kernels.geglu import _bwd_op, _fwd_op, geglu, geglu_reference

# [..., 2F]; SDXL's feed-forward is 4 x 640 and 4 x 1280 wide, SD1.5's 4 x 320
SHAPES = [(2, 3, 2 * 1280), (1, 2 * 2560), (2, 2 * 5120), (7, 2), (3, 5, 2 * 37), (1, 1, 2 * 1025), (2, 2, 2, 6)]
if not INTERPRET:
    SHAPES += [(2, 4096, 5120), (2, 1024, 10240), (16, 1024, 10240)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_no_worse_than_eager(geglu, geglu_reference, [draw(*shape, seed=0, dtype=dtype, device=device)], wrt=[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 10.0, 250.0])
def test_small_and_large_values(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    x = (draw(4, 5, 94, seed=1, device=device) * scale).to(dtype)
    assert_no_worse_than_eager(geglu, geglu_reference, [x], wrt=[0])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_layouts(layout: str, device: torch.device) -> None:
    x = draw(6, 10, 12, seed=2, device=device)
    x = {"transposed": x.transpose(0, 2), "sliced": x[::2, :, ::3], "expanded": x[:, :1].expand(6, 10, 12)}[layout]
    assert_no_worse_than_eager(geglu, geglu_reference, [x], wrt=[0])


def test_is_the_exact_gelu_and_takes_the_value_first(device: torch.device) -> None:
    x = draw(64, 40, seed=3, device=device)
    value, gate = x.chunk(2, dim=-1)
    assert torch.allclose(geglu(x), value * F.gelu(gate), atol=1e-6)
    assert (geglu(x) - value * F.gelu(gate, approximate="tanh")).abs().max() > 1e-4


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [3, 40])
def test_the_nonfinite_comes_through(place: int, value: float, device: torch.device) -> None:
    x = draw(3, 74, seed=4, device=device)
    x[1, place] = value
    found, eager = run(geglu, [x], [0]), run(geglu_reference, [x], [0])
    for name, wanted in eager.items():
        assert torch.equal(found[name].isfinite(), wanted.isfinite()), name
        assert torch.equal(found[name].isnan(), wanted.isnan()), name


def test_repeatable_and_compilable(device: torch.device) -> None:
    x = draw(2, 9, 2 * 320, seed=5, dtype=torch.bfloat16, device=device)
    assert_bitwise_repeatable(geglu, [x], wrt=[0])
    assert_compiles(geglu, [x], wrt=[0])


def test_operators_pass_opcheck(device: torch.device) -> None:
    x, grad = draw(3, 2, 10, seed=6, device=device), draw(3, 2, 5, seed=7, device=device)
    torch.library.opcheck(_fwd_op, (x,))
    torch.library.opcheck(_fwd_op, (x.transpose(0, 1),))
    torch.library.opcheck(_bwd_op, (grad, x))


def test_one_launch_each_and_nothing_kept_but_the_input(launches: list[str], device: torch.device) -> None:
    x = draw(2, 3, 2 * 1280, seed=8, device=device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = geglu(x)
    y.sum().backward()
    assert launches == ["_geglu_fwd_kernel", "_geglu_bwd_kernel"]
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_second_derivatives_are_refused(device: torch.device) -> None:
    """Autograd cannot differentiate the backward kernels; without the error second derivatives would be wrong."""
    assert_second_derivatives_are_refused(geglu, [draw(3, 10, seed=0, device=device)], [0])


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)])
def test_nothing(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    geglu(x).sum().backward()
    assert geglu(x).shape == (shape[0], shape[1] // 2) and x.grad is not None


def test_mistakes_are_named(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"halves the last dimension, which must be even; found \(2, 3\)"):
        geglu(torch.zeros(2, 3, device=device))


@settings(max_examples=12)
@given(
    rows=st.lists(st.integers(1, 7), max_size=3),
    features=st.integers(1, 1100),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(1e-3, 100),
)
def test_any_shape(rows: list[int], features: int, dtype: torch.dtype, scale: float) -> None:
    x = (draw(*rows, 2 * features, seed=features) * scale).to("cpu" if INTERPRET else "cuda", dtype)
    assert_no_worse_than_eager(geglu, geglu_reference, [x], wrt=[0])


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    x = torch.randn(2**31 // 10240 + 3, 10240, device="cuda", dtype=torch.float16).requires_grad_()
    y = geglu(x)
    y.backward(torch.ones_like(y))
    last = x.detach()[-2:].clone().requires_grad_()
    geglu(last).backward(torch.ones_like(y[-2:]))
    assert torch.equal(y[-2:], geglu(last)) and same_bits(x.grad[-2:], last.grad)  # type: ignore[index, arg-type]
