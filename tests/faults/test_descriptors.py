"""Too few file descriptors, from one on; tests/data/test_cache.py has a limit of 64 and a cache of 96 shards."""

from __future__ import annotations

import pytest

from faults.campaign import ROAD, Campaign, refused
from faults.conftest import Attempt


@pytest.mark.faults(share=0.5)
@pytest.mark.parametrize("program", ROAD)
def test_a_few_descriptors(program: str, campaign: Campaign, attempt: Attempt) -> None:
    def act(count: int) -> str:
        campaign.set_up(program)
        ending = campaign.run(program, descriptors=count)
        problem = refused(ending) or campaign.continue_(program)
        return problem and f"{program} with {count} descriptors: {problem}"

    attempt(program, "few descriptors", range(1, 25), act)
