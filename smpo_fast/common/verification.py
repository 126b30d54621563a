"""What a verification of files reports: a finding for each thing that was checked, and the checks that formats share.

The package that owns a format verifies it; ``smpo_fast.verification`` recognises what a folder holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from smpo_fast.common.errors import EnvironmentProblem, UserError, environment_problem
from smpo_fast.common.storage import SEAL, sha256, unsealed

GOOD, NOTE, BAD = "ok", "note", "BAD"
CHANGED = "its content has changed since it was written (sha256 differs)"

# Names that a killed process leaves behind, and whether they may be deleted. The first match counts.
_LEFTOVERS = (
    (r"\..+\.partial", "unfinished work: the command that began it continues from it; delete it to begin again"),
    (r"\..+\.old", "the earlier folder of one that was being replaced: if that one is missing, rename this to it; "
                   "otherwise it may be deleted"),
    (r"\.(saving|removing)-step-.+", "of a checkpoint that was being written or removed: may be deleted, unless a "
                                     "training is running"),
    (r"\.tmp\w*|.+\.tmp", "a draft that a killed process left: may be deleted, unless a process is writing here"),
)  # fmt: skip


class Finding(NamedTuple):
    """One thing that was checked."""

    grade: str  # GOOD, NOTE (harmless, or not checked), or BAD
    place: Path
    text: str  # what was found; where BAD also what to do


def good(place: Path, text: str) -> Finding:
    """A thing that is as it should be."""
    return Finding(GOOD, place, text)


def note(place: Path, text: str) -> Finding:
    """A thing that the user should know of, and that damages nothing."""
    return Finding(NOTE, place, text)


def bad(place: Path, text: str) -> Finding:
    """A thing that is not as it should be."""
    return Finding(BAD, place, text)


def caught(place: Path, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; what it refuses with a UserError is BAD.

    Raises EnvironmentProblem where the machine is the reason.
    """
    try:
        yield from check()
    except EnvironmentProblem:
        raise
    except UserError as error:
        yield bad(place, str(error))


def read_description(file: Path, advice: str, *needed: str) -> tuple[dict[str, Any], list[Finding]]:
    """The values of a sealed JSON file, which are {} where it cannot be used, and what was found.

    advice: what to do about a damaged one.  needed: the keys that every version wrote; a file of an earlier version has
    no hash that would tell that some are gone.
    """
    try:
        raw = json.loads(file.read_text())
        values = unsealed(raw)
    except (OSError, ValueError, RecursionError) as error:
        if problem := environment_problem(error, file):
            raise problem from error
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used: {error}"
        return {}, [bad(file, f"{what}: {advice}")]
    if missing := [name for name in needed if name not in values] or ([] if values else ["anything"]):
        return {}, [bad(file, f"does not say {', '.join(missing)}: {advice}")]
    if SEAL in raw:
        return values, [good(file, "readable, and its values are as they were written")]
    return values, [note(file, "readable; an earlier version wrote it without a hash of its own values")]


def check_files(
    folder: Path, files: Mapping[str, Mapping[str, Any]], advice: str, *, may_lack: Container[str] = ()
) -> Iterator[Finding]:
    """Compare files with their recorded sizes and hashes.

    files: name -> 'bytes' and, where it was recorded, 'sha256'.  may_lack: names of files that need not be there.
    """
    for name, facts in files.items():
        yield check_file(folder / name, facts, advice, may_lack=name in may_lack)


def check_file(file: Path, facts: Mapping[str, Any], advice: str, *, may_lack: bool = False) -> Finding:
    """Compare one file with what was recorded of it, as ``check_files`` does."""
    if not file.is_file():
        return note(file, "is not here (yet)") if may_lack else bad(file, f"is missing: {advice}")
    size = file.stat().st_size
    if size != facts["bytes"]:
        return bad(file, f"has {size} bytes instead of {facts['bytes']}: {advice}")
    if "sha256" not in facts:
        return note(file, f"{size} bytes, as recorded; an earlier version recorded no hash")
    if sha256(file) != facts["sha256"]:
        return bad(file, f"{CHANGED}: {advice}")
    return good(file, f"{size} bytes, sha256 as recorded")


def check_unlisted(folder: Path, known: Container[str], advice: str) -> Iterator[Finding]:
    """Files below a folder that nothing mentions. Leftovers of killed processes are notes; others are BAD.

    known: names of files, relative to the folder.
    """
    for path in sorted(folder.iterdir()):
        yield from _unlisted(folder, path, known, advice)


def _unlisted(folder: Path, path: Path, known: Container[str], advice: str) -> Iterator[Finding]:
    name = path.relative_to(folder).as_posix()
    if name in known:
        return
    if leftover := leftover_advice(path.name):
        yield note(path, leftover)
    elif path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            yield from _unlisted(folder, inner, known, advice)
    else:
        yield bad(path, f"is not part of what was written here: {advice}")


def check_leftovers_of(folder: Path) -> Iterator[Finding]:
    """What killed processes that made this folder left next to it."""
    for path in sorted(folder.absolute().parent.glob(f".{folder.absolute().name}.*")):
        if advice := leftover_advice(path.name):
            yield note(path, advice)


def leftover_advice(name: str) -> str | None:
    """Whether what a killed process left under this name may be deleted; None for a name that none leaves."""
    return next((advice for pattern, advice in _LEFTOVERS if re.fullmatch(pattern, name)), None)


def check_tensors(file: Path, advice: str) -> Finding:
    """Read every tensor of a safetensors file, one at a time: all floating-point numbers must be finite."""
    count, wrong = 0, []
    try:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  it is no dictionary
                tensor = stored.get_tensor(name)
                count += 1
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    wrong.append(name)
    except Exception as error:  # safetensors raises its own errors and the system's
        if problem := environment_problem(error, file):
            raise problem from error
        return bad(file, f"cannot be read as safetensors ({error}): {advice}")
    if wrong:
        more = f" and {len(wrong) - 3} more tensors" if len(wrong) > 3 else ""
        return bad(file, f"{', '.join(wrong[:3])}{more}: NaN or infinite values: {advice}")
    return good(file, f"{count} tensors, every number finite")
