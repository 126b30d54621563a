"""The mutants: small realistic bugs, each a piece of text of one file and what takes its place.

They are listed in the TOML files beside this module, one file for each package. ``survivors.toml`` has those that the
tests once let pass.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"


@dataclass(frozen=True)
class Mutant:
    """A bug. ``tests`` are those that are expected to find it: files, or single tests as FILE::NAME."""

    id: str
    package: str  # the name of the list that it is in
    file: str  # relative to the repository
    bug: str  # what a user would meet
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str:
        """The file with the bug. Raises ValueError where the mutant is stale: ``old`` is not there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"mutant {self.id} is stale: its old text occurs {count} times in {self.file}")
        return text.replace(self.old, self.new)


def load() -> list[Mutant]:
    """All mutants, by package and in the order of their lists."""
    return [
        Mutant(package=file.stem, **{**entry, "tests": tuple(entry["tests"])})
        for file in sorted(HERE.glob("*.toml"))
        for entry in tomllib.loads(file.read_text())["mutant"]
    ]
