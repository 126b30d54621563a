"""Every program is killed before, within and after each change that it makes on the disk, and refused each of them."""

from __future__ import annotations

import pytest

from faults.campaign import ROAD, Campaign
from faults.conftest import Attempt
from faults.shim import ERRORS

MOMENTS = [i / 500 for i in range(500)]  # shares of the time that a program takes
COSTLY = ("train",)  # ten times the seconds of the others


def _cases(*kinds: str, share: float) -> list[pytest.param]:
    return [
        pytest.param(program, kind, marks=pytest.mark.faults(share=share * (3 if program in COSTLY else 1)))
        for program in ROAD
        for kind in kinds
    ]


@pytest.mark.parametrize(("program", "kind"), [*_cases("kill", share=5), *_cases(*ERRORS, share=1)])
def test_at_every_boundary(program: str, kind: str, campaign: Campaign, attempt: Attempt) -> None:
    """Afterwards the same command ends with the bytes of the undisturbed run; what is refused is told in a sentence."""
    attempt(program, kind, campaign.faults(program, kind), lambda fault: campaign.try_fault(program, fault))


@pytest.mark.parametrize("program", [pytest.param(p, marks=pytest.mark.faults(share=0.5)) for p in ROAD])
def test_killed_at_any_moment(program: str, campaign: Campaign, attempt: Attempt) -> None:
    attempt(program, "kill at a moment", MOMENTS, lambda share: campaign.try_moment(program, share))
