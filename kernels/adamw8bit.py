"""adamw8bit: one AdamW step with 8-bit states over a flat parameter, in one pass, independent of how it is sharded.

AdamW (arXiv 1711.05101) with g the gradient times ``grad_scale``, t the step (the first is 1), for every element::

    m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr/(1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

This step's m and v enter the update unrounded. Stored are 8-bit codes (block-wise quantisation as in 8-bit Adam, arXiv
2110.02861, with the codes below instead of its dynamic ones) and, per block of 256 elements, the largest |m| and the
largest v in fp32::

    m = m_scale sign(k) (k/127)^4,  k = -127..127       v = v_scale (k/255)^4,  k = 0..255

The values of neighbouring codes differ by 2 to 3 % near the block's largest value and by 30 % four decades below it.
Products, quotients and square roots follow IEEE rounding and nothing is contracted into fused multiply-adds, so no
lookup table is needed and every device computes the same codes. m is rounded to the nearest code. v is rounded
stochastically, which preserves its mean: beta2 = 0.999 changes v by a thousandth per step, less than half a code, so
with rounding to nearest it would hardly change after its first hundred steps. A positive v is never rounded to 0: an
element whose gradients are tiny compared to its neighbours' takes steps up to 3 times too large or too small, but never
unbounded ones.

Weights are fp32, or bf16 with stochastic rounding: at a learning rate of 1e-5 a step is a fraction of bf16's spacing,
and rounding to nearest would leave the weight unchanged.

A block in which a gradient, or the v that follows from it, is not finite is left as it was, weights and states: its
scales would become infinite or NaN, and with them the states of all its elements.

Every element has a random word per step (``_rounding.py``): the upper half is for v, the lower half for the weight.
Blocks too are counted from the parameter's start. A slice therefore gives exactly the bits that the whole parameter
gives; only a block divided between slices needs the maxima of both sides, see ``adamw8bit_block_max``. Use a different
seed for every parameter.

Shapes: everything [n], scales [blocks touched]. Dtypes: weight fp32 or bf16, gradient any float, arithmetic fp32.

Bytes per element: states 2.03; moved per step 16.1 (fp32 weight and gradient), 12.1 (bf16 weight), 10.1 (both bf16).

Status: not measured on a GPU. On a CPU, and without Triton, the eager reference runs instead and gives the same bits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smpo_fast.kernels._launch import INTERPRET, cdiv, check, launch, on_kernel
from smpo_fast.kernels._rounding import element_words, random_words, round_stochastically, round_to_bf16

try:
    import triton
    import triton.language as tl
except ImportError:  # the optimizer also runs on machines without Triton
    triton = None

BLOCK = 256  # elements that share their scales
M_CODES, V_CODES = 127, 255
ROWS, WARPS = 64 if INTERPRET else 4, 4  # blocks per program: one per warp, or many under the interpreter, for speed
CPU_CHUNK, CHUNK = 256, 2**16  # blocks per iteration of eager code; on a CPU they should fit its cache


class State(NamedTuple):
    """Codes [n] and scales [blocks touched] of a parameter or a slice of one; zeros before the first step."""

    m8: Tensor
    v8: Tensor
    m_scale: Tensor
    v_scale: Tensor


def adamw8bit_state(n: int, device: torch.device | str | None = None, offset: int = 0) -> State:
    """States for ``n`` elements that begin at element ``offset`` of their parameter, before the first step."""
    blocks = blocks_touched(n, offset)
    codes = (torch.zeros(n, dtype=dtype, device=device) for dtype in (torch.int8, torch.uint8))
    scales = (torch.zeros(blocks, dtype=torch.float32, device=device) for _ in range(2))
    return State(*codes, *scales)


def blocks_touched(n: int, offset: int = 0) -> int:
    """How many of a parameter's blocks have elements in [offset, offset + n)."""
    return cdiv(offset % BLOCK + n, BLOCK)


