"""Parameter slices on disk: every rank writes the ones it owns, and any other layout reads what it needs.

A parameter is flattened; a slice of it is a name, the index of its first element, and a length. Several tensors may be
stored for a slice, told apart by their kind: ``weight``, and whatever an optimizer keeps. Such a tensor has one entry
per element, or one per block of elements counted from the start of the parameter, or a few numbers for the whole slice.

    rank00003-0000.safetensors      of about 1 GiB at most, so that writing needs no more host memory than that
        exp_avg@4096+1024/conv.weight     elements 4096 to 5119 of conv.weight
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.common.errors import CheckpointError

FILE_BYTES = 1 << 30


class ParameterSlice(NamedTuple):
    """Elements [offset, offset + numel) of the flattened parameter ``name``."""

    name: str
    offset: int
    numel: int

    @property
    def end(self) -> int:
        """The first element after the slice."""
        return self.offset + self.numel


def parse_key(key: str) -> tuple[ParameterSlice, str]:
    """The slice that a tensor belongs to, and its kind, from its name in a file."""
    location, _, name = key.partition("/")
    kind, _, numbers = location.partition("@")
    offset, _, numel = numbers.partition("+")
    return ParameterSlice(name, int(offset), int(numel)), kind


class ShardWriter:
    """Writes the slices of one rank; call ``close`` at the end. Add each kind of a slice at most once."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._pending: dict[str, Tensor] = {}
        self._bytes = self._files = 0

    def add(self, param_slice: ParameterSlice, kind: str, tensor: Tensor) -> None:
        """Copy the present values of a tensor of any shape; they are written once a file is full."""
        key = f"{kind}@{param_slice.offset}+{param_slice.numel}/{param_slice.name}"
        self._pending[key] = tensor.detach().reshape(-1).to("cpu", copy=True)
        self._bytes += tensor.nbytes
        if self._bytes >= FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Write what is still in memory."""
        if self._pending:
            save_file(self._pending, self._folder / f"rank{self._rank:05d}-{self._files:04d}.safetensors")
            self._files += 1
            self._pending, self._bytes = {}, 0


class ShardReader:
    """Reads the files of the writers of all ranks. Only what is requested is brought into memory.

    files: others than those of writers are ignored.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stored: dict[tuple[str, str], list[tuple[ParameterSlice, str, Any]]] = defaultdict(list)
        for path in sorted(path for path in files if path.match("rank*.safetensors")):
            file = safe_open(path, "pt")
            for key in file.keys():
                param_slice, kind = parse_key(key)
                self._stored[param_slice.name, kind].append((param_slice, key, file))

    def slices(self, name: str, kind: str) -> list[ParameterSlice]:
        """The stored slices of one kind of a parameter, by ascending offset."""
        return sorted(param_slice for param_slice, _, _ in self._stored[name, kind])

    def exact(self, param_slice: ParameterSlice, kind: str) -> Tensor | None:
        """What was added for exactly this slice; None where the parameter was cut differently."""
        stored = self._stored[param_slice.name, kind]
        found = (file.get_tensor(key) for other, key, file in stored if other == param_slice)
        return next(found, None)

    def number(self, name: str, kind: str) -> int:
        """A whole number that is the same for every slice of a parameter, such as a count of steps."""
        found = self.exact(self.slices(name, kind)[0], kind)
        assert found is not None
        return int(found)

    def elements(self, param_slice: ParameterSlice, kind: str, block: int = 1) -> Tensor:
        """The entries of a slice, however the parameter was cut: one per element, or one per ``block`` elements.

        Raises CheckpointError where entries are missing.
        """
        first, end = param_slice.offset // block, -(-param_slice.end // block)
        out, missing = None, end - first
        stored = sorted(self._stored[param_slice.name, kind], key=lambda entry: entry[0])
        for other, key, file in stored:
            begin = other.offset // block
            low, high = max(first, begin), min(end, -(-other.end // block))
            if low >= high:
                continue
            values = file.get_slice(key)[low - begin : high - begin]
            if out is None:
                out, reached = values.new_empty(end - first), first
            if low > reached:
                break
            missing -= max(0, high - reached)
            out[low - first : high - first] = values
            reached = max(reached, high)
        if out is None or missing:
            raise CheckpointError(
                f"'{kind}' of {param_slice.name}, elements {param_slice.offset} to "
                f"{param_slice.end - 1}, is missing: the checkpoint belongs to another network or optimizer"
            )
        return out
