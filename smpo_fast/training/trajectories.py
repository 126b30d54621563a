"""A folder of stored trajectories: tau and the reference's errors of every example, for runs that share them.

Where the frozen reference inverts, or random noise is added, tau and the reference's errors do not depend on the
policy. The first run that computes them stores them here; later runs, with another beta, gamma or learning rate, train
without inversion and without a reference. tau is stored in half precision and rounded before it is used, so the run
that writes and the runs that read see the same numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smpo_fast.common.errors import ConfigError, DataError, environment_problem
from smpo_fast.common.runtime import World
from smpo_fast.common.storage import as_json, atomic_write, sealed, unsealed, write_json
from smpo_fast.engine.checkpoint import different_facts
from smpo_fast.training.examples import Examples

INFO = "trajectories.json"


class TrajectoryStore:
    """The trajectories of runs with the same ``facts``. A pair's position is its index in the order of the whole run.

    A step's file of a rank contains, for each of its pairs, tau [M, 2, C, H, W] and errors [M, 2] by position; any
    number of ranks can read what another number wrote. Every tensor has a checksum, which is verified when it is read
    (files of earlier versions have none). Raises ConfigError when the folder belongs to other facts.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        drawn_per_step: int,
        world: World,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """facts: JSON values; defaults: of those that an earlier version did not record."""
        self.folder, self.world, self._drawn = folder, world, drawn_per_step
        self._check_facts(as_json(facts), as_json(defaults or {}))
        # Listed once: all ranks must agree on what is stored, while files appear one after another.
        self._stored = self._complete_steps()

    def complete(self, first: int, steps: int) -> bool:
        """Whether a run of so many steps finds everything from step ``first`` on."""
        return all(step in self._stored for step in range(first, steps))

    def has(self, step: int) -> bool:
        """Whether a step is stored."""
        return step in self._stored

    def tau(self, step: int, places: Sequence[int]) -> Tensor | None:
        """The noise of this rank's pairs at ``places`` of a step, [M, B, 2, C, H, W] float32; None when not stored.

        Raises DataError for a file that is damaged.
        """
        return self._read("tau", step, places)

    def errors(self, step: int, places: Sequence[int]) -> Tensor | None:
        """The reference's errors of these pairs, [M, B, 2] float32; None when not stored.

        Raises DataError for a file that is damaged.
        """
        return self._read("errors", step, places)

    @staticmethod
    def round(tau: Tensor) -> Tensor:
        """tau [M, B, 2, C, H, W] with the rounding of storage."""
        return tau.half().float()

    def write(self, step: int, groups: Sequence[tuple[Sequence[int], Tensor, Tensor]]) -> None:
        """Store this rank's pairs of a step, in groups: places, tau [M, B, 2, C, H, W] and errors [M, B, 2] of each."""
        values: dict[str, Tensor] = {}
        for places, tau, errors in groups:
            for place, t, e in zip(places, tau.half().cpu().unbind(1), errors.cpu().unbind(1), strict=True):
                position = self._position(step, place)
                values |= {f"{position}.tau": t.contiguous(), f"{position}.errors": e.contiguous()}
        file = self.folder / f"step-{step:06d}.{self.world.rank}-of-{self.world.size}.safetensors"
        checksums = {name: f"{checksum(value):08x}" for name, value in values.items()}
        with atomic_write(file) as draft:
            save_file(values, draft, checksums)

    def reference_errors(self, step: int, examples: Sequence[Examples]) -> list[Tensor] | None:
        """The reference's errors [B, 2] of each set of examples of a step; None when the step is not stored."""
        found: list[Tensor] = []
        for _, group in groupby(examples, key=lambda e: id(e.pairs)):
            errors = self.errors(step, next(group).pairs.places)
            if errors is None:
                return None
            found += errors.unbind()
        return found

    def write_examples(self, step: int, examples: Sequence[Examples], errors: Sequence[Tensor]) -> None:
        """Store the sets of examples of this rank's pairs of a step, with the errors [B, 2] of each set."""
        self.write(step, list(_by_pairs(examples, errors)))

    def _read(self, what: str, step: int, places: Sequence[int]) -> Tensor | None:
        if step not in self._stored:
            return None
        paths = self._stored[step]
        with ExitStack() as stack:
            files = [stack.enter_context(_open(path)) for path in paths]
            positions = [self._position(step, place) for place in places]
            owners = [p % self._drawn % len(files) for p in positions]
            found = [_verified(files[i], paths[i], f"{p}.{what}") for i, p in zip(owners, positions, strict=True)]
        return torch.stack(found, dim=1).float().to(self.world.device)

    def _complete_steps(self) -> dict[int, list[Path]]:
        """The files of each step that all ranks have written, in rank order."""
        found = {}
        for first in self.folder.glob("step-*.0-of-*.safetensors"):
            name, part, _ = first.name.split(".")
            size = int(part.partition("-of-")[2])
            files = [self.folder / f"{name}.{rank}-of-{size}.safetensors" for rank in range(size)]
            if all(f.exists() for f in files):
                found[int(name.removeprefix("step-"))] = files
        return found

    def _position(self, step: int, place: int) -> int:
        return step * self._drawn + self.world.rank + self.world.size * place

    def _check_facts(self, facts: dict[str, Any], defaults: dict[str, Any]) -> None:
        file = self.folder / INFO
        if not file.exists() and self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, sealed(facts), indent=2)
        if not file.exists():
            return  # rank 0 is writing the same facts
        for key, before, now in different_facts(read_facts(self.folder), facts, defaults):
            raise ConfigError(
                f"inversion.store: {self.folder} was made with {key} = {before}, this run has {now}: set another "
                "folder, or restore these settings"
            )


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts that a store was made with. Raises DataError where they cannot be read or have changed."""
    try:
        return unsealed(json.loads((folder / INFO).read_text()))
    except (OSError, ValueError) as error:
        raise environment_problem(error, folder / INFO) or DataError(
            f"inversion.store: {folder / INFO} is damaged ({error}): remove {folder}, and the next run computes "
            "everything again"
        ) from error


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor of any shape."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error


def _verified(file: Any, path: Path, name: str) -> Tensor:
    """A tensor of a file, which is at ``path``."""
    try:
        tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    recorded = (file.metadata() or {}).get(name)
    if recorded is not None and int(recorded, 16) != checksum(tensor):
        raise _damaged(path, f"the checksum of {name} differs")
    return tensor


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"inversion.store: {path} is damaged: {reason}: remove it, and the next run computes it again")


def _by_pairs(
    examples: Sequence[Examples], errors: Sequence[Tensor]
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Places, tau and errors of the pairs of each shape, with a row for each landing."""
    for _, group in groupby(zip(examples, errors, strict=True), key=lambda item: id(item[0].pairs)):
        sets, rows = zip(*group, strict=True)
        yield sets[0].pairs.places, torch.stack([e.tau for e in sets]), torch.stack(rows)