# --- eager reference -------------------------------------------------------------------------------------------


def adamw8bit_step_reference(
    weight: Tensor,
    grad: Tensor,
    m8: Tensor,
    v8: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | float = 1.0,
    seed: int = 0,
    offset: int = 0,
    m_max: Tensor | None = None,
    v_max: Tensor | None = None,
) -> None:
    """``adamw8bit_step`` in eager PyTorch: the same arguments, and the same results to the bit."""
    decay, rate, root = _factors(lr, beta1, beta2, weight_decay, step)
    for part, blocks, first in _chunks(weight, offset):
        w, g, codes_m, codes_v = weight[part], grad[part], m8[part], v8[part]
        lead = first % BLOCK
        m, v = _moments(g, codes_m, codes_v, m_scale[blocks], v_scale[blocks], beta1, beta2, grad_scale, lead)
        words = random_words(m.numel(), first - lead, step, seed, weight.device).view_as(m)
        largest_m, largest_v = _largest(m.abs(), m_max, blocks), _largest(v, v_max, blocks)
        finite = largest_v < math.inf
        m_scale[blocks] = torch.where(finite, largest_m, m_scale[blocks])
        v_scale[blocks] = torch.where(finite, largest_v, v_scale[blocks])
        kept = _flat(finite[:, None].expand_as(m).contiguous(), lead, len(w))
        codes_m.copy_(torch.where(kept, _flat(_encode_m(m, largest_m), lead, len(w)), codes_m))
        codes_v.copy_(torch.where(kept, _flat(_encode_v(v, largest_v, words), lead, len(w)), codes_v))
        update = _flat(m / (_sqrt(v) * root + eps), lead, len(w))
        new = w.float() * decay - update * rate
        new = new if w.dtype == torch.float32 else round_stochastically(new, _flat(words, lead, len(w)))
        w.copy_(torch.where(kept, new, w))


