"""The ladder: ways to run the UNet's no-gradient call, from the released script's to compiled ones.

Each rung makes a function that runs the call for an architecture, a device and a number of images. A rung that needs a
GPU, a library or a part of this project that is missing raises ``Unavailable``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ours
import torch
from architectures import Architecture, make_inputs, make_unet
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smpo_fast.models.attention import set_attention

Call = Callable[[], Tensor]


class Unavailable(RuntimeError):
    """A rung cannot run on this machine."""


@dataclass(frozen=True)
class Rung:
    """One way to run the call. ``make`` changes or wraps a half-precision UNet and returns what to call."""

    name: str
    make: Callable[[Any, torch.device], Callable[..., Any]]
    gpu: bool = False
    approximate: bool = False
    compiles: bool = False
    graph: bool = False
    few: bool = False  # run at the first two batch sizes only

    @property
    def tolerance(self) -> float:
        """Allowed relative error against the released script's call; bf16 rounding in a whole network gives 0.02."""
        return 0.5 if self.approximate else 0.06

    channels_last: bool = False


def half_dtype(device: torch.device) -> torch.dtype:
    """The dtype of half-precision rungs: bf16 on a GPU; fp32 on a CPU, where half precision is slow."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _plain(unet: Any, device: torch.device) -> Callable[..., Any]:
    return unet


def _channels_last(unet: Any, device: torch.device) -> Callable[..., Any]:
    return unet.to(memory_format=torch.channels_last)


def _compiled_blocks(unet: Any, device: torch.device) -> Callable[..., Any]:
    """Compile the transformer blocks, most of the FLOPs; a repeated block is compiled once for each shape."""
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return unet


def _compiled(unet: Any, device: torch.device) -> Callable[..., Any]:
    return torch.compile(_channels_last(unet, device), fullgraph=True, dynamic=False)


def _kernels(unet: Any, device: torch.device) -> Callable[..., Any]:
    ours.patch_kernels(unet)
    return _channels_last(unet, device)


def _attention(first: SDPBackend) -> Callable[[Any, torch.device], Callable[..., Any]]:
    """SDPA that prefers one back-end and falls back to the others (e.g. for cross-attention with its 77 keys)."""
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    order = [first, *(backend for backend in others if backend is not first)]

    def make(unet: Any, device: torch.device) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(order, set_priority=True):
                return unet(*args, **kwargs)

        return call

    return make


def _xformers(unet: Any, device: torch.device) -> Callable[..., Any]:
    if set_attention([unet], "xformers", device) != "xformers":
        raise Unavailable("xformers cannot run on this machine")
    return unet


def _flash3(unet: Any, device: torch.device) -> Callable[..., Any]:
    """FlashAttention 3 through SDPA, if this torch can activate it and its wheel is installed."""
    attention = importlib.import_module("torch.nn.attention")
    if not hasattr(attention, "activate_flash_attention_impl"):
        raise Unavailable("this torch has no activate_flash_attention_impl")
    attention.activate_flash_attention_impl("FA3")

    def call(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return unet(*args, **kwargs)

    return call


def _fp8_linears(unet: Any, device: torch.device) -> Callable[..., Any]:
    """Linear layers with fp8 weights and activations quantised on the fly, in compiled blocks."""
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise Unavailable(f"torchao is not importable ({error})") from error

    def wide(module: Any, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and min(module.weight.shape) >= 640 and "time" not in name

    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    quantization.quantize_(unet, config, filter_fn=wide)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return unet


AUTOCAST = "autocast over fp32 (reference)"
HALF = "half weights (best_eager)"
# Ordered by importance, because a report that runs out of time skips the rest.
RUNGS = (
    Rung(HALF, _plain),
    Rung("half weights, CUDA graph", _plain, gpu=True, graph=True, few=True),
    Rung("compiled blocks", _compiled_blocks, gpu=True, compiles=True, few=True),
    Rung("compiled blocks, CUDA graph", _compiled_blocks, gpu=True, compiles=True, graph=True, few=True),
    Rung("kernels", _kernels, channels_last=True),
    Rung("kernels, CUDA graph", _kernels, gpu=True, graph=True, channels_last=True, few=True),
    Rung("attention: cuDNN first", _attention(SDPBackend.CUDNN_ATTENTION), gpu=True, few=True),
    Rung("attention: flash first", _attention(SDPBackend.FLASH_ATTENTION), gpu=True, few=True),
    Rung("attention: xformers", _xformers, gpu=True, few=True),
    Rung("fp8 linears, compiled blocks", _fp8_linears, gpu=True, compiles=True, approximate=True, few=True),
    Rung("channels-last", _channels_last, channels_last=True, few=True),
    Rung("attention: memory-efficient first", _attention(SDPBackend.EFFICIENT_ATTENTION), gpu=True, few=True),
    Rung("compiled whole, channels-last", _compiled, gpu=True, compiles=True, channels_last=True, few=True),
    # last, because torch keeps FlashAttention 3 activated for the rest of the process
    Rung("attention: flash 3", _flash3, gpu=True, few=True),
)


def autocast_call(architecture: Architecture, device: torch.device, images: int) -> Call:
    """The released script's call: fp32 weights, cast to half precision by autocast at every use."""
    unet = make_unet(architecture, device, torch.float32).eval()
    set_attention([unet], "sdpa", device)
    args, kwargs = make_inputs(architecture, images, device, torch.float32)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    @torch.no_grad()
    def call() -> Tensor:
        with torch.autocast(device.type, half):
            return unet(*args, **kwargs)[0].float()

    return call


class HalfUNet:
    """One half-precision UNet for a rung at several batch sizes."""

    def __init__(self, architecture: Architecture, device: torch.device, rung: Rung) -> None:
        if rung.gpu and device.type != "cuda":
            raise Unavailable("needs a GPU")
        self.architecture, self.device, self.rung = architecture, device, rung
        self.dtype = half_dtype(device)
        unet = make_unet(architecture, device, self.dtype).eval()
        set_attention([unet], "sdpa", device)
        self.run = rung.make(unet, device)

    def call(self, images: int) -> Call:
        """The rung's call for a number of images."""
        args, kwargs = make_inputs(self.architecture, images, self.device, self.dtype)
        if self.rung.channels_last:
            args = (args[0].to(memory_format=torch.channels_last), *args[1:])

        @torch.no_grad()
        def call() -> Tensor:
            return self.run(*args, **kwargs)[0]

        return captured(call) if self.rung.graph else call


def captured(call: Call) -> Call:
    """The call as a CUDA graph; every replay writes the same output tensor."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def release(device: torch.device) -> None:
    """Free the memory of deleted networks, graphs and compiled code."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def free_after(device: torch.device) -> Any:
    """Call ``release`` when the block ends, also by an exception."""
    try:
        yield
    finally:
        release(device)
