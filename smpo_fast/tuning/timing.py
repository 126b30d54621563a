"""Seconds and peak memory of calls on a device, and what the device can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_once(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def seconds_of(call: Callable[[], Any], device: torch.device, *, enough: float = 0.4, least: int = 3) -> float:
    """The median of single calls, for about ``enough`` seconds; the call has been made before.

    Two calls are queued at a time, as in a run, where the host prepares a call while the device works on another: what
    is measured is the slower of the two.
    """
    taken: list[float] = []
    while len(taken) < least or sum(taken) * 2 < enough:
        taken.append(seconds_once(lambda: (call(), call()), device) / 2)
    return statistics.median(taken)


def reset_peak(device: torch.device) -> None:
    """Start over with ``peak_bytes``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that tensors had since the last reset; 0 on a CPU, whose allocator does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What large operations on random data reach: 'matmul' in FLOP/s, and 'copy' in bytes/s, read plus written."""
    large = device.type == "cuda"
    side, count = (8192, 1 << 29) if large else (512, 1 << 22)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)

    def rate(work: float, call: Callable[[], Any]) -> float:
        call()
        return work / seconds_of(call, device, enough=0.2)

    found = {"matmul": rate(2 * side**3, lambda: a @ b)}
    return {**found, "copy": rate(2 * source.nbytes, lambda: target.copy_(source))}
