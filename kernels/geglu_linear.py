"""geglu_linear: GEGLU as the epilogue of the matrix multiplication in front of it, for calls without a gradient.

With the weight's rows W = [W_a; W_g] and the bias b = [b_a; b_g], value first, gate second (Shazeer,
arXiv 2002.05202)::

    y = (x W_a^T + b_a) GELU(x W_g^T + b_g)        exact GELU, as in geglu

Shapes: x [..., K], weight [2F, K], bias [2F] or None, y [..., F]. Dtypes: x, weight and bias share one float dtype;
sums, bias and GELU are computed in fp32 and rounded once at the end (eager code rounds the projection, the GELU and the
product). fp32 inputs are multiplied in fp32, or in TF32 if ``torch.set_float32_matmul_precision`` allows it.

Each program computes a tile of values and the matching tile of gates, so the projection, which is twice as wide as the
result, is never written to memory. Programs process the tiles in groups of 8 rows of tiles, which reuse the same
columns of the weight from the cache. Tile sizes are chosen by shape from a table, never by timing.

Bytes saved per output element against the projection followed by geglu, in half precision: 8 (writing and reading 2F).
SDXL at 1024 px with two images: 6.7 GB per network call, which is 1.6 ms at 4.3 TB/s (calculated). A matrix
multiplication in Triton may lose more than that to the library's: 28 % of a call's operations are here.

Forward only: where a gradient is needed the projection must be kept anyway, so the stock module (or geglu) runs. It
also runs in calls without a gradient whose result is compared with one that has a gradient, such as the reference's:
the two would round differently. So a patched module runs the op inside ``forward_only()`` and nowhere else.

Status: not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smpo_fast.kernels._launch import INTERPRET, cdiv, check, launch, needs_gradient, on_kernel, operator
from smpo_fast.kernels._triton import tl, triton

GROUP = 8  # rows of tiles that are processed together
WIDE_SHARED = 200 * 1024  # bytes of shared memory per program that the widest tile needs


# --- eager reference -------------------------------------------------------------------------------------------


def geglu_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``geglu_linear`` in eager PyTorch, as in diffusers: [..., K], [2F, K] and [2F] -> [..., F], any float dtype."""
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


# --- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _geglu_linear_kernel(
    p_x, p_weight, p_bias, p_y,
    rows, features, depth,
    BIAS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(features, BN)
    i_group = tl.program_id(0) // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - i_group * GROUP, GROUP)
    i_inside = tl.program_id(0) % (GROUP * tiles_n)
    i_m, i_n = i_group * GROUP + i_inside % height, i_inside // height

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    # rows beyond the end read the last row instead of being masked: their results are not stored
    p_x += tl.minimum(o_m, rows - 1).to(tl.int64)[:, None] * depth + o_k[None, :]
    p_value = p_weight + tl.minimum(o_n, features - 1).to(tl.int64)[None, :] * depth + o_k[:, None]
    p_gate = p_value + tl.cast(features, tl.int64) * depth  # not .to: Triton makes a size of 1 a Python constant
    b_value, b_gate = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for k in range(0, depth, BK):
        if EVEN:
            b_x, b_wv, b_wg = tl.load(p_x), tl.load(p_value), tl.load(p_gate)
        else:
            m = o_k < depth - k
            b_x = tl.load(p_x, mask=m[None, :], other=0.0)
            b_wv = tl.load(p_value, mask=m[:, None], other=0.0)
            b_wg = tl.load(p_gate, mask=m[:, None], other=0.0)
        if INTERPRETED:  # the interpreter's tl.dot would multiply the bits of bf16 as integers
            b_x, b_wv, b_wg = b_x.to(tl.float32), b_wv.to(tl.float32), b_wg.to(tl.float32)
        b_value = tl.dot(b_x, b_wv, b_value, input_precision=PRECISION)
        b_gate = tl.dot(b_x, b_wg, b_gate, input_precision=PRECISION)
        p_x += BK
        p_value += BK
        p_gate += BK

    m_n = o_n < features
    if BIAS:
        b_value += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_gate += tl.load(p_bias + features + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_y = b_value * (0.5 * b_gate * (1.0 + tl.erf(b_gate * 0.7071067811865476)))
    o_y = o_m.to(tl.int64)[:, None] * features + o_n[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=(o_m < rows)[:, None] & m_n[None, :])


# --- launchers -------------------------------------------------------------------------------------------------


def _tile(rows: int, depth: int, dtype: torch.dtype, shared: int) -> dict[str, int]:
    """Tile sizes, pipeline stages and warps. The widest tile spills registers before Hopper."""
    if dtype == torch.float32 or depth % 64 > 0:  # no tensor cores to keep busy, or only narrow loads
        bm, bn, bk, stages, warps = (32 if rows > 16 else 16), 32, 32, 2, 4
    elif rows <= 64:
        bm, bn, bk, stages, warps = (64 if rows > 16 else 16), 64, 64, 3, 4
    elif shared >= WIDE_SHARED:
        bm, bn, bk, stages, warps = 128, 128, 64, 3, 8
    else:
        bm, bn, bk, stages, warps = 128, 64, 64, 3, 8
    return {"BM": bm, "BN": bn, "BK": bk, "num_stages": stages, "num_warps": warps}


def _shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may use; 0 without a GPU."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 0


def _geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    features, depth, rows = weight.shape[0] // 2, weight.shape[1], x.shape[:-1].numel()
    y = _geglu_linear_shapes(x, weight, bias)
    tile = _tile(rows, depth, x.dtype, _shared_memory(x))
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    launch(
        _geglu_linear_kernel, cdiv(rows, tile["BM"]) * cdiv(features, tile["BN"]), device=x.device,
        p_x=x, p_weight=weight, p_bias=weight if bias is None else bias.contiguous(), p_y=y,
        rows=rows, features=features, depth=depth,
        BIAS=bias is not None, EVEN=depth % tile["BK"] == 0, PRECISION="tf32" if tf32 else "ieee", GROUP=GROUP, **tile,
        INTERPRETED=INTERPRET,
    )  # fmt: skip
    return y


def _geglu_linear_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0] // 2), dtype=x.dtype, device=x.device)


