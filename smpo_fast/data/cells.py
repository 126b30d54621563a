"""Reads single cells of arrow columns, of which some have no Python value."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

# A timestamp with nanoseconds, a date beyond the year 9999, an offset that leads out of a damaged column.
_ERRORS = (ValueError, ArithmeticError, LookupError, TypeError, pa.ArrowException)


class BadCell(ValueError):
    """A cell that cannot be read; the message is 'kind: detail', to be put after the column's name."""


def cell_value(column: pa.Array, i: int) -> Any:
    """Cell ``i`` of a column as a Python value; None for null. Raises BadCell for a value that Python does not have."""
    try:
        return column[i].as_py()
    except UnicodeDecodeError as error:
        raise BadCell(f"is not UTF-8 text: {error.reason}") from error
    except _ERRORS as error:
        raise BadCell(f"cannot be read: {column.type}, {error}") from error
