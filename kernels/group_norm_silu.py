"""group_norm_silu: GroupNorm (Wu and He, arXiv 1803.08494) and the SiLU after it, channels-last or contiguous.

Forward, over the D*H*W elements of a group of D channels of one image::

    mean, var                          rstd = 1 / sqrt(var + eps)            n = (x - mean) rstd
    z = n w + b                        y = z sigmoid(z)   (silu), or z

Backward, the derivative of the above, with ``dz = dy sigmoid(z) (1 + z (1 - sigmoid(z)))``, or dy, and means over the
group::

    dw = sum dz n                      db = sum dz        per channel, over images and pixels
    dx = rstd (w dz - mean(w dz) - n mean(w dz n))

Shapes: x, y [N, C, *]; w, b [C]; groups of equally many adjacent channels. x may be contiguous or channels-last (each
has its own tile shape, nothing is copied; y and dx have x's memory order) and may have gaps between images or channels;
any other layout is copied first.

Dtypes: any float in; statistics of a tile in fp32, as deviations from means (two passes over registers), combined over
tiles in fp64, so a large mean does not spoil the variance; y in x's dtype, dw and db in the weights' dtype.

Work split: an image is cut into tiles of 128 pixels x 64 channels (channels-last) or of up to 8192 elements
(contiguous): 1280 programs for two channels-last images of 320 x 128 x 128, where one program per group would give 64.
Forward takes three launches (tile statistics, group statistics, apply); backward takes three plus the sums for the
weights. All sums have a fixed order; there are no atomics.

Machine instructions per element, channels-last in bf16 (``tests/kernels/test_compile_ahead.py``): statistics 10, apply
13. At fewer bytes per instruction the kernels would be limited by instructions instead of memory.

Bytes per element in half precision: forward 6 (x twice, y once), plus 6 % for partial statistics; backward 10. z is not
kept: the backward pass recomputes it from x. SDXL at 1024 px with two images: 46 calls per forward pass, 1.9 GB.

Status: not measured on a GPU. PyTorch's CUDA GroupNorm copies channels-last images to contiguous ones and back, and
runs 64 programs at batch 2; Liger's supports contiguous images only and has no SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from smpo_fast.kernels._launch import INTERPRET, cdiv, check, launch, needs_gradient, on_kernel, operator, power_of_2
from smpo_fast.kernels._triton import libdevice, tl, triton

# A tile has up to 8 rows of 1024 elements, 8 of each row per thread: threads exchange sums, which costs as much as the
# arithmetic of 40 elements, once in 64 elements. Backward has half as many rows, because it needs more registers.
ROWS, ROWS_BACKWARD, ROW, WARPS = 8, 4, 1024, 4
PIXELS, CHANNELS = 16, 64  # row of a channels-last image; 64 divides every width of SDXL and SD1.5
S, T, U = ("s_n", "s_c", "s_p"), ("t_n", "t_c", "t_p"), ("u_n", "u_c", "u_p")  # names of strides in the kernels


# --- eager reference -------------------------------------------------------------------------------------------


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """``group_norm_silu`` in eager PyTorch: the same arguments and result, in any float dtype."""
    if weight.dtype == x.dtype:
        y = F.group_norm(x, num_groups, weight, bias, eps)
    else:  # under autocast: fp32 weights, half-precision activations
        y = F.group_norm(x.float(), num_groups, weight.float(), bias.float(), eps)
    return (F.silu(y) if silu else y).to(x.dtype)


# --- kernels ---------------------------------------------------------------------------------------------------


if INTERPRET:

    @triton.jit
    def _sigmoid(b_z):
        return 1.0 / (1.0 + tl.exp(-b_z))

else:

    @triton.jit
    def _sigmoid(b_z):
        # 2 ulp, without the code for arguments and results near the limits of fp32, where SiLU is 0 or its argument
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-b_z))


@triton.jit
def _tile(pixels, channels, chunks, blocks, s_n, s_c, s_p, Q: tl.constexpr, CB: tl.constexpr, P: tl.constexpr):
    """This program's image, pixel chunk and channels, and its elements [Q, CB, P]: offsets from its int64 start.

    Pixel p of row q is q * P + p of the chunk. Each thread has the same channels and pixels of all rows, so that
    adding up rows takes no exchange between threads.
    """
    i_block = tl.program_id(0) % blocks
    i_chunk = (tl.program_id(0) // blocks) % chunks
    i_n = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    o_p = tl.arange(0, Q)[:, None, None] * P + tl.arange(0, P)[None, None, :]
    o_c = i_block * CB + tl.arange(0, CB)
    m = (o_c < channels)[None, :, None] & (i_chunk * (Q * P) + o_p < pixels)
    start = i_n * s_n + (i_chunk * (Q * P)).to(tl.int64) * s_p + (i_block * CB).to(tl.int64) * s_c
    o = tl.arange(0, CB)[None, :, None] * s_c + o_p * s_p
    return i_n, i_chunk, o_c, m, start, o


@triton.jit
def _load(p, m, EVEN: tl.constexpr):
    """Elements in fp32; EVEN: all of them exist."""
    return tl.load(p).to(tl.float32) if EVEN else tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, b, m, EVEN: tl.constexpr):
    if EVEN:
        tl.store(p, b.to(p.dtype.element_ty))
    else:
        tl.store(p, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def _z_and_slope(b_n, b_w, b_b, SILU: tl.constexpr):
    """y = f(z) of the normalised tile, and f'(z); f is SiLU or the identity."""
    b_z = b_n * b_w[None, :, None] + b_b[None, :, None]
    if SILU:
        b_s = _sigmoid(b_z)
        return b_z * b_s, b_s * (1.0 + b_z * (1.0 - b_s))
    else:
        return b_z, 1.0


