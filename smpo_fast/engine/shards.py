"""Slices of parameters on disk: every rank writes what it holds, and any other layout reads what it needs.

A parameter is flattened; a slice of it is a name, the place of its first element, and a length. For a slice there are
several tensors, told apart by a word: ``weight``, and whatever an optimizer keeps. Each has one entry an element, one
entry a block of elements counted from the parameter's start, or a few numbers for the whole slice.

    rank00003-0000.safetensors      of at most about 1 GiB, so that writing takes no more host memory than that
        exp_avg@4096+1024/conv.weight     elements 4096 to 5119 of conv.weight
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.common.errors import UserError

FILE_BYTES = 1 << 30


class Slice(NamedTuple):
    """Elements [offset, offset + numel) of the flattened parameter ``name``."""

    name: str
    offset: int
    numel: int


class Writer:
    """Writes one rank's slices; call ``close`` at the end. A slice and a word must not be added twice."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._files = 0

    def add(self, piece: Slice, word: str, tensor: Tensor) -> None:
        """Keep a tensor's values as they are now; written when a file is full."""
        key = f"{word}@{piece.offset}+{piece.numel}/{piece.name}"
        self._waiting[key] = tensor.detach().reshape(-1).to("cpu", copy=True)
        self._bytes += tensor.nbytes
        if self._bytes >= FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Write what waits."""
        if self._waiting:
            save_file(self._waiting, self._folder / f"rank{self._rank:05d}-{self._files:04d}.safetensors")
            self._files += 1
            self._waiting, self._bytes = {}, 0


class Reader:
    """Reads what all ranks' writers left in a folder. Only what is asked for is brought into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: dict[tuple[str, str], list[tuple[Slice, str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("rank*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():
                place, _, name = key.partition("/")
                word, _, numbers = place.partition("@")
                offset, _, numel = numbers.partition("+")
                self._keys[name, word].append((Slice(name, int(offset), int(numel)), key, file))

    def slices(self, name: str, word: str) -> list[Slice]:
        """The slices of a parameter that have a word, in the order of their offsets."""
        return sorted(piece for piece, _, _ in self._keys[name, word])

    def exact(self, piece: Slice, word: str) -> Tensor | None:
        """What was added for this very slice; None where the writers cut the parameter otherwise."""
        found = (file.get_tensor(key) for other, key, file in self._keys[piece.name, word] if other == piece)
        return next(found, None)

    def elements(self, piece: Slice, word: str, block: int = 1) -> Tensor:
        """The entries of a slice however the writers cut it: one an element, or one a ``block`` of elements.

        Raises SettingsError where entries are missing.
        """
        first, end = piece.offset // block, -(-(piece.offset + piece.numel) // block)
        out, missing = None, end - first
        for (_, offset, numel), key, file in sorted(self._keys[piece.name, word], key=lambda found: found[0]):
            begin = offset // block
            low, high = max(first, begin), min(end, -(-(offset + numel) // block))
            if low >= high:
                continue
            part = file.get_slice(key)[low - begin : high - begin]
            if out is None:
                out, reached = part.new_empty(end - first), first
            if low > reached:
                break
            missing -= max(0, high - reached)
            out[low - first : high - first] = part
            reached = max(reached, high)
        if out is None or missing:
            raise UserError(
                f"{self._folder}: '{word}' of {piece.name}, elements {piece.offset} to "
                f"{piece.offset + piece.numel - 1}, is not there: the checkpoint is of another network or optimizer"
            )
        return out
