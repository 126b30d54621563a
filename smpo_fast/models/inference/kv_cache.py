"""Keys and values of the cross-attention, computed once per chunk of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from smpo_fast.models.attention import Attention, plain


@dataclass(frozen=True)
class CallInputs:
    """What all calls of a chunk have in common.

    unet: the UNet's keyword arguments, 2 rows per pair; keys_values: (key, value) of each cross-attention,
    [pairs, heads, tokens, d], 1 row per pair.
    """

    unet: dict[str, Any]
    keys_values: list[tuple[Tensor, Tensor]]

    def first(self, pairs: int) -> CallInputs:
        """Those of the first pairs."""
        return self.take(0, pairs)

    def take(self, start: int, stop: int) -> CallInputs:
        """Those of some pairs: views."""
        return self.map(lambda t: t[2 * start : 2 * stop], lambda t: t[start:stop])

    def map(self, of_images: Callable[[Tensor], Tensor], of_pairs: Callable[[Tensor], Tensor]) -> CallInputs:
        """A copy with a function applied to every tensor: one for tensors of 2 rows per pair, one for those of 1."""
        unet: dict[str, Any] = {"encoder_hidden_states": of_images(self.unet["encoder_hidden_states"])}
        if added := self.unet.get("added_cond_kwargs"):
            unet["added_cond_kwargs"] = {name: of_images(t) for name, t in added.items()}
        return CallInputs(unet, [(of_pairs(k), of_pairs(v)) for k, v in self.keys_values])

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, in a fixed order."""
        yield self.unet["encoder_hidden_states"]
        yield from self.unet.get("added_cond_kwargs", {}).values()
        yield from chain.from_iterable(self.keys_values)


def cacheable_cross_attentions(unet: nn.Module) -> Iterator[Any]:
    """The cross-attentions whose keys and values depend on the prompt alone and whose processor can use cached ones."""
    for name, module in unet.named_modules():
        if name.endswith("attn2") and type(getattr(module, "processor", None)) is Attention and plain(module):
            yield module


@contextmanager
def cached_keys_values(attentions: list[Any], cached: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the attentions use these keys and values, [pairs, heads, tokens, d] each."""
    try:
        for attn, key_value in zip(attentions, cached, strict=True):
            attn.cached_key_value = key_value
        yield
    finally:
        for attn in attentions:
            attn.cached_key_value = None
