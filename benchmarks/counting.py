"""Counts that are the same on every machine: FLOPs, bytes, launches, host syncs, saved activations, peak memory.

Everything is counted on the meta device, where tensors have shapes but no memory, so SDXL at its true size is traced in
seconds on a laptop. The meta device stands for the accelerator and the CPU for the host: copies between them, and
numbers read from the device, are counted as they would occur on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from architectures import Architecture, make_inputs, make_unet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from smpo_fast.models.attention import set_processors
from smpo_fast.models.residual_block import skip_unit_scales
from smpo_fast.models.tracing import META, LiveBytes, flops, fused_attention, saved_bytes

__all__ = ["META", "LiveBytes", "flops", "fused_attention", "saved_bytes"]
# Operations that launch no kernel: they allocate, or return another view of existing memory.
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view",
         "aten::detach", "aten::lift_fresh", "aten::alias", "aten::_local_scalar_dense", "aten::new_empty_strided",
         "aten::set_", "aten::resize_"}  # fmt: skip


def _is_view(operation: Any) -> bool:
    """Whether the output is a view of an input: aliased and not written."""
    returns = operation._schema.returns
    if operation._schema.name in ("aten::split", "aten::chunk", "aten::unbind", "aten::split_with_sizes"):
        return True  # a list of views: the schema marks only the input
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Constants(TorchFunctionMode):
    """Counts ``torch.tensor([...], device=...)``, whose copy is not visible to a dispatch mode."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu") == META:
            self.uploads += 1
        return func(*args, **(kwargs or {}))


class DeviceSpy(TorchDispatchMode):
    """Counts what a program does with its device, the meta device.

    launches: operations that run at least one kernel. uploads: copies from the host. reads: copies to the host and
    single numbers read, each of which makes the host wait. Numbers read are 1, tensors read are zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.reads = 0
        self._copies = 0
        self._constants = _Constants()

    @property
    def uploads(self) -> int:
        return self._copies + self._constants.uploads

    def __enter__(self) -> DeviceSpy:
        self._constants.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        on_device = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.device.type == "meta"]
        if name == "aten::_local_scalar_dense" and on_device:
            self.reads += 1
            return 1.0 if on_device[0].is_floating_point() else 1
        if name == "aten::_to_copy" and on_device and kwargs.get("device", META).type == "cpu":
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = func(*args, **kwargs)
        made = [x for x in tree_iter(out) if isinstance(x, Tensor) and x.device.type == "meta"]
        if made and not on_device and name in ("aten::_to_copy", "aten::copy_"):
            self._copies += 1
        elif made and name not in _FREE and not _is_view(func):
            self.launches[name] += 1
        return out


def saved_bytes_of_a_pair(architecture: Architecture, checkpointing: bool) -> int:
    """Bytes that autograd saves in the policy's forward pass of one pair in half precision."""
    unet: Any = make_unet(architecture, META, torch.bfloat16).train()
    args, kwargs = make_inputs(architecture, 2, META, torch.bfloat16)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with fused_attention(), saved_bytes(unet.parameters()) as kept:
        unet(*args, **kwargs)
    return kept["bytes"]


def unet_of_a_run(architecture: Architecture, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A UNet on the meta device with the modules that a run gives it."""
    unet: Any = make_unet(architecture, META, dtype)
    set_processors(unet)
    skip_unit_scales(unet)
    return unet


def unet_call(architecture: Architecture, images: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
    """A function that calls a run's UNet once on the meta device."""
    unet = unet_of_a_run(architecture, dtype)
    args, kwargs = make_inputs(architecture, images, META, dtype)
    return lambda: unet(*args, **kwargs)[0]


def pair_flops(architecture: Architecture, calls: float) -> dict[str, float]:
    """FLOPs of one pair by part: ``calls`` no-gradient calls per image, then policy and reference at x_t."""
    call = unet_call(architecture, 2)
    with torch.no_grad():
        forward = flops(call)
    both = flops(lambda: call().sum().backward())
    return {
        "inversion": calls * forward,
        "reference": forward,
        "policy forward": forward,
        "policy backward": both - forward,
        "total": (calls + 1) * forward + both,
    }


class _Shapes(TorchDispatchMode):
    """Shapes of the operations that this project's kernels replace, in the order of their first use."""

    WATCHED = {"aten::native_group_norm", "aten::native_layer_norm", "aten::gelu", "aten::silu"}

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.WATCHED:
            self.found[func._schema.name.removeprefix("aten::"), tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


_TRACED: dict[tuple[str, int], dict[str, Counter[tuple[int, ...]]]] = {}


def op_shapes(architecture: Architecture, images: int = 2) -> dict[str, Counter[tuple[int, ...]]]:
    """Shapes of the inputs of each fusible operation in one UNet call, and how often each occurs; traced once.

    group_norm_silu: [B, C, H, W] normalised (and mostly passed on to SiLU); layer_norm: [B, L, C];
    geglu: [B, L, 2C], value and gate concatenated.
    """
    key = repr(architecture), images
    if key not in _TRACED:
        _TRACED[key] = _traced_shapes(architecture, images)
    return _TRACED[key]


def _traced_shapes(architecture: Architecture, images: int) -> dict[str, Counter[tuple[int, ...]]]:
    with fused_attention(), torch.no_grad(), _Shapes() as shapes:
        unet_call(architecture, images)()
    table: dict[str, Counter[tuple[int, ...]]] = {"group_norm_silu": Counter(), "layer_norm": Counter()}
    table["geglu"] = Counter()
    for (name, shape), count in shapes.found.items():
        if name == "native_group_norm":
            # the blocks normalise [B, C, H, W], the shape that diffusers passes on
            table["group_norm_silu"][shape] += count
        elif name == "native_layer_norm":
            table["layer_norm"][shape] += count
        elif name == "gelu":
            table["geglu"][(*shape[:-1], 2 * shape[-1])] += count
    return table


def least_bytes(op: str, shape: tuple[int, ...], item: int, *, backward: bool = False) -> int:
    """The bytes an operation must move: every input read once, every output written once (parameters left out).

    item: bytes of an element. pair_loss and renoise_step take the latents' shape [B, 2, C, H, W].
    """
    count = 1
    for side in shape:
        count *= side
    forward = {
        "group_norm_silu": 2 * count,  # x -> y
        "layer_norm": 2 * count,
        "geglu": count + count // 2,  # value and gate -> half the size
        "pair_loss": 3 * count,  # policy, reference, target -> a few numbers
        "renoise_step": 4 * count,  # clean latent, sum, estimate -> sum
    }
    gradient = {
        "group_norm_silu": 3 * count,  # x, dy -> dx
        "layer_norm": 3 * count,
        "geglu": count + count // 2 + count,  # value and gate, dy -> both gradients
        "pair_loss": 3 * count,  # policy, target -> gradient
        "renoise_step": 0,
    }
    return (gradient if backward else forward)[op] * item


def parameters_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters of some modules."""
    return [p for module in modules for p in module.parameters()]
