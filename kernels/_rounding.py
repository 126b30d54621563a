"""A random word for every element of a parameter, and stochastic rounding to bf16 with it.

Random numbers are Philox4x32-10 (Salmon et al., SC 2011) with key ``seed`` and counter (i // 4, step), i the element's
index in its parameter; element i uses word i % 4. So they do not depend on how parameters are sharded. Eager code and
kernels give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the optimizers also run on machines without Triton
    triton = None


def random_words(n: int, first: int, step: int, seed: int, device: torch.device) -> Tensor:
    """One 32-bit word per element as int64 [n], from element ``first`` on; n and first are multiples of 4."""
    quad = torch.arange(first // 4, (first + n) // 4, device=device)
    c0, c1 = quad & 0xFFFFFFFF, quad >> 32
    c2, c3 = torch.full_like(quad, step), torch.zeros_like(quad)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        # products of 64 bits wrap around in int64, with the right bits
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (b >> 32 & 0xFFFFFFFF) ^ c1 ^ k0, b & 0xFFFFFFFF
        c2, c3 = (a >> 32 & 0xFFFFFFFF) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack((c0, c1, c2, c3), dim=1).view(-1)


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """fp32 [n] to bf16 by stochastic rounding with words [n], which preserves the mean; NaN and infinities stay."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + (words & 0xFFFF).to(torch.int32)) & -65536
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def _jit(function: Any) -> Any:
    return None if triton is None else triton.jit(function)


@_jit
def element_words(i_quad, seed_low, seed_high, step):
    """A random uint32 word for each element of the quads [*, Q], [*, 4 Q]; one Philox call yields four."""
    zero = (i_quad * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        i_quad.to(tl.uint32), (i_quad >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero,
        zero + seed_low.to(tl.uint32), zero + seed_high.to(tl.uint32),
    )  # fmt: skip
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@_jit
def round_to_bf16(b_x, b_words):
    """fp32 to bf16 bits by the lower half of each word; NaN and infinities are unchanged. All of one shape."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_rounded = (b_bits + (b_words & 0xFFFF)) >> 16
    # an infinity stays one, and a NaN keeps a mantissa bit, without which it would become an infinity
    b_special = (b_bits >> 16) | tl.where((b_bits & 0x7FFFFF) != 0, 0x40, 0)
    b_rounded = tl.where((b_bits & 0x7F800000) == 0x7F800000, b_special, b_rounded)
    return b_rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
