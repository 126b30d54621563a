"""Two ranks of a training, of which one is killed or refused something at each of its boundaries."""

from __future__ import annotations

import pytest

from faults.campaign import Campaign
from faults.conftest import Attempt
from faults.shim import ERRORS, KILLS, Fault

BOUNDARIES = range(1, 160)  # of rank 0; rank 1 has fewer, and a fault beyond its last one does not happen


@pytest.mark.faults(share=6)
@pytest.mark.parametrize("kinds", [KILLS, ERRORS], ids=["kill", "errors"])
def test_one_of_two_ranks(kinds: tuple[str, ...], campaign: Campaign, attempt: Attempt) -> None:
    places = [(r, Fault(k, b)) for k in kinds for r, last in ((0, 160), (1, 12)) for b in BOUNDARIES if b < last]
    attempt("train on two ranks", "kill" if kinds == KILLS else "errors", places, lambda at: campaign.try_ranks(*at))
