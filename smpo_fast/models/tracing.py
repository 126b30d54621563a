"""Instruments that count what a network call costs on the meta device: FLOPs, live bytes, saved tensors, autocast.

Tensors on the meta device have shapes but no memory, so SDXL at its true size is traced within seconds on a laptop.
Here "meta" represents the accelerator: ``LiveBytes`` follows every storage from allocation to release, which gives
the memory use of a call without a GPU. Allocator rounding, library workspaces and the driver's own memory are not
included, and neither are the savings of our kernels or of a compiler.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, a function of a module or class is another one, for every caller and thread.

    A torch function mode would not do: it is inactive while autograd runs, where gradient checkpointing repeats calls.
    """
    inherited, original = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def fused_attention() -> AbstractContextManager[None]:
    """Inside, attention is one kernel, as on a GPU; the meta device would otherwise run the unfused formula."""

    def flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value)[0]

    return replaced(F, "scaled_dot_product_attention", flash)


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call and of everything in it; a multiply-add counts as two."""
    with fused_attention(), Flops() as counted:
        call()
    return counted.total


class Flops(TorchDispatchMode):
    """Counts FLOPs with torch's formulas; torch's own counter keeps gradients alive, which LiveBytes would count."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages alive on a device: now, and at most so far. ``alive`` exist already, of any shape."""

    def __init__(self, alive: Iterable[Tensor] = (), device: str = "meta") -> None:
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._sizes: dict[int, int] = {}
        for tensor in alive:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor of any shape from now on, if it is on the device."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[Counter[str]]:
    """Bytes that autograd saves for the backward pass: ``counter["bytes"]``, complete at the end of the block.

    parameters, of any shape, are not counted.
    """
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, Tensor] = {}  # keeps the storages alive, so that no address is used twice
    total: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own and key not in kept:
            kept[key] = tensor.detach()
            total["bytes"] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


class Autocast:
    """What CUDA's bfloat16 autocast does to a UNet; the meta device has no autocast of its own.

    Matrix products and convolutions compute in bfloat16, norms and softmax in float32. The casts of trained weights
    are cached for the whole forward pass (``weights``), those of frozen weights are not.
    """

    PRODUCTS: tuple[tuple[Any, str], ...] = ((F, "linear"), (F, "conv2d"), (torch, "baddbmm"), (torch, "bmm"))
    EXACT: tuple[tuple[Any, str], ...] = ((F, "group_norm"), (F, "layer_norm"), (Tensor, "softmax"))

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self._caching = True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the functions cast their arguments."""
        dtypes = [(*f, torch.bfloat16) for f in self.PRODUCTS] + [(*f, torch.float32) for f in self.EXACT]
        with ExitStack() as stack:
            for owner, name, dtype in dtypes:
                stack.enter_context(replaced(owner, name, self._casting(getattr(owner, name), dtype)))
            yield

    def _casting(self, function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
        def cast_first(*args: Any, **kwargs: Any) -> Tensor:
            named = {name: self._cast(value, dtype) for name, value in kwargs.items()}
            return function(*(self._cast(value, dtype) for value in args), **named)

        return cast_first

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        if not (self._caching and value.is_leaf and value.requires_grad and dtype is torch.bfloat16):
            return value.to(dtype)
        if id(value) not in self.weights:
            self.weights[id(value)] = value.to(dtype)
        return self.weights[id(value)]

    def end_forward(self) -> int:
        """Drop the cached casts, as autocast does after a forward pass; returns their bytes."""
        cached = sum(weight.nbytes for weight in self.weights.values())
        self.weights.clear()
        self._caching = False
        return cached
