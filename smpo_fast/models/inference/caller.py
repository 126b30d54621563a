"""The no-gradient call: how a UNet is run when nothing is trained on it.

Inversion is most of a step, and all its calls see the same weights. So what depends on a pair's prompt alone (the keys
and values of the cross-attention) is computed once for a chunk of pairs; the transformer blocks may be compiled and
whole calls replayed as CUDA graphs, at a few fixed batch sizes; and two approximations can be switched on.

Nothing of this is left behind in the network: the modules are as they were after every call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from functools import partial

import torch
from torch import Tensor

from smpo_fast.common.errors import UserError
from smpo_fast.config.schema import Config, Inversion, Model
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.inversion import NoisePredictor
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.compilation import compiled, compiled_blocks
from smpo_fast.models.inference.cuda_graphs import CudaGraphs
from smpo_fast.models.inference.deep_cache import DeepFeatures
from smpo_fast.models.inference.float8 import Float8
from smpo_fast.models.inference.kv_cache import CallInputs, cacheable_cross_attentions, cached_keys_values, split_heads


def check(config: Config, device: torch.device, zero_stage: int) -> None:
    """Refuse what cannot run, before anything heavy is loaded; raises SettingsError naming the setting.

    zero_stage: -1 without DeepSpeed.
    """
    model, inversion = config.model, config.inversion
    wanted = {
        "model.compile": model.compile != "off",
        "model.cuda_graphs": model.cuda_graphs,
        "inversion.fp8": inversion.fp8,
        "inversion.reuse_deep": inversion.reuse_deep,
    }
    for name, value in wanted.items():
        if value and zero_stage == 3:
            raise UserError(f"{name}: ZeRO stage 3 gathers weights module by module; take stage 2, or leave it off")
        if value and model.compile != "all" and inversion.source != "inversion":
            raise UserError(f"{name} changes nothing: inversion.source = '{inversion.source}' makes no such calls")
    if model.channels_last and zero_stage >= 0:
        raise UserError(
            "model.channels_last: DeepSpeed flattens weights in the other order; leave it off, or --ds_config"
        )
    if model.compile == "all" and model.reference == "sharded":
        raise UserError("model.compile = 'all': a sharded reference cannot go through the policy's code: 'inversion'")
    if model.compile == "all" and config.lora.rank:
        raise UserError("model.compile = 'all': with LoRA the reference is another graph than the policy: 'inversion'")
    _check_inversion(model, inversion, device)


def _check_inversion(model: Model, inversion: Inversion, device: torch.device) -> None:
    if model.cuda_graphs and device.type != "cuda":
        raise UserError(f"model.cuda_graphs needs a CUDA device, this is {device.type}: leave it off")
    if model.cuda_graphs and inversion.network == "reference" and model.reference == "streamed":
        raise UserError("model.cuda_graphs: a streamed reference has no fixed place: model.reference = 'replicated'")
    if inversion.reuse_deep and inversion.renoise_steps == 0:
        raise UserError(f"inversion.reuse_deep: solver = '{inversion.solver}' makes one call a step: nothing to reuse")
    if inversion.fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("inversion.fp8 needs a GPU with float8 matrix products (compute capability 8.9 or newer)")


def sizes(chunk: int) -> list[int]:
    """The batch sizes, in pairs, that compiled and captured calls are made at: a chunk and its quarters."""
    return sorted({-(-chunk * quarter // 4) for quarter in (1, 2, 3, 4)})


class InferenceCaller:
    """A UNet run without gradients, for one window after another."""

    def __init__(self, denoiser: Denoiser, model: Model, inversion: Inversion, *, chunk: int) -> None:
        # Outside DeepSpeed's wrapper, whose forward is for training; stage 3 gathers weights from there.
        bare = getattr(denoiser.unet, "module", denoiser.unet)
        sharded = any(hasattr(p, "ds_id") for p in bare.parameters())
        self.denoiser = copy(denoiser)
        self.denoiser.unet = denoiser.unet if sharded else bare
        self.input_dtype = torch.float32 if denoiser.velocity else denoiser.dtype
        self._cross = [] if sharded else list(cacheable_cross_attentions(bare))
        self._always: list[Callable[[], AbstractContextManager[None]]] = []
        if model.compile != "off":
            self._always.append(partial(compiled, compiled_blocks(bare)))
        self._float8 = Float8(bare) if inversion.fp8 else None
        if self._float8 is not None:
            self._always.append(self._float8.active)
        self._deep = DeepFeatures(bare) if inversion.reuse_deep else None
        self._sizes = sizes(chunk) if model.cuda_graphs or model.compile != "off" else []
        self._graphs = CudaGraphs(self._run) if model.cuda_graphs else None

    @torch.no_grad()
    def weights_changed(self) -> None:
        """A window begins: the weights may have changed in place since the last one."""
        if self._float8 is not None:
            self._float8.quantise()

    @torch.no_grad()
    def predictor(self, cond: Conditioning) -> NoisePredictor:
        """The network for a chunk of pairs, at most ``chunk``; keys and values of their prompts are computed here."""
        count = len(cond.prompt)
        if self._sizes:  # rows beyond the pairs repeat the first one
            filler = next(s for s in self._sizes if s >= count) - count
            cond = cond.map(lambda t: torch.cat([t, t[:1].expand(filler, *t.shape[1:])]) if filler else t)
        with self.denoiser.autocast():
            prompt = cond.prompt.to(self.denoiser.dtype)
            held = [
                (split_heads(attn, attn.to_k(prompt)), split_heads(attn, attn.to_v(prompt))) for attn in self._cross
            ]
        told = CallInputs(self.denoiser.unet_inputs(cond), held)
        if self._graphs is not None:
            told = self._graphs.placed(told)
        return partial(self._eps, told)

    @torch.no_grad()
    def _eps(self, told: CallInputs, x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
        count = len(x)
        size = next((s for s in self._sizes if s >= count), count)
        x_in, times = x, timesteps
        if size > count:
            x_in = torch.cat([x, x[:1].expand(size - count, *x.shape[1:])])
            times = torch.cat([timesteps, timesteps[:1].expand(size - count)])
        shallow = refinement and self._deep is not None
        run = self._run if self._graphs is None else self._graphs.run
        prediction = run(x_in, times, told, shallow)[:count]
        return self.denoiser.as_eps(prediction, x, timesteps)

    def _run(self, x: Tensor, timesteps: Tensor, told: CallInputs, shallow: bool) -> Tensor:
        told = told.first(len(x))
        with ExitStack() as stack:
            for context in self._always:
                stack.enter_context(context())
            stack.enter_context(cached_keys_values(self._cross, told.held))
            if self._deep is not None:
                stack.enter_context(self._deep.reused() if shallow else self._deep.kept())
            return self.denoiser.predict(x, timesteps, told.inputs)
