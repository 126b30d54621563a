"""run.speed: files, stored profiles, eager code, and measuring at the start of a run."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.answers import json_answer
from helpers.small_run import SMALL, run
from torch import nn

from smpo_fast import cli, train
from smpo_fast.common.errors import ConfigError
from smpo_fast.config import loading
from smpo_fast.planning import profiles
from smpo_fast.planning.profiles import Profile
from smpo_fast.training.job import Job
from smpo_fast.tuning import bench, speed
from smpo_fast.tuning.bench import Rejected

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of profiles, and measurements that are the same on every machine: a UNet call takes 1 ms."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(bench, "seconds_of", milliseconds_of_calls)
    monkeypatch.setattr(bench, "seconds_once", milliseconds_of_calls)
    return tmp_path / "xdg"


def milliseconds_of_calls(measured: Callable[[], Any], device: torch.device) -> float:
    """0.001 for each call of a UNet, and as much for all the rest."""
    calls = 1

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += isinstance(module, UNet2DConditionModel)

    with nn.modules.module.register_module_forward_pre_hook(count):
        measured()
    return calls / 1000


def job(run_dir: Path, *words: str) -> Job:
    return Job(loading.load(overrides=[*SMALL, f"run.dir={run_dir}", *words]), None)


def a_gpu(monkeypatch: pytest.MonkeyPatch, name: str = "H100") -> None:
    monkeypatch.setattr(profiles, "_machine", lambda kind: {"device": name, "driver": "1", "versions": {}})


def stored(of: Job, settings: dict[str, Any]) -> Profile:
    key = profiles.key_of(speed._planned(of), CUDA)
    profile = Profile(key, settings, {"policy": 1.0, "optimizer": 0.1}, {"policy": 1e12})
    profiles.store(profile, "")
    return profile


# --- what is chosen -------------------------------------------------------------------------------------------


def test_a_stored_profile_completes_the_settings_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(monkeypatch)
    this = job(tmp_path)
    stored(this, {"model.channels_last": True, "batch.micro_pairs": 16, "model.cuda_graphs": True})
    choice = profiles.choose(this.config, speed._planned(this), CUDA)
    assert choice.values == {"model.channels_last": True, "model.cuda_graphs": True}  # micro_pairs is given
    assert "model.cuda_graphs = true" in choice.why
    assert "given, and left as they are: batch.micro_pairs" in choice.why


@pytest.mark.parametrize("word", ["optim.name=adafactor", "objective.name=dpo", "lora.rank=2", "data.resolution=40"])
def test_a_profile_is_for_one_network_and_what_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    a_gpu(monkeypatch)
    stored(job(tmp_path), {"model.channels_last": True})
    other = job(tmp_path, word)
    choice = profiles.choose(other.config, speed._planned(other), CUDA)
    assert not choice.found
    assert choice.values == {}


def test_a_profile_is_for_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch)
    this = job(tmp_path)
    stored(this, {"model.channels_last": True})
    a_gpu(monkeypatch, "A100")
    assert not profiles.choose(this.config, speed._planned(this), CUDA).found


@pytest.mark.parametrize("damage", ["not json", '{"key": 1}', "value", "foreign"])
def test_a_damaged_profile_is_ignored_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    a_gpu(monkeypatch)
    this = job(tmp_path)
    profile = stored(this, {"optim.lr" if damage == "foreign" else "model.channels_last": True})
    file = profiles.folder_of(profile.key) / profiles.MEASURED
    if damage == "value":
        file.write_text(file.read_text().replace("true", "false"))
    elif damage != "foreign":
        file.write_text(damage)
    choice = profiles.choose(this.config, speed._planned(this), CUDA)
    assert not choice.found
    assert str(file) in (shown := capsys.readouterr().err)
    assert "smpo tune writes a new one" in shown


def test_nothing_is_open_where_all_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the settings that a run records: given back, they are the same run."""
    a_gpu(monkeypatch)
    this = job(tmp_path)
    stored(this, {"model.channels_last": True})
    complete = tmp_path / "config.toml"
    complete.write_text(loading.dump(this.config))
    choice = profiles.choose(loading.load(complete), speed._planned(this), CUDA)
    assert choice == profiles.Choice({}, "auto: all settings of speed are given")


def test_plain_is_eager_code_unless_kernels_are_given(tmp_path: Path) -> None:
    assert speed.known(job(tmp_path, "run.speed=plain")).config.kernels.enabled == []
    listed = speed.known(job(tmp_path, "run.speed=plain", 'kernels.enabled=["geglu"]'))
    assert listed.config.kernels.enabled == ["geglu"]
    assert speed.known(job(tmp_path)).config.kernels.enabled == "auto"


def test_a_file_replaces_what_is_given(tmp_path: Path) -> None:
    file = tmp_path / "tuned.toml"
    file.write_text("[batch]\nmicro_pairs = 3\n[model]\nchannels_last = true\n")
    found = speed.known(job(tmp_path / "run", f"run.speed={file}"))
    assert (found.config.batch.micro_pairs, found.config.model.channels_last) == (3, True)
    assert found.speed == f"{file}: batch.micro_pairs = 3, model.channels_last = true"
    assert found.config.run.speed == "auto"  # what is recorded needs no file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlr = 1.0\n", "optim.lr is no setting of speed"),
        ("[batch]\nmicro_pair = 1\n", "did you mean 'batch.micro_pairs'"),
        ("[batch]\nmicro_pairs = 0\n", "batch.micro_pairs"),
        ("[model\n", "not valid TOML"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "tuned.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        speed.known(job(tmp_path / "run", f"run.speed={file}"))


# --- measuring at the start of a run --------------------------------------------------------------------------


def open_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float | None, *words: str) -> Job:
    """A job that has to choose, as on a GPU for which nothing is stored."""
    nothing = profiles.Choice({}, "auto: nothing was measured", found=False)
    monkeypatch.setattr(speed, "_stored", lambda job: nothing)
    monkeypatch.setattr(speed, "hours_left", lambda job, planned: hours)
    return job(tmp_path / "run", *words)


