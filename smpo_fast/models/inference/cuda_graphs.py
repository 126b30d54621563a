"""Whole calls replayed as CUDA graphs, at a few fixed batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smpo_fast.models.inference.kv_cache import CallInputs


class CudaGraphs:
    """Calls captured once per batch size and replayed, without Python or kernel launches in between.

    Shapes: x [B, 2, C, H, W], timesteps [B]. All graphs read the same input buffers, sized for the largest chunk so
    far, and share one memory pool. They read the weights in place, so an optimizer's in-place update takes effect.
    """

    def __init__(self, call: Callable[[Tensor, Tensor, CallInputs, bool], Tensor]) -> None:
        self._call = call
        self._inputs: CallInputs | None = None
        self._x: Tensor | None = None
        self._times: Tensor | None = None
        self._graphs: dict[tuple[int, bool], tuple[Any, Tensor]] = {}
        self._pool: Any = None

    def placed(self, inputs: CallInputs) -> CallInputs:
        """A chunk's inputs, copied into the buffers that the graphs read; the images' shape must not change."""

        def rows(of: CallInputs) -> int:
            return len(of.unet["encoder_hidden_states"])

        if self._inputs is None or rows(inputs) > rows(self._inputs):
            self._inputs = inputs.map(torch.clone, torch.clone)
            self._graphs.clear()  # they read the smaller buffers
        else:
            for buffer, value in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
                buffer[: len(value)].copy_(value)
        return self._inputs

    def run(self, x: Tensor, timesteps: Tensor, inputs: CallInputs, shallow: bool) -> Tensor:
        """The prediction, a new tensor like x."""
        if self._x is None or self._x.shape[1:] != x.shape[1:] or len(self._x) < len(x) or self._times is None:
            most = len(inputs.unet["encoder_hidden_states"]) // 2
            self._x, self._times = x.new_empty(most, *x.shape[1:]), timesteps.new_empty(most)
            self._graphs.clear()
        self._x[: len(x)].copy_(x)
        self._times[: len(x)].copy_(timesteps)
        if (len(x), shallow) not in self._graphs:
            self._capture(len(x), inputs, shallow)
        graph, out = self._graphs[len(x), shallow]
        graph.replay()
        return out.clone()

    def _capture(self, size: int, inputs: CallInputs, shallow: bool) -> None:
        assert self._x is not None and self._times is not None
        arguments = (self._x[:size], self._times[:size], inputs, shallow)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries initialise and the compiler compiles here, outside the capture
            for _ in range(2):
                self._call(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # With "global", the default, allocations of the prefetching thread would invalidate the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._call(*arguments)
        self._pool = self._pool or graph.pool()
        self._graphs[size, shallow] = graph, out
