"""Reuse of the UNet's deep features in the later calls of a solver step: an approximation (DeepCache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from smpo_fast.common.errors import ConfigError
from smpo_fast.models.inference.replaced_forward import replaced_forwards


class DeepFeatures:
    """The deep blocks' input to the last up-block, in the last full call (DeepCache, Ma et al., CVPR 2024).

    A shallow call runs only the first down-block and the last up-block, with these features in between. Raises
    ConfigError for a network with a single level.
    """

    def __init__(self, unet: Any) -> None:
        if len(unet.up_blocks) < 2:
            raise ConfigError("inversion.reuse_deep: this network has one level only, and so no deep features")
        self._unet = unet
        self._features: Tensor | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, a full call stores its deep features."""
        last = self._unet.up_blocks[-2]
        inner = last.forward

        def keep(*args: Any, **kwargs: Any) -> Tensor:
            out = inner(*args, **kwargs)
            if self._features is None or self._features.shape[1:] != out.shape[1:] or len(self._features) < len(out):
                self._features = out.clone()
            else:  # in place: the captured graph of a shallow call reads this very memory
                self._features[: len(out)].copy_(out)
            return out

        with replaced_forwards({last: keep}):
            yield

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside, a call is shallow: it uses the features of the last full call."""
        unet, features = self._unet, self._features
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
