"""The step in phases: shared trajectories, several timesteps a pair, equal errors, and a bar that moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.small_run import numbers, run, weights
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from smpo_fast.common.runtime import Stopped
from smpo_fast.config import schema
from smpo_fast.engine.local import LocalEngine
from smpo_fast.method.inversion import network_calls
from smpo_fast.training.progress import CallHook
from smpo_fast.training.run_log import read_metrics
from smpo_fast.training.step import Trainer


def calls_of(run_dir: Path, *words: str) -> dict[str, int]:
    """Run, and count the images that went through a network, by whether gradients were kept."""
    from diffusers import UNet2DConditionModel

    counted = {"inversion or reference": 0, "policy": 0}
    inner = UNet2DConditionModel.forward

    def counting(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["policy" if torch.is_grad_enabled() else "inversion or reference"] += len(sample)
        return inner(self, sample, *args, **kwargs)

    with mock.patch.object(UNet2DConditionModel, "forward", counting):
        assert run(run_dir, *words) == 0
    return counted


@pytest.mark.parametrize(
    "how",
    [
        ["inversion.network=reference", "inversion.steps=4"],
        pytest.param(["objective.name=dpo"], marks=pytest.mark.slow),
    ],
)
def test_a_store_spares_later_runs_the_inversion_and_the_reference(how: list[str], cache: str, tmp_path: Path) -> None:
    """Bit for bit the run that wrote it, also at another beta and learning rate than it was written at."""
    words = [cache, *how, f"inversion.store={tmp_path / 'store'}"]
    first = calls_of(tmp_path / "first", *words)
    again = calls_of(tmp_path / "again", *words)
    assert numbers(tmp_path / "first") == numbers(tmp_path / "again")
    assert all(torch.equal(v, weights(tmp_path / "again")[n]) for n, v in weights(tmp_path / "first").items())
    assert first["inversion or reference"] > 0 and again["inversion or reference"] == 0
    assert again["policy"] == first["policy"] == 4 * 6 * 2
    swept = calls_of(tmp_path / "swept", *words, "objective.beta=500", "optim.lr=2e-4", "labels.gamma=4")
    assert swept["inversion or reference"] == 0 and numbers(tmp_path / "swept") != numbers(tmp_path / "first")
    assert run(tmp_path / "other", *words, "run.seed=1") == 2, "another run's trajectories are refused"


def test_winner_and_loser_get_the_same_random_noise(cache: str, tmp_path: Path) -> None:
    """As in Diffusion-DPO (arXiv 2311.12908)."""
    words = [cache, "objective.name=dpo", "run.steps=1", f"inversion.store={tmp_path / 'store'}"]
    assert run(tmp_path / "run", *words) == 0
    (file,) = (tmp_path / "store").glob("step-*.safetensors")
    noise = [value for name, value in load_file(file).items() if name.endswith(".tau")]
    assert len(noise) == 6 and all(torch.equal(tau[:, 0], tau[:, 1]) for tau in noise)
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("landings", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_store_changes_a_run_by_the_rounding_of_tau_alone(landings: int, cache: str, tmp_path: Path) -> None:
    words = [cache, "inversion.network=reference", "inversion.steps=4", f"inversion.per_trajectory={landings}"]
    assert run(tmp_path / "plain", *words) == 0
    assert run(tmp_path / "stored", *words, f"inversion.store={tmp_path / 'store'}") == 0
    plain, stored = (read_metrics(tmp_path / name) for name in ("plain", "stored"))
    assert plain[0]["model_mse"] != stored[0]["model_mse"]
    assert plain[0]["model_mse"] == pytest.approx(stored[0]["model_mse"], rel=2e-3)


def test_several_timesteps_of_one_trajectory(cache: str, tmp_path: Path) -> None:
    """As many examples from a third of the pairs; the reference still agrees exactly at step 0."""
    one = calls_of(tmp_path / "one", cache, "inversion.steps=4")
    three = calls_of(tmp_path / "three", cache, "inversion.steps=4", "inversion.per_trajectory=3")
    assert three["policy"] == one["policy"] and three["inversion or reference"] < 0.75 * one["inversion or reference"]
    rows = read_metrics(tmp_path / "three")
    assert rows[0]["logit_max"] == 0 and rows[1]["logit_max"] > 0 and rows[-1]["pairs_seen"] == 4 * 6


@pytest.mark.parametrize("how", [["batch.micro_pairs=4"], ["inversion.source=inversion", "inversion.per_trajectory=3"]])
def test_micro_batches_add_up_to_the_mean_that_is_logged(how: list[str], cache: str, tmp_path: Path) -> None:
    """Of every pair with the same share, also where the last micro-batch is smaller and with several landings."""
    shares, inner = [], LocalEngine.backward

    def noting(self: LocalEngine, loss: torch.Tensor, *, last: bool) -> None:
        shares.append(loss.item())
        inner(self, loss, last=last)

    with mock.patch.object(LocalEngine, "backward", noting):
        assert run(tmp_path / "run", cache, "run.steps=1", "objective.name=sft", "inversion.steps=4", *how) == 0
    assert len(shares) > 1 and sum(shares) == pytest.approx(read_metrics(tmp_path / "run")[0]["train_loss"])


@pytest.mark.parametrize("solver", ["pec", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ab2", "heun"))])
def test_solvers_train(solver: str, cache: str, tmp_path: Path) -> None:
    words = [cache, f"inversion.solver={solver}", "inversion.steps=4", "run.steps=2"]
    counted = calls_of(tmp_path / "run", *words)
    settings = schema.Config.model_validate(json.loads(json.dumps(_settings(tmp_path / "run"))))
    schedule = _schedule(settings)
    paths = [p for step in range(2) for p in schedule.paths(6, settings.inversion, settings.run.seed, step)]
    expected = sum(network_calls(p.depth, settings.inversion) for p in paths)
    assert counted["inversion or reference"] == 2 * (expected + 2 * 6), (
        "what the paths ask for, and the reference's errors"
    )
    assert read_metrics(tmp_path / "run")[0]["logit_max"] == 0


def _settings(run_dir: Path) -> dict[str, Any]:
    from smpo_fast.config import loading

    return loading.load(run_dir / "config.toml").model_dump()


def _schedule(settings: Any) -> Any:
    from smpo_fast.models.locate import find, schedule_of

    return schedule_of(find(settings.model), settings.inversion)


class _NothingRead(TorchDispatchMode):
    """Fails when a number or a tensor leaves the device; the CPU plays the device, so copies are not seen here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::mexpected_select"), func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_before_the_optimizer(cache: str, tmp_path: Path) -> None:
    phases = []

    def watched(name: str) -> Any:
        inner = getattr(Trainer, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            phases.append(name)
            with _NothingRead():
                return inner(self, *args, **kwargs)

        return mock.patch.object(Trainer, name, call)

    with watched("invert"), watched("reference_errors"), watched("policy_gradient"):
        assert run(tmp_path / "run", cache, "run.steps=2") == 0
    assert phases == ["invert", "reference_errors", "policy_gradient"] * 2


class NoSignals:
    """In place of ``StopSignal``."""

    def check(self) -> None:
        """Never stops."""


def test_the_bar_moves_with_every_network_call_and_ends_at_the_pairs_of_the_step() -> None:
    class Bar:
        n, moves = 0, 0

        def update(self, count: int) -> None:
            self.n, self.moves = self.n + count, self.moves + (count > 0)

    bar = Bar()
    before_call = CallHook(NoSignals(), bar)  # type: ignore[arg-type]
    for done in (0, 64):
        before_call.begin_step(pairs=64, work=64 * 15)
        for _ in range(11 * 8):
            before_call(8)  # the inversion of 64 pairs, 8 at a time
        assert 40 < bar.n - done < 64 and bar.moves > 40
        before_call(64)
        before_call(64, cost=3)
        assert bar.n == done + 64


def test_a_stop_request_takes_effect_at_the_next_network_call() -> None:
    class Requested:
        def check(self) -> None:
            raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        CallHook(Requested(), None)(8)  # type: ignore[arg-type]
