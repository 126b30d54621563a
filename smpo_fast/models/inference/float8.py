"""Linear layers with float8 matrix products: an approximation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smpo_fast.common.errors import ConfigError

_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max


def linears(unet: nn.Module) -> list[nn.Linear]:
    """The layers that can compute in float8."""
    blocks = (m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    named = (item for block in blocks for item in block.named_modules())
    # Keys and values of the prompt are computed once per chunk: float8 would gain nothing there.
    found = (m for name, m in named if type(m) is nn.Linear and name not in ("attn2.to_k", "attn2.to_v"))
    return [m for m in found if m.in_features % 16 == 0 and m.out_features % 16 == 0]


def weight_bytes(unet: nn.Module) -> int:
    """Bytes of the float8 copy of a network's weights: one per element, and a float32 scale per row."""
    return sum(m.weight.numel() + 4 * m.out_features for m in linears(unet))


class Float8:
    """The linear layers of the transformer blocks in float8 (e4m3), with one scale per row of weights and activations.

    Raises ConfigError for a network without a layer that this is possible for.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.linears = linears(unet)
        if not self.linears:
            raise ConfigError(
                "inversion.fp8 matches no linear layer of this network (not adapted, both dimensions multiples of 16)"
            )

    def quantise(self) -> None:
        """Round the current weights; in place from the second time on, because captured graphs read that memory."""
        for linear in self.linears:
            rounded = _rows_to_float8(linear.weight)
            if (before := getattr(linear, "float8_weight", None)) is None:
                object.__setattr__(linear, "float8_weight", rounded)
                continue
            for place, value in zip(before, rounded, strict=True):
                place.copy_(value)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the layers compute in float8."""
        # A class, rather than a new function per layer: the compiler recognises it in the next call and the next block.
        try:
            for linear in self.linears:
                linear.__class__ = _Float8Linear
            yield
        finally:
            for linear in self.linears:
                linear.__class__ = nn.Linear


class _Float8Linear(nn.Linear):
    """A linear layer in float8; ``float8_weight`` is its weight: rounded rows [out, in] and their scales [out, 1]."""

    float8_weight: tuple[Tensor, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        weight, weight_scale = self.float8_weight
        rows, scale = _rows_to_float8(x.reshape(-1, self.in_features))
        product = _product(rows, scale, weight, weight_scale).to(x.dtype)
        product = product if self.bias is None else product + self.bias.to(x.dtype)
        return product.view(*x.shape[:-1], self.out_features)


def check_device(device: torch.device) -> None:
    """Raise ConfigError for a device that cannot multiply float8 matrices with a scale for each row."""
    try:
        _product(
            *_rows_to_float8(torch.ones(16, 16, device=device)), *_rows_to_float8(torch.ones(16, 16, device=device))
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"inversion.fp8: PyTorch {torch.__version__} cannot multiply float8 matrices with a scale for each row on "
            f"this GPU ({reason}): leave it off"
        ) from error


def _product(rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Rows [n, in] times weights [out, in], each with the scales [., 1] of its rows: [n, out] bfloat16."""
    if rows.device.type == "cpu":  # for studies of the error; some versions of PyTorch lack this product on a CPU
        return (rows.float() @ weight.float().t() * scale * weight_scale.t()).bfloat16()
    return torch._scaled_mm(rows, weight.t(), scale_a=scale, scale_b=weight_scale.t(), out_dtype=torch.bfloat16)


def _rows_to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded rows of x [rows, n] and the scale [rows, 1] by which to multiply them."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / _FP8_MAX).clamp(min=1e-12)
    return (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale
