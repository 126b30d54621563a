"""Seconds of a run under different settings, from the phases that these change, and the fastest settings found."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import print0
from smpo_fast.config import loading
from smpo_fast.config.presets import SOLVER_PRESETS
from smpo_fast.config.schema import Config
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import footprint, step_ops
from smpo_fast.models.inference import checks
from smpo_fast.models.network_spec import IMAGES_PER_PAIR
from smpo_fast.planning import profiles
from smpo_fast.planning.memory import memory
from smpo_fast.planning.planned_run import PlannedRun
from smpo_fast.planning.profiles import Profile
from smpo_fast.planning.speed import work
from smpo_fast.tuning.bench import EAGER, Bench, CallTimes, PolicyTimes, Rejected
from smpo_fast.tuning.candidates import APPROXIMATIONS
from smpo_fast.tuning.search import LEAST_GAIN, Coordinate, Values, search

_CALL_KEYS = ("batch.inversion_pairs", "model.attention", "model.channels_last", "model.cuda_graphs",
              "model.merge_qkv", "kernels.enabled", "inversion.fp8", "inversion.reuse_deep")  # fmt: skip
_POLICY_KEYS = ("batch.micro_pairs", "model.gradient_checkpointing", "model.attention", "model.channels_last",
                "kernels.enabled")  # fmt: skip


@dataclass
class Trial:
    """A candidate: what it changed, the settings, and its times, or why it was rejected."""

    values: Values
    settings: Config
    call: CallTimes | None = None
    policy: PolicyTimes | None = None
    pair_seconds: float = 0.0
    reason: str = ""


@dataclass
class Tuner:
    """Tries settings for a run on a bench, within a time and a memory limit.

    seconds: for all trials; limit: bytes that a run may need by plan; planned: the run with other settings.
    """

    bench: Bench
    run: PlannedRun
    schedule: NoiseSchedule
    device: torch.device
    stage: int  # of ZeRO; -1 without DeepSpeed
    limit: float
    seconds: float
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.noted: Callable[[Trial], None] = self._print  # is given each trial when it is done
        self._began, self._calls, self._policies = time.monotonic(), {}, {}  # type: ignore[var-annotated]

    @property
    def left(self) -> float:
        """Seconds left for trials."""
        return self.seconds - (time.monotonic() - self._began)

    def fastest(self, start: Config, coordinates: list[Coordinate]) -> Config:
        """The fastest settings that the search finds, beginning at ``start``.

        Raises Rejected if these, or eager code at their batch sizes, cannot run.
        """
        costs = []
        for _ in range(2):
            self._calls.clear()
            self._policies.clear()
            costs.append(self.cost(eager(start), {}))
        noise = abs(costs[0] - costs[1]) / min(costs)
        gain = max(LEAST_GAIN, noise)
        print0(f"  two measurements differ by {noise:.1%}: gains below {gain:.1%} do not count")
        return search(start, coordinates, self.cost, self._skip, gain)

    def _skip(self, coordinate: Coordinate, values: Values) -> bool:
        if self.left > coordinate.setup:
            return False
        reason = f"not tried: {max(0, self.left):.0f} s are left, and it may take {coordinate.setup:.0f} s or more"
        self._note(Trial(values, self.run.config, reason=reason))
        return True

    def cost(self, candidate: Config, values: Values) -> float:
        """Seconds of the whole run, as far as they depend on these settings. Raises Rejected."""
        trial = Trial(values, candidate)
        try:
            self._check(candidate)
            trial.call, trial.policy = self._call(candidate), self._policy(candidate)
        except Rejected as rejected:
            trial.reason = str(rejected)
            self._note(trial)
            raise
        trial.pair_seconds = self.pair_seconds(trial.call, trial.policy)
        self._note(trial)
        setup = trial.policy.setup + (trial.call.setup if trial.call else 0.0)
        return setup + trial.pair_seconds * self.run.examples_of_rank * self.run.config.run.steps

    def pair_seconds(self, call: CallTimes | None, policy: PolicyTimes) -> float:
        """Seconds of a step per pair of a rank."""
        inversion = 0.0 if call is None else call.seconds * self.calls
        return inversion + policy.reference + policy.policy + policy.optimizer / self.run.examples_of_rank

    @property
    def calls(self) -> float:
        """No-gradient calls of the inversion per trained pair."""
        return work(self.run, self.schedule, False).calls["inversion"]

    def _check(self, candidate: Config) -> None:
        """Raise Rejected for settings that a run would refuse, or that do not fit the memory."""
        try:
            checks.check(candidate, self.device, self.stage)
            step_ops.check(candidate)
        except UserError as error:
            raise Rejected(str(error)) from error
        planned = self.planned(candidate)
        needed = memory(planned, planned.variant()).needed
        if needed > self.limit:
            raise Rejected(f"a run needs {needed / 1e9:.1f} GB by plan, and {self.limit / 1e9:.1f} GB are allowed")

    def planned(self, candidate: Config) -> PlannedRun:
        """The run with a candidate's settings."""
        run = self.run
        return PlannedRun(candidate, run.network, run.precision, run.ranks, run.per_node, run.ds)

    def _call(self, c: Config) -> CallTimes | None:
        if c.inversion.source != "inversion":
            return None
        key = _key(c, _CALL_KEYS, c.model.compile != "off")
        if key not in self._calls:
            self._calls[key] = _kept(lambda: self.bench.call(c))
        return _result(self._calls[key])

    def _policy(self, c: Config) -> PolicyTimes:
        key = _key(c, _POLICY_KEYS, c.model.compile == "all")
        if key not in self._policies:
            self._policies[key] = _kept(lambda: self.bench.policy(c))
        return _result(self._policies[key])

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.noted(trial)

    def _print(self, trial: Trial) -> None:
        print0(f"  {describe(trial.values) or 'eager'}: {self.describe_times(trial)}")

    def describe_times(self, trial: Trial) -> str:
        """The times of a trial, in milliseconds per pair."""
        if trial.policy is None:
            return trial.reason
        call = "" if trial.call is None else f"call {1e3 * trial.call.seconds:.4g}, "
        return (
            f"{1e3 * trial.pair_seconds:.4g} ms a pair ({call}reference {1e3 * trial.policy.reference:.4g}, policy "
            f"{1e3 * trial.policy.policy:.4g})"
        )

    def approximations(self, best: Config, asked: Collection[str]) -> tuple[Config, dict[str, dict[str, float] | str]]:
        """The settings with those approximations that are asked for and gain, each tried together with those before.

        Also what each one changes: 'error' of tau relative to ``best`` and 'gain', or why it cannot be used.
        """
        found: dict[str, dict[str, float] | str] = {}
        if best.inversion.source != "inversion":
            return best, found
        try:
            exact, tau = self.bench.inversion(best)
        except Rejected as error:
            return best, dict.fromkeys(APPROXIMATIONS, f"the exact inversion could not be timed: {error}")
        chosen, lowest = best, exact
        for name in APPROXIMATIONS:
            try:
                candidate = loading.replaced(chosen, approximation(chosen, name, self.device.type))
                if self.left <= 0:
                    raise Rejected("not tried: out of time")
                self._check(candidate)
                seconds, other = self.bench.inversion(candidate)
            except (Rejected, UserError) as error:
                found[name] = str(error)
                continue
            found[name] = {"gain": exact / seconds, "error": float((other - tau).norm() / tau.norm())}
            if name in asked and seconds < lowest:
                chosen, lowest = candidate, seconds
        return chosen, found

    def profile(self, settings: Config, key: dict[str, Any]) -> Profile:
        """The profile of settings that have been tried."""
        call, policy = self._call(settings), self._policy(settings)
        planned = self.planned(settings)
        forward = IMAGES_PER_PAIR * footprint.inference_cost(planned.network, planned.precision).flops
        both = work(planned, self.schedule, settings.model.gradient_checkpointing).flops["policy"]
        seconds = {"reference": policy.reference, "policy": policy.policy, "optimizer": policy.optimizer}
        rates = {"policy": both / policy.policy}
        if policy.reference:
            rates["reference"] = forward / policy.reference
        if call is not None:
            seconds["call"], rates["inversion"] = call.seconds, forward / call.seconds
        values = {name: profiles.get(settings, name) for name in profiles.KEYS}
        return Profile(key, values, seconds, rates)


