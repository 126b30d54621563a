"""The no-gradient call: how a UNet is run when nothing is trained on it.

Inversion is most of a step, and all its calls see the same weights. So what depends on a pair's prompt alone (the keys
and values of the cross-attention) is computed once for a chunk of pairs; the transformer blocks may be compiled and
whole calls replayed as CUDA graphs, at a few fixed batch sizes; and two approximations can be switched on.

Nothing of this is left behind in the network: the modules are as they were after every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from smpo_fast.batch import Conditioning
from smpo_fast.config import Config, Inversion, Model, SettingsError
from smpo_fast.inversion import Eps
from smpo_fast.model import Attention, Denoiser

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
# Compiled variants of a block: widths (13 of SDXL's residual blocks) x batch sizes x shapes of pictures, with and
# without gradients. Beyond the limit a block would run as it is, for the rest of the run.
_SPECIALISATIONS = 1024


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
            raise SettingsError(f"{name}: ZeRO stage 3 gathers weights module by module; take stage 2, or leave it off")
        if value and model.compile != "all" and inversion.source != "inversion":
            raise SettingsError(f"{name} changes nothing: inversion.source = '{inversion.source}' makes no such calls")
    if model.channels_last and zero_stage >= 0:
        raise SettingsError(
            "model.channels_last: DeepSpeed flattens weights in the other order; leave it off, or --ds_config"
        )
    if model.compile == "all" and model.reference == "sharded":
        raise SettingsError(
            "model.compile = 'all': a sharded reference cannot go through the policy's code: 'inversion'"
        )
    if model.compile == "all" and config.lora.rank:
        raise SettingsError(
            "model.compile = 'all': with LoRA the reference is another graph than the policy: 'inversion'"
        )
    _check_inversion(model, inversion, device)


def _check_inversion(model: Model, inversion: Inversion, device: torch.device) -> None:
    if model.cuda_graphs and device.type != "cuda":
        raise SettingsError(f"model.cuda_graphs needs a CUDA device, this is {device.type}: leave it off")
    if model.cuda_graphs and inversion.network == "reference" and model.reference == "streamed":
        raise SettingsError(
            "model.cuda_graphs: a streamed reference has no fixed place: model.reference = 'replicated'"
        )
    if inversion.reuse_deep and inversion.renoise_steps == 0:
        raise SettingsError(
            f"inversion.reuse_deep: solver = '{inversion.solver}' makes one call a step: nothing to reuse"
        )
    if inversion.fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise SettingsError("inversion.fp8 needs a GPU with float8 matrix products (compute capability 8.9 or newer)")


def sizes(chunk: int) -> list[int]:
    """The batch sizes, in pairs, that compiled and captured calls are made at: a chunk and its quarters."""
    return sorted({-(-chunk * quarter // 4) for quarter in (1, 2, 3, 4)})


class Caller:
    """A UNet run without gradients, for one window after another."""

    def __init__(self, denoiser: Denoiser, model: Model, inversion: Inversion, *, chunk: int) -> None:
        # Outside DeepSpeed's wrapper, whose forward is for training; stage 3 gathers weights from there.
        bare = getattr(denoiser.unet, "module", denoiser.unet)
        sharded = any(hasattr(p, "ds_id") for p in bare.parameters())
        self.denoiser = copy(denoiser)
        self.denoiser.unet = denoiser.unet if sharded else bare
        self.input_dtype = torch.float32 if denoiser.velocity else denoiser.dtype
        self._cross = [] if sharded else list(_cross_attentions(bare))
        self._always: list[Callable[[], AbstractContextManager[None]]] = []
        if model.compile != "off":
            self._always.append(partial(_compiled, _blocks(bare)))
        self._float8 = Float8(bare) if inversion.fp8 else None
        if self._float8 is not None:
            self._always.append(self._float8.active)
        self._deep = DeepFeatures(bare) if inversion.reuse_deep else None
        self._sizes = sizes(chunk) if model.cuda_graphs or model.compile != "off" else []
        self._graphs = Graphs(self._run) if model.cuda_graphs else None

    @torch.no_grad()
    def begin(self) -> None:
        """A window begins: the weights may have changed in place since the last one."""
        if self._float8 is not None:
            self._float8.quantise()

    @torch.no_grad()
    def pairs(self, cond: Conditioning) -> Eps:
        """The network for a chunk of pairs, at most ``chunk``; keys and values of their prompts are computed here."""
        count = len(cond.prompt)
        if self._sizes:  # rows beyond the pairs repeat the first one
            filler = next(s for s in self._sizes if s >= count) - count
            cond = cond.map(lambda t: torch.cat([t, t[:1].expand(filler, *t.shape[1:])]) if filler else t)
        with self.denoiser.autocast():
            prompt = cond.prompt.to(self.denoiser.dtype)
            held = [(_heads(attn, attn.to_k(prompt)), _heads(attn, attn.to_v(prompt))) for attn in self._cross]
        told = _Told(self.denoiser.told(cond), held)
        if self._graphs is not None:
            told = self._graphs.placed(told)
        return partial(self._eps, told)

    @torch.no_grad()
    def _eps(self, told: _Told, x: Tensor, timesteps: Tensor, *, again: bool = False) -> Tensor:
        count = len(x)
        size = next((s for s in self._sizes if s >= count), count)
        x_in, times = x, timesteps
        if size > count:
            x_in = torch.cat([x, x[:1].expand(size - count, *x.shape[1:])])
            times = torch.cat([timesteps, timesteps[:1].expand(size - count)])
        shallow = again and self._deep is not None
        run = self._run if self._graphs is None else self._graphs.run
        prediction = run(x_in, times, told, shallow)[:count]
        return self.denoiser.as_eps(prediction, x, timesteps)

    def _run(self, x: Tensor, timesteps: Tensor, told: _Told, shallow: bool) -> Tensor:
        told = told.first(len(x))
        with ExitStack() as stack:
            for context in self._always:
                stack.enter_context(context())
            stack.enter_context(_holding(self._cross, told.held))
            if self._deep is not None:
                stack.enter_context(self._deep.reused() if shallow else self._deep.kept())
            return self.denoiser.predict(x, timesteps, told.inputs)


@dataclass(frozen=True)
class _Told:
    """What a chunk's calls share: the UNet's other inputs, 2 rows a pair, and keys and values, one row a pair."""

    inputs: dict[str, Any]
    held: list[tuple[Tensor, Tensor]]

    def first(self, pairs: int) -> _Told:
        return self.map(lambda t: t[: 2 * pairs], lambda t: t[:pairs])

    def map(self, input_: Callable[[Tensor], Tensor], held: Callable[[Tensor], Tensor]) -> _Told:
        inputs: dict[str, Any] = {"encoder_hidden_states": input_(self.inputs["encoder_hidden_states"])}
        if added := self.inputs.get("added_cond_kwargs"):
            inputs["added_cond_kwargs"] = {name: input_(t) for name, t in added.items()}
        return _Told(inputs, [(held(k), held(v)) for k, v in self.held])

    def tensors(self) -> Iterator[Tensor]:
        yield self.inputs["encoder_hidden_states"]
        yield from self.inputs.get("added_cond_kwargs", {}).values()
        yield from chain.from_iterable(self.held)


# --- keys and values --------------------------------------------------------------------------------------------


def _cross_attentions(unet: nn.Module) -> Iterator[Any]:
    """The cross-attentions whose keys and values depend on the prompt alone, in a processor that can hold them."""
    for name, module in unet.named_modules():
        if not name.endswith("attn2") or type(getattr(module, "processor", None)) is not Attention:
            continue
        attn: Any = module
        special = (
            attn.norm_cross,
            attn.spatial_norm,
            attn.group_norm,
            attn.norm_q,
            attn.norm_k,
            attn.added_kv_proj_dim,
        )
        if not any(special) and not attn.residual_connection and attn.rescale_output_factor == 1.0:
            yield attn


def _heads(attn: Any, x: Tensor) -> Tensor:
    """[n, tokens, heads d] -> [n, heads, tokens, d]."""
    return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)


@contextmanager
def _holding(attentions: list[Any], held: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    try:
        for attn, key_value in zip(attentions, held, strict=True):
            attn.held = key_value
        yield
    finally:
        for attn in attentions:
            attn.held = None


# --- compilation ------------------------------------------------------------------------------------------------


def _blocks(unet: nn.Module) -> list[nn.Module]:
    """What is compiled: transformer and residual blocks; equal ones share their code."""
    return [m for m in unet.modules() if type(m).__name__ in ("BasicTransformerBlock", "ResnetBlock2D")]


def _compiled_impl(block: nn.Module) -> Callable[..., Any]:
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _SPECIALISATIONS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _SPECIALISATIONS)
    return torch.compile(block._call_impl, dynamic=False)


@contextmanager
def _compiled(blocks: list[nn.Module]) -> Iterator[None]:
    before: list[Any] = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            if not hasattr(block, "inversion_impl"):
                object.__setattr__(block, "inversion_impl", _compiled_impl(block))
            block._compiled_call_impl = cast(Any, block.inversion_impl)
        yield
    finally:
        for block, previous in zip(blocks, before, strict=True):
            block._compiled_call_impl = previous


def compile_training(*unets: nn.Module) -> None:
    """Compile the blocks of policy and reference for good, for ``model.compile = "all"``.

    A graph made for gradients rounds otherwise than one without: ask the reference with gradients switched on and its
    parameters requiring them (``window`` does), and both networks go through the same code. Then equal weights give
    equal predictions, bit for bit.
    """
    for unet in unets:
        unet.requires_grad_(True)
        for block in _blocks(getattr(unet, "module", unet)):
            block._compiled_call_impl = _compiled_impl(block)


def as_in_training(model: Model) -> AbstractContextManager[Any]:
    """How the reference is asked, inside ``no_grad``: as it is, or through the policy's compiled code."""
    return torch.enable_grad() if model.compile == "all" else nullcontext()


