"""Runs on several ranks under DeepSpeed agree with runs in one process."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import pytest
from helpers.paths import CONFIGS
from helpers.ranks import run_ranks
from helpers.small_run import SMALL, assert_same_run, finish, launch, numbers, run

from smpo_fast import train
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.method import inversion
from smpo_fast.models import locate
from smpo_fast.models.inference.weight_copies import WeightCopies
from smpo_fast.training.run_log import read_metrics
from smpo_fast.training.step_paths import StepPaths


def train_on_ranks(rank: int, size: int, words: list[str]) -> int:
    return train.main(words)


def test_the_launcher_trains_two_ranks_that_agree_with_plain_pytorch(cache: str, plain: Path, tmp_path: Path) -> None:
    assert "The run is complete" in finish(launch(tmp_path / "run", cache, ranks=2))
    assert_same_run(plain, tmp_path / "run", tolerance=2e-4)
    assert read_metrics(tmp_path / "run")[0]["logit_max"] == 0.0


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_under_other_stages_agree_with_plain_pytorch(
    stage: int, cache: str, plain: Path, tmp_path: Path
) -> None:
    words = [*SMALL, cache, f"run.dir={tmp_path / 'run'}", "--ds_config", str(CONFIGS / f"ds_zero{stage}.json")]
    assert run_ranks(train_on_ranks, 2, words=words) == [0, 0]
    assert_same_run(plain, tmp_path / "run", tolerance=2e-4)
    assert read_metrics(tmp_path / "run")[0]["logit_max"] == 0.0, "equal networks predict equally under sharding too"


def test_eight_bit_adam_and_a_channels_last_inversion_train_under_zero(
    cache: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, refresh = [], WeightCopies.refresh
    monkeypatch.setattr(WeightCopies, "refresh", lambda self: (copied.append(len(self._forms)), refresh(self))[1])
    words = [cache, "optim.name=adamw8bit", "model.channels_last=true", "model.merge_qkv=true"]
    assert run(tmp_path / "run", *words, "--ds_config", str(CONFIGS / "ds_zero2.json")) == 0
    eight, full = (numbers(d)[-1]["train_loss"] for d in (tmp_path / "run", plain))
    assert abs(eight - full) < 2e-3
    assert copied and min(copied) > 20, "convolutions, which DeepSpeed has flattened, before every step"
    assert read_metrics(tmp_path / "run")[0]["logit_max"] == 0.0, "policy and reference have no copies"


def test_ranks_make_equally_many_network_calls() -> None:
    """ZeRO-3 gathers weights in every call: a rank that made fewer would hang the others."""
    for how in ("stratified", "independent"):
        settings = loading.from_dict({"inversion": {"timesteps": how}})
        schedule = locate.schedule_of(locate.find(settings.model), settings.inversion)
        for step in range(5):
            paths = schedule.paths(12, settings.inversion, 0, step)
            per_rank = [StepPaths(paths, World(rank, 3)).pairs_per_round(range(4)) for rank in range(3)]
            assert per_rank[0] == per_rank[1] == per_rank[2]
            own = [inversion.active_counts(StepPaths(paths, World(rank, 3)).of(range(4))) for rank in range(3)]
            assert per_rank[0] == [max(counts) for counts in zip_longest(*own, fillvalue=0)]
