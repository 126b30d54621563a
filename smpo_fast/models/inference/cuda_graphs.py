"""Whole calls replayed as CUDA graphs, at a few fixed batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from smpo_fast.models.inference.kv_cache import CallInputs


class CudaGraphs:
    """Calls captured once per image shape and batch size and replayed, without Python or kernel launches in between.

    Shapes: x [B, 2, C, H, W] with B at most ``pairs``, timesteps [B, 2]. All graphs read the same input buffers, which
    are made once for ``pairs`` pairs and never replaced: a graph goes on using the addresses that it was captured
    with. They read the weights in place, so an optimizer's in-place update takes effect.

    The graphs of all batch sizes and image shapes share one memory pool. That is safe because an output is copied
    before the next replay, and it keeps the memory near that of the largest graph, however many shapes there are.
    """

    def __init__(self, call: Callable[[Tensor, Tensor, CallInputs, bool], Tensor], pairs: int) -> None:
        self._call, self._pairs = call, pairs
        self._inputs: CallInputs | None = None
        self._latents: dict[torch.Size, tuple[Tensor, Tensor]] = {}  # by image shape: x and timesteps
        self._graphs: dict[tuple[torch.Size, int, bool], tuple[Any, Tensor]] = {}
        self._pool: Any = None  # valid while at least one of the graphs lives: none is ever dropped

    def placed(self, inputs: CallInputs) -> CallInputs:
        """The inputs of a chunk of at most ``pairs`` pairs, copied into the buffers that the graphs read."""
        if self._inputs is None:

            def buffer(rows: int) -> Callable[[Tensor], Tensor]:
                return lambda t: t.new_empty(rows, *t.shape[1:])

            self._inputs = inputs.map(buffer(2 * self._pairs), buffer(self._pairs))
        for place, value in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
            place[: len(value)].copy_(value)
        return self._inputs

    def run(self, x: Tensor, timesteps: Tensor, inputs: CallInputs, shallow: bool) -> Tensor:
        """The prediction, a new tensor like x; ``inputs`` as returned by ``placed``."""
        shape, size = x.shape[1:], len(x)
        if shape not in self._latents:
            self._latents[shape] = x.new_empty(self._pairs, *shape), timesteps.new_empty(self._pairs, 2)
        buffers = tuple(buffer[:size] for buffer in self._latents[shape])
        for place, value in zip(buffers, (x, timesteps), strict=True):
            place.copy_(value)
        if (shape, size, shallow) not in self._graphs:
            self._graphs[shape, size, shallow] = self._captured(*buffers, inputs, shallow)
        graph, out = self._graphs[shape, size, shallow]
        graph.replay()
        return out.clone()

    def _captured(self, *arguments: Any) -> tuple[Any, Tensor]:
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries initialise and the compiler compiles here, outside the capture
            for _ in range(2):
                self._call(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # With "global", the default, allocations of the prefetching thread would invalidate the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            out = self._call(*arguments)
        self._pool = graph.pool()
        return graph, out


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream on which calls are warmed up and captured: one, because each has its own library workspaces."""
    return torch.cuda.Stream(device)
