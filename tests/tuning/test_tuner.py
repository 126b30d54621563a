"""What a candidate costs, what is refused before it is timed, and what is written: with times from a table."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import torch

from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.models.locate import find, schedule_of
from smpo_fast.planning import profiles
from smpo_fast.planning.planned_run import PlannedRun
from smpo_fast.tuning.bench import CallTimes, PolicyTimes, Rejected
from smpo_fast.tuning.candidates import coordinates
from smpo_fast.tuning.search import Coordinate
from smpo_fast.tuning.tune import overlay, planned_run
from smpo_fast.tuning.tuner import Tuner, eager

CPU = torch.device("cpu")


class TableBench:
    """Times as a device might have them: channels-last helps, graphs fail, larger batches are faster up to 4 pairs."""

    setup = 0.0

    def __init__(self) -> None:
        self.calls: list[Config] = []

    def call(self, c: Config) -> CallTimes:
        self.calls.append(c)
        if c.batch.inversion_pairs > 8:
            raise Rejected("out of memory")
        seconds = 0.010 / min(c.batch.inversion_pairs, 4) * (0.8 if c.model.channels_last else 1.0)
        return CallTimes(seconds, self.setup * c.model.channels_last, 0, 1e-6)

    def policy(self, c: Config) -> PolicyTimes:
        return PolicyTimes(0.004, 0.02 + 0.01 * c.model.gradient_checkpointing, 0.1, 0.0, 0, 1e-6)

    def inversion(self, c: Config) -> tuple[float, torch.Tensor]:
        if c.inversion.reuse_deep:
            raise Rejected("no deep features")
        fast = c.inversion.solver == "pec"
        return (0.01 if fast else 0.02), torch.full((4,), 1.1 if fast else 1.0)


def make(bench: Any, limit: float = 1e12, seconds: float = 100.0, **sections: dict[str, Any]) -> Tuner:
    settings = loading.from_dict({
        "run": {"steps": 10}, "data": {"resolution": 32}, "batch": {"pairs_per_step": 16, "inversion_pairs": 1},
        "kernels": {"enabled": []}, "inversion": {"steps": 5}, **sections,
    })  # fmt: skip
    run: PlannedRun = planned_run(settings, find(settings.model), None, "fp32")
    return Tuner(bench, run, schedule_of(find(settings.model), settings.inversion), CPU, -1, limit, seconds)


def test_a_candidate_costs_its_setup_and_all_pairs_of_the_run() -> None:
    bench = TableBench()
    bench.setup = 7.0
    tuner = make(bench)
    calls = tuner.calls
    assert 4 < calls < 8
    pair = calls * 0.010 + 0.004 + 0.02 + 0.1 / 16
    assert tuner.cost(tuner.run.config, {}) == pytest.approx(160 * pair)
    faster = loading.replaced(tuner.run.config, {"model.channels_last": True})
    assert tuner.cost(faster, {}) == pytest.approx(7.0 + 160 * (pair - 0.2 * calls * 0.010))


def test_a_phase_is_measured_once_for_the_settings_that_change_it() -> None:
    bench = TableBench()
    tuner = make(bench)
    tuner.cost(tuner.run.config, {})
    tuner.cost(loading.replaced(tuner.run.config, {"batch.micro_pairs": 4}), {})
    assert len(bench.calls) == 1


def test_the_fastest_settings_are_found_and_written_with_their_numbers() -> None:
    tuner = make(TableBench())
    best = tuner.fastest(eager(tuner.run.config), coordinates("cpu", 16, 16))
    assert (best.batch.inversion_pairs, best.model.channels_last, best.model.gradient_checkpointing) == (4, True, False)
    profile = tuner.profile(best, profiles.key_of(tuner.run, CPU))
    assert profile.seconds == pytest.approx({"call": 0.002, "reference": 0.004, "policy": 0.02, "optimizer": 0.1})
    assert set(profile.rates) == {"inversion", "reference", "policy"}
    text = overlay(tuner, profile, {}, CPU)
    written = {f"{s}.{k}": v for s, table in tomllib.loads(text).items() for k, v in table.items()}
    assert written == profile.settings
    assert "channels_last = true  # false: " in text
    assert "no-gradient call 2 x" in text


def test_settings_that_a_run_refuses_are_named_with_the_reason() -> None:
    tuner = make(TableBench())
    with pytest.raises(Rejected, match="cuda_graphs needs a CUDA device"):
        tuner.cost(loading.replaced(tuner.run.config, {"model.cuda_graphs": True}), {"model.cuda_graphs": True})
    assert "needs a CUDA device" in tuner.trials[-1].reason


def test_settings_that_need_too_much_memory_are_not_timed() -> None:
    bench = TableBench()
    tuner = make(bench, limit=1e6)
    with pytest.raises(Rejected, match=r"GB by plan, and 0\.0 GB are allowed"):
        tuner.cost(tuner.run.config, {})
    assert not bench.calls


def test_nothing_is_begun_that_the_time_does_not_allow() -> None:
    tuner = make(TableBench(), seconds=30.0)
    slow = Coordinate("compilation", lambda best: [{"model.compile": "inversion"}], setup=60.0)
    assert tuner.fastest(eager(tuner.run.config), [slow]).model.compile == "off"
    assert "not tried" in tuner.trials[-1].reason
    assert "60 s" in tuner.trials[-1].reason


def test_approximations_are_reported_with_gain_and_error() -> None:
    tuner = make(TableBench())
    chosen, found = tuner.approximations(tuner.run.config, [])
    assert found["pec"] == {"gain": pytest.approx(2.0), "error": pytest.approx(0.1, rel=1e-5)}
    assert found["fp8"] == {"gain": pytest.approx(1.0), "error": 0.0}
    assert found["reuse_deep"] == "no deep features"
    assert chosen == tuner.run.config


def test_only_approximations_that_are_asked_for_and_gain_are_chosen() -> None:
    tuner = make(TableBench())
    chosen, _ = tuner.approximations(tuner.run.config, ["fp8", "pec"])
    assert (chosen.inversion.solver, chosen.inversion.fp8) == ("pec", False)


def test_approximations_that_are_chosen_were_tried_together() -> None:
    class Every(TableBench):
        """Each approximation makes the inversion a quarter faster."""

        tried: list[tuple[bool, bool, bool]] = []

        def inversion(self, c: Config) -> tuple[float, torch.Tensor]:
            given = c.inversion.fp8, c.inversion.reuse_deep, c.inversion.solver == "pec"
            self.tried.append(given)
            return 0.02 * 0.75 ** sum(given), torch.ones(4)

    tuner = make(Every())
    chosen, _ = tuner.approximations(tuner.run.config, ["fp8", "pec"])
    assert Every.tried == [(False, False, False), (True, False, False), (True, True, False), (True, False, True)]
    assert chosen.inversion.fp8 and chosen.inversion.solver == "pec" and not chosen.inversion.reuse_deep


def test_an_exact_inversion_that_cannot_be_timed_ends_no_search() -> None:
    class Full(TableBench):
        def inversion(self, c: Config) -> tuple[float, torch.Tensor]:
            raise Rejected("out of memory")

    tuner = make(Full())
    chosen, found = tuner.approximations(tuner.run.config, ["pec"])
    assert chosen == tuner.run.config
    assert set(found.values()) == {"the exact inversion could not be timed: out of memory"}


def test_a_run_without_inversion_has_neither_calls_nor_approximations() -> None:
    bench = TableBench()
    tuner = make(bench, inversion={"source": "noise"})
    assert tuner.cost(tuner.run.config, {}) == pytest.approx(160 * (0.024 + 0.1 / 16))
    assert not bench.calls
    assert tuner.approximations(tuner.run.config, ["pec"]) == (tuner.run.config, {})
    assert "call" not in tuner.profile(tuner.run.config, {}).seconds