def adamw8bit_block_max_reference(
    grad: Tensor,
    m8: Tensor,
    v8: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    *,
    beta1: float,
    beta2: float,
    grad_scale: Tensor | float = 1.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """``adamw8bit_block_max`` in eager PyTorch: the same arguments, and the same results to the bit."""
    found = []
    for part, blocks, first in _chunks(grad, offset):
        scales = (m_scale[blocks], v_scale[blocks])
        m, v = _moments(grad[part], m8[part], v8[part], *scales, beta1, beta2, grad_scale, first % BLOCK)
        found.append((m.abs().amax(1), v.amax(1)))
    if not found:
        return grad.new_zeros(0, dtype=torch.float32), grad.new_zeros(0, dtype=torch.float32)
    return torch.cat([m for m, _ in found]), torch.cat([v for _, v in found])


def _factors(lr: float, beta1: float, beta2: float, weight_decay: float, step: int) -> tuple[float, float, float]:
    """A step's factors: of the weight, of the update, and of sqrt(v) in the update."""
    return 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5


def _chunks(x: Tensor, offset: int) -> Iterator[tuple[slice, slice, int]]:
    """Slices of the elements and of the blocks touched, and the index of the first element in the parameter."""
    lead, n, chunk = offset % BLOCK, len(x), CPU_CHUNK if x.device.type == "cpu" else CHUNK
    for block in range(0, blocks_touched(n, offset), chunk):
        begin, end = max(0, block * BLOCK - lead), min(n, (block + chunk) * BLOCK - lead)
        yield slice(begin, end), slice(block, block + chunk), offset + begin


def _by_block(x: Tensor, lead: int) -> Tensor:
    """[n] -> [blocks, BLOCK], with zeros where the first and the last block extend beyond the slice."""
    tail = -(lead + len(x)) % BLOCK
    return (F.pad(x, (lead, tail)) if lead or tail else x).view(-1, BLOCK)


def _flat(x: Tensor, lead: int, n: int) -> Tensor:
    return x.view(-1)[lead : lead + n]


def _moments(
    grad: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor,
    beta1: float, beta2: float, grad_scale: Tensor | float, lead: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m and v of this step, [blocks, BLOCK] fp32; v is infinite where it is not finite, and never NaN."""
    g = _by_block(grad, lead).float() * (grad_scale.float() if isinstance(grad_scale, Tensor) else grad_scale)
    m8, v8 = _by_block(m8, lead).float(), _by_block(v8, lead).float()
    m, v = _fourth_power(m8, M_CODES) * m8.sign() * m_scale[:, None], _fourth_power(v8, V_CODES) * v_scale[:, None]
    v = v * beta2 + g * g * (1 - beta2)
    return m * beta1 + g * (1 - beta1), torch.where(v < math.inf, v, math.inf)


def _largest(x: Tensor, joint: Tensor | None, blocks: slice) -> Tensor:
    """The largest value of each block [blocks], or the given one where that is not negative."""
    largest = x.amax(1)
    return largest if joint is None else torch.where(joint[blocks] >= 0, joint[blocks], largest)


def _fourth_power(code: Tensor, codes: int) -> Tensor:
    square = code * code
    return square * square * codes**-4


def _encode_m(m: Tensor, scale: Tensor) -> Tensor:
    """The nearest code, int8."""
    x, low, bottom, top = _between(m.abs(), scale, M_CODES)
    return (torch.where(x - bottom > (top - bottom) * 0.5, low + 1, low) * m.sign()).to(torch.int8)


def _encode_v(v: Tensor, scale: Tensor, words: Tensor) -> Tensor:
    """Stochastic rounding to the code below or above, by the words' upper half; never 0 for a positive v."""
    x, low, bottom, top = _between(v, scale, V_CODES)
    chance = ((words >> 16).float() + 0.5) * 2**-16
    code = torch.where(x - bottom > (top - bottom) * chance, low + 1, low)
    return torch.where(v > 0, code.clamp(min=1), 0).to(torch.uint8)


def _between(x: Tensor, scale: Tensor, codes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x / scale (0 in a block of zeros), the code below it, and the values of that code and of the next."""
    x = x / torch.where(scale > 0, scale, 1)[:, None]
    low = (_sqrt(_sqrt(x)) * codes).floor().clamp(max=codes - 1)
    return x, low, _fourth_power(low, codes), _fourth_power(low + 1, codes)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root, which PyTorch's for fp32 is not on every CPU."""
    return x.double().sqrt().float() if x.device.type == "cpu" else x.sqrt()


# --- kernels ---------------------------------------------------------------------------------------------------


def _jit(function: Any) -> Any:
    if triton is None:
        return None
    varying = ["first_block", "seed_low", "seed_high", "step"]
    return triton.jit(function, do_not_specialize=[n for n in varying if n in inspect.signature(function).parameters])


@_jit
def _fourth_power_of(b_code, CODES: tl.constexpr):
    b_square = b_code * b_code
    return b_square * b_square * (1.0 / (CODES * CODES * CODES * CODES))


@_jit
def _new_moments(
    p_grad, p_m8, p_v8, p_m_scale, p_v_scale, p_grad_scale, grad_scale,
    n, lead, blocks, beta1, beta2, new1, new2,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, M_CODES: tl.constexpr, V_CODES: tl.constexpr,
):  # fmt: skip
    """This step's m and v [ROWS, BLOCK]; the block indices [ROWS] and element offsets, each with its mask.

    v is infinite where it is not finite, and never NaN, which a maximum would ignore.
    """
    i_block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_block = i_block < blocks
    o = i_block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :] - lead
    m = (o >= 0) & (o < n)
    if SCALE:
        grad_scale = tl.load(p_grad_scale).to(tl.float32)
    b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32) * grad_scale
    b_m8 = tl.load(p_m8 + o, mask=m, other=0).to(tl.float32)
    b_v8 = tl.load(p_v8 + o, mask=m, other=0).to(tl.float32)
    b_m = _fourth_power_of(b_m8, M_CODES)
    b_m = tl.where(b_m8 < 0, -b_m, b_m) * tl.load(p_m_scale + i_block, mask=m_block, other=0.0)[:, None]
    b_v = _fourth_power_of(b_v8, V_CODES) * tl.load(p_v_scale + i_block, mask=m_block, other=0.0)[:, None]
    b_m = b_m * beta1 + b_grad * new1
    b_v = b_v * beta2 + b_grad * b_grad * new2
    b_v = tl.where(b_v < float("inf"), b_v, float("inf"))
    return b_m, b_v, i_block, m_block, o, m


@_jit
def _largest_of(p_joint, b_x, i_block, m_block, JOINT: tl.constexpr):
    """The largest value of each block [ROWS]; if JOINT the given one, where that is not negative."""
    b_largest = tl.max(b_x, 1)
    if JOINT:
        b_joint = tl.load(p_joint + i_block, mask=m_block, other=0.0)
        b_largest = tl.where(b_joint >= 0, b_joint, b_largest)
    return b_largest


@_jit
def _code(b_x, b_scale, b_chance, CODES: tl.constexpr):
    """The code below x / scale, or the one above if x is further between the two than ``chance`` (0 to 1); fp32."""
    b_x = tl.div_rn(b_x, tl.where(b_scale > 0, b_scale, 1.0))
    b_low = tl.floor(tl.sqrt_rn(tl.sqrt_rn(b_x)) * CODES)
    b_low = tl.minimum(b_low, CODES - 1.0)
    b_bottom, b_top = _fourth_power_of(b_low, CODES), _fourth_power_of(b_low + 1.0, CODES)
    return tl.where(b_x - b_bottom > (b_top - b_bottom) * b_chance, b_low + 1.0, b_low)


@_jit
def _step_kernel(
    p_weight, p_grad, p_m8, p_v8, p_m_scale, p_v_scale, p_m_max, p_v_max, p_grad_scale, grad_scale,
    n, lead, blocks, first_block, step, seed_low, seed_high, beta1, beta2, new1, new2, eps, decay, rate, root,
    SCALE: tl.constexpr, M_JOINT: tl.constexpr, V_JOINT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, M_CODES: tl.constexpr, V_CODES: tl.constexpr,
):  # fmt: skip
    """Update the weights, codes and scales of ROWS blocks, except of those with a v that is not finite."""
    b_m, b_v, i_block, m_block, o, m = _new_moments(
        p_grad, p_m8, p_v8, p_m_scale, p_v_scale, p_grad_scale, grad_scale,
        n, lead, blocks, beta1, beta2, new1, new2, SCALE, ROWS, BLOCK, M_CODES, V_CODES,
    )  # fmt: skip
    b_largest_m = _largest_of(p_m_max, tl.abs(b_m), i_block, m_block, M_JOINT)
    b_largest_v = _largest_of(p_v_max, b_v, i_block, m_block, V_JOINT)
    m_block &= b_largest_v < float("inf")
    m &= m_block[:, None]
    tl.store(p_m_scale + i_block, b_largest_m, mask=m_block)
    tl.store(p_v_scale + i_block, b_largest_v, mask=m_block)
    i_quad = (i_block + first_block)[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    b_words = element_words(i_quad, seed_low, seed_high, step)
    b_new = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32) * decay
    b_new -= tl.div_rn(b_m, tl.sqrt_rn(b_v) * root + eps) * rate
    if p_weight.dtype.element_ty == tl.bfloat16:
        tl.store(p_weight + o, round_to_bf16(b_new, b_words), mask=m)
    else:
        tl.store(p_weight + o, b_new, mask=m)
    b_code = _code(tl.abs(b_m), b_largest_m[:, None], 0.5, M_CODES)
    tl.store(p_m8 + o, tl.where(b_m < 0, -b_code, b_code).to(tl.int8), mask=m)
    b_chance = ((b_words >> 16).to(tl.float32) + 0.5) * 0.0000152587890625
    b_code = tl.maximum(_code(b_v, b_largest_v[:, None], b_chance, V_CODES), 1.0)
    tl.store(p_v8 + o, tl.where(b_v > 0, b_code, 0.0).to(tl.int32).to(tl.uint8), mask=m)


@_jit
def _block_max_kernel(
    p_grad, p_m8, p_v8, p_m_scale, p_v_scale, p_m_max, p_v_max, p_grad_scale, grad_scale,
    n, lead, blocks, beta1, beta2, new1, new2,
    SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, M_CODES: tl.constexpr, V_CODES: tl.constexpr,
):  # fmt: skip
    """The largest |m| and v of ROWS blocks; v infinite where it is not finite."""
    b_m, b_v, i_block, m_block, _o, _m = _new_moments(
        p_grad, p_m8, p_v8, p_m_scale, p_v_scale, p_grad_scale, grad_scale,
        n, lead, blocks, beta1, beta2, new1, new2, SCALE, ROWS, BLOCK, M_CODES, V_CODES,
    )  # fmt: skip
    tl.store(p_m_max + i_block, _largest_of(p_m_max, tl.abs(b_m), i_block, m_block, False), mask=m_block)
    tl.store(p_v_max + i_block, _largest_of(p_v_max, b_v, i_block, m_block, False), mask=m_block)


# --- launchers -------------------------------------------------------------------------------------------------


def _tile() -> dict[str, Any]:
    return {
        "ROWS": ROWS, "BLOCK": BLOCK, "M_CODES": M_CODES, "V_CODES": V_CODES,
        # fused multiply-adds would round differently from a CPU
        "num_warps": WARPS, "enable_fp_fusion": False,
    }  # fmt: skip


def _sizes(x: Tensor, scale: Tensor, offset: int) -> dict[str, int]:
    """Number of elements, position of the first one in its block, and number of blocks."""
    return {"n": len(x), "lead": offset % BLOCK, "blocks": len(scale)}


def _gradient_scale(grad_scale: Tensor | float, unread: Tensor) -> dict[str, Any]:
    """A scale on the device is read there; one on the host is passed by value, with any tensor as the pointer."""
    if isinstance(grad_scale, Tensor):
        return {"p_grad_scale": grad_scale, "grad_scale": 1.0, "SCALE": True}
    return {"p_grad_scale": unread, "grad_scale": float(grad_scale), "SCALE": False}


def _step(
    weight: Tensor, grad: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    grad_scale: Tensor | float, seed: int, offset: int, m_max: Tensor | None, v_max: Tensor | None,
) -> None:  # fmt: skip
    decay, rate, root = _factors(lr, beta1, beta2, weight_decay, step)
    launch(
        _step_kernel, cdiv(len(m_scale), ROWS), device=weight.device,
        p_weight=weight, p_grad=grad, p_m8=m8, p_v8=v8, p_m_scale=m_scale, p_v_scale=v_scale,
        p_m_max=m_scale if m_max is None else m_max, p_v_max=v_scale if v_max is None else v_max,
        **_gradient_scale(grad_scale, m_scale), **_sizes(weight, m_scale, offset), first_block=offset // BLOCK,
        step=step, seed_low=_signed(seed), seed_high=_signed(seed >> 32),
        beta1=beta1, beta2=beta2, new1=1 - beta1, new2=1 - beta2, eps=eps, decay=decay, rate=rate, root=root,
        M_JOINT=m_max is not None, V_JOINT=v_max is not None, **_tile(),
    )  # fmt: skip


def _block_max(
    grad: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor,
    *, beta1: float, beta2: float, grad_scale: Tensor | float, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m_max, v_max = torch.empty_like(m_scale), torch.empty_like(v_scale)
    launch(
        _block_max_kernel, cdiv(len(m_scale), ROWS), device=grad.device,
        p_grad=grad, p_m8=m8, p_v8=v8, p_m_scale=m_scale, p_v_scale=v_scale, p_m_max=m_max, p_v_max=v_max,
        **_gradient_scale(grad_scale, m_scale), **_sizes(grad, m_scale, offset),
        beta1=beta1, beta2=beta2, new1=1 - beta1, new2=1 - beta2, **_tile(),
    )  # fmt: skip
    return m_max, v_max


def _signed(word: int) -> int:
    """The lower 32 bits as int32, so that every seed has the same type and none triggers a recompilation."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


# --- public ----------------------------------------------------------------------------------------------------


def adamw8bit_step(
    weight: Tensor,
    grad: Tensor,
    m8: Tensor,
    v8: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Tensor | float = 1.0,
    seed: int = 0,
    offset: int = 0,
    m_max: Tensor | None = None,
    v_max: Tensor | None = None,
) -> None:
    """One step in place: writes weight, codes and scales; see the top of this file.

    weight: [n] fp32 or bf16; grad: [n]; m8, v8: [n] int8 and uint8; m_scale, v_scale: [blocks touched] fp32; all
    contiguous, as ``adamw8bit_state`` makes them. step: 1, 2, ...; grad_scale: a number, or a tensor of one on the
    weight's device; seed: 0 to 2^63 - 1; offset: the index of the first element in its parameter. m_max, v_max:
    [blocks touched] fp32, used as the blocks' largest values instead of the maxima over this slice, except where
    negative; needed for blocks that are divided between slices. A block whose new v is not finite, or whose v_max is
    infinite, stays as it is. Raises ValueError for other shapes and dtypes.
    """
    _check(weight, grad, m8, v8, m_scale, v_scale, offset)
    check(weight.dtype in (torch.float32, torch.bfloat16), f"weights are fp32 or bf16; found {weight.dtype}")
    check(step >= 1, f"steps count from 1; found {step}")
    run = _step if triton is not None and on_kernel(weight) else adamw8bit_step_reference
    run(
        weight, grad, m8, v8, m_scale, v_scale, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        step=step, grad_scale=grad_scale, seed=seed, offset=offset, m_max=m_max, v_max=v_max,
    )  # fmt: skip


def adamw8bit_block_max(
    grad: Tensor,
    m8: Tensor,
    v8: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    *,
    beta1: float,
    beta2: float,
    grad_scale: Tensor | float = 1.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The largest |m| and v of each block touched after the next step: two tensors [blocks touched] fp32.

    For blocks divided between slices: take the maximum of both sides (``all_reduce`` with MAX) and pass it to
    ``adamw8bit_step`` as m_max and v_max. The largest v is infinite where it is not finite, so that all slices of the
    block skip the step. Arguments and errors as there; nothing is written.
    """
    _check(grad, grad, m8, v8, m_scale, v_scale, offset)
    run = _block_max if triton is not None and on_kernel(grad) else adamw8bit_block_max_reference
    return run(grad, m8, v8, m_scale, v_scale, beta1=beta1, beta2=beta2, grad_scale=grad_scale, offset=offset)


def _check(weight: Tensor, grad: Tensor, m8: Tensor, v8: Tensor, m_scale: Tensor, v_scale: Tensor, offset: int) -> None:
    n, blocks = len(weight), blocks_touched(len(weight), offset)
    for name, x, length in (
        ("weight", weight, n), ("grad", grad, n), ("m8", m8, n), ("v8", v8, n),
        ("m_scale", m_scale, blocks), ("v_scale", v_scale, blocks),
    ):  # fmt: skip
        check(x.shape == (length,) and x.is_contiguous(), f"{name} is [{length}], contiguous; found {tuple(x.shape)}")
    check(m8.dtype == torch.int8 and v8.dtype == torch.uint8, f"codes are int8 and uint8; found {m8.dtype}, {v8.dtype}")
