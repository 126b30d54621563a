"""Whole calls replayed as CUDA graphs, at a few fixed batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smpo_fast.models.inference.kv_cache import CallInputs


class CudaGraphs:
    """Calls captured once for each batch size and replayed: no Python and no launches in between.

    All graphs read the same buffers, of the largest chunk seen, and share one memory pool; weights are read where they
    lie, so an optimizer's update in place is seen.
    """

    def __init__(self, call: Callable[[Tensor, Tensor, CallInputs, bool], Tensor]) -> None:
        self._call = call
        self._told: CallInputs | None = None
        self._x: Tensor | None = None
        self._times: Tensor | None = None
        self._graphs: dict[tuple[int, bool], tuple[Any, Tensor]] = {}
        self._pool: Any = None

    def placed(self, told: CallInputs) -> CallInputs:
        """A chunk's shared inputs, copied to where the graphs read them; the pictures' shape must stay the same."""
        if self._told is None or len(told.inputs["encoder_hidden_states"]) > len(
            self._told.inputs["encoder_hidden_states"]
        ):
            self._told = told.map(torch.clone, torch.clone)
            self._graphs.clear()  # they read the smaller buffers
        else:
            for place, value in zip(self._told.tensors(), told.tensors(), strict=True):
                place[: len(value)].copy_(value)
        return self._told

    def run(self, x: Tensor, timesteps: Tensor, told: CallInputs, shallow: bool) -> Tensor:
        """The prediction, a new tensor."""
        if self._x is None or self._x.shape[1:] != x.shape[1:] or len(self._x) < len(x) or self._times is None:
            most = len(told.inputs["encoder_hidden_states"]) // 2
            self._x, self._times = x.new_empty(most, *x.shape[1:]), timesteps.new_empty(most)
            self._graphs.clear()
        self._x[: len(x)].copy_(x)
        self._times[: len(x)].copy_(timesteps)
        if (len(x), shallow) not in self._graphs:
            self._capture(len(x), told, shallow)
        graph, out = self._graphs[len(x), shallow]
        graph.replay()
        return out.clone()

    def _capture(self, size: int, told: CallInputs, shallow: bool) -> None:
        assert self._x is not None and self._times is not None
        arguments = (self._x[:size], self._times[:size], told, shallow)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and the compiler settle here, outside the capture
            for _ in range(2):
                self._call(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "global", the default, would let the prefetching thread's allocations spoil the capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._call(*arguments)
        self._pool = self._pool or graph.pool()
        self._graphs[size, shallow] = graph, out
