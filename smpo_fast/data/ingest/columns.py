"""What the columns of a source mean, and the pairs that follow from its records.

Four formats, whatever container they come in:

    pairs     a prompt, two pictures, and perhaps a label or two scores (Pick-a-Pic)
    chosen    a prompt, the picture that was preferred, the one that was not
    ranking   a prompt, a list of pictures, and a list of ranks, scores or preferences (HPD, ImageReward)
    single    a prompt, one picture, and its label, rank or score (KTO): pairs are made within a prompt
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smpo_fast.common.errors import UserError
from smpo_fast.data.ingest.records import Problem
from smpo_fast.data.ingest.sources import PairSource

ALIASES = {
    "prompt": ("caption", "prompt", "text", "original_prompt", "txt"),
    "image_0": ("jpg_0", "image_0", "img_0"),
    "image_1": ("jpg_1", "image_1", "img_1"),
    "label_0": ("label_0",),
    "label_1": ("label_1",),
    "reward_0": ("reward_0", "ps_score_0", "score_0"),
    "reward_1": ("reward_1", "ps_score_1", "score_1"),
    "uid_0": ("image_0_uid",),
    "uid_1": ("image_1_uid",),
    "chosen": ("chosen", "chosen_image", "image_chosen", "winner", "win", "w"),
    "rejected": ("rejected", "rejected_image", "image_rejected", "loser", "lose", "l"),
    "images": ("images", "image_paths", "image_path", "file_path", "generations"),
    "image": ("image", "jpg", "png", "file_name", "image_path", "file_path", "path"),
    "rank": ("rank", "ranks", "ranking"),
    "preference": ("human_preference", "preference", "label", "labels", "cls"),
    "score": ("score", "scores", "reward", "rewards", "raw_scores"),
}
_ORDERS = ("rank", "preference", "score")  # the first that is there decides which picture is better
# What a format must have, what it may have besides, and which of these are lists.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pairs": (
        ("prompt", "image_0", "image_1"),
        ("label_0", "label_1", "reward_0", "reward_1", "uid_0", "uid_1"),
    ),
    "chosen": (("prompt", "chosen", "rejected"), ()),
    "ranking": (("prompt", "images"), _ORDERS),
    "single": (("prompt", "image"), _ORDERS),
}
_LISTS = ("images", *_ORDERS)


@dataclass(frozen=True)
class Reading:
    """What was understood of a source: its format, and the column behind each meaning."""

    format: str
    columns: dict[str, str]

    def __str__(self) -> str:
        return f"{self.format}: " + ", ".join(f"{role} = '{column}'" for role, column in self.columns.items())


def understand(source: PairSource, name: str = "", given: Mapping[str, str] | None = None) -> Reading:
    """The reading of a source, from its first records.

    name: the format, '' to find it.  given: meaning -> column, where a column's name does not tell.  Raises
    SettingsError, with what was found and what would do, where that leaves no format or more than one.
    """
    given = dict(given or {})
    lists, problem = _columns(source)
    _check_given(source, given, lists, problem)
    readings = [_reading(source, form, given, lists) for form in ([name] if name else FORMATS)]
    fits = [reading for reading in readings if reading is not None]
    decided = [reading for reading in fits if reading.format != "pairs" or _has_preference(reading)]
    fits = decided or fits
    if len(fits) == 1:
        return fits[0]
    listed = ", ".join(f"{column} (a list)" if is_list else column for column, is_list in lists.items())
    if fits:
        raise UserError(
            f"{source.given} can be read as {' and as '.join(str(fit) for fit in fits)}: choose with --format"
        )
    wanted = "; ".join(f"{form}: {_wanted(form)}" for form in ([name] if name else FORMATS))
    raise UserError(
        f"{source.given} ({source.container}): cannot tell what its columns mean. Found: {listed}. Wanted: {wanted}. "
        "Name them, for example --columns prompt=text,chosen=good,rejected=bad"
    )


def _columns(source: PairSource, look: int = 16) -> tuple[dict[str, bool], str]:
    """Columns of the first records, with whether most hold lists; and the reason of a record that was unreadable."""
    votes: dict[str, int] = {}
    problem = ""
    with contextlib.closing(source.records()) as records:
        for record, _ in zip(records, range(look), strict=False):
            if isinstance(record.values, Problem):
                problem = problem or record.values.reason
                continue
            for column, value in record.values.items():
                vote = 0 if value is None else 1 if isinstance(_unpacked(value), list) else -1
                votes[column] = votes.get(column, 0) + vote
    if not votes:
        raise UserError(f"{source.given} ({source.container}) has no readable record: {problem or 'it is empty'}")
    return {column: vote > 0 for column, vote in votes.items()}, problem


def _check_given(source: PairSource, given: Mapping[str, str], lists: Mapping[str, bool], problem: str) -> None:
    for role, column in given.items():
        if role not in ALIASES:
            raise UserError(f"--columns {role}={column}: '{role}' is none of {', '.join(ALIASES)}")
        if column not in lists:
            note = f" (and a record that is {problem})" if problem else ""
            raise UserError(
                f"--columns {role}={column}: {source.given} has no such column; it has {', '.join(lists)}{note}"
            )


def _reading(source: PairSource, form: str, given: Mapping[str, str], lists: Mapping[str, bool]) -> Reading | None:
    must, may = FORMATS[form]
    columns: dict[str, str] = {}
    for role in (*must, *may):
        found = [given[role]] if role in given else _found(role, form, given, lists)
        if role in must and len(found) > 1:
            if all(other in given or _found(other, form, given, lists) for other in must):
                raise UserError(
                    f"{source.given}: {role} could be {' or '.join(found)}: say which, --columns {role}={found[0]}"
                )
        if role in must and not found:
            return None
        if found:
            columns[role] = found[0]
    if form in ("ranking", "single") and not any(role in columns for role in _ORDERS):
        return None
    unread = _unread_preference(lists, columns)
    if form == "pairs" and unread and not _has_preference(Reading(form, columns)):
        raise UserError(
            f"{source.given}: the column '{unread}' may say which picture is better, "
            "but not how: --columns label_0=.. if 1 means the first picture, label_1=.. if 1 means the second"
        )
    return Reading(form, columns)


def _found(role: str, form: str, given: Mapping[str, str], lists: Mapping[str, bool]) -> list[str]:
    is_list = form == "ranking" and role in _LISTS
    free = [column for column in ALIASES[role] if column in lists and column not in given.values()]
    any_kind = role.startswith("reward_")  # a list of one, as the authors' script writes it
    return [column for column in free if any_kind or lists[column] == is_list]


def _unread_preference(lists: Mapping[str, bool], columns: Mapping[str, str]) -> str:
    left = [column for column in lists if column not in columns.values()]
    return next((column for column in left if column in ALIASES["preference"]), "")


def _has_preference(reading: Reading) -> bool:
    return any(role in reading.columns for role in ("label_0", "label_1", "reward_0", "chosen", *_ORDERS))


def _wanted(form: str) -> str:
    must, may = FORMATS[form]
    text = ", ".join(f"{role} ({'/'.join(ALIASES[role])})" for role in must)
    return f"{text} and one of {', '.join(may)}" if form in ("ranking", "single") else text


def _unpacked(value: Any) -> Any:
    """A list that a CSV cell holds as text."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value