# --- CUDA graphs --------------------------------------------------------------------------------------------------


class Graphs:
    """Calls captured once for each batch size and replayed: no Python and no launches in between.

    All graphs read the same buffers, of the largest chunk seen, and share one memory pool; weights are read where they
    lie, so an optimizer's update in place is seen.
    """

    def __init__(self, call: Callable[[Tensor, Tensor, _Told, bool], Tensor]) -> None:
        self._call = call
        self._told: _Told | None = None
        self._x: Tensor | None = None
        self._times: Tensor | None = None
        self._graphs: dict[tuple[int, bool], tuple[Any, Tensor]] = {}
        self._pool: Any = None

    def placed(self, told: _Told) -> _Told:
        """A chunk's shared inputs, copied to where the graphs read them; the pictures' shape must stay the same."""
        if self._told is None or len(told.inputs["encoder_hidden_states"]) > len(
            self._told.inputs["encoder_hidden_states"]
        ):
            self._told = told.map(torch.clone, torch.clone)
            self._graphs.clear()  # they read the smaller buffers
        else:
            for place, value in zip(self._told.tensors(), told.tensors(), strict=True):
                place[: len(value)].copy_(value)
        return self._told

    def run(self, x: Tensor, timesteps: Tensor, told: _Told, shallow: bool) -> Tensor:
        """The prediction, a new tensor."""
        if self._x is None or self._x.shape[1:] != x.shape[1:] or len(self._x) < len(x) or self._times is None:
            most = len(told.inputs["encoder_hidden_states"]) // 2
            self._x, self._times = x.new_empty(most, *x.shape[1:]), timesteps.new_empty(most)
            self._graphs.clear()
        self._x[: len(x)].copy_(x)
        self._times[: len(x)].copy_(timesteps)
        if (len(x), shallow) not in self._graphs:
            self._capture(len(x), told, shallow)
        graph, out = self._graphs[len(x), shallow]
        graph.replay()
        return out.clone()

    def _capture(self, size: int, told: _Told, shallow: bool) -> None:
        assert self._x is not None and self._times is not None
        arguments = (self._x[:size], self._times[:size], told, shallow)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and the compiler settle here, outside the capture
            for _ in range(2):
                self._call(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "global", the default, would let the prefetching thread's allocations spoil the capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._call(*arguments)
        self._pool = self._pool or graph.pool()
        self._graphs[size, shallow] = graph, out


# --- approximations -----------------------------------------------------------------------------------------------


class Float8:
    """The linears of the transformer blocks in float8 (e4m3): a scale for each row of weights and of activations."""

    def __init__(self, unet: nn.Module) -> None:
        blocks = (m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock")
        named = (item for block in blocks for item in block.named_modules())
        # keys and values of the prompt are computed once a chunk, as they are
        linears = (m for name, m in named if type(m) is nn.Linear and name not in ("attn2.to_k", "attn2.to_v"))
        self.linears = [m for m in linears if m.in_features % 16 == 0 and m.out_features % 16 == 0]
        if not self.linears:
            raise SettingsError("inversion.fp8 matched no linear of this network (plain, sides multiples of 16)")

    def quantise(self) -> None:
        """Round the weights as they are now; in place, where they were rounded before."""
        for linear in self.linears:
            rounded = _rows_to_float8(linear.weight)
            if (places := getattr(linear, "rounded", None)) is None:
                object.__setattr__(linear, "rounded", rounded)
                continue
            for place, value in zip(places, rounded, strict=True):
                place.copy_(value)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the linears compute in float8."""
        # By class, not by a new function for each: the compiler knows it again in the next call and the next block.
        try:
            for linear in self.linears:
                linear.__class__ = _Float8Linear
            yield
        finally:
            for linear in self.linears:
                linear.__class__ = nn.Linear


class _Float8Linear(nn.Linear):
    """A linear in float8; ``rounded`` is its weight: rows and their scales."""

    rounded: tuple[Tensor, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        weight, weight_scale = self.rounded
        rows, scale = _rows_to_float8(x.reshape(-1, self.in_features))
        product = torch._scaled_mm(
            rows, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16
        ).to(x.dtype)
        product = product if self.bias is None else product + self.bias.to(x.dtype)
        return product.view(*x.shape[:-1], self.out_features)


def _rows_to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded rows and the scale [rows, 1] that gives them their size back."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / _FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale


class DeepFeatures:
    """What the deep blocks of the last full call gave the last up-block (DeepCache, Ma et al., CVPR 2024).

    A shallow call runs the first down-block and the last up-block alone, beside those features.
    """

    def __init__(self, unet: Any) -> None:
        if len(unet.up_blocks) < 2:
            raise SettingsError("inversion.reuse_deep: this network has one level; there is nothing deep in it")
        self._unet = unet
        self._features: Tensor | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a full call leaves its deep features here."""
        last = self._unet.up_blocks[-2]
        inner = last.forward

        def keep(*args: Any, **kwargs: Any) -> Tensor:
            out = inner(*args, **kwargs)
            if self._features is None or self._features.shape[1:] != out.shape[1:] or len(self._features) < len(out):
                self._features = out.clone()
            else:  # in place: a captured graph of the shallow call reads them here
                self._features[: len(out)].copy_(out)
            return out

        with _forwards({last: keep}):
            yield

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside, a call takes the features of the call before it."""
        unet, features = self._unet, self._features
        assert features is not None, "a shallow call follows a full one"

        def down(block: Any, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
            # as many residuals as the block would give: the up-blocks count them off
            return sample, (sample,) * (len(block.resnets) + bool(block.downsamplers))

        def through(sample: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
            return kwargs.get("hidden_states", sample)

        def deep(sample: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
            here: Any = kwargs.get("hidden_states", sample)
            return features[: len(here)]

        stubs: dict[nn.Module, Callable[..., Any]] = {
            block: lambda *a, block=block, **k: down(
                block, k.pop("hidden_states", None) if not a else a[0], *a[1:], **k
            )
            for block in unet.down_blocks[1:]
        }
        stubs |= {block: through for block in [unet.mid_block, *unet.up_blocks[:-2]] if block is not None}
        stubs[unet.up_blocks[-2]] = deep
        with _forwards(stubs):
            yield


@contextmanager
def _forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward pass for a while."""
    try:
        for module, forward in forwards.items():
            object.__setattr__(module, "forward", forward)
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
