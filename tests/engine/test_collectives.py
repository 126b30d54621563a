"""Joining the process group: ranks that do not come, and what one process opens."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
from helpers.ranks import end_ranks

from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.common.runtime import World
from smpo_fast.engine import collectives


def join_with_one_rank_missing(rank: int, size: int, missing: int) -> tuple[str, float]:
    if rank == missing:
        return "", 0.0
    collectives.RENDEZVOUS_TIMEOUT = timedelta(seconds=3)
    began = time.monotonic()
    with pytest.raises(EnvironmentProblem) as caught:
        collectives.join(World(rank, size))
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("missing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_does_not_come_is_reported_in_time(missing: int) -> None:
    assert collectives.RENDEZVOUS_TIMEOUT <= timedelta(minutes=1)
    message, seconds = end_ranks(join_with_one_rank_missing, 2, missing=missing)[1 - missing].value
    assert "2 ranks did not meet at 127.0.0.1:" in message and "within 3 s" in message
    assert seconds < 30


def join_alone(rank: int, size: int) -> tuple[set[str], list[Any]]:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    collectives.join(World())
    total = torch.ones(3)
    torch.distributed.all_reduce(total)
    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return set(listening), total.tolist()


def test_one_process_listens_on_no_network_interface() -> None:
    listening, total = end_ranks(join_alone, 1)[0].value
    assert listening <= {"127.0.0.1", "::1"} and total == [1.0, 1.0, 1.0]
