"""layer_norm: LayerNorm (Ba et al., arXiv 1607.06450) over the last dimension, with the residual addition before it.

Forward, over the C elements of a row, ``r`` an optional residual::

    s    = x + r                       rounded to x's dtype, since s is an output too
    mean = mean(s)                     var = mean (s - mean)^2               rstd = 1 / sqrt(var + eps)
    y    = (s - mean) rstd w + b

Backward, the derivative of the above, with ``n = (s - mean) rstd``, ``d = w dy`` and ``ds`` the gradient of s::

    dx = dr = rstd (d - mean(d) - n mean(d n)) + ds           dw = sum_rows dy n           db = sum_rows dy

Shapes: x, r, s, y [..., C]; w, b [C]. Dtypes: any float in; statistics and sums in fp32 (two passes over a row held in
registers, so a large mean does not spoil the variance); y and s in x's dtype, each gradient in the dtype of its tensor.
dw and db add the partial sums of programs with fixed rows, as many programs as the device runs at once: no atomics, and
the same bits on every GPU with as many multiprocessors.

Bytes per element in half precision: forward 4, with the residual 8 (eager: 4 and 10); backward 6, with ds 8, and the
partial sums, which are written and read again (16 bytes per program and column; 17 % at 8192 x 640, mostly in cache).
SDXL at 1024 px with two images: 210 calls per forward pass, 5.0 GB for norms and additions.

Status: not measured on a GPU. Liger and apex have no LayerNorm that includes the residual addition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smpo_fast.kernels._launch import (
    cdiv,
    check,
    launch,
    multiprocessors,
    needs_gradient,
    on_kernel,
    operator,
    power_of_2,
)
from smpo_fast.kernels._triton import tl, triton

MAX_FEATURES = 4096  # because a row is held in registers
# In the backward pass, warps per multiprocessor: what fits into its registers, and with 32 bytes per thread and tensor
# 20 KB in flight at SDXL's widths. More programs would also write more partial sums.
WARPS_EACH = 16
SUM_ROWS, SUM_COLUMNS = 32, 32  # tile in which partial sums are added up


# --- eager reference -------------------------------------------------------------------------------------------


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm`` in eager PyTorch: the same arguments and results, in any float dtype."""
    total = x if residual is None else x + residual
    if weight.dtype == total.dtype:
        y = F.layer_norm(total, weight.shape, weight, bias, eps)
    else:  # under autocast: fp32 weights, half-precision activations
        y = F.layer_norm(total.float(), weight.shape, weight.float(), bias.float(), eps).to(total.dtype)
    return y if residual is None else (total, y)