@triton.jit
def _statistics_kernel(
    p_x, p_mean, p_m2, pixels, channels, chunks, blocks, s_n, s_c, s_p,
    Q: tl.constexpr, CB: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel of a tile; both [N, chunks, C].

    Deviations are taken from the mean of the Q pixels that a thread has of a channel, and those means' from the tile's.
    """
    i_n, i_chunk, o_c, m, start, o = _tile(pixels, channels, chunks, blocks, s_n, s_c, s_p, Q, CB, P)
    b_x = _load(p_x + start + o, m, EVEN)
    count = tl.minimum(pixels - i_chunk * (Q * P), Q * P)
    # with this many equal values of half precision every sum is exact, and so is the mean
    exact: tl.constexpr = EVEN and p_x.dtype.element_ty.primitive_bitwidth == 16
    if EVEN:
        b_own_mean = tl.sum(b_x, 0) * (1.0 / Q)
        b_x = b_x - b_own_mean[None, :, :]
        b_mean = tl.sum(b_own_mean, 1) * (1.0 / P)
        b_apart = b_own_mean - b_mean[:, None]
        b_weighted = b_apart * Q
    else:
        b_own = tl.minimum(tl.maximum((count - tl.arange(0, P) + P - 1) // P, 0), Q).to(tl.float32)[None, :]
        b_own_mean = tl.sum(b_x, 0) / tl.maximum(b_own, 1.0)
        b_x = tl.where(m, b_x - b_own_mean[None, :, :], 0.0)
        b_mean = tl.sum(b_own_mean * b_own, 1) / count
        b_apart = b_own_mean - b_mean[:, None]
        b_weighted = b_apart * b_own
    b_m2 = tl.sum(b_x * b_x, 0) + b_weighted * b_apart
    if not exact:  # the mean's own rounding error: without it a constant image would not give exactly b
        b_mean += tl.sum(tl.sum(b_x, 0) + b_weighted, 1) / count
    o_out = (i_n * chunks + i_chunk) * channels + o_c
    tl.store(p_mean + o_out, b_mean, mask=o_c < channels)
    tl.store(p_m2 + o_out, tl.sum(b_m2, 1), mask=o_c < channels)


@triton.jit
def _groups_kernel(
    p_mean, p_m2, p_weight, p_group_mean, p_group_rstd, p_channels,
    pixels, channels, chunks, groups, eps,
    P: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of one group of one image, combined from the tile statistics of its channels.

    p_channels [N, 2, C]: the mean and rstd w again for each channel, which spares the next kernel's threads a division.
    """
    i_n, i_g = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    size = channels // groups
    o_d = tl.arange(0, D)
    b_sum = tl.zeros([K, D], tl.float64)
    b_total = tl.zeros([K, D], tl.float64)
    for k in range(0, chunks, K):
        o_k = k + tl.arange(0, K)
        m = (o_k < chunks)[:, None] & (o_d < size)[None, :]
        b_count = tl.minimum(pixels - o_k * P, P).to(tl.float64)[:, None]
        o = (i_n * chunks + o_k[:, None]) * channels + i_g * size + o_d[None, :]
        b_mean = tl.load(p_mean + o, mask=m, other=0.0).to(tl.float64)
        b_sum += tl.where(m, b_count * b_mean, 0.0)
        b_total += tl.where(m, b_count, 0.0)
    total = tl.sum(tl.sum(b_total, 0), 0)
    mean = tl.sum(tl.sum(b_sum, 0), 0) / total
    b_sum = tl.zeros([K, D], tl.float64)
    for k in range(0, chunks, K):
        o_k = k + tl.arange(0, K)
        m = (o_k < chunks)[:, None] & (o_d < size)[None, :]
        b_count = tl.minimum(pixels - o_k * P, P).to(tl.float64)[:, None]
        o = (i_n * chunks + o_k[:, None]) * channels + i_g * size + o_d[None, :]
        b_apart = tl.load(p_mean + o, mask=m, other=0.0).to(tl.float64) - mean
        b_m2 = tl.load(p_m2 + o, mask=m, other=0.0).to(tl.float64)
        b_sum += tl.where(m, b_m2 + b_count * b_apart * b_apart, 0.0)
    variance = tl.sum(tl.sum(b_sum, 0), 0) / total
    tl.store(p_group_mean + i_n * groups + i_g, mean.to(tl.float32))
    rstd = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    tl.store(p_group_rstd + i_n * groups + i_g, rstd)
    o_c = i_g * size + o_d
    b_w = tl.load(p_weight + o_c, mask=o_d < size, other=0.0).to(tl.float32)
    p_channels += 2 * i_n * channels
    tl.store(p_channels + o_c, tl.zeros([D], tl.float32) + mean.to(tl.float32), mask=o_d < size)
    tl.store(p_channels + channels + o_c, b_w * rstd, mask=o_d < size)


@triton.jit
def _apply_kernel(
    p_x, p_y, p_channels, p_bias,
    pixels, channels, chunks, blocks, s_n, s_c, s_p, t_n, t_c, t_p,
    SILU: tl.constexpr, Q: tl.constexpr, CB: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of y; s and t are the strides of x and y; p_channels [N, 2, C]: mean and rstd w of each channel."""
    i_n, i_chunk, o_c, m, start, o = _tile(pixels, channels, chunks, blocks, s_n, s_c, s_p, Q, CB, P)
    _, _, _, _, start_y, o_y = _tile(pixels, channels, chunks, blocks, t_n, t_c, t_p, Q, CB, P)
    m_c = o_c < channels
    p_channels += 2 * i_n * channels
    b_mean, b_scale = _load(p_channels + o_c, m_c, EVEN), _load(p_channels + channels + o_c, m_c, EVEN)
    b_b = _load(p_bias + o_c, m_c, EVEN)
    b_x = _load(p_x + start + o, m, EVEN) - b_mean[None, :, None]
    b_y, _ = _z_and_slope(b_x, b_scale, b_b, SILU)
    _store(p_y + start_y + o_y, b_y, m, EVEN)


@triton.jit
def _channel_values(p_mean, p_rstd, p_weight, p_bias, i_n, o_c, channels, groups):
    m_c = o_c < channels
    o_g = i_n * groups + o_c // (channels // groups)
    b_mean = tl.load(p_mean + o_g, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_g, mask=m_c, other=0.0)
    b_w = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_b = tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return o_g, m_c, b_mean, b_rstd, b_w, b_b


@triton.jit(do_not_specialize=["images"])
def _bwd_sums_kernel(
    p_x, p_grad_y, p_mean, p_rstd, p_weight, p_bias, p_sums,
    images, pixels, channels, chunks, blocks, groups, s_n, s_c, s_p, t_n, t_c, t_p,
    SILU: tl.constexpr, Q: tl.constexpr, CB: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz n over each channel of a tile: [2, N, chunks, C]; t are the strides of grad_y."""
    i_n, i_chunk, o_c, m, start, o = _tile(pixels, channels, chunks, blocks, s_n, s_c, s_p, Q, CB, P)
    _, _, _, _, start_y, o_y = _tile(pixels, channels, chunks, blocks, t_n, t_c, t_p, Q, CB, P)
    _, m_c, b_mean, b_rstd, b_w, b_b = _channel_values(p_mean, p_rstd, p_weight, p_bias, i_n, o_c, channels, groups)
    b_n = (_load(p_x + start + o, m, EVEN) - b_mean[None, :, None]) * b_rstd[None, :, None]
    _, b_slope = _z_and_slope(b_n, b_w, b_b, SILU)
    b_dz = _load(p_grad_y + start_y + o_y, m, EVEN) * b_slope
    if not EVEN:
        b_dz, b_n = tl.where(m, b_dz, 0.0), tl.where(m, b_n, 0.0)
    b_to_bias, b_to_weight = tl.sum(tl.sum(b_dz, 0), 1), tl.sum(tl.sum(b_dz * b_n, 0), 1)
    o_out = (i_n * chunks + i_chunk) * channels + o_c
    tl.store(p_sums + o_out, b_to_bias, mask=m_c)
    o_out += images.to(tl.int64) * chunks * channels
    tl.store(p_sums + o_out, b_to_weight, mask=m_c)


@triton.jit(do_not_specialize=["images"])
def _bwd_groups_kernel(
    p_sums, p_weight, p_channel_sums, p_group_means, images, pixels, channels, chunks, groups,
    K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One group of one image: sums per channel [2, N, C], and means of w dz and w dz n per group [2, N, G]."""
    i_n, i_g = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    size = channels // groups
    o_d = tl.arange(0, D)
    b_w = tl.load(p_weight + i_g * size + o_d, mask=o_d < size, other=0.0).to(tl.float64)
    for which in range(2):
        i_row = which * images + i_n
        b_sum = tl.zeros([K, D], tl.float64)
        for k in range(0, chunks, K):
            o_k = k + tl.arange(0, K)
            m = (o_k < chunks)[:, None] & (o_d < size)[None, :]
            o = (i_row * chunks + o_k[:, None]) * channels + i_g * size + o_d[None, :]
            b_sum += tl.load(p_sums + o, mask=m, other=0.0).to(tl.float64)
        b_channel = tl.sum(b_sum, 0)
        tl.store(p_channel_sums + i_row * channels + i_g * size + o_d, b_channel.to(tl.float32), mask=o_d < size)
        mean = tl.sum(b_w * b_channel, 0) / pixels / size
        tl.store(p_group_means + i_row * groups + i_g, mean.to(tl.float32))


@triton.jit(do_not_specialize=["images"])
def _bwd_apply_kernel(
    p_x, p_grad_y, p_grad_x, p_mean, p_rstd, p_weight, p_bias, p_group_means,
    images, pixels, channels, chunks, blocks, groups, s_n, s_c, s_p, t_n, t_c, t_p, u_n, u_c, u_p,
    SILU: tl.constexpr, Q: tl.constexpr, CB: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of x; s, t and u are the strides of x, grad_y and grad_x."""
    i_n, i_chunk, o_c, m, start, o = _tile(pixels, channels, chunks, blocks, s_n, s_c, s_p, Q, CB, P)
    _, _, _, _, start_y, o_y = _tile(pixels, channels, chunks, blocks, t_n, t_c, t_p, Q, CB, P)
    _, _, _, _, start_x, o_x = _tile(pixels, channels, chunks, blocks, u_n, u_c, u_p, Q, CB, P)
    o_g, m_c, b_mean, b_rstd, b_w, b_b = _channel_values(p_mean, p_rstd, p_weight, p_bias, i_n, o_c, channels, groups)
    b_c1 = tl.load(p_group_means + o_g, mask=m_c, other=0.0) * b_rstd
    b_c2 = tl.load(p_group_means + images.to(tl.int64) * groups + o_g, mask=m_c, other=0.0) * b_rstd
    b_n = (_load(p_x + start + o, m, EVEN) - b_mean[None, :, None]) * b_rstd[None, :, None]
    _, b_slope = _z_and_slope(b_n, b_w, b_b, SILU)
    b_dz = _load(p_grad_y + start_y + o_y, m, EVEN) * b_slope
    b_w = b_w * b_rstd
    b_dx = b_dz * b_w[None, :, None] - (b_n * b_c2[None, :, None] + b_c1[None, :, None])
    _store(p_grad_x + start_x + o_x, b_dx, m, EVEN)


# --- launchers -------------------------------------------------------------------------------------------------


def _strided(x: Tensor) -> Tensor:
    """[N, C, pixels]: a view if the pixels have a single stride, else a copy."""
    return x.flatten(2)


def _like(x: Tensor) -> Tensor:
    """An uninitialised tensor of the shape of x, channels-last where x is, else contiguous."""
    last = x.ndim == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=form)


def _tiles(x: Tensor, rows: int) -> tuple[int, int, dict[str, int]]:
    """How many chunks of pixels and blocks of channels cover [N, C, pixels], and the kernels' options.

    rows: the most rows of a tile. EVEN says whether tiles cover x exactly.
    """
    channels, pixels = x.shape[1:]
    if x.stride(1) == 1 and channels > 1:
        p, cb = min(PIXELS, power_of_2(pixels)), min(CHANNELS, power_of_2(channels))
    else:
        p = min(ROW, power_of_2(pixels))
        cb = min(ROW // p, power_of_2(channels))
    q = min(rows, cdiv(power_of_2(pixels), p))
    chunks, blocks = cdiv(pixels, q * p), cdiv(channels, cb)
    even = chunks * q * p == pixels and blocks * cb == channels
    return chunks, blocks, {"Q": q, "CB": cb, "P": p, "EVEN": even, "num_warps": WARPS}


def _strides(names: tuple[str, str, str], x: Tensor) -> dict[str, int]:
    """The strides of [N, C, pixels] by the kernels' parameter names."""
    return dict(zip(names, x.stride(), strict=True))


def _join(chunks: int, size: int) -> dict[str, int]:
    d = power_of_2(size)
    return {"K": min(power_of_2(chunks), max(1, 256 // d)), "D": d, "num_warps": 4}


def _group_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _fwd_shapes(x, weight, bias, groups, eps, silu)
    weight, bias = weight.contiguous(), bias.contiguous()
    a, b = _strided(x), _strided(y)
    n, channels, pixels = a.shape
    chunks, blocks, tile = _tiles(a, ROWS)
    options = {"dtype": torch.float32, "device": x.device}
    tile_mean, tile_m2 = torch.empty((2, n, chunks, channels), **options).unbind()
    of_channels = torch.empty((n, 2, channels), **options)
    programs, sizes = n * chunks * blocks, {"pixels": pixels, "channels": channels, "chunks": chunks}
    launch(
        _statistics_kernel, programs, device=x.device, p_x=a, p_mean=tile_mean, p_m2=tile_m2,
        **sizes, blocks=blocks, **_strides(S, a), **tile,
    )  # fmt: skip
    launch(
        _groups_kernel, n * groups, device=x.device,
        p_mean=tile_mean, p_m2=tile_m2, p_weight=weight, p_group_mean=mean, p_group_rstd=rstd, p_channels=of_channels,
        **sizes, groups=groups, eps=eps, P=tile["Q"] * tile["P"], **_join(chunks, channels // groups),
    )  # fmt: skip
    launch(
        _apply_kernel, programs, device=x.device, p_x=a, p_y=b, p_channels=of_channels, p_bias=bias,
        **sizes, blocks=blocks, **_strides(S, a), **_strides(T, b), SILU=silu, **tile,
    )  # fmt: skip
    return y, mean, rstd


def _group_norm_bwd(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, weight, bias = _like(x), weight.contiguous(), bias.contiguous()
    a, b, c = _strided(x), _strided(grad_y), _strided(grad_x)
    n, channels, pixels = a.shape
    chunks, blocks, tile = _tiles(a, ROWS_BACKWARD)
    options = {"dtype": torch.float32, "device": x.device}
    sums = torch.empty((2, n, chunks, channels), **options)
    channel_sums, group_means = torch.empty((2, n, channels), **options), torch.empty((2, n, groups), **options)
    programs = n * chunks * blocks
    sizes = {"images": n, "pixels": pixels, "channels": channels, "chunks": chunks, "groups": groups}
    values = {"p_mean": mean, "p_rstd": rstd, "p_weight": weight, "p_bias": bias}
    strides = {**_strides(S, a), **_strides(T, b)}
    launch(
        _bwd_sums_kernel, programs, device=x.device, p_x=a, p_grad_y=b, **values, p_sums=sums,
        **sizes, blocks=blocks, **strides, SILU=silu, **tile,
    )  # fmt: skip
    launch(
        _bwd_groups_kernel, n * groups, device=x.device,
        p_sums=sums, p_weight=weight, p_channel_sums=channel_sums, p_group_means=group_means, **sizes,
        **_join(chunks, channels // groups),
    )  # fmt: skip
    launch(
        _bwd_apply_kernel, programs, device=x.device,
        p_x=a, p_grad_y=b, p_grad_x=c, **values, p_group_means=group_means,
        **sizes, blocks=blocks, **strides, **_strides(U, c), SILU=silu, **tile,
    )  # fmt: skip
    of_bias, of_weight = (sums.sum(0).to(weight.dtype) for sums in channel_sums)
    return grad_x, of_weight, of_bias


def _fwd_shapes(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device) for _ in range(2))
    return _like(x), mean, rstd


def _bwd_shapes(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), torch.empty_like(weight), torch.empty_like(bias)


_fwd_op = operator(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    _group_norm_fwd,
    _fwd_shapes,
)
_bwd_op = operator(
    "group_norm_silu_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
    _group_norm_bwd,
    _bwd_shapes,
)


# --- autograd --------------------------------------------------------------------------------------------------


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, groups, eps, silu):  # type: ignore[no-untyped-def]
        y, mean, rstd = _fwd_op(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y):  # type: ignore[no-untyped-def]
        grad_x, grad_w, grad_b = _bwd_op(grad_y, *ctx.saved_tensors, ctx.groups, ctx.silu)
        wanted = ctx.needs_input_grad
        return grad_x, grad_w if wanted[1] else None, grad_b if wanted[2] else None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """GroupNorm of x and, unless ``silu`` is False, SiLU of the result; see the top of this file.

    x: [N, C, *] with at least three dimensions, any float dtype; weight, bias: [C]. Returns x's shape, dtype and memory
    order. Raises ValueError for other shapes and if num_groups is below 1 or does not divide C.
    """
    channels = x.shape[1] if x.ndim > 1 else 0
    check(num_groups > 0, f"num_groups is at least 1; found {num_groups}")
    check(x.ndim >= 3 and channels % num_groups == 0, f"{num_groups} groups for a tensor {tuple(x.shape)}")
    check(weight.shape == bias.shape == (channels,), f"weights {tuple(weight.shape)} for {channels} channels")
    if not on_kernel(x):
        return group_norm_silu_reference(x, weight, bias, num_groups=num_groups, eps=eps, silu=silu)
    if not needs_gradient(x, weight, bias):
        return _fwd_op(x, weight, bias, num_groups, eps, silu)[0]
    return _GroupNorm.apply(x, weight, bias, num_groups, eps, silu)


class FusedGroupNorm(nn.GroupNorm):
    """nn.GroupNorm of [N, C, *] that runs the op, without SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, num_groups=self.num_groups, eps=self.eps, silu=False)


class FusedGroupNormSiLU(nn.GroupNorm):
    """nn.GroupNorm of [N, C, *] that runs the op together with the SiLU that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, num_groups=self.num_groups, eps=self.eps, silu=True)
