"""renoise_step: predictor and corrector of an inversion step for a batch of pairs that may be at different timesteps.

ReNoise inversion: Garibi et al., ECCV 2024, arXiv 2403.14602. An image's state is the fp32 sum ``S`` of
(sigma step) * eps, from which the latent at a noise level with signal coefficient ``s`` (sqrt of alpha_bar) is
``x = s (x_0 i + S)``, i = 1 / (signal at the start). With coefficients of its own for each pair::

    predictor    x       = s (x_0 i + S + h e)              the network's next input; without e: the input at S
                 rest'   = rest + e                         the running sum of estimates, if one is kept
    corrector    S'      = S + h (a e + b rest)             the step itself
                 x       = s (x_0 i + S')                   the network's input at the next step

``e`` is the latest noise estimate, ``rest`` the sum of earlier ones. The weights (a, b) determine the solver:

    ddim                          (1, -)        renoise, last of K + 1      (1, 0)
    renoise, mean of K + 1        (1/(K+1), 1/(K+1))                        heun, pec          (1/2, 1/2)
    ab2, extrapolated by a share s: (1 + s, -s), rest = the previous step's estimate

Shapes and dtypes: x_0 [B, 2, C, H, W] any float; S fp32; e any float; rest fp32 for the predictor, which adds to it,
any float for the corrector, which only reads it; coefficients fp32, B elements in any shape; x keeps its dtype and
layout. Each tensor may be contiguous or channels-last, independently of the others. No gradients are computed.
Arithmetic is fp32 in the order of the formulas above; S is never rounded to half precision.

Bytes per element with half-precision estimates and x: predictor 12 (reads x_0, S, e; writes x), corrector 18 (reads
x_0, S, e, rest; writes S, x), i.e. 0.79 MB and 1.2 MB per SDXL image. One launch each for any batch size.

Status: not measured on a GPU. Predicted to be under 0.3 % of a step even in eager code. It is worth having because an
inversion step between two network calls becomes one launch without host arithmetic, which fits into a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smpo_fast.kernels._launch import (
    cdiv,
    channels_last,
    check,
    is_packed,
    launch,
    on_kernel,
    operator,
    packed,
    packed_like,
)
from smpo_fast.kernels._triton import tl, triton

BLOCK = 1024
WARPS = 4


# --- eager reference -------------------------------------------------------------------------------------------


def predict_reference(
    x: Tensor,
    x_0: Tensor,
    total: Tensor,
    signal: Tensor,
    inverse_start: Tensor,
    estimate: Tensor | None = None,
    h: Tensor | None = None,
    rest: Tensor | None = None,
) -> None:
    """``predict_`` in eager PyTorch: the same arguments."""
    y = x_0 * _column(inverse_start) + total
    if estimate is not None and h is not None:
        y = y + _column(h) * estimate
    x.copy_(_column(signal) * y)
    if rest is not None and estimate is not None:
        rest.add_(estimate)


def correct_reference(
    x: Tensor,
    x_0: Tensor,
    total: Tensor,
    signal: Tensor,
    inverse_start: Tensor,
    estimate: Tensor,
    h: Tensor,
    rest: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> None:
    """``correct_`` in eager PyTorch: the same arguments."""
    if rest is not None and weights is not None:
        estimate = _column(weights[0]) * estimate + _column(weights[1]) * rest
    total.add_(_column(h) * estimate)
    x.copy_(_column(signal) * (x_0 * _column(inverse_start) + total))


def _column(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1, 1, 1, 1, 1)


# --- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _address(o, minor, n, TURN: tl.constexpr):
    return (o % minor) * (n // minor) + o // minor if TURN else o


@triton.jit
def _place(pieces, n, BLOCK: tl.constexpr):
    """This program's pair, the start of its image, and its elements and their mask in the state's memory order."""
    i_image = tl.program_id(0) // pieces
    o = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    return i_image // 2, i_image.to(tl.int64) * n, o, o < n


@triton.jit
def _predict_kernel(
    p_x, p_x_0, p_total, p_estimate, p_rest, p_signal, p_inverse_start, p_h,
    n, pieces, minor,
    ESTIMATE: tl.constexpr, REST: tl.constexpr,
    TURN_X: tl.constexpr, TURN_0: tl.constexpr, TURN_ESTIMATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of one image; a tensor whose TURN flag is set has the other memory order than the state."""
    i_pair, first, o, m = _place(pieces, n, BLOCK)
    b_clean = tl.load(p_x_0 + first + _address(o, minor, n, TURN_0), mask=m).to(tl.float32)
    b_y = b_clean * tl.load(p_inverse_start + i_pair) + tl.load(p_total + first + o, mask=m)
    if ESTIMATE:
        o_estimate = first + _address(o, minor, n, TURN_ESTIMATE)
        b_estimate = tl.load(p_estimate + o_estimate, mask=m).to(tl.float32)
        b_y = b_y + tl.load(p_h + i_pair) * b_estimate
        if REST:
            b_rest = tl.load(p_rest + o_estimate, mask=m)
            tl.store(p_rest + o_estimate, b_rest + b_estimate, mask=m)
    b_x = tl.load(p_signal + i_pair) * b_y
    tl.store(p_x + first + _address(o, minor, n, TURN_X), b_x.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def _correct_kernel(
    p_x, p_x_0, p_total, p_estimate, p_rest, p_signal, p_inverse_start, p_h, p_last, p_earlier,
    n, pieces, minor,
    REST: tl.constexpr,
    TURN_X: tl.constexpr, TURN_0: tl.constexpr, TURN_ESTIMATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of one image; a tensor whose TURN flag is set has the other memory order than the state."""
    i_pair, first, o, m = _place(pieces, n, BLOCK)
    o_estimate = first + _address(o, minor, n, TURN_ESTIMATE)
    b_move = tl.load(p_estimate + o_estimate, mask=m).to(tl.float32)
    if REST:
        b_rest = tl.load(p_rest + o_estimate, mask=m).to(tl.float32)
        b_move = tl.load(p_last + i_pair) * b_move + tl.load(p_earlier + i_pair) * b_rest
    b_total = tl.load(p_total + first + o, mask=m) + tl.load(p_h + i_pair) * b_move
    tl.store(p_total + first + o, b_total, mask=m)
    b_clean = tl.load(p_x_0 + first + _address(o, minor, n, TURN_0), mask=m).to(tl.float32)
    b_x = tl.load(p_signal + i_pair) * (b_clean * tl.load(p_inverse_start + i_pair) + b_total)
    tl.store(p_x + first + _address(o, minor, n, TURN_X), b_x.to(p_x.dtype.element_ty), mask=m)


# --- launchers -------------------------------------------------------------------------------------------------


def _sizes(total: Tensor) -> tuple[int, dict[str, int]]:
    """The number of programs; elements of a image, its pieces, and its inner extent in the order of ``total``."""
    channels, n = total.shape[2], total.shape[2:].numel()
    pieces = cdiv(n, BLOCK)
    minor = channels if channels_last(total) else n // max(channels, 1)
    return 2 * len(total) * pieces, {"n": n, "pieces": pieces, "minor": max(minor, 1)}


def _turns(total: Tensor, x: Tensor, x_0: Tensor, estimate: Tensor) -> dict[str, bool]:
    others = {"TURN_X": x, "TURN_0": x_0, "TURN_ESTIMATE": estimate}
    return {name: channels_last(t) != channels_last(total) for name, t in others.items()}


def _predict(
    x: Tensor, x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor,
    estimate: Tensor | None, h: Tensor | None, rest: Tensor | None,
) -> None:  # fmt: skip
    x_0, e = packed(x_0), total if estimate is None else packed(estimate)
    total = packed(total)
    check(rest is None or channels_last(e) == channels_last(rest), "estimate and rest have different memory orders")
    programs, sizes = _sizes(total)
    launch(
        _predict_kernel, programs, device=x.device,
        p_x=x, p_x_0=x_0, p_total=total, p_estimate=e, p_rest=total if rest is None else rest,
        p_signal=signal.contiguous(), p_inverse_start=inverse_start.contiguous(),
        p_h=signal if h is None else h.contiguous(), **sizes,
        ESTIMATE=estimate is not None, REST=rest is not None, **_turns(total, x, x_0, e),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _correct(
    x: Tensor, x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor,
    estimate: Tensor, h: Tensor, rest: Tensor | None, last: Tensor | None, earlier: Tensor | None,
) -> None:  # fmt: skip
    x_0, estimate = packed(x_0), packed(estimate)
    programs, sizes = _sizes(total)
    launch(
        _correct_kernel, programs, device=x.device,
        p_x=x, p_x_0=x_0, p_total=total, p_estimate=estimate,
        p_rest=estimate if rest is None else packed_like(rest, estimate),
        p_signal=signal.contiguous(), p_inverse_start=inverse_start.contiguous(), p_h=h.contiguous(),
        p_last=h if last is None else last.contiguous(), p_earlier=h if earlier is None else earlier.contiguous(),
        **sizes,
        REST=rest is not None, **_turns(total, x, x_0, estimate), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


_predict_op = operator(
    "renoise_predict",
    "(Tensor(a!) x, Tensor x_0, Tensor total, Tensor signal, Tensor inverse_start, Tensor? estimate, Tensor? h,"
    " Tensor(b!)? rest) -> ()",
    _predict,
    lambda *_: None,
)
_correct_op = operator(
    "renoise_correct",
    "(Tensor(a!) x, Tensor x_0, Tensor(b!) total, Tensor signal, Tensor inverse_start, Tensor estimate, Tensor h,"
    " Tensor? rest, Tensor? last, Tensor? earlier) -> ()",
    _correct,
    lambda *_: None,
)


# --- public ----------------------------------------------------------------------------------------------------


def predict_(
    x: Tensor,
    x_0: Tensor,
    total: Tensor,
    signal: Tensor,
    inverse_start: Tensor,
    estimate: Tensor | None = None,
    h: Tensor | None = None,
    rest: Tensor | None = None,
) -> None:
    """Write x = signal (x_0 inverse_start + total + h estimate) and add the estimate to ``rest``, in place.

    x: [B, 2, C, H, W], any float dtype, no gaps; x_0, estimate: that shape, any float; total: that shape, fp32; signal,
    inverse_start, h: B elements, fp32; rest: fp32 in the estimate's memory order, or None. estimate and h are given
    together or not at all. Raises ValueError for other shapes, dtypes or layouts.
    """
    check((estimate is None) == (h is None), "an estimate needs its h")
    sums = torch.float32 if rest is None else rest.dtype
    check(sums == torch.float32, f"rest, the running sum of estimates, is fp32; found {sums}")
    _check(x, x_0, total, (signal, inverse_start, h), (estimate, rest), written=(x, rest))
    if not on_kernel(x):
        predict_reference(x, x_0, total, signal, inverse_start, estimate, h, rest)
    else:
        _predict_op(x, x_0, total, signal, inverse_start, estimate, h, rest)


def correct_(
    x: Tensor,
    x_0: Tensor,
    total: Tensor,
    signal: Tensor,
    inverse_start: Tensor,
    estimate: Tensor,
    h: Tensor,
    rest: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add h (a estimate + b rest) to ``total`` and write x = signal (x_0 inverse_start + total), in place.

    Arguments as in ``predict_``, but total has no gaps and rest may have any float dtype. weights: (a, b), fp32 with B
    elements each, given together with rest; without them the step is h estimate. Raises ValueError like ``predict_``.
    """
    check((rest is None) == (weights is None), "a sum of earlier estimates needs its weights")
    last, earlier = weights or (None, None)
    _check(x, x_0, total, (signal, inverse_start, h, last, earlier), (estimate, rest), written=(x, total))
    if not on_kernel(x):
        correct_reference(x, x_0, total, signal, inverse_start, estimate, h, rest, weights)
    else:
        _correct_op(x, x_0, total, signal, inverse_start, estimate, h, rest, last, earlier)


def _check(
    x: Tensor, x_0: Tensor, total: Tensor, numbers: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...], *,
    written: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    shape = x.shape
    check(len(shape) == 5 and shape[1] == 2, f"latents are [B, 2, C, H, W]; found {tuple(shape)}")
    check(shape[2:].numel() < 2**31 - BLOCK, "a image has 2^31 elements or more")
    for t in (x_0, total, *others):
        check(t is None or t.shape == shape, "latents, state and estimates differ in shape")
    for c in numbers:
        check(c is None or c.numel() == shape[0], "a coefficient is one number per pair")
    for t in (total, *numbers):
        check(t is None or t.dtype == torch.float32, "the state and the coefficients are fp32")
    for t in written:
        check(t is None or is_packed(t), "a tensor that is written to must have no gaps")
