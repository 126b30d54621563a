"""``--json``: standard output is one object, with the numbers of the text, which is on standard error."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers.answers import json_answer

from smpo_fast import cli
from smpo_fast.common.errors import DataError
from smpo_fast.common.json_report import json_report
from smpo_fast.config import loading

TRAIN = ["train", "--dry-run", "data.max_pairs=24", "run.steps=4", "batch.pairs_per_step=6", "batch.micro_pairs=2"]


@dataclass
class Numbers:
    finite: float
    other: float
    more: np.ndarray


def test_values_of_any_kind_become_json(capsys: pytest.CaptureFixture[str]) -> None:
    with json_report(True) as facts:
        print("working")
        facts |= {
            "path": Path("a") / "b",
            "numbers": Numbers(0.5, float("nan"), np.array([1, 2])),
            "one": np.float32(2),
        }
        facts["tuple"] = (1, float("inf"), None)
    printed = capsys.readouterr()
    numbers = {"finite": 0.5, "other": None, "more": [1, 2]}
    assert json.loads(printed.out) == {"path": "a/b", "numbers": numbers, "one": 2.0, "tuple": [1, None, None]}
    assert printed.err == "working\n"


def test_without_the_flag_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with json_report(False) as facts:
        facts["a"] = 1
        print("text")
    assert capsys.readouterr() == ("text\n", "")


def test_a_failure_and_other_ranks_print_no_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = sys.stdout
    with pytest.raises(DataError), json_report(True):
        raise DataError("nothing")
    assert sys.stdout is out
    monkeypatch.setenv("RANK", "1")
    with json_report(True) as facts:
        facts["a"] = 1
    assert capsys.readouterr().out == ""


def test_settings(capsys: pytest.CaptureFixture[str]) -> None:
    facts, text = json_answer(capsys, "settings")
    assert set(facts["settings"]) == {name for name, _ in loading.keys()}
    assert facts["settings"]["optim.beta1"]["default"] == 0.9 and "| `beta1` | `0.9` |" in text


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    facts, text = json_answer(capsys, "plan", "--gpu", "RTX 4090")
    assert f"{facts['needed'] / 1e9:.2f} GB: it fits" in text and facts["fits"]
    assert f"{facts['parameters']['trained'] / 1e6:,.1f} million" in text


def test_import_score_verify_and_dry_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(loading.DEFAULT_FILE.parent / "assets" / "pairs.parquet")
    facts, text = json_answer(capsys, "import", source, "pairs", "--dry-run")
    assert f"in the first {facts['read']}: {facts['pairs']} pairs" in text and facts["pairs"] > 100
    assert f"format {facts['format']}, pairs: {facts['pairing']}" in text and not Path("pairs").exists()
    facts, text = json_answer(capsys, "import", source, "pairs")
    assert f"{facts['pairs']} pairs in {len(facts['parts'])} part(s)" in text and facts["out"] == "pairs"
    facts, text = json_answer(capsys, "score", "pairs", "scores", "--scorer", "embedded", "--max-pairs", "24")
    assert f"{facts['counts']['pictures']} images of {facts['counts']['pairs']} pairs scored" in text
    assert f"mean {facts['scorers'][0]['mean']:.4g}" in text and "24 of 24 pairs" in text
    assert facts["labels"]["used"] == 24 and f"median {facts['labels']['weight_quantiles'][1]:.3g}" in text
    facts, text = json_answer(capsys, "verify", "scores")
    assert f"{facts['checked']} things checked, none" in text and facts["bad"] == 0
    assert [finding["grade"] for finding in facts["findings"]] == ["ok"] * facts["checked"]
    Path("scores/scores.parquet").unlink()
    facts, text = json_answer(capsys, "verify", "scores", status=1)
    assert facts["bad"] == sum(finding["grade"] == "BAD" for finding in facts["findings"]) > 0
    facts, text = json_answer(capsys, *TRAIN, "data.pairs=pairs", "data.max_pairs=24", "run.dir=run")
    assert f"pairs      {facts['pairs']['count']} rows of" in text and facts["pairs"]["counted_in"] == "table"
    assert f"draw {facts['draws']['pairs']} pairs: {facts['draws']['epochs']:.2f} epochs" in text
    assert f"at step {facts['state']['step']} of {facts['state']['steps']}" in text
    assert f"objective  {facts['objective']}" in text


def test_a_run_that_is_no_dry_run_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--json"]) == 2
    assert "--json goes with --dry-run" in capsys.readouterr().err
