"""Reuse of the UNet's deep features in the later calls of a solver step: an approximation (DeepCache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smpo_fast.common.errors import ConfigError
from smpo_fast.models.inference.replaced_forward import replaced_forwards


class DeepFeatures:
    """The deep blocks' input to the last up-block, in the last full call (DeepCache, Ma et al., CVPR 2024).

    A shallow call runs only the first down-block and the last up-block, with these features in between. ``images``: the
    most in a call. Raises ConfigError for a network with a single level.
    """

    def __init__(self, unet: Any, images: int) -> None:
        if len(unet.up_blocks) < 2:
            raise ConfigError("inversion.reuse_deep: this network has one level only, and so no deep features")
        self._unet, self._images = unet, images
        # By image shape. Never replaced, because captured graphs use their addresses; all of them share memory,
        # because the features of a solver step are of no use to the next one.
        self._features: dict[torch.Size, Tensor] = {}
        self._memory: Tensor | None = None

    def _place(self, image: torch.Size, like: Tensor) -> Tensor:
        """Where the features of images of a shape are kept, with the memory format of ``like``."""
        if image not in self._features:
            size = self._images * like[0].numel()
            if self._memory is None or self._memory.numel() < size:
                self._memory = like.new_empty(size)
            rows = (self._images, *like.shape[1:])
            self._features[image] = self._memory.as_strided(rows, torch.empty_like(like).stride())
        return self._features[image][: len(like)]

    @contextmanager
    def kept(self, image: torch.Size) -> Iterator[None]:
        """Inside, a full call on latents [2 B, *image] stores its deep features."""
        last = self._unet.up_blocks[-2]
        inner = last.forward

        def keep(*args: Any, **kwargs: Any) -> Tensor:
            out = inner(*args, **kwargs)
            self._place(image, out).copy_(out)
            return out

        with replaced_forwards({last: keep}):
            yield

    @contextmanager
    def reused(self, image: torch.Size) -> Iterator[None]:
        """Inside, a call is shallow: it uses the features of the last full call on latents of this shape."""
        unet, features = self._unet, self._features.get(image)
        assert features is not None, "a shallow call must follow a full one"

        def down(block: Any, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
            # as many residuals as the block would return: the up-blocks take a fixed number of them
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
