"""Joining and leaving the process group, and collectives in which the error of one rank is raised on all."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.common.runtime import World

RENDEZVOUS_TIMEOUT = timedelta(minutes=1)  # for all ranks to start; those that come give up after it
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


def join(world: World) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, unless it exists. Collective.

    One process alone listens on no network interface. Raises EnvironmentProblem when not all ranks come in time.
    """
    if torch.distributed.is_initialized():
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.size == 1:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        alone = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        return
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except torch.distributed.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvironmentProblem(
            f"the {world.size} ranks did not meet at {where} within {RENDEZVOUS_TIMEOUT.total_seconds():.0f} s: a rank "
            f"has failed (see its message), or the address cannot be reached ({str(error).splitlines()[0]})"
        ) from error
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)


def shutdown() -> None:
    """Leave the process group, if there is one. Called at exit; harmless to call earlier."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
