"""How many faults were tried and survived: as text, as JSON, and as the table in docs/reliability.md.

``python -m faults.results`` (with tests/ on the path) writes the numbers of results.json into the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- numbers: begin -->\n", "<!-- numbers: end -->"


class Count(NamedTuple):
    """Of the ``possible`` faults of a kind that a program can meet, how many were tried, and survived."""

    kind: str
    program: str
    possible: int
    tried: int
    survived: int


def to_json(seed: int, counts: Iterable[Count]) -> str:
    """The content of results.json: no date, no machine."""
    listed = [count._asdict() for count in sorted(counts)]
    total = {name: sum(count[name] for count in listed) for name in ("possible", "tried", "survived")}
    return json.dumps({"seed": seed, "total": total, "counts": listed}, indent=1) + "\n"


def summary(counts: Sequence[Count]) -> str:
    """A line for each kind of fault and program, and the total."""
    lines = [
        f"{c.kind:<24} {c.program:<24} {c.tried:>6} of {c.possible:>6} tried, {c.survived:>6} survived"
        for c in sorted(counts)
    ]
    tried, survived = sum(c.tried for c in counts), sum(c.survived for c in counts)
    return "\n".join(["", *lines, f"{tried} faults tried, {survived} survived"])


def table(text: str) -> str:
    """results.json as Markdown: a row for each kind of fault, with the programs that met it."""
    found = json.loads(text)
    counts, total = [Count(**c) for c in found["counts"]], found["total"]
    rows = ["| fault | possible | tried | survived | where |", "|---|---:|---:|---:|---|"]
    for kind in sorted({c.kind for c in counts}):
        of_kind = [c for c in counts if c.kind == kind]
        sums = [sum(getattr(c, name) for c in of_kind) for name in ("possible", "tried", "survived")]
        where = ", ".join(f"{c.program} {c.tried}" for c in of_kind)
        rows.append(f"| {kind} | {sums[0]:,} | {sums[1]:,} | {sums[2]:,} | {where} |")
    rows.append(
        f"| **all** | {total['possible']:,} | {total['tried']:,} | {total['survived']:,} | seed {found['seed']} |"
    )
    return "\n".join(rows) + "\n"


def with_table(page: str, text: str) -> str:
    """The page with the table of results.json between its markers."""
    before, _, rest = page.partition(_BEGIN)
    _, found, after = rest.partition(_END)
    assert found, f"{PAGE} has no markers {_BEGIN.strip()} and {_END}"
    return before + _BEGIN + table(text) + _END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), RESULTS.read_text()))
