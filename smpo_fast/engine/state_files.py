"""Writing and reading the weights of an engine, and what it keeps besides them, as parameter slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from smpo_fast.engine.optimizers import LocalSlice
from smpo_fast.engine.shards import ParameterSlice, ShardReader, ShardWriter


class SliceStates(Protocol):
    """What is kept for every slice besides its weights: the states of an optimizer, or an average."""

    def states(self, param_slice: ParameterSlice) -> Iterable[tuple[str, Tensor]]:
        """What is to be saved of a slice, as (kind, tensor of any shape)."""

    def restore(self, param_slice: ParameterSlice, saved: ShardReader) -> None:
        """Load it again, after the weights of the slice. Raises CheckpointError where something is missing."""


def write_state(
    folder: Path, rank: int, slices: Iterable[LocalSlice], kept: Sequence[SliceStates], module: nn.Module
) -> None:
    """Write this rank's slices with all that is kept for them; rank 0 adds the buffers of the module."""
    writer = ShardWriter(folder, rank)
    for local in slices:
        writer.add(local.param_slice, "weight", local.values())
        for states in kept:
            for kind, value in states.states(local.param_slice):
                writer.add(local.param_slice, kind, value)
    if rank == 0:
        for name, buffer in persistent_buffers(module).items():
            writer.add(ParameterSlice(name, 0, buffer.numel()), "buffer", buffer)
    writer.close()


@torch.no_grad()
def read_state(
    files: Sequence[Path], slices: Iterable[LocalSlice], kept: Sequence[SliceStates], module: nn.Module
) -> None:
    """Read into this rank's slices, what is kept for them and all buffers what any layout wrote into these files.

    Raises CheckpointError where something is missing.
    """
    saved = ShardReader(files)
    for local in slices:
        weights = local.values()
        weights.copy_(saved.elements(local.param_slice, "weight").view(weights.shape))
        for states in kept:
            states.restore(local.param_slice, saved)
    for name, buffer in persistent_buffers(module).items():
        if buffer.numel():
            whole = ParameterSlice(name, 0, buffer.numel())
            buffer.copy_(saved.elements(whole, "buffer").view(buffer.shape))


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that belong to its state dict."""
    kept = module.state_dict().keys()
    return {name: b for name, b in module.named_buffers(remove_duplicate=False) if name in kept}
