"""Shared by all kernels: eager/Triton dispatch, operator registration, launching, and image memory layout.

``on_kernel`` decides what runs: Triton on CUDA tensors; Triton's interpreter on any tensor if ``TRITON_INTERPRET=1``
was set before Triton (or PyTorch, which imports it) was imported; eager code otherwise. Importing these modules never
touches a device.

Every launcher is registered as an operator of the library ``smpo_fast`` together with a function that computes the
shapes of its results, so that ``torch.compile`` includes it in its graph unchanged. The operators define no gradients:
each module wraps them in a ``torch.autograd.Function``, which costs half the host time of
``torch.library.custom_op``, and calls them directly where no gradient is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("smpo_fast", "FRAGMENT")


def on_kernel(x: Tensor) -> bool:
    """Whether an op on ``x``, of any shape, runs its kernel.

    Otherwise, and always in float64, it runs its eager reference.
    """
    return (x.is_cuda or INTERPRET) and x.dtype in FLOATS


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def operator(name: str, signature: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``run`` as torch.ops.smpo_fast.<name> and return it; ``shapes`` allocates its results without data."""
    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smpo_fast::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.smpo_fast, name).default


def launch(kernel: Any, programs: int, *, device: torch.device, **arguments: Any) -> None:
    """Run ``programs`` programs of a kernel on ``device``, which need not be the current one.

    ``arguments`` are all of the kernel's parameters and, if needed, options of the compiler (``num_warps``, ...).
    Products and sums are contracted unless ``enable_fp_fusion`` is False; versions of Triton differ in the default.
    Raises KeyError for a parameter that is missing.
    """
    if programs == 0:
        return
    # by position, since Triton passes keywords through three calls
    values = [arguments.pop(name) for name in kernel.arg_names]
    arguments.setdefault("enable_fp_fusion", True)
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        kernel[(programs,)](*values, **arguments)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*values, **arguments)


_TICKETS: dict[tuple[torch.device, int], Tensor] = {}


def tickets(count: int, device: torch.device) -> Tensor:
    """int32 zeros [>= count]: counters with which a launch finds its last-arriving programs, and which it resets to 0.

    Zeroing them for every call would cost a second launch, so one buffer is kept per stream: calls on a stream run one
    after another, and each finds the zeros that the previous one left. A CUDA graph can be replayed on any stream,
    concurrently with other graphs captured on the same one, so a captured call gets its own buffer in the graph's
    memory, zeroed by a node of the graph. ``torch.compile`` runs the operator unchanged, so one of these two cases
    applies.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _TICKETS or len(_TICKETS[key]) < count:
        _TICKETS[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return _TICKETS[key]


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has; without a GPU, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n`` (and 1)."""
    return 1 << max(0, n - 1).bit_length()


def channels_last(images: Tensor) -> bool:
    """Whether [B, 2, C, H, W] is stored as [B, 2, H, W, C] rather than contiguously."""
    return not images.is_contiguous() and images.permute(0, 1, 3, 4, 2).is_contiguous()


def is_packed(images: Tensor) -> bool:
    """Whether [B, 2, C, H, W] has no gaps and its images are stored in the order C, H, W or H, W, C."""
    return images.is_contiguous() or channels_last(images)


def packed(images: Tensor) -> Tensor:
    """``images``, [N, C, *], if they are packed (see ``is_packed``), else a contiguous copy."""
    return images if is_packed(images) else images.contiguous()


def packed_like(images: Tensor, like: Tensor) -> Tensor:
    """``images``, [N, C, *], in the memory order of ``like``, which must be packed; copied only if that differs."""
    if channels_last(like):
        return images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return images.contiguous()


def transposition(images: Tensor, other: Tensor) -> int:
    """Where to find element i of a packed image in another packed tensor of the same shape.

    Returns 0 if the memory orders agree (element i is at i). Otherwise returns m, and element i is at
    ``(i % m) * (n // m) + i // m`` for images of n elements.
    """
    channels, height, width = images.shape[2:]
    if channels_last(images) == channels_last(other):
        return 0
    return channels if channels_last(images) else height * width


def check(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)
