"""Writing and reading an engine's weights and optimizer states as slices."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from smpo_fast.engine.optimizers import Held, SlicedOptimizer
from smpo_fast.engine.shards import Reader, Slice, Writer


def _write(folder: Path, rank: int, held: Iterable[Held], optimizer: SlicedOptimizer, module: nn.Module) -> None:
    writer = Writer(folder, rank)
    for one in held:
        writer.add(one.piece, "weight", one.values())
        for word, numbers in optimizer.numbers(one.piece):
            writer.add(one.piece, word, numbers)
    if rank == 0:
        for name, buffer in _persistent_buffers(module).items():
            writer.add(Slice(name, 0, buffer.numel()), "buffer", buffer)
    writer.close()


@torch.no_grad()
def _read(folder: Path, held: Iterable[Held], optimizer: SlicedOptimizer, module: nn.Module) -> None:
    saved = Reader(folder)
    for one in held:
        weights = one.values()
        weights.copy_(saved.elements(one.piece, "weight").view(weights.shape))
        optimizer.restore(one.piece, saved)
    for name, buffer in _persistent_buffers(module).items():
        if buffer.numel():
            buffer.copy_(saved.elements(Slice(name, 0, buffer.numel()), "buffer").view(buffer.shape))


def _whole(parameters: dict[str, Tensor]) -> list[Held]:
    return [Held(Slice(name, 0, p.numel()), p.numel(), p) for name, p in parameters.items()]


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = module.state_dict().keys()
    return {name: b for name, b in module.named_buffers(remove_duplicate=False) if name in kept}
