"""What the columns of a source mean: the format of its records, and the column for each role in it.

Four formats, whatever container they come in:

    pairs     a prompt, two images, and optionally a label or two scores (Pick-a-Pic)
    chosen    a prompt, the preferred image, the other image
    ranking   a prompt, a list of images, and a list of ranks, scores or preferences (HPD, ImageReward)
    single    a prompt, one image, and its label, rank or score (KTO): pairs are made within a prompt
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smpo_fast.common.console import printable
from smpo_fast.common.errors import ConfigError, DataError
from smpo_fast.data.ingest.records import UnreadableRecord
from smpo_fast.data.ingest.sources import PairSource

# The names by which the column of a role is recognised, the usual ones first.
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
ORDER_ROLES = ("rank", "preference", "score")  # the first that has a column decides which image is better
# Roles that a format needs, and those that it may have besides.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pairs": (("prompt", "image_0", "image_1"), ("label_0", "label_1", "reward_0", "reward_1", "uid_0", "uid_1")),
    "chosen": (("prompt", "chosen", "rejected"), ()),
    "ranking": (("prompt", "images"), ORDER_ROLES),
    "single": (("prompt", "image"), ORDER_ROLES),
}
_LISTS = ("images", *ORDER_ROLES)  # roles whose columns hold lists in a ranking
EXAMINED_RECORDS = 16


@dataclass(frozen=True)
class ColumnMapping:
    """What the columns of a source mean: its format, and the column of each role."""

    format: str
    columns: dict[str, str]

    def __str__(self) -> str:
        return f"{self.format}: " + ", ".join(f"{role} = '{column}'" for role, column in self.columns.items())

    @property
    def order_role(self) -> str:
        """The role that decides which image is better, in the formats 'ranking' and 'single'."""
        return next(role for role in ORDER_ROLES if role in self.columns)


def detect_columns(source: PairSource, name: str = "", given: Mapping[str, str] | None = None) -> ColumnMapping:
    """The meaning of a source's columns, from its first records.

    name: the format, '' to detect it.  given: role -> column, for columns that their names do not explain.  Raises
    DataError, with the columns found and those needed, where no format or more than one fits; ConfigError for roles
    or columns in ``given`` that do not exist.
    """
    given = dict(given or {})
    lists, problem = _examine(source)
    _check_given(source, given, lists, problem)
    mappings = [_mapping(source, form, given, lists) for form in ([name] if name else FORMATS)]
    fitting = [mapping for mapping in mappings if mapping is not None]
    decided = [mapping for mapping in fitting if mapping.format != "pairs" or _has_preference(mapping)]
    fitting = decided or fitting
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{column} (a list)" if is_list else column for column, is_list in lists.items())
    if fitting:
        raise DataError(
            printable(
                f"{source.given} can be read as {' and as '.join(str(fit) for fit in fitting)}: choose with --format"
            )
        )
    needed = "; ".join(f"{form}: {_needed(form)}" for form in ([name] if name else FORMATS))
    raise DataError(
        printable(
            f"{source.given} ({source.container}): cannot tell what its columns mean. Found: {listed}. "
            f"Needed: {needed}. Name them, for example --columns prompt=text,chosen=good,rejected=bad"
        )
    )


def unpack_list(value: Any) -> Any:
    """The list that a CSV cell holds as JSON text; any other value unchanged."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _examine(source: PairSource) -> tuple[dict[str, bool], str]:
    """Columns of the first records, with whether most cells hold lists; and the reason of an unreadable record."""
    votes: dict[str, int] = {}
    problem = ""
    with contextlib.closing(source.records()) as records:
        for record, _ in zip(records, range(EXAMINED_RECORDS), strict=False):
            if isinstance(record.cells, UnreadableRecord):
                problem = problem or record.cells.reason
                continue
            for column, value in record.cells.items():
                vote = 0 if value is None else 1 if isinstance(unpack_list(value), list) else -1
                votes[column] = votes.get(column, 0) + vote
    if not votes:
        raise DataError(
            printable(f"{source.given} ({source.container}) has no readable record: {problem or 'it is empty'}")
        )
    return {column: vote > 0 for column, vote in votes.items()}, problem


def _check_given(source: PairSource, given: Mapping[str, str], lists: Mapping[str, bool], problem: str) -> None:
    for role, column in given.items():
        if role not in ALIASES:
            raise ConfigError(printable(f"--columns {role}={column}: '{role}' is none of {', '.join(ALIASES)}"))
        if column not in lists:
            note = f" (and a record that is {problem})" if problem else ""
            raise ConfigError(
                printable(
                    f"--columns {role}={column}: {source.given} has no such column; it has {', '.join(lists)}{note}"
                )
            )


def _mapping(
    source: PairSource, form: str, given: Mapping[str, str], lists: Mapping[str, bool]
) -> ColumnMapping | None:
    """The columns of a format's roles; None where the source lacks some that it needs."""
    needed, optional = FORMATS[form]
    columns: dict[str, str] = {}
    for role in (*needed, *optional):
        found = [given[role]] if role in given else _columns_named_like(role, form, given, lists)
        if role in needed and len(found) > 1:
            if all(other in given or _columns_named_like(other, form, given, lists) for other in needed):
                raise DataError(
                    printable(
                        f"{source.given}: {role} could be {' or '.join(found)}: say which, --columns {role}={found[0]}"
                    )
                )
        if role in needed and not found:
            return None
        if found:
            columns[role] = found[0]
    if form in ("ranking", "single") and not any(role in columns for role in ORDER_ROLES):
        return None
    unread = _unread_preference(lists, columns)
    if form == "pairs" and unread and not _has_preference(ColumnMapping(form, columns)):
        raise DataError(
            printable(
                f"{source.given}: the column '{unread}' may say which image is better, "
                "but not how: --columns label_0=.. if 1 means the first image, label_1=.. if 1 means the second"
            )
        )
    return ColumnMapping(form, columns)


def _columns_named_like(role: str, form: str, given: Mapping[str, str], lists: Mapping[str, bool]) -> list[str]:
    is_list = form == "ranking" and role in _LISTS
    free = [column for column in ALIASES[role] if column in lists and column not in given.values()]
    any_kind = role.startswith("reward_")  # may be a list of one, as the authors' scoring script writes it
    return [column for column in free if any_kind or lists[column] == is_list]


def _unread_preference(lists: Mapping[str, bool], columns: Mapping[str, str]) -> str:
    left = [column for column in lists if column not in columns.values()]
    return next((column for column in left if column in ALIASES["preference"]), "")


def _has_preference(mapping: ColumnMapping) -> bool:
    return any(role in mapping.columns for role in ("label_0", "label_1", "reward_0", "chosen", *ORDER_ROLES))


def _needed(form: str) -> str:
    needed, optional = FORMATS[form]
    text = ", ".join(f"{role} ({'/'.join(ALIASES[role])})" for role in needed)
    return f"{text} and one of {', '.join(optional)}" if form in ("ranking", "single") else text