@pytest.mark.parametrize("hours", [None, 0.9])
def test_a_short_run_is_advised_to_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float | None) -> None:
    found = speed.measured(open_job(tmp_path, monkeypatch, hours))
    assert "smpo tune with the same settings measures and keeps it" in found.speed


def test_a_long_run_measures_what_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = speed.measured(open_job(tmp_path, monkeypatch, 2.0))
    shown = capsys.readouterr().out
    assert "90 s go into measuring" in shown
    assert "model.channels_last=true" in shown
    assert "micro_pairs=4" not in shown  # 2 are given
    assert (found.config.batch.micro_pairs, found.config.batch.inversion_pairs) == (2, 4)
    assert found.speed.startswith("auto: measured on")


@pytest.mark.slow
def test_what_was_measured_at_the_start_is_found_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same given settings; with others, something else was left open."""
    this = open_job(tmp_path, monkeypatch, 2.0)
    speed.measured(this)
    device = torch.device("cpu")
    assert profiles.find(profiles.key_of(speed._planned(this), device)) is None
    kept = profiles.find(profiles.key_of(speed._planned(this), device, this.config))
    assert kept is not None and kept.settings["batch.micro_pairs"] == 2
    a_gpu(monkeypatch)
    profiles.store(Profile(profiles.key_of(speed._planned(this), CUDA, this.config), kept.settings, {}, {}), "")
    assert profiles.choose(this.config, speed._planned(this), CUDA).found
    other = job(tmp_path / "run", "batch.micro_pairs=1")
    assert not profiles.choose(other.config, speed._planned(other), CUDA).found


def test_a_run_goes_on_if_measuring_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> Any:
        raise Rejected("out of memory")

    monkeypatch.setattr(bench.Bench, "call", fail)
    found = speed.measured(open_job(tmp_path, monkeypatch, 2.0))
    assert found.speed == "auto: measuring failed"
    assert "measuring failed (out of memory)" in capsys.readouterr().err


def test_what_does_not_suit_the_run_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    this = job(tmp_path)
    monkeypatch.setattr(speed, "_stored", lambda job: profiles.Choice({"model.cuda_graphs": True}, "auto: measured"))
    found = speed.measured(this)
    assert not found.config.model.cuda_graphs
    assert "does not suit this run" in found.speed
    assert "cuda_graphs needs a CUDA device" in capsys.readouterr().err


def test_hours_left_are_those_of_the_remaining_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "modelled_seconds", lambda *args: {"policy": 3000.0, "inversion": 600.0})
    this = job(tmp_path)
    assert speed.hours_left(this, speed._planned(this)) == pytest.approx(4.0)
    monkeypatch.setattr(speed, "modelled_seconds", lambda *args: None)
    assert speed.hours_left(this, speed._planned(this)) is None


# --- the programs ---------------------------------------------------------------------------------------------


def test_tune_writes_a_file_and_a_profile_that_run_and_plan_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inversion.steps=2", "batch.pairs_per_step=2", "batch.inversion_pairs=2"]
    folder, file = tmp_path / "run", tmp_path / "tuned.toml"
    tune = ["tune", "--minutes", "5", "--approximate", "pec", "--out", str(file), *SMALL, *words]
    facts, shown = json_answer(capsys, *tune, f"run.dir={folder}")
    assert f"{1e3 * facts['candidates'][0]['pair_seconds']:.4g} ms" in shown
    assert f"tuned: {facts['whole_steps']['tuned']:.4g} ms a pair" in shown
    assert f"x{facts['approximations']['pec']['gain']:.2f} faster" in shown
    assert "approximation pec: the inversion is x1.25 faster" in shown  # 3 calls and the rest, in place of 4
    assert "approximation reuse_deep: the inversion is x1.00" in shown
    assert "whole step of 2 pairs, tuned" in shown, shown
    tuned = tomllib.loads(file.read_text())
    exact = {f"{s}.{k}" for s, table in tuned.items() for k in table if s != "inversion"}
    assert exact == set(profiles.KEYS)
    assert tuned["inversion"]["solver"] == "pec"  # only because it was asked for, and takes fewer calls
    assert "fp8" not in tuned["inversion"]
    assert "ms a pair" in file.read_text()
    assert run(folder, *words, "run.steps=1", f"run.speed={file}") == 0
    assert f"\nspeed: {file}: " in capsys.readouterr().out
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["speed"].startswith(f"{file}: ")
    used = loading.load(folder / "config.toml")
    assert all(profiles.get(used, name) == value for name, value in profiles.from_file(file).items())
    assert cli.main(["plan", *SMALL, *words]) == 0
    assert "measured by smpo tune on" in capsys.readouterr().out


def test_a_dry_run_says_what_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, "--dry-run", f"run.dir={tmp_path}"]) == 0
    assert "speed      auto: nothing is chosen on a CPU" in capsys.readouterr().out
