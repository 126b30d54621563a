"""What the kernels share: the switch between eager code and Triton, operator registration, launches, picture layout.

The switch is ``on_kernel``: Triton on CUDA tensors, Triton's interpreter on any tensor when ``TRITON_INTERPRET=1``
was set before Triton (or PyTorch, which imports it) was imported, eager code otherwise. Nothing here or in the ops
touches a device at import.

Every launcher is registered as an operator of the library ``smpo_fast``, with a rule for the shapes of its results,
so that ``torch.compile`` puts it into its graph as it is. The operators know nothing of gradients: each room has an
``autograd.Function`` around them, which costs half the host time of ``torch.library.custom_op``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("smpo_fast", "FRAGMENT")


def on_kernel(x: Tensor) -> bool:
    """Whether an op on ``x`` runs its kernel; otherwise (also in float64) it runs its eager reference."""
    return (x.is_cuda or INTERPRET) and x.dtype in FLOATS


def operator(name: str, signature: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``run`` as torch.ops.smpo_fast.<name>; ``shapes`` makes its results without data. Returns the op."""
    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smpo_fast::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.smpo_fast, name).default


def launch(kernel: Any, programs: int, *, device: torch.device, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel on ``device``, which need not be the current one.

    ``arguments`` are all of the kernel's parameters and, if needed, options of the compiler (``num_warps``, ...).
    Raises KeyError for a parameter that is missing.
    """
    if programs == 0:
        return
    # by position, since Triton passes keywords through three calls
    values = [arguments.pop(name) for name in kernel.arg_names]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*values, **arguments)


_TICKETS: dict[tuple[torch.device, int], Tensor] = {}


def tickets(count: int, device: torch.device) -> Tensor:
    """int32 zeros [>= count], on which the programs of a launch count their arrivals and which they leave at zero.

    Zeroing them for every call would be a second launch, so a buffer is kept for each stream: the calls of a stream
    follow one another and each finds what the last one left. A CUDA graph is replayed on any stream, beside others
    that were captured on the same one, so a captured call gets a buffer of its own in the graph's memory, zeroed by
    a node of the graph. Under torch.compile the operator runs as it is, and one of the two holds.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _TICKETS or len(_TICKETS[key]) < count:
        _TICKETS[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _TICKETS[key]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n`` (and 1)."""
    return 1 << max(0, n - 1).bit_length()


def channels_last(pictures: Tensor) -> bool:
    """Whether [B, 2, C, H, W] lies in memory as [B, 2, H, W, C] and not as it is written."""
    return not pictures.is_contiguous() and pictures.permute(0, 1, 3, 4, 2).is_contiguous()


def is_packed(pictures: Tensor) -> bool:
    """Whether [B, 2, C, H, W] has no gaps and its pictures lie in the order C, H, W or H, W, C."""
    return pictures.is_contiguous() or channels_last(pictures)


def packed(pictures: Tensor) -> Tensor:
    """``pictures`` if it is packed, else a packed copy."""
    return pictures if is_packed(pictures) else pictures.contiguous()


def packed_like(pictures: Tensor, like: Tensor) -> Tensor:
    """``pictures`` in the memory order of ``like``, which is packed: a copy only of what lies otherwise."""
    if channels_last(like):
        return pictures.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return pictures.contiguous()


def transposition(pictures: Tensor, other: Tensor) -> int:
    """How to find element i of a packed picture in another packed tensor of the same shape.

    0: at i, the orders agree. Else m: at ``(i % m) * (n // m) + i // m`` for pictures of n elements.
    """
    channels, height, width = pictures.shape[2:]
    if channels_last(pictures) == channels_last(other):
        return 0
    return channels if channels_last(pictures) else height * width


def check(condition: bool, message: str) -> None:
    """Raise ValueError: the caller handed over tensors that an op cannot take."""
    if not condition:
        raise ValueError(message)
