"""One call of a UNet: from latents and prompts to a noise prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import attention
from smpo_fast.models.locate import ModelSource


class _Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 from input and weights of any dtype: [N, K, H, W] to [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        bias, kind = None if self.bias is None else self.bias.float(), x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return self._conv_forward(x.float(), self.weight.float(), bias)


def predict_in_float32(unet: nn.Module) -> None:
    """Make the last convolution of a half-precision UNet compute in float32, so that predictions are not rounded.

    A loss compares errors that differ in their third or fourth digit, which is where half precision ends.
    """
    last = _last_convolution(unet)
    if type(last) is nn.Conv2d:
        last.__class__ = _Float32Conv2d


@contextmanager
def borrowed(unet: nn.Module) -> Iterator[None]:
    """Inside, denoisers of a UNet may change it; afterwards it is as it was, for its owner to sample with."""
    last = _last_convolution(unet)
    kind = type(last)
    try:
        yield
    finally:
        last.__class__ = kind


def _last_convolution(unet: nn.Module) -> Any:
    bare: Any = getattr(unet, "module", unet)  # without DeepSpeed's wrapper
    return getattr(bare.conv_out, "base_layer", bare.conv_out)  # without LoRA


class Denoiser:
    """A UNet as the method uses it: predictions for pairs, in float32 whatever the UNet computes in.

    Shapes: x [B, 2, C, H, W], time [B] int64, conditioning of B rows; a prediction has the shape of x. In half
    precision the UNet's last convolution is made to compute in float32.
    """

    def __init__(
        self, unet: nn.Module, source: ModelSource, schedule: NoiseSchedule, precision: str, device: torch.device
    ) -> None:
        self.unet = unet
        self.velocity = source.prediction_type == "v_prediction"
        self.dtype = COMPUTE_DTYPES[precision]
        if precision != "fp32":
            predict_in_float32(unet)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if precision == "bf16-autocast":
            self.autocast = partial(torch.autocast, device.type, torch.bfloat16)
        alphas = torch.from_numpy(schedule.alphas_cumprod.astype(np.float64))
        levels = torch.stack([alphas.sqrt(), (1 - alphas).sqrt()], dim=1).float()
        # A released path starts below timestep 0, at the level of 0: negative indices count from the end.
        self._levels = torch.cat([levels, levels[:1].expand_as(levels)]).to(device)

    def __call__(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """The network's own prediction (eps or v), like x [B, 2, C, H, W]."""
        return self.predict(x, time[:, None].expand(-1, 2), self.unet_inputs(cond))

    def eps(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """The noise prediction, like x [B, 2, C, H, W], also for a network that predicts v."""
        return self.as_eps(self(x, time, cond), x, time)

    def unet_inputs(self, cond: Conditioning) -> dict[str, Any]:
        """The UNet's keyword arguments, one row per image: 2 B rows, in its dtype."""
        inputs: dict[str, Any] = {"encoder_hidden_states": cond.prompt.to(self.dtype).repeat_interleave(2, dim=0)}
        if cond.pooled is not None and cond.time_ids is not None:
            ids = cond.time_ids  # image sizes and crops stay in float32: half precision would round them
            inputs["added_cond_kwargs"] = {
                "text_embeds": cond.pooled.to(self.dtype).repeat_interleave(2, dim=0),
                "time_ids": ids.flatten(0, 1) if ids.ndim == 3 else ids.repeat_interleave(2, dim=0),
            }
        return inputs

    def predict(self, x: Tensor, timesteps: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Like a call, [B, 2, C, H, W], but given every image's timestep [B, 2], and the results of ``unet_inputs``."""
        with self.autocast(), attention.preferred(self.unet):
            out = self.unet(x.flatten(0, 1).to(self.dtype), timesteps.flatten(), return_dict=False, **inputs)[0]
        return out.float().unflatten(0, x.shape[:2])

    def as_eps(self, prediction: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The noise that a prediction at x implies, like x: ``eps = signal v + noise x`` for a v-prediction."""
        if not self.velocity:
            return prediction
        signal, noise = self._level(time)
        return torch.addcmul(noise * x, signal, prediction)

    def target(self, x_0: Tensor, tau: Tensor, time: Tensor) -> Tensor:
        """The prediction that the network should make at ``x_t = signal_t x_0 + noise_t tau``, [B, 2, C, H, W].

        It is tau for an eps-prediction, and ``v = signal tau - noise x_0`` for a v-prediction.
        """
        if not self.velocity:
            return tau
        signal, noise = self._level(time)
        return torch.addcmul(signal * tau, noise, x_0, value=-1)

    def _level(self, time: Tensor) -> tuple[Tensor, ...]:
        """Signal and noise of the timesteps [B], each [B, 1, 1, 1, 1]."""
        return self._levels[time][..., None, None, None, None].unbind(1)
