"""Fused kernels in place of modules of a UNet.

``patch`` gives stock modules of a diffusers UNet a fused forward pass by changing their class to a subclass of their
own with the same name. Parameters, buffers, hooks and state-dict keys stay as they are, and so does whatever LoRA and
DeepSpeed attached to them; ``unpatch`` restores the class. A kernel is imported only when it is enabled.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from smpo_fast.common.errors import ConfigError, EnvironmentProblem
from smpo_fast.common.runtime import warn0
from smpo_fast.config.schema import Config

MODULES = ("group_norm_silu", "layer_norm", "geglu", "geglu_linear")


def check(config: Config, device: torch.device) -> None:
    """Check that the kernels that the settings name can run at all, before anything heavy is loaded.

    Raises EnvironmentProblem when Triton is missing. On a CPU the kernels' eager references run, with one notice.
    """
    enabled = config.kernels.listed
    if enabled and importlib.util.find_spec("triton") is None:
        raise EnvironmentProblem(
            f"kernels.enabled = {enabled} needs Triton, which is not installed: "
            'pip install "smpo-fast[kernels]" (Linux), or leave kernels.enabled out'
        )
    if enabled and only_eager(device):
        warn0(f"kernels.enabled = {enabled}: kernels need CUDA; on {device.type} eager code runs instead")


def only_eager(device: torch.device) -> bool:
    """Whether every kernel runs its eager reference on a device."""
    return device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1"


def patch(unet: nn.Module, enabled: Collection[str]) -> dict[str, int]:
    """Put those of MODULES that are enabled into a UNet; returns how many modules each of them replaced.

    Names of other kernels are ignored. Raises ConfigError for a kernel that matches no module; the UNet is then
    unchanged.
    """
    found = {name: list(_MATCHES[name](unet)) for name in MODULES if name in enabled}
    for name, swaps in found.items():
        if not swaps:
            raise ConfigError(f"kernels.enabled: {name} matches no module of this {type(unet).__name__}")
    for swaps in found.values():
        for module, mixin in swaps:
            _swap(module, mixin)
    helpers = (_AppliedSiLU, _AddNormBlock)
    return {name: sum(mixin not in helpers for _, mixin in swaps) for name, swaps in found.items()}


def unpatch(unet: nn.Module) -> int:
    """Restore the class of every patched module; returns their number."""
    patched = [m for m in unet.modules() if hasattr(type(m), "stock_class")]
    for module in patched:
        module.__class__ = cast(Any, type(module)).stock_class
    return len(patched)


def forward_only(unet: nn.Module) -> list[Callable[[], AbstractContextManager[None]]]:
    """Contexts in which a patched UNet runs the kernels that have no gradient; for calls of the inversion.

    Outside of them it computes as in training, so that equal weights give the reference and the policy equal errors.
    """
    loaded = sys.modules.get("smpo_fast.kernels.geglu_linear")  # ``patch`` imports it for a UNet that uses it
    if loaded is None or not any(isinstance(module, loaded.FusedGEGLULinear) for module in unet.modules()):
        return []
    return [loaded.forward_only]


def _swap(module: nn.Module, mixin: type) -> None:
    if not isinstance(module, mixin):
        module.__class__ = _subclass(cast(Any, type(module)), cast(Any, mixin))


@cache
def _subclass(base: type, mixin: type) -> type:
    """``base`` with the forward pass of ``mixin``, under the same name: diffusers finds repeated blocks by it.

    A mixin may handle some calls only and leave the others to ``base``, which may itself be patched.
    """
    stock = getattr(base, "stock_class", base)
    return type(base.__name__, (mixin, base), {"__module__": __name__, "stock_class": stock})


# --- group_norm_silu -------------------------------------------------------------------------------------------


class _AppliedSiLU(nn.SiLU):
    """A SiLU behind a norm that has applied it already to images (4 dimensions), but not to the time embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.ndim == 4 else super().forward(x)


def _group_norms(unet: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    from smpo_fast.kernels.group_norm_silu import FusedGroupNorm, FusedGroupNormSiLU

    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default":
            if type(module.nonlinearity) is nn.SiLU and _stock(module.norm1, module.norm2):
                yield from ((norm, FusedGroupNormSiLU) for norm in (module.norm1, module.norm2))
                yield module.nonlinearity, _AppliedSiLU
        elif isinstance(module, Transformer2DModel) and type(getattr(module, "norm", None)) is nn.GroupNorm:
            yield module.norm, FusedGroupNorm
        elif isinstance(module, UNet2DConditionModel) and type(module.conv_act) is nn.SiLU:
            if _stock(module.conv_norm_out):
                yield module.conv_norm_out, FusedGroupNormSiLU
                yield module.conv_act, _AppliedSiLU


def _stock(*norms: Any) -> bool:
    """Whether all are torch's own norms, with weight and bias."""
    return all(type(n) in (nn.GroupNorm, nn.LayerNorm) and n.bias is not None for n in norms)


# --- layer_norm ------------------------------------------------------------------------------------------------


class _AddNormBlock(BasicTransformerBlock):
    """A transformer block of SDXL and SD1.5 in which each residual addition is fused with the norm that follows it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if cross_attention_kwargs or self._chunk_size is not None or hidden_states.ndim != 3:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        self_states = encoder_hidden_states if self.only_cross_attention else None
        out = self.attn1(self.norm1(hidden_states), encoder_hidden_states=self_states, attention_mask=attention_mask)
        hidden_states, normed = self.norm2(hidden_states, out)
        out = self.attn2(normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        hidden_states, normed = self.norm3(hidden_states, out)
        return self.ff(normed) + hidden_states


def _layer_norms(unet: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    from smpo_fast.kernels.layer_norm import FusedLayerNorm

    for module in unet.modules():
        if type(module) is BasicTransformerBlock and module.norm_type == "layer_norm":
            norms: tuple[Any, ...] = (module.norm1, module.norm2, module.norm3)
            plain = module.pos_embed is None and module.attn2 is not None and not hasattr(module, "fuser")
            if plain and _stock(*norms):
                yield from ((norm, FusedLayerNorm) for norm in norms)
                yield module, _AddNormBlock


# --- geglu, geglu_linear ---------------------------------------------------------------------------------------


def _geglus(unet: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    from smpo_fast.kernels.geglu import FusedGEGLU

    return ((module, FusedGEGLU) for module in unet.modules() if type(module) is GEGLU)


def _linear_geglus(unet: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    from smpo_fast.kernels.geglu_linear import FusedGEGLULinear, plain

    return ((m, FusedGEGLULinear) for m in unet.modules() if type(m) is GEGLU and plain(m.proj))


_MATCHES: dict[str, Callable[[nn.Module], Iterator[tuple[nn.Module, type]]]] = {
    "group_norm_silu": _group_norms,
    "layer_norm": _layer_norms,
    "geglu": _geglus,
    "geglu_linear": _linear_geglus,
}
