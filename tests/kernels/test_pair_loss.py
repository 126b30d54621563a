"""pair_loss and pair_errors: errors against fp64, identical networks, independence of pairs, links, compilation."""

from __future__ import annotations

import math
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
    slow_unless,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smpo_fast.kernels import pair_loss as kernel_module
from smpo_fast.kernels._launch import INTERPRET, tickets
from smpo_fast.kernels.pair_loss import (
    LINKS,
    _bwd_op,
    _errors_op,
    _fwd_op,
    _pair_loss_bwd,
    _pair_loss_fwd,
    pair_errors,
    pair_errors_reference,
    pair_loss,
    pair_loss_reference,
)
from smpo_fast.method import objective

SHAPES = [(1, 4, 64, 64), (3, 4, 17, 13), (5, 1, 1, 1), (2, 3, 7, 2)]
if not INTERPRET:
    SHAPES += [(1, 4, 128, 128), (32, 4, 128, 128), (4, 4, 64, 64), (1, 4, 160, 96)]


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: Any, layout: str = "plain") -> Tensor:
    """[B, 2, C, H, W] in the given layout."""
    b, c, h, w = shape
    x = draw(b, 2, c, h, w, seed=seed, dtype=dtype, device=device)
    if layout == "channels_last":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "sliced":
        return x.repeat_interleave(2, dim=0).repeat_interleave(2, dim=4)[::2, :, :, :, ::2]
    return x


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: Any, *, given_errors: bool,
    layouts: tuple[str, str, str] = ("plain", "plain", "plain"),
) -> tuple[list[Tensor], Callable[..., Callable[..., Any]]]:  # fmt: skip
    """Inputs, and a function that turns pair_loss or its reference into an op of these inputs."""
    policy, target = (
        images(shape, 0, dtype, device, layouts[0]),
        images(shape, 1, torch.float32, device, layouts[2]),
    )
    # the reference is close to the policy, as in training: the margin is a difference of nearly equal numbers
    reference = (policy.float() + 0.01 * images(shape, 2, torch.float32, device, layouts[1])).to(dtype)
    if given_errors:
        reference = pair_errors_reference(reference, target)
    weight = draw(shape[0], seed=3, device=device)
    inputs = [policy, reference, target, weight]

    def make(op: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *tensors: op(*tensors, **{"beta": 20.0, **options})

    return inputs, make


def conditions(make: Callable[..., Any], inputs: list[Tensor], **options: Any) -> dict[str, float]:
    """Condition numbers: the loss depends on a difference of nearly equal errors, which amplifies their rounding."""
    out = make(pair_loss_reference, **options)(*(x.double() for x in inputs))
    beta = options.get("beta", 20.0)
    rounding = (0.5 * beta * inputs[3].double() * torch.maximum(out.policy, out.reference).amax(1)).abs().max().item()
    loss, logit = out.loss.abs().max().item(), out.logit.abs().max().item()
    moved = rounding * max(1.0, logit / beta if options.get("link") == "ipo" else 1.0)
    return {
        "output 0": 1 + 4 * moved / max(loss, 1e-30),
        "output 1": 1 + 4 * rounding / max(logit, 1e-30),
        "gradient of input 0": 1 + 4 * rounding,
    }


def judge(make: Callable[..., Any], inputs: list[Tensor], **options: Any) -> None:
    op, reference = make(pair_loss, **options), make(pair_loss_reference, **options)
    assert_no_worse_than_eager(op, reference, inputs, wrt=[0], condition=conditions(make, inputs, **options))


@pytest.mark.parametrize("dtype", slow_unless(lambda dtype: dtype == torch.bfloat16, DTYPES))
def test_no_worse_than_eager_over_many_pairs(dtype: torch.dtype, device: torch.device) -> None:
    """With this many pairs eager code is not accurate by luck, so no condition numbers are needed."""
    inputs, make = problem((100, 4, 8, 8), dtype, device, given_errors=False)
    assert_no_worse_than_eager(make(pair_loss), make(pair_loss_reference), inputs, wrt=[0])


@pytest.mark.parametrize("given_errors", [False, True], ids=["reference", "errors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, given_errors: bool, device: torch.device
) -> None:
    inputs, make = problem(shape, dtype, device, given_errors=given_errors)
    judge(make, inputs)


@pytest.mark.parametrize("layouts", [
    ("channels_last", "channels_last", "plain"), ("plain", "channels_last", "channels_last"),
    ("channels_last", "plain", "channels_last"), ("sliced", "plain", "channels_last"), ("plain", "sliced", "sliced"),
], ids="-".join)  # fmt: skip
def test_layouts(layouts: tuple[str, str, str], device: torch.device) -> None:
    shape = (3, 4, 6, 10)
    inputs, make = problem(shape, torch.float32, device, given_errors=False, layouts=layouts)
    judge(make, inputs)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("beta", [0.1, 20.0, 5000.0])
def test_links(link: str, beta: float, device: torch.device) -> None:
    inputs, make = problem((16, 4, 5, 5), torch.float32, device, given_errors=False)
    judge(make, inputs, link=link, beta=beta)


@pytest.mark.parametrize("weight", [-1000.0, -60.0, -1.0, 0.0, 1e-6, 3.0, 30.0, 60.0, 1000.0])
def test_each_loss_alone_far_out(weight: float, device: torch.device) -> None:
    """One pair per batch, so that small losses are compared relative to themselves and not to larger ones."""
    policy, reference, target = (images((1, 4, 4, 4), s, torch.float32, device) for s in (0, 1, 2))
    out = pair_loss(policy, reference, target, torch.tensor([weight], device=device), beta=2.0)
    truth = pair_loss_reference(
        policy.double(), reference.double(), target.double(), torch.tensor([weight], device=device).double(), beta=2.0
    )
    # the errors are fp32: this is how much their rounding changes the exponential of the logit
    slack = 1e-6 * (1 + truth.logit.abs().item()) * max(1.0, abs(weight))
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=slack, abs=1e-37)


@pytest.mark.parametrize("name", ["smpo", "dpo"])
def test_is_the_objective(name: str, device: torch.device) -> None:
    """The same numbers as smpo_fast.objective, which training uses without kernels."""
    (policy, reference, target, weight), _ = problem((3, 4, 8, 8), torch.float32, device, given_errors=False)
    errors, frozen = objective.pair_errors(policy, target), objective.pair_errors(reference, target)
    used = objective.OBJECTIVES[name].weigh(weight)
    out = pair_loss(policy, pair_errors(reference, target), target, used, beta=20.0)
    assert torch.allclose(out.loss, objective.OBJECTIVES[name].pair_loss(errors, frozen, used, 20.0), rtol=1e-5)
    assert torch.allclose(out.logit, objective.logit(errors, frozen, used, 20.0), rtol=1e-4, atol=1e-6)
    assert torch.allclose(out.policy, errors) and torch.allclose(out.reference, frozen)


@pytest.mark.parametrize("given_errors", [False, True], ids=["reference", "errors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_networks_give_logit_zero_and_log_two(
    dtype: torch.dtype, given_errors: bool, device: torch.device
) -> None:
    inputs, _ = problem((3, 4, 33, 31), dtype, device, given_errors=False)
    policy, _, target, weight = inputs
    reference = pair_errors(policy.clone(), target) if given_errors else policy.clone()
    out = pair_loss(policy, reference, target, 10 * weight, beta=5000.0)
    assert (out.logit == 0).all() and torch.equal(out.policy, out.reference)
    assert torch.equal(out.loss, torch.full_like(out.loss, math.log(2)))


def test_a_pair_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    inputs, make = problem((5, 4, 29, 31), torch.float16, device, given_errors=False)
    op = make(pair_loss)
    upstream = draw(5, seed=9, device=device)

    def values(rows: slice, spoil: bool = False) -> list[Tensor]:
        parts = [x[rows].clone() for x in inputs]
        if spoil:
            parts[0][1:] = float("nan")
        parts[0].requires_grad_()
        out = op(*parts)
        return [*out, *torch.autograd.grad(out.loss, parts[0], upstream[rows])]

    whole = values(slice(0, 5))
    for i in range(5):
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, values(slice(i, i + 1)), strict=True))
    assert all(torch.equal(a[:1], b[:1]) for a, b in zip(whole, values(slice(0, 5), spoil=True), strict=True))


