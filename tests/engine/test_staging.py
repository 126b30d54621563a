"""Gradients that travel to the host through pinned buffers: what is used when, and what is never overwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smpo_fast.engine import staging
from smpo_fast.engine.staging import HostCopies


class Device:
    """Plays a device that copies late: when its event is waited for, and not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.buffers: list[int] = []
        self.log: list[str] = []
        device, copy = self, Tensor.copy_

        class Event:
            def record(self) -> None:
                self.until = len(device.queue)

            def synchronize(self) -> None:
                device.log.append("wait")
                for target, source in device.queue[: self.until]:
                    copy(target, source)
                device.queue[: self.until] = [(target, target) for target, _ in device.queue[: self.until]]

        def late(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            assert non_blocking
            device.queue.append((target, source.clone()))
            return target

        def pinned(size: int) -> Tensor:
            self.buffers.append(size)
            return torch.zeros(size, dtype=torch.uint8)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(Tensor, "copy_", late)
        monkeypatch.setattr(staging, "_pinned", pinned)


def test_every_tensor_arrives_in_order_with_its_shape_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    device, copies = Device(monkeypatch), HostCopies()
    tensors = {
        str(i): torch.randn(shape).to(dtype)
        for i, (shape, dtype) in enumerate([
            ((3, 5), torch.bfloat16), ((7,), torch.float32), ((), torch.bfloat16), ((2, 3, 4), torch.float16),
            ((1,), torch.bfloat16), ((40, 40), torch.bfloat16), ((5,), torch.float32),
        ])
    }  # fmt: skip
    arrived: dict[str, Tensor] = {}

    def use(name: str, values: Tensor) -> None:
        device.log.append(name)
        arrived[name] = values.clone()

    for name, tensor in tensors.items():
        copies.send(name, tensor, use)
        device.log.append(f"sent {name}")
    copies.finish(use)
    assert list(arrived) == list(tensors)
    for name, tensor in tensors.items():
        assert arrived[name].dtype is tensor.dtype and torch.equal(arrived[name], tensor), name


def test_the_host_waits_for_the_copy_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    device, copies = Device(monkeypatch), HostCopies()

    def use(name: str, values: Tensor) -> None:
        device.log.append(name)

    for name in "abcd":
        copies.send(name, torch.ones(4), use)
        device.log.append(f"sent {name}")
    copies.finish(use)
    assert device.log == [
        "sent a", "sent b", "wait", "a", "sent c", "wait", "b", "sent d", "wait", "c", "wait", "d",
    ]  # fmt: skip


def test_buffers_are_kept_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device, copies = Device(monkeypatch), HostCopies()
    used: list[Any] = []

    def use(name: str, values: Tensor) -> None:
        used.append(name)

    for _ in range(3):
        for count in (100, 50, 10):
            copies.send("x", torch.ones(count), use)
        copies.finish(use)
    assert len(used) == 9
    assert len(device.buffers) <= 3
