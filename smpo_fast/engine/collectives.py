"""The process group, and collectives in which the error of one rank is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from smpo_fast.common.runtime import World

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # ranks give up when one of them has been silent for this long
_T = TypeVar("_T")


def gather(world: World, value: _T) -> list[_T]:
    """The values of all ranks, in rank order; also a barrier. Collective."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


def error_as_value(action: Callable[[], _T]) -> _T | Exception:
    """Return an error instead of raising it, so that it can be sent to the other ranks, which would wait forever."""
    try:
        return action()
    except Exception as error:
        return error


def raise_first_error(values: list[_T | Exception]) -> list[_T]:
    """The values; raises the first error among them."""
    for value in values:
        if isinstance(value, Exception):
            raise value
    return [v for v in values if not isinstance(v, Exception)]


def on_every_rank(world: World, action: Callable[[], _T]) -> list[_T]:
    """The results of ``action`` on all ranks; an error of one rank is raised on all. Collective."""
    return raise_first_error(gather(world, error_as_value(action)))


def on_rank_0(world: World, action: Callable[[], _T]) -> _T:
    """The result of ``action`` on rank 0, on every rank; its error is raised on every rank. Collective."""
    value = error_as_value(action) if world.rank == 0 else None
    first: Any = gather(world, value)[0]
    return raise_first_error([first])[0]


def shutdown() -> None:
    """Leave the process group, if there is one. Called at exit; harmless to call earlier."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