def test_swapping_the_pair_and_the_sign_changes_nothing(device: torch.device) -> None:
    (policy, reference, target, weight), _ = problem((4, 4, 9, 9), torch.float32, device, given_errors=False)
    a = pair_loss(policy, reference, target, weight, beta=20.0)
    b = pair_loss(policy.flip(1), reference.flip(1), target.flip(1), -weight, beta=20.0)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logit, b.logit)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("link", LINKS)
def test_the_nonfinite_comes_through(link: str, place: int, value: float, device: torch.device) -> None:
    inputs, make = problem((3, 4, 5, 7), torch.float32, device, given_errors=False)
    inputs[place].view(3, -1)[1, -1] = value
    found, eager = (run(make(op, link=link), inputs, [0]) for op in (pair_loss, pair_loss_reference))
    for name, wanted in eager.items():
        assert torch.equal(found[name].isfinite(), wanted.isfinite()), name
        assert torch.equal(found[name].isnan(), wanted.isnan()), name


@pytest.mark.parametrize("scale", [1e-30, 300.0, 6e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_small_values(dtype: torch.dtype, scale: float, device: torch.device) -> None:
    """300 squared is more than fp16 holds."""
    inputs, make = problem((2, 4, 8, 8), dtype, device, given_errors=False)
    inputs = [(x * min(scale, 6e4 / x.abs().max().item())).to(x.dtype) for x in inputs[:3]] + inputs[3:]
    judge(make, inputs, beta=1e-9)


def test_repeatable_and_compilable(device: torch.device) -> None:
    inputs, make = problem((2, 4, 40, 40), torch.bfloat16, device, given_errors=False)
    assert_bitwise_repeatable(make(pair_loss), inputs, wrt=[0])
    assert_compiles(make(pair_loss), inputs, wrt=[0])


def test_operators_pass_opcheck(device: torch.device) -> None:
    inputs, _ = problem((2, 4, 6, 6), torch.float16, device, given_errors=False)
    policy, reference, target, weight = inputs
    torch.library.opcheck(_fwd_op, (policy, reference, target, weight, 2.0, 0))
    torch.library.opcheck(_fwd_op, (policy, pair_errors(reference, target), target, weight, 2.0, 0))
    torch.library.opcheck(_errors_op, (policy, target))
    last = policy.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    torch.library.opcheck(_bwd_op, (weight, weight, last, target))


@pytest.mark.parametrize("given_errors", [False, True], ids=["reference", "errors"])
def test_one_launch_forward_and_one_backward(given_errors: bool, launches: list[str], device: torch.device) -> None:
    for pairs in (1, 7):
        inputs, make = problem((pairs, 4, 48, 48), torch.float16, device, given_errors=given_errors)
        launches.clear()
        loss = make(pair_loss)(inputs[0].requires_grad_(), *inputs[1:]).loss
        loss.sum().backward()
        assert launches == ["_pair_loss_kernel", "_pair_loss_bwd_kernel"]
        launches.clear()
        pair_errors(inputs[0], inputs[2])
        assert launches == ["_pair_loss_kernel"]


class Operations(TorchDispatchMode):
    """Records PyTorch's operations, except for allocations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name not in ("empty", "empty_like", "empty_strided", "detach", "alias", "permute"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given_errors", [False, True], ids=["reference", "errors"])
@pytest.mark.parametrize("pairs", [1, 7])
def test_nothing_is_copied_cast_or_zeroed_beside_the_launches(
    pairs: int, given_errors: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, _ = problem((pairs, 4, 48, 48), torch.float16, device, given_errors=given_errors)
    policy, reference, target, weight = inputs
    monkeypatch.undo()  # removes the fixture that fills new memory with NaN, an operation too
    monkeypatch.setattr(kernel_module, "launch", lambda *_, **__: None)
    tickets(pairs, device)  # they are allocated in the first call on a stream
    with Operations() as seen:
        _pair_loss_fwd(policy, reference, target, weight, 20.0, 0)
        _pair_loss_bwd(weight, weight, policy, target)
    # on a CPU tickets are allocated in every call
    assert seen.names == (["zeros"] if device.type == "cpu" else [])


def test_the_backward_pass_makes_no_zeros(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's default would be a memset for each output without a gradient."""
    inputs, make = problem((2, 4, 8, 8), torch.float16, device, given_errors=False)
    out, upstream = make(pair_loss)(inputs[0].requires_grad_(), *inputs[1:]), torch.ones(2, device=device)
    monkeypatch.undo()
    monkeypatch.setattr(kernel_module, "launch", lambda *_, **__: None)
    with Operations() as seen:
        torch.autograd.grad(out.loss, inputs[0], upstream)
    assert [name for name in seen.names if "zero" in name] == []


@pytest.mark.skipif(not INTERPRET, reason="a GPU runs programs in an order of its own")
@pytest.mark.parametrize("order", ["backwards", "shuffled", "losers first"])
def test_the_order_of_arrival_changes_no_bit(order: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program arrives last finds all the others' sums, and the tickets are reset."""
    from triton.runtime.interpreter import interpreter_builder

    pairs, pieces = 3, 5
    inputs, make = problem((pairs, 4, 48, 50), torch.float16, device, given_errors=False)
    assert -(-4 * 48 * 50 // 2048) == pieces
    op, shared = make(pair_loss), torch.zeros(pairs, dtype=torch.int32)
    wanted = [*op(*inputs), pair_errors(inputs[0], inputs[2])]
    count = 2 * pairs * pieces
    places = {
        "backwards": list(range(count))[::-1],
        "shuffled": torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist(),
        "losers first": sorted(range(count), key=lambda i: (-(i // pieces % 2), i)),
    }[order]
    stock = interpreter_builder.set_grid_idx
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: stock(places[x], y, z))
    monkeypatch.setattr(kernel_module, "tickets", lambda count, device: shared)
    for _ in range(2):
        found = [*op(*inputs), pair_errors(inputs[0], inputs[2])]
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
        assert (shared == 0).all()


@pytest.mark.gpu
def test_calls_on_streams_and_in_graphs_do_not_share_tickets() -> None:
    inputs, make = problem((4, 4, 128, 128), torch.float16, "cuda", given_errors=False)
    op, streams = make(pair_loss), [torch.cuda.Stream() for _ in range(3)]
    wanted = op(*inputs)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, op(*inputs)))
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(op(*inputs))
        for (graph, out), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
            found.append(out)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for out in found for a, b in zip(out, wanted, strict=True))


def test_second_derivatives_are_refused(device: torch.device) -> None:
    """Autograd cannot differentiate the backward kernels; without the error second derivatives would be wrong."""
    inputs, make = problem((2, 4, 3, 3), torch.float32, device, given_errors=False)
    assert_second_derivatives_are_refused(make(pair_loss), inputs, [0])


def test_no_pairs(device: torch.device) -> None:
    x = torch.zeros(0, 2, 4, 8, 8, device=device)
    out = pair_loss(x, x, x, torch.zeros(0, device=device), beta=1.0)
    assert out.loss.shape == (0,) and out.policy.shape == (0, 2)


def test_mistakes_are_named(device: torch.device) -> None:
    x, w = torch.zeros(2, 2, 4, 8, 8, device=device), torch.zeros(2, device=device)
    with pytest.raises(ValueError, match="link = 'tanh'"):
        pair_loss(x, x, x, w, beta=1.0, link="tanh")
    with pytest.raises(ValueError, match=r"\[B, 2, C, H, W\]"):
        pair_loss(x[:, 0], x, x, w, beta=1.0)
    with pytest.raises(ValueError, match="the target has the shape"):
        pair_loss(x, x, x[:1], w, beta=1.0)
    with pytest.raises(ValueError, match="weight has the shape"):
        pair_loss(x, x, x, w[:1], beta=1.0)
    with pytest.raises(ValueError, match="reference has the shape"):
        pair_loss(x, x[:1], x, w, beta=1.0)


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 13), st.integers(1, 13)),
    dtype=st.sampled_from(DTYPES),
    link=st.sampled_from(LINKS),
    given_errors=st.booleans(),
    beta=st.floats(1e-3, 1e4),
    layouts=st.tuples(*[st.sampled_from(["plain", "channels_last", "sliced"])] * 3),
)
def test_any_shape_and_layout(
    shape: tuple[int, ...], dtype: torch.dtype, link: str, given_errors: bool, beta: float,
    layouts: tuple[str, str, str],
) -> None:  # fmt: skip
    device = "cpu" if INTERPRET else "cuda"
    inputs, make = problem(shape, dtype, device, given_errors=given_errors, layouts=layouts)
    judge(make, inputs, link=link, beta=beta)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    pairs = 2**31 // (2 * 4 * 128 * 128) + 3
    policy = torch.randn(pairs, 2, 4, 128, 128, device="cuda", dtype=torch.float16).requires_grad_()
    target = torch.randn(pairs, 2, 4, 128, 128, device="cuda", dtype=torch.float16)
    weight = torch.ones(pairs, device="cuda")
    out = pair_loss(policy, torch.zeros(pairs, 2, device="cuda"), target, weight, beta=1.0)
    out.loss.sum().backward()
    last = policy.detach()[-2:].clone().requires_grad_()
    alone = pair_loss(last, torch.zeros(2, 2, device="cuda"), target[-2:], weight[-2:], beta=1.0)
    alone.loss.sum().backward()
    assert torch.equal(out.loss[-2:], alone.loss) and same_bits(policy.grad[-2:], last.grad)  # type: ignore[index, arg-type]
