"""ema: moving averages of the weights, for many slices of parameters in one pass over memory and one launch.

For every element, with d the ``decay`` of this step (Polyak averaging with exponential weights, as EDM2 applies it:
arXiv 2312.02696, section 3)::

    average = average + (1 - d) (weight - average)

The difference, its product with 1 - d, and the sum are each rounded to fp32 and nothing is contracted into fused
multiply-adds, so every device computes the same bits; ``torch.lerp`` is contracted on some and not on others.

An average is fp32, or bf16 with stochastic rounding: its change is a thousandth of the distance to the weight or less,
far below bf16's spacing, so rounding to nearest would leave it where it is. Every element has a random word per step
(``_rounding.py``), of which the lower half is used. Elements are counted from the parameter's start, so a slice gives
exactly the bits that the whole parameter gives. Use a different seed for every parameter.

A UNet has over a thousand parameters, most of them small, so there is one launch for all of them: addresses, lengths,
offsets and seeds of all slices are written to a table, and a program finds its slice there. Slices whose memory is
aligned to 16 bytes and whose length is a multiple of 16 have wide accesses; the others have a second launch.

Shapes: [n] each. Dtypes: averages fp32 or bf16, weights fp32 or bf16, arithmetic fp32.

Bytes moved per element: 12 (both fp32), 10 (bf16 weight), 8 (bf16 average), 6 (both bf16).

Status: not measured on a GPU. On a CPU, and without Triton, the eager reference runs instead and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from smpo_fast.kernels._launch import cdiv, check, launch, on_kernel
from smpo_fast.kernels._rounding import element_words, random_words, round_stochastically, round_to_bf16

try:
    import triton
    import triton.language as tl
except ImportError:  # averages are also kept on machines without Triton
    triton = None

QUAD = 4  # elements that share a call of the random number generator
WIDE = 16  # bytes of the widest access; also how many elements a slice with such accesses is a multiple of
TILE, WARPS = 4096, 8  # elements per program
CPU_CHUNK, CHUNK = 2**16, 2**24  # elements per iteration of eager code; on a CPU they should fit its cache


# --- eager reference -------------------------------------------------------------------------------------------


def ema_update_reference(
    averages: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    decay: float,
    step: int,
    seeds: Sequence[int],
    offsets: Sequence[int],
) -> None:
    """``ema_update`` in eager PyTorch: the same arguments, and the same results to the bit."""
    for average, weight, seed, offset in zip(averages, weights, seeds, offsets, strict=True):
        chunk = CPU_CHUNK if average.device.type == "cpu" else CHUNK
        for begin in range(0, len(average), chunk):
            part = slice(begin, min(begin + chunk, len(average)))
            old = average[part].float()
            new = (weight[part].float() - old).mul_(1 - decay).add_(old)
            if average.dtype == torch.bfloat16:
                new = round_stochastically(new, _words(len(new), offset + begin, step, seed, new.device))
            average[part] = new


def _words(n: int, first: int, step: int, seed: int, device: torch.device) -> Tensor:
    """A random word for each of the elements [first, first + n) of a parameter."""
    lead = first % QUAD
    return random_words(cdiv(lead + n, QUAD) * QUAD, first - lead, step, seed, device)[lead : lead + n]


# --- kernels ---------------------------------------------------------------------------------------------------


def _jit(function: Any) -> Any:
    return None if triton is None else triton.jit(function, do_not_specialize=["step"])


@_jit
def _update_kernel(
    p_table, p_slice, rate, step,
    AVERAGE: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, QUAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Update TILE elements of the slice that the program's number belongs to."""
    program = tl.program_id(0)
    p_row = p_table + tl.load(p_slice + program) * 6
    average, weight, n = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    offset, seed, first_program = tl.load(p_row + 3), tl.load(p_row + 4), tl.load(p_row + 5)
    p_average, p_weight = average.to(tl.pointer_type(AVERAGE)), weight.to(tl.pointer_type(WEIGHT))
    n, lead = n.to(tl.int32), (offset % QUAD).to(tl.int32)
    if ALIGNED:
        p_average, p_weight, n = (
            tl.multiple_of(p_average, WIDE),
            tl.multiple_of(p_weight, WIDE),
            tl.multiple_of(n, WIDE),
        )
        lead = 0
    i_tile = (program - first_program).to(tl.int32)
    o = i_tile * TILE + tl.arange(0, TILE) - lead
    m = (o >= 0) & (o < n)
    b_average = tl.load(p_average + o, mask=m, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32)
    b_new = (b_weight - b_average) * rate + b_average
    if AVERAGE == tl.bfloat16:
        i_quad = offset // QUAD + i_tile * (TILE // QUAD) + tl.arange(0, TILE // QUAD)
        b_words = element_words(i_quad, seed, seed >> 32, step)
        tl.store(p_average + o, round_to_bf16(b_new, b_words), mask=m)
    else:
        tl.store(p_average + o, b_new, mask=m)


