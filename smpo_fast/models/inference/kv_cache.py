"""Keys and values of the cross-attention, computed once for a chunk of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from smpo_fast.models.attention import Attention


@dataclass(frozen=True)
class CallInputs:
    """What a chunk's calls share: the UNet's other inputs, 2 rows a pair, and keys and values, one row a pair."""

    inputs: dict[str, Any]
    held: list[tuple[Tensor, Tensor]]

    def first(self, pairs: int) -> CallInputs:
        return self.map(lambda t: t[: 2 * pairs], lambda t: t[:pairs])

    def map(self, input_: Callable[[Tensor], Tensor], held: Callable[[Tensor], Tensor]) -> CallInputs:
        inputs: dict[str, Any] = {"encoder_hidden_states": input_(self.inputs["encoder_hidden_states"])}
        if added := self.inputs.get("added_cond_kwargs"):
            inputs["added_cond_kwargs"] = {name: input_(t) for name, t in added.items()}
        return CallInputs(inputs, [(held(k), held(v)) for k, v in self.held])

    def tensors(self) -> Iterator[Tensor]:
        yield self.inputs["encoder_hidden_states"]
        yield from self.inputs.get("added_cond_kwargs", {}).values()
        yield from chain.from_iterable(self.held)


def cacheable_cross_attentions(unet: nn.Module) -> Iterator[Any]:
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


def split_heads(attn: Any, x: Tensor) -> Tensor:
    """[n, tokens, heads d] -> [n, heads, tokens, d]."""
    return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)


@contextmanager
def cached_keys_values(attentions: list[Any], held: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    try:
        for attn, key_value in zip(attentions, held, strict=True):
            attn.held = key_value
        yield
    finally:
        for attn in attentions:
            attn.held = None
