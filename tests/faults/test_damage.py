"""Every file of every artefact is damaged; the program that reads it notices, or what it makes of it is unharmed."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.campaign import Campaign
from faults.conftest import Attempt
from smpo_fast.common.runtime import rng

# The program that reads an artefact, and the files that it reads of it.
READERS = {
    "pairs": ("prepare", ["pairs/*"]),
    "scores": ("prepare", ["scores/scores.*"]),
    "cache": ("train", ["cache/*"]),
    "checkpoint": ("save", ["toy/checkpoints/step-000006/**/*"]),
    "trajectories": ("reuse", ["store/*"]),
    "export": ("evaluate", ["run/export/**/*"]),
    "export, verified": ("verify export", ["run/export/**/*"]),
}
PLACES = 12  # in a file, that are flipped
READ_BESIDES = {"checkpoint": ("toy",)}  # what the program does not read when it starts afresh
# Loaders compare no checksums of a pipeline in diffusers' layout; smpo verify compares those in its export.json.
KINDS = {"export": ("truncate", "delete")}


def damage(file: Path, kind: str, place: int, other: Path) -> None:
    """kind: flip a bit, truncate, delete, or exchange with another file; place: 0 .. PLACES - 1."""
    content, at = file.read_bytes(), rng(place, "damage", len(file.read_bytes()))
    if kind == "delete":
        file.unlink()
    elif kind == "swap":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "truncate":
        file.write_bytes(content[: int(at.integers(len(content)))])
    else:
        changed = bytearray(content)
        changed[int(at.integers(len(content)))] ^= 1 << int(at.integers(8))
        file.write_bytes(changed)


@pytest.mark.faults(share=1)
@pytest.mark.parametrize(
    ("artefact", "kind"),
    [(name, kind) for name in READERS for kind in KINDS.get(name, ("flip", "truncate", "delete", "swap"))],
)
def test_a_damaged_file(artefact: str, kind: str, campaign: Campaign, attempt: Attempt) -> None:
    reader, patterns = READERS[artefact]
    campaign.set_up(reader, *READ_BESIDES.get(artefact, ()))
    found = [p for pattern in patterns for p in sorted(campaign.work.glob(pattern)) if p.is_file() and p.stat().st_size]
    files = [file.relative_to(campaign.work).as_posix() for file in found]
    if artefact == "export":  # images are known by all files of the encoders, also by those that loaders do not need
        files = [file for file in files if "/tokenizer" not in file]
    different = {one: next((o for o in files if _bytes(campaign, o) != _bytes(campaign, one)), "") for one in files}
    faults = [(file, place) for file in files for place in range(PLACES if kind in ("flip", "truncate") else 1)]

    def act(fault: tuple[str, int]) -> str:
        file, place = fault
        one, other = campaign.work / file, campaign.work / different[file]
        files = [file, different[file]] if kind == "swap" else [file]
        wrong = campaign.try_damage(reader, files, lambda: damage(one, kind, place, other))
        return wrong and f"{kind} {place}: {wrong}"

    attempt(artefact, f"{kind} a file", faults, act)


def _bytes(campaign: Campaign, file: str) -> bytes:
    return (campaign.work / file).read_bytes()
