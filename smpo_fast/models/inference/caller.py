"""No-gradient calls of a UNet, as the inversion makes them.

Inversion takes most of a training step, and all of its calls see the same weights. So whatever depends on a pair's
prompt alone (the keys and values of the cross-attention) is computed once per chunk of pairs; blocks may be compiled,
and whole calls replayed as CUDA graphs at a few fixed batch sizes; and two approximations can be enabled.

The network itself is unchanged after every call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn

from smpo_fast.config.schema import Inversion, Model
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.inversion import NoisePredictor
from smpo_fast.models import kernel_patch
from smpo_fast.models.attention import keys_values
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.compilation import compiled, compiled_blocks
from smpo_fast.models.inference.cuda_graphs import CudaGraphs
from smpo_fast.models.inference.deep_cache import DeepFeatures
from smpo_fast.models.inference.float8 import Float8
from smpo_fast.models.inference.kv_cache import CallInputs, cacheable_cross_attentions, cached_keys_values
from smpo_fast.models.inference.weight_copies import WeightCopies


def batch_sizes(chunk: int) -> list[int]:
    """The batch sizes, in pairs, that calls are captured for: a chunk and its quarters."""
    return sorted({-(-chunk * quarter // 4) for quarter in (1, 2, 3, 4)})


def drop_copies(unet: nn.Module) -> None:
    """Free the copies of weights that callers of a network keep at its modules; those callers are then of no use."""
    for module in unet.modules():
        for name in ("inversion_weight", "inversion_qkv", "float8_weight"):
            vars(module).pop(name, None)


class InferenceCaller:
    """Makes the no-gradient calls of a UNet, for chunks of at most ``chunk`` pairs."""

    def __init__(self, denoiser: Denoiser, model: Model, inversion: Inversion, *, chunk: int) -> None:
        # DeepSpeed's wrapper is for training and is bypassed, except with ZeRO stage 3, where it gathers the weights.
        bare = getattr(denoiser.unet, "module", denoiser.unet)
        sharded = any(hasattr(p, "ds_id") for p in bare.parameters())
        self.denoiser = copy(denoiser)
        self.denoiser.unet = denoiser.unet if sharded else bare
        self.input_dtype = torch.float32 if denoiser.velocity else denoiser.dtype
        self._cross_attentions = [] if sharded else list(cacheable_cross_attentions(bare))
        self._contexts: list[Callable[[], AbstractContextManager[None]]] = kernel_patch.forward_only(bare)
        if model.compile != "off":
            self._contexts.append(partial(compiled, compiled_blocks(bare)))
        self._copies = None if sharded else WeightCopies(bare, denoiser.dtype, model.channels_last, model.merge_qkv)
        if self._copies is not None:
            self._contexts.append(self._copies.active)
        self._float8 = Float8(bare) if inversion.fp8 else None
        if self._float8 is not None:
            self._contexts.append(self._float8.active)
        self._deep = DeepFeatures(bare, 2 * chunk) if inversion.reuse_deep else None
        self._sizes = batch_sizes(chunk) if model.cuda_graphs else []
        self._graphs = CudaGraphs(self._run, chunk) if model.cuda_graphs else None

    @torch.no_grad()
    def weights_changed(self) -> None:
        """To be called before the first call, and when the weights have changed in place since the last one."""
        if self._copies is not None:
            self._copies.refresh()
        if self._float8 is not None:
            self._float8.quantise()

    @torch.no_grad()
    def predictor(self, cond: Conditioning) -> NoisePredictor:
        """The network for a chunk of pairs; computes the keys and values of their prompts."""
        count = len(cond.prompt)
        if self._sizes:  # up to the next batch size, the first row is repeated
            padding = next(s for s in self._sizes if s >= count) - count
            cond = cond.map(lambda t: torch.cat([t, t[:1].expand(padding, *t.shape[1:])]) if padding else t)
        with self.denoiser.autocast():
            prompt = cond.prompt.to(self.denoiser.dtype)
            cached = [keys_values(attn, prompt) for attn in self._cross_attentions]
        inputs = CallInputs(self.denoiser.unet_inputs(cond), cached)
        if self._graphs is not None:
            inputs = self._graphs.placed(inputs)
        return partial(self._eps, inputs)

    @torch.no_grad()
    def _eps(self, inputs: CallInputs, x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
        count = len(x)
        size = next((s for s in self._sizes if s >= count), count)
        x_in, times = x, timesteps
        if size > count:
            x_in = torch.cat([x, x[:1].expand(size - count, *x.shape[1:])])
            times = torch.cat([timesteps, timesteps[:1].expand(size - count, -1)])
        shallow = refinement and self._deep is not None
        run = self._run if self._graphs is None else self._graphs.run
        prediction = run(x_in, times, inputs, shallow)[:count]
        return self.denoiser.as_eps(prediction, x, timesteps[:, 0])

    def _run(self, x: Tensor, timesteps: Tensor, inputs: CallInputs, shallow: bool) -> Tensor:
        inputs = inputs.first(len(x))
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context())
            stack.enter_context(cached_keys_values(self._cross_attentions, inputs.keys_values))
            if self._deep is not None:
                deep = self._deep.reused if shallow else self._deep.kept
                stack.enter_context(deep(x.shape[2:]))
            return self.denoiser.predict(x, timesteps, inputs.unet)
