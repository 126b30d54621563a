"""The comparison of kernels with eager code at the start of a run, what it chooses, and what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smpo_fast import train
from smpo_fast.common.errors import EnvironmentProblem
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.models import kernel_checks, step_ops
from smpo_fast.models.kernel_checks import NAMES, KernelCheck, check_kernel
from smpo_fast.training.run_log import read_metrics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SMALL = (4, 8, 8)
DEFAULTS = ("pair_loss", "renoise_step")


@pytest.fixture(autouse=True)
def _kernels_run_here() -> None:
    pytest.importorskip("triton")
    assert pytest.importorskip("smpo_fast.kernels._launch").INTERPRET or DEVICE.type == "cuda", "set TRITON_INTERPRET=1"


def settings(enabled: Any = None, **sections: dict[str, Any]) -> Config:
    return loading.from_dict({**sections, **({} if enabled is None else {"kernels": {"enabled": enabled}})})


def wrong(op: Callable[..., Any], by: float) -> Callable[..., Any]:
    """An operator whose first result, or the first tensor that it writes to, is off by a factor."""

    def call(*args: Any) -> Any:
        out = op(*args)
        changed = out if isinstance(out, Tensor) else args[0] if out is None else out[0]
        changed.mul_(1 + by)
        return out

    return call


# the launchers of every kernel: forward, and backward where there is one
LAUNCHERS = [
    ("pair_loss", "pair_loss", "_fwd_op"), ("pair_loss", "pair_loss", "_bwd_op"),
    ("pair_loss", "pair_loss", "_errors_op"), ("renoise_step", "renoise_step", "_predict_op"),
    ("renoise_step", "renoise_step", "_correct_op"), ("group_norm_silu", "group_norm_silu", "_fwd_op"),
    ("group_norm_silu", "group_norm_silu", "_bwd_op"), ("layer_norm", "layer_norm", "_bwd_op"),
    ("geglu", "geglu", "_fwd_op"), ("geglu", "geglu", "_bwd_op"), ("geglu_linear", "geglu_linear", "_op"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_agrees(name: Any, dtype: torch.dtype) -> None:
    found = check_kernel(name, DEVICE, dtype, SMALL)
    assert found.ok and found.reason == "" and 0 <= found.error <= found.tolerance < 0.03, found


@pytest.mark.parametrize(("name", "file", "launcher"), LAUNCHERS)
def test_every_wrong_kernel_is_caught(name: Any, file: str, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(f"smpo_fast.kernels.{file}", fromlist=["*"])
    monkeypatch.setattr(module, launcher, wrong(getattr(module, launcher), 1e-4))
    found = check_kernel(name, DEVICE, torch.float32, SMALL)
    assert not found.ok and found.error > found.tolerance and "off by" in found.reason


def test_a_kernel_that_returns_nan_or_fails_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from smpo_fast.kernels import geglu

    monkeypatch.setattr(geglu, "_fwd_op", wrong(geglu._fwd_op, float("nan")))
    assert not check_kernel("geglu", DEVICE, torch.float32).ok

    def broken(*_: Any) -> Any:
        raise RuntimeError("PTX was compiled for another driver\nand a long trace")

    monkeypatch.setattr(geglu, "_fwd_op", broken)
    found = check_kernel("geglu", DEVICE, torch.float32)
    assert not found.ok and found.reason == "RuntimeError: PTX was compiled for another driver"


def test_the_check_draws_no_random_numbers_of_the_run() -> None:
    state = torch.random.get_rng_state()
    check_kernel("renoise_step", DEVICE, torch.float32, SMALL)
    assert torch.equal(state, torch.random.get_rng_state())


# --- what a run chooses ------------------------------------------------------------------------------------------


def test_auto_is_the_default_and_chooses_what_the_run_has_a_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.load().kernels.enabled == "auto"
    assert step_ops.wanted(settings(), CUDA) == DEFAULTS
    assert step_ops.wanted(settings(), CPU) == ()
    assert step_ops.wanted(settings(objective={"name": "sft"}), CUDA) == ()
    assert step_ops.wanted(settings(objective={"name": "dpo"}), CUDA) == ("pair_loss",)
    assert step_ops.wanted(settings([]), CUDA) == ()
    assert step_ops.wanted(settings(["geglu"]), CPU) == ("geglu",)
    monkeypatch.setattr(step_ops.importlib.util, "find_spec", lambda name: None)
    assert step_ops.wanted(settings(), CUDA) == ()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine's kernels, interpreted or not, count as compiled ones."""
    monkeypatch.setattr(step_ops, "has_kernels", lambda device: True)
    yield


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    from smpo_fast.kernels import renoise_step

    monkeypatch.setattr(renoise_step, "_correct_op", wrong(renoise_step._correct_op, 1e-3))


def test_a_failed_check_leaves_the_kernel_out_and_says_so(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch)
    found = step_ops.resolve(settings(), DEVICE, torch.float32, SMALL)
    assert found.enabled == ("pair_loss",) and [c.ok for c in found.checks] == [True, False]
    said = capsys.readouterr().err
    assert "renoise_step does not agree with eager code (corrector, result 0: off by" in said
    assert "eager code is used instead" in said
    with pytest.raises(EnvironmentProblem, match="renoise_step does not agree.*remove it from the list, or use 'auto'"):
        step_ops.resolve(settings(["renoise_step"]), DEVICE, torch.float32, SMALL)


def test_all_ranks_leave_out_what_fails_on_one(here: None, capsys: pytest.CaptureFixture[str]) -> None:
    other = KernelCheck("pair_loss", False, float("nan"), 0.0, "RuntimeError: no image")
    found = step_ops.resolve(settings(), DEVICE, torch.float32, SMALL, lambda mine: [mine, (other,)])
    assert found.enabled == ("renoise_step",) and "pair_loss does not agree" in capsys.readouterr().err
    facts = step_ops.Selection((), (other,)).facts()
    assert json.loads(json.dumps(facts, allow_nan=False))["checks"][0]["error"] is None


def test_where_eager_code_serves_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert step_ops.resolve(settings(["geglu"]), CPU, torch.float32) == (("geglu",), ())


def kernels_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "environment.json").read_text())["kernels"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreted kernels stand in for compiled ones")
def test_a_run_uses_the_kernels_that_agree_and_records_them(
    tiny_run: list[str], here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without settings for kernels; the second run, with a wrong kernel, resumes the first one's checkpoint."""
    from smpo_fast.kernels import renoise_step

    launched: list[Any] = []
    launch = renoise_step.launch
    monkeypatch.setattr(renoise_step, "launch", lambda *a, **k: (launched.append(a[0]), launch(*a, **k)))
    words = [*tiny_run, f"run.dir={tmp_path}"]
    assert train.main(words) == 0
    found = kernels_of(tmp_path)
    assert found["enabled"] == list(DEFAULTS) and [c["ok"] for c in found["checks"]] == [True, True]
    checked_only = 2
    assert len(launched) > checked_only
    assert read_metrics(tmp_path)[0]["logit_max"] == 0.0

    spoil(monkeypatch)
    launched.clear()
    assert train.main([*words, "run.steps=2"]) == 0
    found = kernels_of(tmp_path)
    assert found["enabled"] == ["pair_loss"] and "off by" in found["checks"][1]["reason"]
    assert len(launched) == checked_only
    assert "renoise_step does not agree" in capsys.readouterr().err
    assert len(read_metrics(tmp_path)) == 2


def test_the_names_are_those_of_the_settings() -> None:
    assert set(kernel_checks._TRIALS) == set(NAMES)
    assert settings(list(NAMES)).kernels.listed == list(NAMES)
