"""What a call costs the host beside the launch itself: contexts, autograd nodes, Python calls."""

from __future__ import annotations

import cProfile
import importlib.util
import pstats
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smpo_fast.kernels import _launch, geglu, group_norm_silu, layer_norm
from smpo_fast.kernels.geglu import geglu as geglu_op
from smpo_fast.kernels.group_norm_silu import group_norm_silu as group_norm_op
from smpo_fast.kernels.layer_norm import layer_norm as layer_norm_op


class Kernel:
    """Records what it is launched with."""

    arg_names = ("x",)

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *values, **options: self.calls.append((grid, values, options))


@pytest.mark.parametrize(("index", "entered"), [(0, []), (None, []), (1, [1])])
def test_only_another_device_than_the_current_one_is_entered(
    index: int | None, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int | None] = []

    class Entered:
        def __init__(self, device: torch.device) -> None:
            seen.append(device.index)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(device=Entered, current_device=lambda: 0))
    kernel = Kernel()
    _launch.launch(kernel, 3, device=torch.device("cuda", index) if index is not None else torch.device("cuda"), x=5)
    assert seen == entered and kernel.calls == [((3,), (5,), {"enable_fp_fusion": True})]


def test_contraction_can_be_turned_off_and_no_program_is_no_launch() -> None:
    kernel = Kernel()
    _launch.launch(kernel, 1, device=torch.device("cpu"), x=5, enable_fp_fusion=False)
    _launch.launch(kernel, 0, device=torch.device("cpu"), x=5)
    assert kernel.calls == [((1,), (5,), {"enable_fp_fusion": False})]


def calls(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Each operation on inputs of which some could have a gradient."""
    x, image = torch.ones(2, 3, 64, device=device), torch.ones(2, 64, 4, 4, device=device)
    w, b = torch.ones(64, device=device, requires_grad=True), torch.zeros(64, device=device, requires_grad=True)
    leaf = x.clone().requires_grad_()
    return {
        "geglu": lambda: geglu_op(leaf),
        "layer_norm": lambda: layer_norm_op(x, w, b),  # type: ignore[dict-item, return-value]
        "addition and layer_norm": lambda: layer_norm_op(x, w, b, x)[1],  # type: ignore[dict-item]
        "group_norm_silu": lambda: group_norm_op(image, w, b, num_groups=8),
    }


# Python functions called, launches not included; with an autograd node they were 29, 50, 54 and 85
MOST_CALLS = {"geglu": 20, "layer_norm": 33, "addition and layer_norm": 34, "group_norm_silu": 64}


@pytest.mark.parametrize("name", MOST_CALLS)
def test_without_gradients_autograd_is_not_involved(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = calls(device)[name]
    recorded = call()
    assert recorded.grad_fn is not None
    with torch.no_grad():
        silent = call()
        assert silent.grad_fn is None and torch.equal(silent, recorded)
        monkeypatch.setattr(torch.autograd.Function, "apply", None)
        for module in (geglu, group_norm_silu, layer_norm):
            monkeypatch.setattr(module, "launch", lambda *_, **__: None)
        monkeypatch.setattr(torch, "empty", torch._C._VariableFunctions.empty)  # not the poisoned one of the tests
        call()
        with cProfile.Profile() as profile:
            call()
    assert pstats.Stats(profile).total_calls <= MOST_CALLS[name] + 5  # versions of Python differ by a few


def test_this_folder_is_not_taken_for_a_library_called_kernels() -> None:
    """bitsandbytes prints that such a library has no get_kernel."""
    assert importlib.util.find_spec("kernels") is None


@pytest.mark.parametrize(
    "name", ["geglu", "geglu_linear", "group_norm_silu", "layer_norm", "pair_loss", "renoise_step"]
)
def test_without_triton_a_kernel_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("smpo_fast.kernels._triton", f"smpo_fast.kernels.{name}"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "smpo-fast\[kernels\]"') as missing:
        importlib.import_module(f"smpo_fast.kernels.{name}")
    assert missing.value.name == "triton"
