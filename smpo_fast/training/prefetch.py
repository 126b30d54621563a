"""The next step's pairs, read, pinned and copied to the device while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from smpo_fast.method.batch import Pairs

Draw = Callable[[int], list[Pairs]]


class Prefetcher:
    """Calls ``draw(step)``, whose pairs lie on the host, one step ahead of the one asked for.

    A step that was not foreseen is drawn when it is asked for: results do not depend on the order of calls. An error
    in drawing is raised where its step is asked for.
    """

    def __init__(self, draw: Draw, device: torch.device, steps: int) -> None:
        self._draw, self._device, self._steps = draw, device, steps
        self._worker = ThreadPoolExecutor(1, "prefetch")
        self._ahead: tuple[int, Future[Any]] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: int) -> list[Pairs]:
        """The pairs of a step on the device."""
        ahead, self._ahead = self._ahead, None
        ready = ahead[1] if ahead and ahead[0] == step else self._worker.submit(self._fetch, step)
        window, copied = ready.result()
        if step + 1 < self._steps:
            self._ahead = step + 1, self._worker.submit(self._fetch, step + 1)
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for pairs in window:
                for tensor in pairs.tensors():
                    tensor.record_stream(stream)
        return window

    def _fetch(self, step: int) -> tuple[list[Pairs], Any]:
        window = self._draw(step)
        if self._stream is None:
            return [pairs.map(lambda t: t.to(self._device)) for pairs in window], None
        with torch.cuda.stream(self._stream):
            window = [pairs.map(lambda t: t.pin_memory().to(self._device, non_blocking=True)) for pairs in window]
            return window, self._stream.record_event()
