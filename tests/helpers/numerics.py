"""Accuracy checks: errors against eager PyTorch in fp64, compared with the errors of eager code in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from smpo_fast.models.kernel_checks import rounding_of

Op = Callable[..., Any]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def slow_unless(keep: Callable[..., bool], *values: Iterable[Any]) -> list[Any]:
    """All combinations for parametrize; those that ``keep`` does not select are marked slow."""
    cases = []
    for case in product(*values):
        name = "-".join(str(value) for value in case)
        cases.append(pytest.param(*case, id=name, marks=() if keep(*case) else pytest.mark.slow))
    return cases


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """Standard normals, the same in every dtype up to rounding."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [r for r in result if isinstance(r, Tensor)]


def run(op: Op, inputs: Sequence[Tensor | None], wrt: Sequence[int], upstream: int = 99) -> dict[str, Tensor]:
    """Outputs and gradients by name; the upstream gradients are random, and the same for every run."""
    leaves = [x if x is None else x.detach() for x in inputs]
    for i in wrt:
        leaves[i] = leaves[i].requires_grad_()  # type: ignore[union-attr]
    out = outputs(op(*leaves))
    found = {f"output {i}": o.detach() for i, o in enumerate(out)}
    smooth = [o for o in out if o.requires_grad]
    if wrt:
        g = [draw(*o.shape, seed=upstream + k, dtype=o.dtype, device=o.device) for k, o in enumerate(smooth)]
        grads = torch.autograd.grad(smooth, [leaves[i] for i in wrt], g)  # type: ignore[misc]
        found |= {f"gradient of input {i}": g for i, g in zip(wrt, grads, strict=True)}
    return found


def upcast(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def assert_no_worse_than_eager(
    op: Op,
    reference: Op,
    inputs: Sequence[Tensor | None],
    wrt: Sequence[int] = (),
    factor: float = 2.0,
    condition: dict[str, float] | None = None,
) -> None:
    """error(op) <= factor * error(reference in the same dtype) + one rounding, max and RMS, of everything.

    condition: for outputs that are differences of larger numbers, by how much they amplify a rounding of those numbers
    (a condition number); for a single number eager code may be accurate by luck.
    """
    condition = condition or {}
    kept = [None if x is None else x.clone() for x in inputs]
    truth = run(reference, [upcast(x) for x in inputs], wrt)
    found, eager = run(op, inputs, wrt), run(reference, inputs, wrt)
    for x, y in zip(inputs, kept, strict=True):
        assert x is None or torch.equal(x, y.to(x)) or (x.isnan() & y.isnan()).any(), "an input was changed"
    assert found.keys() == eager.keys() == truth.keys()
    for name, want in truth.items():
        assert found[name].dtype == eager[name].dtype and found[name].shape == eager[name].shape, name
        assert_close(name, found[name], eager[name], want, factor, condition.get(name, 1.0))


def assert_close(
    name: str, found: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0, condition: float = 1.0
) -> None:
    """The rule of ``assert_no_worse_than_eager`` for one tensor."""
    if truth.numel() == 0:
        return
    assert found.isfinite().all() or not eager.isfinite().all(), f"{name}: not finite"
    rounding = rounding_of(found.dtype, condition)
    mine, theirs = ((x.double() - truth).abs() for x in (found, eager))
    worst = int(mine.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    largest = factor * theirs.max() + rounding * truth.abs().max()
    assert mine.max() <= largest, (
        f"{name}: error {mine.max():.3e} at {where}: found {found.flatten()[worst]:.9g}, wanted "
        f"{truth.flatten()[worst]:.9g}; eager's largest error is {theirs.max():.3e}"
    )
    rms, eager_rms, size = (x.square().mean().sqrt() for x in (mine, theirs, truth))
    assert rms <= factor * eager_rms + rounding * size, f"{name}: RMS error {rms:.3e}, eager's {eager_rms:.3e}"


def assert_bitwise_repeatable(op: Op, inputs: Sequence[Tensor | None], wrt: Sequence[int] = ()) -> None:
    first, second = run(op, inputs, wrt), run(op, inputs, wrt)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_compiles(op: Op, inputs: Sequence[Tensor | None], wrt: Sequence[int] = ()) -> None:
    """Compiles to one graph without breaks, forward and backward, with the same results as the plain call."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    plain, traced = run(op, inputs, wrt), run(compiled, inputs, wrt)
    for name, value in plain.items():
        assert torch.equal(value, traced[name]), name
        assert value.dtype == traced[name].dtype, name


def assert_second_derivatives_are_refused(op: Op, inputs: Sequence[Tensor], wrt: Sequence[int]) -> None:
    leaves = [x.detach().requires_grad_(i in wrt) for i, x in enumerate(inputs)]
    out = [o for o in outputs(op(*leaves)) if o.requires_grad]
    first = torch.autograd.grad([o.square().sum() for o in out], [leaves[i] for i in wrt], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality in which NaN equals NaN."""
    return torch.equal(a.nan_to_num(nan=1.25e9), b.nan_to_num(nan=1.25e9)) and torch.equal(a.isnan(), b.isnan())
