"""Every pair of programs at the same time in the same folders."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest

from faults.campaign import Campaign
from faults.conftest import Attempt

PROGRAMS = ("import", "score", "prepare", "train", "evaluate", "generate")


@pytest.mark.faults(share=8)
def test_pairs_of_programs(campaign: Campaign, attempt: Attempt) -> None:
    """Each does its work or says in a sentence why not; afterwards each ends as if it had been alone."""
    delays = [i / 10 for i in range(10)]
    pairs = [
        (pair, delay, there)
        for pair in combinations_with_replacement(PROGRAMS, 2)
        for delay in delays
        for there in (False, True)
    ]

    def act(fault: tuple[tuple[str, str], float, bool]) -> str:
        wrong = campaign.try_together(*fault)
        return wrong and f"{fault}: {wrong}"

    attempt("pairs of programs", "together", pairs, act)
