"""Whether each fused kernel agrees with eager code on the device at hand, before a run relies on it.

The true result is eager code in float64. A kernel may be wrong by twice as much as eager code in its own dtype, and by
one rounding more: eager code is sometimes exact by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from smpo_fast.common.runtime import rng
from smpo_fast.config.schema import KernelName

NAMES: tuple[KernelName, ...] = get_args(KernelName)
LATENT = (4, 128, 128)  # of SDXL at 1024 px
PAIRS = 2


class KernelCheck(NamedTuple):
    """How a kernel compares with eager code, at that of its results which uses up most of what it is allowed."""

    name: str
    ok: bool
    error: float
    """Largest difference from float64, relative to the largest value of that result; NaN if the kernel did not run."""
    tolerance: float
    """What ``error`` may be."""
    reason: str
    """Of a failure: the exception, or which result is wrong and by how much. Empty if ok."""


class Trial(NamedTuple):
    """A call of a kernel, and of the eager code that it replaces, with the same inputs."""

    what: str
    fused: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: Sequence[Tensor]
    differentiated: Sequence[int] = ()
    """Which of the inputs have gradients."""
    condition: float = 1.0
    """How much the results amplify a rounding of what they are computed from."""


def check_kernel(
    name: KernelName, device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int] = LATENT
) -> KernelCheck:
    """Compare a kernel with eager code, and its gradients where it has some, on random inputs in a dtype.

    latent: channels, height and width of the run's latents, which pair_loss and renoise_step work on; the others are
    tried at a width of SDXL's. An exception of the kernel, or of its compilation, is a failed check.
    """
    worst, used = KernelCheck(name, True, 0.0, 0.0, ""), -1.0
    try:
        for trial in _TRIALS[name](device, dtype, latent):
            for what, error, tolerance in _compare(trial):
                if not error <= tolerance:  # NaN included
                    reason = (
                        f"{trial.what}, {what}: off by {error:.1e} of its largest value; {tolerance:.1e} is allowed"
                    )
                    return KernelCheck(name, False, error, tolerance, reason)
                if error > used * tolerance:
                    worst, used = worst._replace(error=error, tolerance=tolerance), error / tolerance
    except Exception as failure:  # whatever a compiler or a driver can raise: eager code serves instead
        reason = f"{type(failure).__name__}: {(str(failure) or 'no message').splitlines()[0]}"
        return KernelCheck(name, False, math.nan, 0.0, reason)
    return worst


def rounding_of(dtype: torch.dtype, condition: float = 1.0) -> float:
    """What one rounding changes, relative to the value. condition: see ``Trial``; sums are computed in float32."""
    return torch.finfo(dtype).eps + (condition - 1) * torch.finfo(torch.float32).eps


def allowance(eager: Tensor, truth: Tensor, condition: float = 1.0) -> Tensor:
    """The largest error that a kernel's result may have, given eager code's result and the true one.

    eager: any shape, in the dtype of the kernel's result; truth: same shape, float64. Returns a scalar.
    """
    return 2.0 * (eager.double() - truth).abs().max() + rounding_of(eager.dtype, condition) * truth.abs().max()


def _compare(trial: Trial) -> Iterator[tuple[str, float, float]]:
    """Error and tolerance of each result of a trial, by name."""
    fused, eager = (_results(op, trial.inputs, trial.differentiated) for op in (trial.fused, trial.eager))
    truth = _results(trial.eager, [x.double() for x in trial.inputs], trial.differentiated)
    for what, wanted in truth.items():
        size = wanted.abs().max()
        size = torch.where(size == 0, 1.0, size)
        error = (fused[what].double() - wanted).abs().max() / size
        yield what, error.item(), (allowance(eager[what], wanted, trial.condition) / size).item()


def _results(op: Callable[..., Any], inputs: Sequence[Tensor], differentiated: Sequence[int]) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_(i in differentiated) for i, x in enumerate(inputs)]
    with torch.set_grad_enabled(bool(differentiated)):
        out = op(*leaves)
    out = [out] if isinstance(out, Tensor) else list(out)
    found = {f"result {i}": o.detach() for i, o in enumerate(out)}
    smooth = [o for o in out if o.requires_grad]
    if smooth:
        upstream = [_draw(f"gradient {k}", *o.shape).to(o) for k, o in enumerate(smooth)]
        grads = torch.autograd.grad(smooth, [leaves[i] for i in differentiated], upstream)
        found |= {f"gradient {i}": g for i, g in zip(differentiated, grads, strict=True)}
    return found


def _draw(purpose: str, *shape: int) -> Tensor:
    return torch.from_numpy(rng(0, f"kernel check {purpose}").standard_normal(shape, dtype=np.float32))


# --- the trials of each kernel ---------------------------------------------------------------------------------------


def _pair_loss(device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int]) -> Iterator[Trial]:
    from smpo_fast.kernels import pair_loss as kernel

    # the loser's errors are larger, so that the margin is not a small difference of large numbers
    larger = torch.tensor([1.0, 1.5]).view(1, 2, 1, 1, 1)
    prediction = (_draw("prediction", PAIRS, 2, *latent) * larger).to(device, dtype)
    target, weight = (_draw("target", PAIRS, 2, *latent).to(device), _draw("weight", PAIRS).to(device))
    errors = torch.tensor([[1.0, 1.0]] * PAIRS, device=device)

    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: op(*tensors, beta=2.0)[:3]

    inputs = [prediction, errors, target, weight]
    yield Trial("losses", call(kernel.pair_loss), call(kernel.pair_loss_reference), inputs, (0,), condition=8.0)

    def equal_networks(errors_of: Callable[..., Tensor], losses_of: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda p, t, w: losses_of(p, errors_of(p, t), t, w, beta=5000.0)[1]

    fused = equal_networks(kernel.pair_errors, kernel.pair_loss)
    eager = equal_networks(kernel.pair_errors_reference, kernel.pair_loss_reference)
    yield Trial("logits of equal networks, which are 0", fused, eager, [prediction, target, weight])


def _renoise_step(device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int]) -> Iterator[Trial]:
    from smpo_fast.kernels import renoise_step as kernel

    x_0, total, estimate, rest = (_draw(p, PAIRS, 2, *latent).to(device) for p in ("x_0", "total", "e", "rest"))
    numbers = [_draw(p, PAIRS, 1, 1, 1, 1).to(device) for p in ("signal", "start", "h", "last", "earlier")]
    estimate = estimate.to(dtype)

    def predictor(op: Callable[..., None]) -> Callable[..., Any]:
        def call(x_0: Tensor, total: Tensor, e: Tensor, rest: Tensor, signal: Tensor, start: Tensor, h: Tensor) -> Any:
            x, rest = torch.empty_like(x_0), rest.clone()
            op(x, x_0, total, signal, start, e, h, rest)
            return x, rest

        return call

    def corrector(op: Callable[..., None]) -> Callable[..., Any]:
        def call(x_0: Tensor, total: Tensor, e: Tensor, rest: Tensor, *c: Tensor) -> Any:
            x, total = torch.empty_like(x_0), total.clone()
            op(x, x_0, total, c[0], c[1], e, c[2], rest, (c[3], c[4]))
            return x, total

        return call

    inputs = [x_0, total, estimate, rest, *numbers]
    yield Trial("predictor", predictor(kernel.predict_), predictor(kernel.predict_reference), inputs[:-2])
    yield Trial("corrector", corrector(kernel.correct_), corrector(kernel.correct_reference), inputs)


def _group_norm_silu(device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int]) -> Iterator[Trial]:
    from smpo_fast.kernels import group_norm_silu as kernel

    x, weight, bias = _norm_inputs(device, dtype, (2, 320, 8, 8), 320)
    inputs = [x, weight, bias]

    def call(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: op(*tensors, num_groups=32)

    fused, eager = call(kernel.group_norm_silu), call(kernel.group_norm_silu_reference)
    for what, form in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
        yield Trial(what, fused, eager, [x.contiguous(memory_format=form), weight, bias], range(len(inputs)))


def _layer_norm(device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int]) -> Iterator[Trial]:
    from smpo_fast.kernels import layer_norm as kernel

    inputs = _norm_inputs(device, dtype, (16, 640), 640)
    yield Trial("norm", kernel.layer_norm, kernel.layer_norm_reference, inputs, range(3))
    inputs.append(_draw("residual", 16, 640).to(device, dtype))
    yield Trial("addition and norm", kernel.layer_norm, kernel.layer_norm_reference, inputs, range(4))


def _norm_inputs(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], width: int) -> list[Tensor]:
    """x, weight and bias."""
    x, weight, bias = _draw("x", *shape) + 1, _draw("weight", width) + 1, _draw("bias", width)
    return [tensor.to(device, dtype) for tensor in (x, weight, bias)]


def _geglu(device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int]) -> Iterator[Trial]:
    from smpo_fast.kernels import geglu as kernel

    x = _draw("x", 16, 2 * 2560).to(device, dtype)
    yield Trial("GEGLU", kernel.geglu, kernel.geglu_reference, [x], (0,))


def _geglu_linear(device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int]) -> Iterator[Trial]:
    from smpo_fast.kernels import geglu_linear as kernel

    x, weight, bias = _draw("x", 128, 640), _draw("weight", 2 * 256, 640) / 640**0.5, _draw("bias", 2 * 256)
    inputs = [tensor.to(device, dtype) for tensor in (x, weight, bias)]
    yield Trial("projection and GEGLU", kernel.geglu_linear, kernel.geglu_linear_reference, inputs)


_TRIALS: dict[KernelName, Callable[[torch.device, torch.dtype, tuple[int, int, int]], Iterator[Trial]]] = {
    "pair_loss": _pair_loss,
    "renoise_step": _renoise_step,
    "group_norm_silu": _group_norm_silu,
    "layer_norm": _layer_norm,
    "geglu": _geglu,
    "geglu_linear": _geglu_linear,
}