def approximation(best: Config, name: str, device_type: str) -> dict[str, Any]:
    """The values by which an approximation changes the best exact settings."""
    values = dict(APPROXIMATIONS[name])
    if device_type != "cuda" or best.model.compile != "off":
        values.pop("model.compile", None)
    if name == "pec":  # a solver is a preset of finer keys
        values |= {f"inversion.{key}": value for key, value in SOLVER_PRESETS["pec"].items()}
    return values


def describe(values: Mapping[str, Any]) -> str:
    """Settings as words."""
    return " ".join(f"{name}={loading.toml_value(value)}" for name, value in values.items())


def _key(c: Config, names: tuple[str, ...], compiled: bool) -> tuple[Any, ...]:
    return (*(str(profiles.get(c, name)) for name in names), compiled)


def _kept(measure: Callable[[], Any]) -> Any:
    """The result of a measurement, or the reason why there is none."""
    try:
        return measure()
    except Rejected as rejected:
        return rejected


def _result(kept: Any) -> Any:
    if isinstance(kept, Rejected):
        raise kept
    return kept


def eager(settings: Config) -> Config:
    """The settings with eager code, which all candidates are compared with."""
    return loading.replaced(settings, {name: value for name, value in EAGER.items() if name in profiles.KEYS})


def start(settings: Config, device: torch.device, dtype: torch.dtype, latent: tuple[int, int, int]) -> Config:
    """Where a search begins: eager code, with those kernels that a run uses by default on this device."""
    plain = eager(settings)
    kernels = step_ops.resolve(loading.replaced(plain, {"kernels.enabled": "auto"}), device, dtype, latent).enabled
    return loading.replaced(plain, {"kernels.enabled": list(kernels)})
