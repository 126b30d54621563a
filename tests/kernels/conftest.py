"""Kernel tests run on the GPU if there is one, and otherwise in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from smpo_fast.kernels import _launch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # without Triton only the eager code runs, so there is nothing to test

settings.register_profile("kernels", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("kernels")


def _fix_interpreter_rounding() -> None:
    """Make Triton's interpreter round fp32 to bf16 to nearest even, as hardware and PyTorch do; it truncates."""
    from triton.runtime import interpreter

    stock = interpreter._convert_float

    def convert(data, source, target, rounding_mode):  # type: ignore[no-untyped-def]
        if str(source) != "fp32" or str(target) != "bf16":
            return stock(data, source, target, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        rounded = np.where(np.isnan(bits.view(np.float32)), (bits >> 16) | 0x40, rounded)
        return rounded.astype(np.uint16).reshape(data.shape)

    interpreter._convert_float = convert


if _launch.INTERPRET:
    _fix_interpreter_rounding()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if not torch.cuda.is_available() and not _launch.INTERPRET and any(here in item.path.parents for item in items):
        raise pytest.UsageError("no GPU, and TRITON_INTERPRET is not 1: the kernels in tests/kernels cannot run")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if _launch.INTERPRET else "cuda")


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill newly allocated memory with NaN, so that results that were never written are noticed."""

    def poisoned(make):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            real = isinstance(out, torch.Tensor) and not isinstance(out, torch._subclasses.FakeTensor)
            return out.fill_(float("nan")) if real and out.is_floating_point() else out

        return call

    # torch.device("meta") as a context caches the set of constructors on first use: fill it before they are replaced
    torch.utils._device._device_constructors()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from now on."""
    from smpo_fast.kernels import (
        adamw8bit,
        ema,
        geglu,
        geglu_linear,
        group_norm_silu,
        layer_norm,
        pair_loss,
        renoise_step,
    )

    seen: list[str] = []

    def counted(kernel, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(kernel.fn.__name__)
        _launch.launch(kernel, *args, **kwargs)

    for kernel_module in (adamw8bit, ema, geglu, geglu_linear, group_norm_silu, layer_norm, pair_loss, renoise_step):
        monkeypatch.setattr(kernel_module, "launch", counted)
    return seen
