"""Gradients on their way to the host, through pinned memory, while the backward pass goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BUFFERS = 2  # one is filled while the other is read


class _Copy(NamedTuple):
    """A gradient that is being copied: ``values`` has the shape of the gradient and is complete after ``done``."""

    name: str
    values: Tensor
    done: Any


class HostCopies:
    """Copies tensors of a device to the host, and gives each to a function ``use``, in the order they were sent.

    The host waits for a copy only when the tensor after the next one is sent: the device has meanwhile computed what
    was queued, and is never idle for the copy. Takes ``BUFFERS`` pinned buffers as large as the largest tensor.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._sent = 0
        self._pending: deque[_Copy] = deque()

    def send(self, name: str, tensor: Tensor, use: Callable[[str, Tensor], None]) -> None:
        """Begin to copy a tensor of any shape; its memory may be reused by what is queued after this call."""
        while len(self._pending) >= BUFFERS:
            self._receive(use)
        values = self._buffer(tensor.nbytes).view(tensor.dtype)[: tensor.numel()].view(tensor.shape)
        values.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._pending.append(_Copy(name, values, done))

    def finish(self, use: Callable[[str, Tensor], None]) -> None:
        """Wait for all copies, and use them."""
        while self._pending:
            self._receive(use)

    def _receive(self, use: Callable[[str, Tensor], None]) -> None:
        copy = self._pending.popleft()
        copy.done.synchronize()
        use(copy.name, copy.values)

    def _buffer(self, size: int) -> Tensor:
        """The next buffer in turn, which no copy uses, of at least ``size`` bytes."""
        turn, self._sent = self._sent % BUFFERS, self._sent + 1
        size = -(-size // 8) * 8  # a view as any dtype needs whole elements
        if turn == len(self._buffers):
            self._buffers.append(_pinned(size))
        elif len(self._buffers[turn]) < size:
            self._buffers[turn] = _pinned(size)
        return self._buffers[turn]


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
