"""The next step's pairs, read, pinned and copied to the device while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from smpo_fast.method.batch import Pairs

Read = Callable[[int], list[Pairs]]


class Prefetcher:
    """Calls ``read(step)``, which returns pairs on the host, one step ahead of the step requested.

    A step that was not expected is read on request: results do not depend on the order of calls. An error in reading
    is raised when its step is requested.
    """

    def __init__(self, read: Read, device: torch.device, steps: int) -> None:
        self._read, self._device, self._steps = read, device, steps
        self._worker = ThreadPoolExecutor(1, "prefetch")
        self._ahead: tuple[int, Future[Any]] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: int) -> list[Pairs]:
        """The step batch on the device."""
        ahead, self._ahead = self._ahead, None
        ready = ahead[1] if ahead and ahead[0] == step else self._worker.submit(self._fetch, step)
        step_batch, copied = ready.result()
        if step + 1 < self._steps:
            self._ahead = step + 1, self._worker.submit(self._fetch, step + 1)
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for pairs in step_batch:
                for tensor in pairs.tensors():
                    tensor.record_stream(stream)
        return step_batch

    def _fetch(self, step: int) -> tuple[list[Pairs], Any]:
        step_batch = self._read(step)
        if self._stream is None:
            return [pairs.map(lambda t: t.to(self._device)) for pairs in step_batch], None
        with torch.cuda.stream(self._stream):
            step_batch = [
                pairs.map(lambda t: t.pin_memory().to(self._device, non_blocking=True)) for pairs in step_batch
            ]
            return step_batch, self._stream.record_event()
