"""``import.json`` beside a finished pair table: what made the table, its parts, what was rejected, statistics."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smpo_fast.common.console import printable
from smpo_fast.common.errors import DataError
from smpo_fast.common.storage import unsealed

SUMMARY_FILE = "import.json"


def exists(out: Path) -> bool:
    """Whether the folder holds a finished table of ``smpo import`` or ``smpo generate``."""
    return (out / SUMMARY_FILE).is_file()


def part_files(folder: Path) -> list[Path]:
    """The parts of a finished table, in order. Raises DataError where the summary is damaged or a part is missing."""
    try:
        parts = [folder / str(part["name"]) for part in _load(folder)["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(printable(f"data.pairs: {folder / SUMMARY_FILE} is damaged ({error}): import again")) from error
    missing = next((part for part in parts if not part.is_file()), None)
    if missing:
        raise DataError(printable(f"data.pairs: {missing} is missing, but {SUMMARY_FILE} names it: import again"))
    return parts


def image_folder(folder: Path) -> str | None:
    """The folder whose images a table of ``smpo import --paths`` names; None where no summary says so."""
    try:
        summary = _load(folder)
        return os.path.realpath(str(summary["source"]["root"])) if summary["paths"] is True else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(out: Path) -> dict[str, Any]:
    """The summary of a finished table. Raises DataError where it is damaged."""
    try:
        return _load(out)
    except ValueError as error:
        raise DataError(printable(f"{out / SUMMARY_FILE} is damaged ({error}): remove {out}")) from error


def check_identity(out: Path, summary: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise DataError where a finished table is not the one of ``identity``, naming what differs.

    identity: what decides the table's content, as its maker wrote it into the summary.
    """
    other = [key for key, value in identity.items() if summary.get(key) != value]
    if other:
        raise DataError(
            printable(
                f"{out} holds another table (it differs in {', '.join(other)}): remove it, or choose another folder"
            )
        )


def _load(folder: Path) -> dict[str, Any]:
    """The summary's values. Raises OSError or ValueError where they cannot be read or have changed."""
    return unsealed(json.loads((folder / SUMMARY_FILE).read_text()))


def report(summary: Mapping[str, Any]) -> str:
    """A summary as a few lines of text, for the user to read before training."""
    facts = summary["statistics"]
    small, middle, large = facts["shorter_side"]
    lines = [
        f"{summary['pairs']} pairs in {len(summary['parts'])} part(s), rejected: {list_counts(summary['rejected'])}",
        f"  labels: {facts['labelled']}, of these {facts['ties']} ties; image 0 is preferred in "
        f"{facts['first_preferred']:.1%} of the others; rewards: {facts['scored']}",
        f"  images: {facts['pictures']} distinct, {facts['pictures_in_several_pairs']} in several pairs; "
        f"shorter side {small} to {large} px, median {middle}; {facts['unequal_sizes']} pairs of unequal sizes",
        f"  prompts: {facts['prompts']} distinct, {facts['empty_prompts']} pairs with the empty prompt, "
        f"{facts['pairs_of_commonest_prompt']} with the most frequent one",
        f"  repeated pairs: {facts['repeated_pairs']}, of these {facts['swapped_pairs']} in the other order and "
        f"{facts['contradicting_pairs']} with the other image preferred",
    ]
    if facts["undecided"]:
        lines.append(f"  {facts['undecided']} pairs have neither label nor rewards: score them (data.scorer)")
    return "\n".join(lines)


def list_counts(reasons: Mapping[str, int]) -> str:
    """The number of rejected rows and their kinds, the most frequent first; 'none' where there are none."""
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{printable(kind)} ({count})" for kind, count in ordered)
    return f"{sum(reasons.values())}: {listed}" if listed else "none"
