"""Reuse of the UNet's deep features in the second call of a step: a named approximation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from smpo_fast.common.errors import UserError
from smpo_fast.models.inference.forwards import replaced_forwards


class DeepFeatures:
    """What the deep blocks of the last full call gave the last up-block (DeepCache, Ma et al., CVPR 2024).

    A shallow call runs the first down-block and the last up-block alone, beside those features.
    """

    def __init__(self, unet: Any) -> None:
        if len(unet.up_blocks) < 2:
            raise UserError("inversion.reuse_deep: this network has one level; there is nothing deep in it")
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

        with replaced_forwards({last: keep}):
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
        with replaced_forwards(stubs):
            yield
