"""The ladder: ways to run the UNet's no-gradient call, from the released script's to compiled float8.

All but the first are settings of this project, run by the bench of ``smpo tune``. One that needs a GPU or a library
that is missing raises ``Unavailable``.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ours
import torch
from architectures import Architecture, make_unet
from torch import Tensor

from smpo_fast.config import loading
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.kernel_patch import MODULES
from smpo_fast.models.locate import schedule_of
from smpo_fast.tuning.bench import Bench, Rejected

Call = Callable[[], Tensor]
COMPILED, GRAPHS, LAST = {"model.compile": "inversion"}, {"model.cuda_graphs": True}, {"model.channels_last": True}
KERNELS: dict[str, Any] = {"kernels.enabled": list(MODULES)}


class Unavailable(RuntimeError):
    """A rung cannot run on this machine."""


@dataclass(frozen=True)
class Rung:
    """One way to run the call: settings by ``section.key``, on top of eager half precision."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    few: bool = True  # run at the first two batch sizes only
    approximate: bool = False

    @property
    def compiles(self) -> bool:
        return "model.compile" in self.values

    @property
    def tolerance(self) -> float:
        """Allowed relative error against the released script's call; bf16 rounding in a whole network gives 0.02."""
        return 0.5 if self.approximate else 0.06


AUTOCAST = "autocast over fp32 (reference)"
HALF = "half weights (best_eager)"
# Ordered by importance, because a report that runs out of time skips the rest.
RUNGS = (
    Rung(HALF, few=False),
    Rung("CUDA graph", GRAPHS),
    Rung("compiled blocks, CUDA graph", {**COMPILED, **GRAPHS}),
    Rung("all kernels, channels-last", {**KERNELS, **LAST}, few=False),
    Rung("all kernels, channels-last, CUDA graph", {**KERNELS, **LAST, **GRAPHS}, few=False),
    Rung("attention: cuDNN first", {"model.attention": "cudnn"}),
    Rung("attention: flash first", {"model.attention": "flash"}),
    Rung("float8, compiled blocks, CUDA graph", {**COMPILED, **GRAPHS, "inversion.fp8": True}, approximate=True),
    *(Rung(f"kernel {name}", {"kernels.enabled": [name]}) for name in MODULES),
    Rung("channels-last", LAST),
    Rung("compiled blocks", COMPILED),
    Rung("merged query, key and value", {"model.merge_qkv": True}),
    Rung("attention: xformers", {"model.attention": "xformers"}),
    Rung("attention: memory-efficient first", {"model.attention": "efficient"}),
)


class Ladder:
    """The no-gradient calls of an architecture with random weights, in bf16; on a CPU, where that is slow, in fp32."""

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        self.device, self.precision = device, "bf16" if device.type == "cuda" else "fp32"
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._architecture = architecture
        self._settings = ours.settings(architecture, {"model": {"precision": self.precision}})
        source, network = ours.source(architecture), ours.network_spec(architecture)
        with ours.random_weights(architecture, device):
            self.bench = Bench(self._settings, source, network, self.precision, device)

    @contextlib.contextmanager
    def call(self, rung: Rung, images: int) -> Iterator[Call]:
        """A rung's call of a number of images, which predicts their noise [images, C, H, W]. Raises Unavailable."""
        settings = loading.replaced(
            self._settings, {"kernels.enabled": [], **rung.values, "batch.inversion_pairs": images // 2}
        )
        if self.device.type != "cuda" and {"model.cuda_graphs", "model.compile"} & rung.values.keys():
            raise Unavailable("needs a GPU")
        try:
            with self.bench.calling(settings) as call:
                yield lambda: call().flatten(0, 1)
        except Rejected as error:
            raise Unavailable(str(error)) from error

    @contextlib.contextmanager
    def autocast(self, images: int) -> Iterator[Call]:
        """The released script's call, like ``call``: fp32 weights, cast to half precision by autocast at every use."""
        unet: Any = make_unet(self._architecture, self.device, torch.float32).eval()
        source = ours.source(self._architecture)
        schedule = schedule_of(source, self._settings.inversion)
        denoiser = Denoiser(unet, source, schedule, "fp32", self.device)
        examples = self.bench.inputs(images // 2)
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16

        @torch.no_grad()
        def call() -> Tensor:
            with torch.autocast(self.device.type, half):
                return denoiser(examples.x_t, examples.time, examples.pairs.cond).flatten(0, 1)

        yield call


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
