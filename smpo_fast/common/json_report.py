"""A program's report as JSON: alone on standard output, with everything else that is printed on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


@contextmanager
def json_report(wanted: bool) -> Iterator[dict[str, Any]]:
    """Collects the facts of a program that ends well; if ``wanted``, prints them as one JSON object, on rank 0.

    Inside, what is printed goes to standard error then. Values may be dataclasses, paths and numpy's numbers and
    arrays; a number that is not finite becomes null, which JSON has no other word for.
    """
    facts: dict[str, Any] = {}
    if not wanted:
        yield facts
        return
    with redirect_stdout(sys.stderr):
        yield facts
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(_plain(facts), indent=1, allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