_op = operator("geglu_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _geglu_linear, _geglu_linear_shapes)


# --- public ----------------------------------------------------------------------------------------------------


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """GEGLU of a linear projection, in eager code where a gradient is needed; see the top of this file.

    x: [..., K]; weight: [2F, K]; bias: [2F] or None; all of one float dtype, which the result [..., F] has too.
    Raises ValueError for other shapes and for differing dtypes.
    """
    check(weight.ndim == 2 and weight.shape[0] % 2 == 0, f"the weight is [2F, K]; found {tuple(weight.shape)}")
    check(x.ndim > 0 and x.shape[-1] == weight.shape[1], f"x is [..., {weight.shape[1]}]; found {tuple(x.shape)}")
    check(bias is None or bias.shape == weight.shape[:1], "the bias has one entry per row of the weight")
    tensors = [t for t in (x, weight, bias) if t is not None]
    check(all(t.dtype == x.dtype for t in tensors), f"dtypes differ: {[str(t.dtype) for t in tensors]}")
    if not on_kernel(x) or needs_gradient(*tensors):
        return geglu_linear_reference(x, weight, bias)
    return _op(x, weight, bias)


_is_forward_only = False


@contextmanager
def forward_only() -> Iterator[None]:
    """Inside, ``FusedGEGLULinear`` modules run the op. For calls that no call with a gradient is compared with."""
    global _is_forward_only
    before, _is_forward_only = _is_forward_only, True
    try:
        yield
    finally:
        _is_forward_only = before


class FusedGEGLULinear(nn.Module):
    """A mixin for diffusers' GEGLU that runs the op inside ``forward_only`` if ``proj`` is a plain linear layer.

    Takes [..., K] and returns [..., F]; ``proj`` maps K features to 2F. Otherwise the next class in the method
    resolution order runs. LoRA, quantised or sharded weights, and hooks are looked for in every call, since they may
    be added later.
    """

    proj: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        proj, x = self.proj, hidden_states
        if not _is_forward_only or args or kwargs or not plain(proj) or not on_kernel(x):
            return super().forward(hidden_states, *args, **kwargs)
        weight, bias = proj.weight, proj.bias
        if needs_gradient(x, weight, bias):
            return super().forward(hidden_states)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return geglu_linear(x, weight, bias)


def plain(proj: nn.Module) -> bool:
    """Whether a layer is an unmodified nn.Linear, so that multiplying by its weight directly gives its result."""
    return (
        type(proj) is nn.Linear
        and type(proj.weight) is nn.Parameter
        and proj.weight.ndim == 2
        and not (proj._forward_hooks or proj._forward_pre_hooks or proj._backward_hooks or proj._backward_pre_hooks)
        and "forward" not in proj.__dict__
    )
