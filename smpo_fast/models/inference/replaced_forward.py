"""Replacing the forward functions of modules for the duration of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, the modules have other forward functions."""
    try:
        for module, forward in forwards.items():
            object.__setattr__(module, "forward", forward)
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
