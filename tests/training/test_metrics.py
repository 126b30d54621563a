"""What is logged: by hand, over ranks, across restarts."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ranks import run_ranks

from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.engine import collectives
from smpo_fast.training import metrics
from smpo_fast.training.metrics import COLUMNS, Meter, StepTable, summarize
from smpo_fast.training.run_log import RunLog, read_metrics


def table(**columns: list[float]) -> StepTable:
    n = len(next(iter(columns.values())))
    full = {name: np.array(columns.get(name, [0.0] * n), dtype=float) for name in COLUMNS}
    return StepTable(np.arange(n), np.array([0, 250, 999][:n]), full)


def test_summary_by_hand() -> None:
    values = summarize(
        table(
            loss=[1.0, 2.0, 3.0], logit=[0.5, -6.0, 0.0], weight=[1.0, 2.0, 0.0],
            policy_w=[0.1, 0.3, 0.2], policy_l=[0.2, 0.2, 0.2],
            reference_w=[0.2, 0.2, 0.2], reference_l=[0.2, 0.2, 0.1],
        ),
        beta=100.0,
        num_train_timesteps=1000,
    )  # fmt: skip
    assert values["train_loss"] == 2.0
    assert values["implicit_acc"] == pytest.approx(2 / 3)  # drifts: -0.1 < 0, 0.1 > 0, 0 < 0.1
    assert values["avg_win_diff_loss"] == pytest.approx(0.0)
    assert values["avg_lose_diff_loss"] == pytest.approx(0.1 / 3)
    assert values["rewards/margins"] == pytest.approx(-50 * (0.0 - 0.1 / 3))
    assert values["model_mse"] == pytest.approx(0.2) and values["ref_mse"] == pytest.approx(1.1 / 6)
    assert values["logit_max"] == 6.0 and values["weight_max"] == 2.0
    assert values["saturated"] == pytest.approx(1 / 3) and values["weight_zero"] == pytest.approx(1 / 3)
    assert (values["acc_t000-199"], values["acc_t200-399"], values["acc_t800-999"]) == (1.0, 0.0, 1.0)
    assert "acc_t400-599" not in values, "a bin without pairs has no accuracy"


def test_equal_networks_have_accuracy_zero_not_one() -> None:
    same = summarize(table(policy_w=[0.1], reference_w=[0.1]), 1.0, 1000)
    assert same["implicit_acc"] == 0.0


def test_meter_collects_micro_batches_and_starts_anew() -> None:
    meter = Meter(World())
    for ids, loss in (([4, 2], [0.5, float("nan")]), ([9], [1.5])):
        columns = {name: torch.zeros(len(ids)) for name in COLUMNS} | {"loss": torch.tensor(loss)}
        with meter.phase("policy"):
            meter.add(ids, [7] * len(ids), **columns)
    found, seconds = meter.flush()
    assert found.ids.tolist() == [4, 2, 9] and found.nonfinite_ids() == [2]
    assert found.columns["loss"][2] == 1.5 and set(seconds) == {"policy"} and seconds["policy"] > 0
    meter.add([1], [0], **{name: torch.zeros(1) for name in COLUMNS})
    again, seconds = meter.flush()
    assert again.ids.tolist() == [1] and again.times.tolist() == [0] and not seconds


def test_log_drops_what_a_restart_repeats_and_a_torn_line(tmp_path: Path) -> None:
    settings = loading.from_dict({"log": {"tensorboard": False}})
    log = RunLog(tmp_path, settings, 0, World())
    for step in (1, 2, 3):
        log.write(step, {"train_loss": step / 2, "nonfinite_pairs": [1]})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "train_')
    again = RunLog(tmp_path, settings, 2, World())
    again.write(3, {"train_loss": 9.0})
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["train_loss"]) for r in rows] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["nonfinite_pairs"] == [1]


def flush_on_ranks(rank: int, size: int) -> tuple[list[int], list[int], list[float]]:
    """Rank r has examples r, r + 2, r + 4, whose ids are 10 more; example 3 has no finite loss."""
    collectives.join(World(rank, size))
    meter = Meter(World(rank, size))
    for example in range(rank, 6, size):
        columns = {name: torch.zeros(1) for name in COLUMNS}
        columns |= {"loss": torch.tensor([math.nan if example == 3 else 1.0]), "logit": torch.tensor([example / 2])}
        meter.add([10 + example], [example], **columns)
    found, _ = meter.flush()
    return found.ids.tolist(), found.nonfinite_ids(), found.columns["logit"].tolist()


def test_the_rows_of_all_ranks_are_in_the_order_of_the_step() -> None:
    for ids, nonfinite, logits in run_ranks(flush_on_ranks, 2):
        assert ids == [10, 11, 12, 13, 14, 15] and nonfinite == [13]
        assert logits == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_a_damaged_line_hides_no_other_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, file = loading.from_dict({"log": {"tensorboard": False}}), tmp_path / "metrics.jsonl"
    damaged = ['{"step": 2, "train_', '["no row"]', '{"loss": 1.0}', "\udcff"]
    rows = [json.dumps({"step": step, "train_loss": step / 2}) for step in (1, 3, 4)]
    text = "\n".join([rows[0], *damaged, *rows[1:], '{"step": 5, "tr'])
    file.write_text(text, errors="surrogateescape")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    RunLog(tmp_path, settings, 3, World()).write(4, {"train_loss": 9.0})
    assert "4 of 7 lines are not rows of this log; they are kept" in capsys.readouterr().err
    assert [(row["step"], row["train_loss"]) for row in read_metrics(tmp_path)] == [(1, 0.5), (3, 1.5), (4, 9.0)]
    assert set(damaged) <= set(file.read_text(errors="surrogateescape").splitlines())


def test_tensorboard_has_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, loading.from_dict({}), 0, World())
    log.write(1, {"train_loss": 0.25, "nonfinite_pairs": []})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train_loss")] == [0.25]


def test_trackers_log_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **kwargs: calls.append(("init", kwargs["project"]))  # type: ignore[attr-defined]
    fake.log = lambda values, step: calls.append(("log", step, values))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append(("finish",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = RunLog(tmp_path, loading.from_dict({"log": {"tensorboard": False, "wandb": "mine"}}), 0, World())
    log.write(1, {"train_loss": 0.5, "nonfinite_pairs": [3]})
    log.close()
    assert calls == [("init", "mine"), ("log", 1, {"train_loss": 0.5}), ("finish",)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    RunLog(tmp_path, loading.from_dict({}), 0, World(1, 2)).write(1, {"train_loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_memory_is_of_this_process() -> None:
    assert 0.05 < metrics.memory_gb(torch.device("cpu")) < 100
