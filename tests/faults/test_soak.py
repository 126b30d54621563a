"""A training of 200 steps that is stopped and killed again and again ends as one that was not."""

from __future__ import annotations

import signal

import pytest

from faults.campaign import Campaign, differences, tail
from faults.conftest import Attempt
from smpo_fast.common.runtime import rng


@pytest.mark.faults(share=8)
def test_stopped_and_killed_again_and_again(campaign: Campaign, attempt: Attempt) -> None:
    campaign.set_up("soak")
    whole = campaign.run("soak")
    assert whole.status == 0, tail(whole)
    wanted = campaign.digests()

    def act(seed: int) -> str:
        campaign.set_up("soak")
        at, starts = rng(seed, "soak"), 0
        while not (campaign.work / "soak" / "export").exists():
            kind = signal.SIGKILL if at.random() < 0.5 else signal.SIGTERM
            ending = campaign.run("soak", signal=int(kind), signal_after=float(at.uniform(0.2, 0.5)) * whole.seconds)
            starts += 1
            if ending.status not in (0, -signal.SIGKILL, -signal.SIGTERM) or ending.left or starts > 50:
                return f"soak {seed}, start {starts}: it ended with {ending.status}: {tail(ending)}"
        last = campaign.run("soak")
        return tail(last) if last.status else differences(campaign.digests(), wanted)

    attempt("train, 200 steps", "stopped and killed", range(3), act)
