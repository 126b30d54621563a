"""Optimizer states: their size by optimizer, and restoring them from slices that any layout wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smpo_fast.common.errors import CheckpointError
from smpo_fast.engine.aligned_adamw8bit import ALIGNED, STATE_NAMES, AlignedAdamW8bit
from smpo_fast.engine.shards import ParameterSlice, ShardReader
from smpo_fast.kernels.adamw8bit import BLOCK

STATE_BYTES: dict[str, float] = {  # bytes per parameter by optim.name, in addition to the weights
    "adamw": 8.0,
    "adamw8bit": 2 + 8 / 256,
    "paged_adamw8bit": 2 + 8 / 256,
    "lion8bit": 1 + 4 / 256,
    "adamw8bit_aligned": 2 + 8 / BLOCK,
    "adafactor": 0.0,
}
BITSANDBYTES_CLASSES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit"}


@torch.no_grad()
def _restore_adamw(inner: torch.optim.AdamW, tensor: Tensor, param_slice: ParameterSlice, saved: ShardReader) -> None:
    where = tensor.device if inner.param_groups[0]["fused"] else torch.device("cpu")
    inner.state[tensor] = {"step": torch.tensor(float(saved.number(param_slice.name, "step")), device=where)}
    for name in ("exp_avg", "exp_avg_sq"):
        moment = saved.elements(param_slice, name).view(tensor.shape)
        # in the memory format of the weights, which fused kernels rely on
        inner.state[tensor][name] = torch.empty_like(tensor).copy_(moment)


def _restore_adafactor(
    inner: torch.optim.Optimizer, tensor: Tensor, param_slice: ParameterSlice, saved: ShardReader
) -> None:
    """Slices are whole parameters: Adafactor is refused where they could be anything else."""
    shapes = {
        "exp_avg_sq_row": tensor.shape[:-1], "exp_avg_sq_col": tensor.shape[:-2] + tensor.shape[-1:],
        "exp_avg_sq": tensor.shape, "RMS": (),
    }  # fmt: skip
    found = {name: saved.exact(param_slice, name) for name in shapes}
    kept = {name: v.to(tensor.device).view(shapes[name]) for name, v in found.items() if v is not None}
    inner.state[tensor] = {"step": saved.number(param_slice.name, "step"), **kept}


def _restore_bitsandbytes(inner: Any, tensor: Tensor, param_slice: ParameterSlice, saved: ShardReader) -> None:
    from bitsandbytes import functional

    inner.init_state(inner.param_groups[0], tensor, 0, 0)  # allocates paged states in paged memory
    state = inner.state[tensor]
    state["step"] = saved.number(param_slice.name, "step")
    for i, table in (("1", "dynamic"), ("2", "udynamic")):
        kept = state.get(f"state{i}")
        if kept is None:  # Lion has one state only
            continue
        codes, scales = saved.exact(param_slice, f"state{i}"), saved.exact(param_slice, f"absmax{i}")
        if codes is None:
            codes, scales = _dequantised(param_slice, f"state{i}", f"absmax{i}", inner.name2qmap[table], saved), None
            if kept.dtype is torch.uint8:
                codes, quantised = functional.quantize_blockwise(codes, inner.name2qmap[table].cpu(), blocksize=256)
                scales = quantised.absmax
        kept.copy_(codes.view_as(kept))
        if scales is not None:
            state[f"absmax{i}"].copy_(scales)


def _dequantised(param_slice: ParameterSlice, kind: str, scales: str, table: Tensor, saved: ShardReader) -> Tensor:
    """A bitsandbytes state in fp32, from slices that were cut differently."""
    from bitsandbytes import functional

    values = torch.full((param_slice.numel,), float("nan"))
    for other in saved.slices(param_slice.name, kind):
        low, high = max(param_slice.offset, other.offset), min(param_slice.end, other.end)
        if low >= high:
            continue
        codes, absmax = saved.exact(other, kind), saved.exact(other, scales)
        assert codes is not None
        if absmax is not None:
            codes = functional.dequantize_blockwise(codes, absmax=absmax, code=table.cpu(), blocksize=256)
        values[low - param_slice.offset : high - param_slice.offset] = codes[low - other.offset : high - other.offset]
    if values.isnan().any():
        raise CheckpointError(
            f"'{kind}' of {param_slice.name} is not complete: the checkpoint belongs to another network"
        )
    return values


def _restore_aligned(inner: AlignedAdamW8bit, tensor: Tensor, param_slice: ParameterSlice, saved: ShardReader) -> None:
    state = inner.state_of(tensor)
    state["step"] = saved.number(param_slice.name, "step")
    for name in STATE_NAMES:
        state[name].copy_(saved.elements(param_slice, name, BLOCK if name.endswith("scale") else 1))


RESTORE: dict[str, Callable[[Any, Tensor, ParameterSlice, ShardReader], None]] = {
    "adamw": _restore_adamw,
    "adafactor": _restore_adafactor,
    ALIGNED: _restore_aligned,
    **dict.fromkeys(BITSANDBYTES_CLASSES, _restore_bitsandbytes),
}
