"""pair_loss: the losses of preference pairs, and their gradient, from the networks' predictions.

Forward, for a pair with images i = w (winner), l (loser), over the n = C*H*W elements of a image::

    m_i    = mean (prediction_i - target_i)^2    r_i: the same of the reference model, computed here or given
    D      = (m_w - m_l) - (r_w - r_l)           logit = -(beta/2) weight D
    loss   = softplus(-logit)                    link "sigmoid"
             relu(1 - logit)                     link "hinge"
             (logit/beta - 1/(2 beta))^2         link "ipo"

Backward, with g the gradient of the pair's loss and s the sign, + for the winner and - for the loser::

    d prediction_i = s g (d loss/d logit) (-(beta/2) weight) (2/n) (prediction_i - target_i)

Sources: Diffusion-DPO (arXiv 2311.12908, eq. 14), with SmPO's soft label as the pair's weight (arXiv 2506.02698); hinge
is SLiC-HF's (arXiv 2305.10425), ipo is IPO's (arXiv 2310.12036).

Shapes: prediction, reference, target [B, 2, C, H, W], winner first; weight, loss, logit [B]; errors [B, 2]. Each tensor
may be contiguous or channels-last, independently of the others; any other layout is copied first.

Dtypes: any float in; differences and partial sums in fp32; the total of the partial sums, the margin and the link in
fp64 (a few numbers per pair); loss, logit and errors out in fp32; the gradient in the prediction's dtype. At beta 5000
an average taken in bf16 is wrong by many times the logit: the main purpose of this op is accuracy.

Determinism: an image is split into fixed pieces of 2048 elements with one program each, and the last-arriving program
of a pair adds the sums of all pieces in a fixed order. Which program arrives last varies, but not what it adds: every
bit of a pair's results is independent of the other pairs, the batch size and the order of arrival. The only atomic is
an integer counter of arrivals. ``pair_errors`` uses the same kernel and order of summation, so identical networks give
a logit of exactly 0 even if the reference's errors are computed in a separate call.

Bytes: forward reads prediction, reference and target once; backward reads prediction and target and writes the
gradient. For 4x128x128 half-precision predictions and an fp32 target: 8 bytes per element forward (6 with given
reference errors), 8 backward. One launch forward and one backward for any batch size.

Status: not measured on a GPU. Predicted to be under 0.3 % of a training step, mostly launch overhead. It is worth
having for its accuracy, for keeping no fp32 tensors for the backward pass, and for little host work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smpo_fast.kernels._launch import (
    cdiv,
    check,
    launch,
    on_kernel,
    operator,
    packed,
    packed_like,
    tickets,
    transposition,
)
from smpo_fast.kernels._triton import tl, triton

LINKS = ("sigmoid", "hinge", "ipo")
BLOCK = 2048  # elements per program; fixed, because it determines the order of summation
WARPS = 4


class PairLoss(NamedTuple):
    """Loss and logit [B], errors of policy and reference [B, 2]; all fp32, only the loss is differentiable."""

    loss: Tensor
    logit: Tensor
    policy: Tensor
    reference: Tensor


# --- eager reference -------------------------------------------------------------------------------------------


def pair_errors_reference(prediction: Tensor, target: Tensor) -> Tensor:
    """``pair_errors`` in eager PyTorch, same arguments, differentiable; float64 inputs are computed in float64."""
    return (_upcast(prediction) - _upcast(target)).square().mean(dim=(2, 3, 4))


def pair_loss_reference(
    prediction: Tensor,
    reference: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    beta: float,
    link: str = "sigmoid",
) -> PairLoss:
    """``pair_loss`` in eager PyTorch, with the same arguments; float64 inputs are computed in float64."""
    policy = pair_errors_reference(prediction, target)
    frozen = reference if reference.ndim == 2 else pair_errors_reference(reference, target).detach()
    difference = (policy[:, 0] - policy[:, 1]) - (frozen[:, 0] - frozen[:, 1])
    logit = -0.5 * beta * weight * difference
    if link == "sigmoid":
        loss = F.softplus(-logit)
    elif link == "hinge":
        loss = F.relu(1 - logit)
    else:
        loss = (logit / beta - 0.5 / beta).square()
    return PairLoss(loss, logit.detach(), policy.detach(), frozen)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# --- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _squared_error(b_prediction, b_target, m):
    b_error = b_prediction.to(tl.float32) - b_target
    # masked loads are 0 already; with the mask here too the kernel takes 2 to 4 registers fewer on sm_80 and sm_89
    return tl.sum(tl.where(m, b_error * b_error, 0.0), 0)


@triton.jit
def _mean_error(p_sums, n, pieces, PIECES: tl.constexpr):
    """The mean squared error of one image, from the sums of its pieces, which other programs have written."""
    b_sum = tl.zeros([PIECES], tl.float64)
    for i in range(0, pieces, PIECES):
        o = i + tl.arange(0, PIECES)
        b_sum += tl.load(p_sums + o, mask=o < pieces, other=0.0, cache_modifier=".cg").to(tl.float64)
    # rounded to fp32 as given errors are: identical networks must give identical errors
    return (tl.sum(b_sum, 0) / n).to(tl.float32)


@triton.jit
def _log1p(y):
    """log(1 + y) for y in [0, 1] in fp64, accurate also for a y so small that 1 + y rounds to 1."""
    return tl.where(y < 1e-5, y * (1.0 - y * (0.5 - y * 0.3333333333333333)), tl.log(1.0 + y))


@triton.jit
def _link(logit, beta, LINK: tl.constexpr):
    """The loss and its derivative by the logit."""
    if LINK == 0:
        small = tl.exp(-tl.abs(logit))
        # where, not maximum: the hardware's maximum drops a NaN
        loss = tl.where(logit >= 0, 0.0, -logit) + _log1p(small)
        slope = -tl.where(logit >= 0, small, 1.0) / (1.0 + small)
    elif LINK == 1:
        loss = tl.where(logit >= 1, 0.0, 1.0 - logit)
        slope = tl.where(logit >= 1, 0.0, -1.0)
    else:
        root = (logit - 0.5) / beta
        loss = root * root
        slope = 2.0 * root / beta
    return loss, slope


@triton.jit
def _arrives_last(p_ticket, programs):
    """Whether this is the last-arriving program of this ticket; if so, it sees what the others stored before.

    The barrier orders the stores of all threads before the single thread's atomic, whose release and acquire at GPU
    scope order them before the loads of the last-arriving program. That program resets the ticket to 0.
    """
    tl.debug_barrier()
    last = tl.atomic_add(p_ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(p_ticket, 0)
    return last


@triton.jit
def _pair_loss_kernel(
    p_prediction, p_reference, p_target, p_weight,
    p_sums, p_tickets, p_errors, p_reference_errors, p_loss, p_logit, p_slope,
    n, pieces, minor, beta,
    LINK: tl.constexpr, REFERENCE: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Squared errors of one piece of one image; the last-arriving program of a pair computes the pair's results.

    p_sums [pairs, 1 or 2 networks, 2 images, pieces]. LINK -1: only the policy's errors. The slope is
    d loss / d m_w, which equals - d loss / d m_l.
    """
    i_image = tl.program_id(0) // pieces
    i_piece = tl.program_id(0) % pieces
    i_pair = (i_image // 2).to(tl.int64)
    o = i_piece * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    first = i_image.to(tl.int64) * n
    o_target = (o % minor) * (n // minor) + o // minor if TRANSPOSED else o
    b_target = tl.load(p_target + first + o_target, mask=m, other=0.0).to(tl.float32)
    p_sums += i_pair * (4 if REFERENCE else 2) * pieces
    o_sum = (i_image % 2) * pieces + i_piece
    b_prediction = tl.load(p_prediction + first + o, mask=m, other=0.0)
    tl.store(p_sums + o_sum, _squared_error(b_prediction, b_target, m))
    if REFERENCE:
        b_prediction = tl.load(p_reference + first + o, mask=m, other=0.0)
        tl.store(p_sums + 2 * pieces + o_sum, _squared_error(b_prediction, b_target, m))

    if _arrives_last(p_tickets + i_pair, 2 * pieces):
        m_w = _mean_error(p_sums, n, pieces, PIECES)
        m_l = _mean_error(p_sums + pieces, n, pieces, PIECES)
        tl.store(p_errors + 2 * i_pair, m_w)
        tl.store(p_errors + 2 * i_pair + 1, m_l)
        if LINK >= 0:
            if REFERENCE:
                r_w = _mean_error(p_sums + 2 * pieces, n, pieces, PIECES)
                r_l = _mean_error(p_sums + 3 * pieces, n, pieces, PIECES)
            else:
                r_w = tl.load(p_reference + 2 * i_pair).to(tl.float32)
                r_l = tl.load(p_reference + 2 * i_pair + 1).to(tl.float32)
            tl.store(p_reference_errors + 2 * i_pair, r_w)
            tl.store(p_reference_errors + 2 * i_pair + 1, r_l)
            difference = (m_w.to(tl.float64) - m_l.to(tl.float64)) - (r_w.to(tl.float64) - r_l.to(tl.float64))
            by_difference = tl.load(p_weight + i_pair).to(tl.float64) * (-0.5 * beta)
            logit = by_difference * difference
            loss, slope = _link(logit, beta, LINK)
            tl.store(p_loss + i_pair, loss.to(tl.float32))
            tl.store(p_logit + i_pair, logit.to(tl.float32))
            tl.store(p_slope + i_pair, (slope * by_difference).to(tl.float32))


@triton.jit
def _pair_loss_bwd_kernel(
    p_prediction, p_target, p_slope, p_grad_loss, p_grad,
    n, pieces, minor,
    TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of one piece of one image's prediction."""
    i_image = tl.program_id(0) // pieces
    o = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    first = i_image.to(tl.int64) * n
    o_target = (o % minor) * (n // minor) + o // minor if TRANSPOSED else o
    b_target = tl.load(p_target + first + o_target, mask=m, other=0.0).to(tl.float32)
    b_error = tl.load(p_prediction + first + o, mask=m, other=0.0).to(tl.float32) - b_target
    slope = tl.load(p_slope + i_image // 2) * tl.load(p_grad_loss + i_image // 2).to(tl.float32)
    slope = tl.where(i_image % 2 == 0, slope, -slope)
    b_grad = slope * (2.0 * b_error / n)
    tl.store(p_grad + first + o, b_grad.to(p_grad.dtype.element_ty), mask=m)


# --- launchers -------------------------------------------------------------------------------------------------


def _launch_forward(
    prediction: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor | None, beta: float, link: int,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill ``out``. reference: predictions, errors [B, 2], or None (then link is -1 and weight None: errors only)."""
    prediction, target = packed(prediction), packed(target)
    pairs, n = prediction.shape[0], prediction.shape[2:].numel()
    pieces, minor = cdiv(n, BLOCK), transposition(prediction, target)
    predicted = reference is not None and reference.ndim == 5
    if reference is not None:
        reference = packed_like(reference, prediction) if predicted else reference.contiguous()
    sums = torch.empty((pairs, 2 if predicted else 1, 2, pieces), dtype=torch.float32, device=target.device)
    errors, reference_errors, loss, logit, slope = out if len(out) == 5 else (*out, *[sums] * 4)
    launch(
        _pair_loss_kernel, 2 * pairs * pieces, device=target.device,
        p_prediction=prediction, p_reference=target if reference is None else reference,
        p_target=target, p_weight=sums if weight is None else weight.contiguous(),
        p_sums=sums, p_tickets=tickets(pairs, target.device), p_errors=errors, p_reference_errors=reference_errors,
        p_loss=loss, p_logit=logit, p_slope=slope,
        n=n, pieces=pieces, minor=max(minor, 1), beta=beta,
        LINK=link, REFERENCE=predicted, TRANSPOSED=minor > 0,
        BLOCK=BLOCK, PIECES=min(1024, triton.next_power_of_2(pieces)), num_warps=WARPS,
        enable_fp_fusion=False,  # square and sum must round in the same way for both networks
    )  # fmt: skip


def _pair_errors(prediction: Tensor, target: Tensor) -> Tensor:
    errors = _pair_errors_shapes(prediction, target)
    _launch_forward(prediction, None, target, None, 1.0, -1, (errors,))
    return errors


def _pair_loss_fwd(
    prediction: Tensor, reference: Tensor, target: Tensor, weight: Tensor, beta: float, link: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, logit, policy errors, reference errors, and the slope that the backward pass needs."""
    out = _pair_loss_shapes(prediction, reference, target, weight, beta, link)
    loss, logit, errors, reference_errors, slope = out
    _launch_forward(prediction, reference, target, weight, beta, link, (errors, reference_errors, loss, logit, slope))
    return out


def _pair_loss_bwd(grad_loss: Tensor, slope: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    prediction, target = packed(prediction), packed(target)
    grad = torch.empty_like(prediction)
    n = prediction.shape[2:].numel()
    pieces, minor = cdiv(n, BLOCK), transposition(prediction, target)
    launch(
        _pair_loss_bwd_kernel, 2 * len(prediction) * pieces, device=prediction.device,
        p_prediction=prediction, p_target=target, p_slope=slope, p_grad_loss=grad_loss.contiguous(), p_grad=grad,
        n=n, pieces=pieces, minor=max(minor, 1),
        TRANSPOSED=minor > 0, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return grad


def _pair_errors_shapes(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.empty(prediction.shape[:2], dtype=torch.float32, device=prediction.device)


def _pair_loss_shapes(
    prediction: Tensor, reference: Tensor, target: Tensor, weight: Tensor, beta: float, link: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs, options = prediction.shape[0], {"dtype": torch.float32, "device": prediction.device}
    shapes = ((pairs,), (pairs,), (pairs, 2), (pairs, 2), (pairs,))
    loss, logit, errors, reference_errors, slope = (torch.empty(s, **options) for s in shapes)
    return loss, logit, errors, reference_errors, slope


def _pair_loss_bwd_shapes(grad_loss: Tensor, slope: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(packed(prediction))


_errors_op = operator("pair_errors", "(Tensor prediction, Tensor target) -> Tensor", _pair_errors, _pair_errors_shapes)
_fwd_op = operator(
    "pair_loss",
    "(Tensor prediction, Tensor reference, Tensor target, Tensor weight, float beta, int link)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pair_loss_fwd,
    _pair_loss_shapes,
)
_bwd_op = operator(
    "pair_loss_backward",
    "(Tensor grad_loss, Tensor slope, Tensor prediction, Tensor target) -> Tensor",
    _pair_loss_bwd,
    _pair_loss_bwd_shapes,
)


# --- autograd --------------------------------------------------------------------------------------------------


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction, reference, target, weight, beta, link):  # type: ignore[no-untyped-def]
        loss, logit, errors, reference_errors, slope = _fwd_op(prediction, reference, target, weight, beta, link)
        ctx.save_for_backward(slope, prediction, target)
        ctx.mark_non_differentiable(logit, errors, reference_errors)
        ctx.set_materialize_grads(False)  # otherwise backward would be given tensors of zeros for these three
        return loss, logit, errors, reference_errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, *_):  # type: ignore[no-untyped-def]
        grad = None if grad_loss is None else _bwd_op(grad_loss, *ctx.saved_tensors)
        return grad, None, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------


def pair_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, without a gradient; see the top of this file.

    prediction, target: [B, 2, C, H, W], any float dtypes. Returns [B, 2] fp32. Raises ValueError for other shapes.
    """
    _check(prediction, target)
    if not on_kernel(prediction):
        return pair_errors_reference(prediction, target).detach()
    return _errors_op(prediction.detach(), target.detach())


def pair_loss(
    prediction: Tensor,
    reference: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    beta: float,
    link: str = "sigmoid",
) -> PairLoss:
    """Losses of pairs, differentiable with respect to ``prediction`` only and once; see the top of this file.

    prediction, target: [B, 2, C, H, W]; reference: the reference model's prediction of that shape, or its errors
    [B, 2]; weight: [B]; any float dtypes; link: one of LINKS. Raises ValueError for other shapes and links.
    """
    check(link in LINKS, f"link = '{link}': one of {', '.join(LINKS)}")
    _check(prediction, target)
    pairs = prediction.shape[0]
    check(reference.shape in (prediction.shape, (pairs, 2)), f"reference has the shape {tuple(reference.shape)}")
    check(weight.shape == (pairs,), f"weight has the shape {tuple(weight.shape)}, wanted ({pairs},)")
    if not on_kernel(prediction):
        return pair_loss_reference(prediction, reference, target, weight, beta=beta, link=link)
    frozen = (x.detach() for x in (reference, target, weight))
    return PairLoss(*_PairLoss.apply(prediction, *frozen, beta, LINKS.index(link)))


def _check(prediction: Tensor, target: Tensor) -> None:
    shape = prediction.shape
    check(len(shape) == 5 and shape[1] == 2, f"predictions are [B, 2, C, H, W]; found {tuple(shape)}")
    check(shape[2:].numel() < 2**31 - BLOCK, "a image has 2^31 elements or more")
    check(target.shape == shape, f"the target has the shape {tuple(target.shape)}, the prediction {tuple(shape)}")