# --- launchers -------------------------------------------------------------------------------------------------


def _update(
    averages: Sequence[Tensor], weights: Sequence[Tensor],
    *, decay: float, step: int, seeds: Sequence[int], offsets: Sequence[int],
) -> None:  # fmt: skip
    dtypes = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
    rows = [
        (average.data_ptr(), weight.data_ptr(), len(average), offset, seed)
        for average, weight, offset, seed in zip(averages, weights, offsets, seeds, strict=True)
        if len(average)
    ]
    for aligned in (True, False):
        chosen = [row for row in rows if _is_aligned(*row) == aligned]
        if not chosen:
            continue
        tiles = [cdiv(n + offset % QUAD, TILE) for _, _, n, offset, _ in chosen]
        first = accumulate(tiles, initial=0)
        device = averages[0].device
        table = _upload([(*row, begin) for row, begin in zip(chosen, first, strict=False)], torch.int64, device)
        counts = _upload(tiles, torch.int32, device)
        launch(
            _update_kernel, sum(tiles), device=device, p_table=table,
            p_slice=torch.repeat_interleave(counts, output_size=sum(tiles)), rate=1 - decay, step=step,
            AVERAGE=dtypes[averages[0].dtype], WEIGHT=dtypes[weights[0].dtype], ALIGNED=aligned,
            TILE=TILE, QUAD=QUAD, WIDE=WIDE, num_warps=WARPS,
            enable_fp_fusion=False,  # fused multiply-adds would round differently from a CPU
        )  # fmt: skip


def _is_aligned(average: int, weight: int, n: int, offset: int, seed: int) -> bool:
    return not (average % WIDE or weight % WIDE or n % WIDE or offset % QUAD)


def _upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values on the device, without waiting for it."""
    made = torch.tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


# --- public ----------------------------------------------------------------------------------------------------


def ema_update(
    averages: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    decay: float,
    step: int,
    seeds: Sequence[int],
    offsets: Sequence[int],
) -> None:
    """Move every average towards its weights, in place; see the top of this file.

    averages, weights: [n] of any n below 2^31, contiguous, fp32 or bf16, each list of one dtype and both on one device.
    decay: 0 to 1; step: another one for every call; seeds: of each parameter, 0 to 2^63 - 1; offsets: the index of each
    slice's first element in its parameter. Raises ValueError for other shapes, dtypes and devices.
    """
    _check(averages, weights)
    if not averages:
        return
    run = _update if triton is not None and on_kernel(averages[0]) else ema_update_reference
    run(averages, weights, decay=decay, step=step, seeds=seeds, offsets=offsets)


def _check(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for average, weight in zip(averages, weights, strict=True):
        check(
            average.shape == weight.shape and average.ndim == 1 and len(average) < 2**31,
            f"an average and its weights are [n]; found {tuple(average.shape)} and {tuple(weight.shape)}",
        )
        check(average.is_contiguous() and weight.is_contiguous(), "averages and weights are contiguous")
    for name, tensors in (("averages", averages), ("weights", weights)):
        dtypes = {x.dtype for x in tensors}
        check(len(dtypes) <= 1, f"all {name} have one dtype; found {dtypes}")
        check(dtypes <= {torch.float32, torch.bfloat16}, f"{name} are fp32 or bf16; found {dtypes}")
    devices = {x.device for x in (*averages, *weights)}
    check(len(devices) <= 1, f"averages and weights are on one device; found {devices}")
