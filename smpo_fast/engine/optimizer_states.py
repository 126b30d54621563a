"""Optimizer states: their size by optimizer, and restoring optimizer states from slices that any layout wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smpo_fast.common.errors import UserError
from smpo_fast.engine.aligned_adamw8bit import _STATES, ALIGNED, AlignedAdamW8bit
from smpo_fast.engine.shards import Reader, Slice
from smpo_fast.kernels.adamw8bit import BLOCK

STATE_BYTES: dict[str, float] = {
    "adamw": 8.0,
    "adamw8bit": 2 + 8 / 256,
    "paged_adamw8bit": 2 + 8 / 256,
    "lion8bit": 1 + 4 / 256,
    "adamw8bit_aligned": 2 + 8 / BLOCK,
    "adafactor": 0.0,
}
_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit"}


def _steps_saved(piece: Slice, saved: Reader) -> int:
    """Every slice of a parameter has made as many steps."""
    found = saved.exact(saved.slices(piece.name, "step")[0], "step")
    assert found is not None
    return int(found)


_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def _restore_adamw(inner: torch.optim.AdamW, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    where = tensor.device if inner.param_groups[0]["fused"] else torch.device("cpu")
    inner.state[tensor] = {
        "step": torch.tensor(float(_steps_saved(piece, saved)), device=where),
        # in the weights' memory order, which fused kernels take for granted
        **{w: torch.empty_like(tensor).copy_(saved.elements(piece, w).view(tensor.shape)) for w in _MOMENTS},
    }


def _restore_adafactor(inner: torch.optim.Optimizer, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    """Slices are whole parameters: it is refused where they could be others."""
    shapes = {
        "exp_avg_sq_row": tensor.shape[:-1], "exp_avg_sq_col": tensor.shape[:-2] + tensor.shape[-1:],
        "exp_avg_sq": tensor.shape, "RMS": (),
    }  # fmt: skip
    found = {word: saved.exact(piece, word) for word in shapes}
    kept = {w: value.to(tensor.device).view(shapes[w]) for w, value in found.items() if value is not None}
    inner.state[tensor] = {"step": _steps_saved(piece, saved), **kept}


def _restore_bitsandbytes(inner: Any, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    from bitsandbytes import functional

    inner.init_state(inner.param_groups[0], tensor, 0, 0)  # so that paged states are in paged memory again
    state = inner.state[tensor]
    state["step"] = _steps_saved(piece, saved)
    for i, table in (("1", "dynamic"), ("2", "udynamic")):
        kept = state.get(f"state{i}")
        if kept is None:  # Lion has one
            continue
        codes, scales = saved.exact(piece, f"state{i}"), saved.exact(piece, f"absmax{i}")
        if codes is None:
            codes, scales = _dequantised(piece, f"state{i}", f"absmax{i}", inner.name2qmap[table], saved), None
            if kept.dtype is torch.uint8:
                codes, quantised = functional.quantize_blockwise(codes, inner.name2qmap[table].cpu(), blocksize=256)
                scales = quantised.absmax
        kept.copy_(codes.view_as(kept))
        if scales is not None:
            state[f"absmax{i}"].copy_(scales)


def _dequantised(piece: Slice, word: str, scales: str, table: Tensor, saved: Reader) -> Tensor:
    """A state of bitsandbytes in fp32, from slices that were cut otherwise."""
    from bitsandbytes import functional

    values, end = torch.full((piece.numel,), float("nan")), piece.offset + piece.numel
    for other in saved.slices(piece.name, word):
        low, high = max(piece.offset, other.offset), min(end, other.offset + other.numel)
        if low >= high:
            continue
        codes, absmax = saved.exact(other, word), saved.exact(other, scales)
        assert codes is not None
        if absmax is not None:
            codes = functional.dequantize_blockwise(codes, absmax=absmax, code=table.cpu(), blocksize=256)
        values[low - piece.offset : high - piece.offset] = codes[low - other.offset : high - other.offset]
    if values.isnan().any():
        raise UserError(f"'{word}' of {piece.name} is not complete: the checkpoint is of another network")
    return values


def _restore_aligned(inner: AlignedAdamW8bit, tensor: Tensor, piece: Slice, saved: Reader) -> None:
    state = inner.state_of(tensor)
    state["step"] = _steps_saved(piece, saved)
    for word in _STATES:
        state[word].copy_(saved.elements(piece, word, BLOCK if word.endswith("scale") else 1))


_RESTORE: dict[str, Callable[[Any, Tensor, Slice, Reader], None]] = {
    "adamw": _restore_adamw,
    "adafactor": _restore_adafactor,
    ALIGNED: _restore_aligned,
    **dict.fromkeys(_BITSANDBYTES, _restore_bitsandbytes),
}