# --- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _layer_norm_fwd_kernel(
    p_x, p_residual, p_weight, p_bias, p_total, p_y, p_mean, p_rstd,
    rows, features, eps,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    i_row, o_feature = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_row = first + i_row < rows
    m = m_row[:, None] & (o_feature < features)[None, :]
    start, o = first * features, i_row[:, None] * features + o_feature[None, :]
    b_x = tl.load(p_x + start + o, mask=m, other=0.0).to(tl.float32)
    if RESIDUAL:
        b_x += tl.load(p_residual + start + o, mask=m, other=0.0).to(tl.float32)
        b_total = b_x.to(p_total.dtype.element_ty)
        tl.store(p_total + start + o, b_total, mask=m)
        b_x = b_total.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / features
    b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_rest = (
        tl.sum(b_x, 1) / features
    )  # the mean's own rounding error: without it a constant row would not give exactly b
    b_x = tl.where(m, b_x - b_rest[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / features + eps)
    b_w = tl.load(p_weight + o_feature, mask=o_feature < features, other=0.0).to(tl.float32)
    b_b = tl.load(p_bias + o_feature, mask=o_feature < features, other=0.0).to(tl.float32)
    b_y = b_x * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(p_y + start + o, b_y.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_mean + first + i_row, b_mean + b_rest, mask=m_row)
    tl.store(p_rstd + first + i_row, b_rstd, mask=m_row)


@triton.jit
def _layer_norm_bwd_kernel(
    p_total, p_grad_y, p_grad_total, p_weight, p_mean, p_rstd, p_grad_x, p_partial,
    rows, features, rows_each,
    GRAD_TOTAL: tl.constexpr, GRAD_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i handles rows i * rows_each onwards, ROWS at a time, a divisor of rows_each.

    p_partial [2, programs, features]: sums for weight and bias. Each thread has the same columns of all ROWS rows, so
    that adding up rows takes no exchange between threads.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_row, o_feature = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_feature = o_feature < features
    o = i_row[:, None] * features + o_feature[None, :]
    b_w = tl.load(p_weight + o_feature, mask=m_feature, other=0.0).to(tl.float32)
    share = 1.0 / features
    b_grad_w = tl.zeros([BLOCK], tl.float32)
    b_grad_b = tl.zeros([BLOCK], tl.float32)
    for i in range(0, rows_each, ROWS):
        first = i_program * rows_each + i
        m_row = first + i_row < rows
        m = m_row[:, None] & m_feature[None, :]
        start = first * features
        b_x = tl.load(p_total + start + o, mask=m, other=0.0)
        b_dy = tl.load(p_grad_y + start + o, mask=m, other=0.0)
        b_mean = tl.load(p_mean + first + i_row, mask=m_row, other=0.0)
        b_rstd = tl.load(p_rstd + first + i_row, mask=m_row, other=0.0)
        # where nothing was loaded this may not be 0, but the gradient that it is multiplied by is
        b_n = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]
        b_dy = b_dy.to(tl.float32)
        b_d = b_dy * b_w[None, :]
        b_share = b_rstd * share
        b_c1, b_c2 = tl.sum(b_d, 1) * b_share, tl.sum(b_d * b_n, 1) * b_share
        b_dx = b_d * b_rstd[:, None] - (b_n * b_c2[:, None] + b_c1[:, None])
        if GRAD_TOTAL:
            b_dx += tl.load(p_grad_total + start + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_grad_x + start + o, b_dx.to(p_grad_x.dtype.element_ty), mask=m)
        if GRAD_WEIGHT:
            b_grad_w += tl.sum(b_dy * b_n, 0)
            b_grad_b += tl.sum(b_dy, 0)
    if GRAD_WEIGHT:
        o_partial = i_program * features + o_feature
        tl.store(p_partial + o_partial, b_grad_w, mask=m_feature)
        o_partial += tl.num_programs(0).to(tl.int64) * features
        tl.store(p_partial + o_partial, b_grad_b, mask=m_feature)


@triton.jit
def _layer_norm_sums_kernel(
    p_partial, p_grad_weight, p_grad_bias, parts, features, pieces, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up the sums of all programs in BLOCK columns, of the weight or of the bias."""
    which = tl.program_id(0) // pieces
    i_row, o = tl.arange(0, ROWS), (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    m = o < features
    p_partial += which.to(tl.int64) * parts * features
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, parts, ROWS):
        m_row = (i + i_row < parts)[:, None] & m[None, :]
        b_sum += tl.load(p_partial + (i + i_row)[:, None] * features + o[None, :], mask=m_row, other=0.0)
    b_grad = tl.sum(b_sum, 0).to(p_grad_weight.dtype.element_ty)
    if which == 0:
        tl.store(p_grad_weight + o, b_grad, mask=m)
    else:
        tl.store(p_grad_bias + o, b_grad, mask=m)


# --- launchers -------------------------------------------------------------------------------------------------


def _tile(x: Tensor) -> dict[str, int]:
    block = power_of_2(x.shape[-1])
    # 32 bytes per thread at SDXL's widths: with 64, fp32 rows of 1280 spill registers on sm_80
    warps = min(16, max(4, block * x.element_size() // 1024))
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": warps}


def _bwd_tile(x: Tensor) -> dict[str, int]:
    """Two rows at a time, 8 elements of each per thread: in half precision, two loads of each tensor in flight."""
    block = power_of_2(x.shape[-1])
    warps = min(16, max(1, block // 256))
    return {"ROWS": max(2, 256 // block), "BLOCK": block, "num_warps": warps}


def _bwd_split(rows: int, tile: dict[str, int], device: torch.device) -> tuple[int, int]:
    """The number of programs, as many as run at once, and the rows of each."""
    most = max(1, multiprocessors(device) * WARPS_EACH // tile["num_warps"])
    rows_each = cdiv(cdiv(rows, most), tile["ROWS"]) * tile["ROWS"]
    return cdiv(rows, max(rows_each, 1)), rows_each


def _layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (empty without a residual), y, and mean and rstd of each row."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    total, y, mean, rstd = _fwd_shapes(x, residual, weight, bias, eps)
    features, rows, tile = x.shape[-1], mean.numel(), _tile(x)
    launch(
        _layer_norm_fwd_kernel, cdiv(rows, tile["ROWS"]), device=x.device,
        p_x=x, p_residual=x if residual is None else residual, p_weight=weight, p_bias=bias,
        p_total=y if residual is None else total, p_y=y, p_mean=mean, p_rstd=rstd,
        rows=rows, features=features, eps=eps,
        RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return total, y, mean, rstd


def _layer_norm_bwd(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (equal to the residual's), weight and bias (the last two empty unless ``grad_weight``)."""
    total, grad_y, weight = total.contiguous(), grad_y.contiguous(), weight.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_x, tile, features, rows = torch.empty_like(total), _bwd_tile(total), total.shape[-1], mean.numel()
    programs, rows_each = _bwd_split(rows, tile, total.device)
    partial = torch.empty((2, programs if grad_weight else 0, features), dtype=torch.float32, device=total.device)
    launch(
        _layer_norm_bwd_kernel, programs, device=total.device,
        p_total=total, p_grad_y=grad_y, p_grad_total=grad_y if grad_total is None else grad_total,
        p_weight=weight, p_mean=mean, p_rstd=rstd, p_grad_x=grad_x, p_partial=partial,
        rows=rows, features=features, rows_each=rows_each,
        GRAD_TOTAL=grad_total is not None, GRAD_WEIGHT=grad_weight, **tile,
    )  # fmt: skip
    if not grad_weight:
        return grad_x, *_no_weights(weight)
    grad_w, grad_b = torch.empty_like(weight), torch.empty_like(weight)
    pieces = cdiv(features, SUM_COLUMNS)
    launch(
        _layer_norm_sums_kernel, 2 * pieces, device=total.device,
        p_partial=partial, p_grad_weight=grad_w, p_grad_bias=grad_b,
        parts=programs, features=features, pieces=pieces,
        ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip
    return grad_x, grad_w, grad_b


def _fwd_shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    return total, y, mean, rstd


def _bwd_shapes(
    grad_y: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    return grad_x, *([torch.empty_like(weight) for _ in range(2)] if grad_weight else _no_weights(weight))


def _no_weights(weight: Tensor) -> list[Tensor]:
    return [torch.empty((0,), dtype=weight.dtype, device=weight.device) for _ in range(2)]


_fwd_op = operator(
    "layer_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm_fwd,
    _fwd_shapes,
)
_bwd_op = operator(
    "layer_norm_backward",
    "(Tensor grad_y, Tensor? grad_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd, bool grad_weight)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_norm_bwd,
    _bwd_shapes,
)


# --- autograd --------------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps):  # type: ignore[no-untyped-def]
        _, y, mean, rstd = _fwd_op(x, None, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_x, grad_w, grad_b = _bwd_op(grad_y, None, *ctx.saved_tensors, wanted)
        return grad_x, grad_w if wanted else None, grad_b if wanted else None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, eps):  # type: ignore[no-untyped-def]
        total, y, mean, rstd = _fwd_op(x, residual, weight, bias, eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total, grad_y):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grad_x, grad_w, grad_b = _bwd_op(grad_y, grad_total, *ctx.saved_tensors, wanted)
        return grad_x, grad_x, grad_w if wanted else None, grad_b if wanted else None, None


# --- public ----------------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension; with a residual, of x + residual. See the top of this file.

    x: [..., C], any float dtype, C at most MAX_FEATURES; weight, bias: [C]; residual: shape and dtype of x, or None.
    Returns y, or (x + residual, y), in x's shape and dtype. Raises ValueError for other shapes or dtypes.
    """
    check(x.shape[-1:] == weight.shape == bias.shape, f"weights {tuple(weight.shape)} for rows of {tuple(x.shape)}")
    check(
        residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype),
        "x and residual differ in shape or dtype",
    )
    check(x.shape[-1] <= MAX_FEATURES, f"rows of {x.shape[-1]} elements; at most {MAX_FEATURES} are supported")
    if not on_kernel(x):
        return layer_norm_reference(x, weight, bias, residual, eps=eps)
    if not needs_gradient(x, weight, bias, residual):
        total, y, _, _ = _fwd_op(x, residual, weight, bias, eps)
        return y if residual is None else (total, y)
    if residual is None:
        return _LayerNorm.apply(x, weight, bias, eps)
    return _AddLayerNorm.apply(x, residual, weight, bias, eps)


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm of [..., C] that runs the op; given a residual of that shape it returns (sum, norm of the sum)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None and residual.dtype != x.dtype:  # possible under autocast: add in the wider dtype
            total = x + residual
            return total, layer_norm(total, self.weight, self.bias, eps=self.eps)
        return layer_norm(x, self.weight, self.bias, residual, eps=self.eps)
