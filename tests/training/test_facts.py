"""What must be the same for a run to continue: every fact counts, and those recorded later have defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import toy
from helpers.small_run import run

from smpo_fast.common.runtime import World
from smpo_fast.common.storage import canonical_json
from smpo_fast.config import loading
from smpo_fast.engine import checkpoint
from smpo_fast.engine.checkpoint import Progress, different_facts
from smpo_fast.training.facts import checkpoint_facts, fact_defaults, trajectory_facts
from smpo_fast.training.run import announce_state

IDENTITY = {
    "source": "pairs", "max_pairs": 0, "encoders": "e", "resolution": 32, "buckets": "off", "scores": "",
    "scorer": "pickscore",
}  # fmt: skip


def facts_of(given: dict[str, Any] | None = None, *, unrewarded: int = 1, **identity: Any) -> dict[str, Any]:
    cache: Any = SimpleNamespace(identity=IDENTITY | identity, counts={"unrewarded": unrewarded})
    return checkpoint_facts(loading.from_dict(given or {}), "fp32", "model", cache)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"data": {"conditioning": "original"}}, "conditioning"),
        ({"data": {"prompt_dropout": 0.5}}, "prompt_dropout"),
        ({"data": {"flip": False}}, "flip"),
        ({"run": {"seed": 1}}, "seed"),
        ({"batch": {"pairs_per_step": 2}}, "pairs_per_step"),
        ({"objective": {"beta": 1.0}}, "objective.beta"),
        ({"inversion": {"steps": 7}}, "inversion.steps"),
        ({"labels": {"gamma": 2.0}}, "labels.gamma"),
        ({"optim": {"lr": 1e-3}}, "optim.lr"),
        ({"lora": {"rank": 4}}, "lora.rank"),
    ],
)
def test_every_setting_that_changes_the_numbers_is_a_fact(given: dict[str, Any], key: str) -> None:
    assert key in [name for name, _, _ in different_facts(facts_of(), facts_of(given), {})]


@pytest.mark.parametrize("key", IDENTITY)
def test_every_property_of_the_pairs_is_a_fact(key: str) -> None:
    changed = facts_of(**{key: "other"})
    assert [name for name, _, _ in different_facts(facts_of(), changed, {})] == [f"pairs.{key}"]
    assert f"pairs.{key}" in [
        name for name, _, _ in different_facts(trajectory_facts(facts_of()), trajectory_facts(changed), {})
    ]


@pytest.mark.parametrize(
    ("labels", "shared"),
    [({"gamma": 2.0, "temperature": 3.0}, True), ({"source": "human"}, False), ({"drop_ties": False}, False)],
)
def test_trajectories_are_shared_by_runs_with_the_same_winners(labels: dict[str, Any], shared: bool) -> None:
    assert (trajectory_facts(facts_of()) == trajectory_facts(facts_of({"labels": labels}))) is shared


def test_a_scorer_that_scored_nothing_is_no_fact() -> None:
    assert facts_of(unrewarded=0) == facts_of(unrewarded=0, scorer="other")


def test_settings_that_change_no_number_are_no_facts() -> None:
    inversion = {"network": "reference"}
    given = {"run": {"steps": 7, "save_every": 3}, "inversion": inversion | {"store": "s"}, "batch": {"micro_pairs": 1}}
    assert facts_of(given) == facts_of({"inversion": inversion})


@pytest.mark.parametrize("section", ["objective", "inversion", "labels", "optim", "lora"])
def test_a_new_key_of_any_section_leaves_older_checkpoints_usable(section: str) -> None:
    facts = facts_of()
    for key in facts[section]:
        older = facts | {section: {name: value for name, value in facts[section].items() if name != key}}
        assert different_facts(older, facts, fact_defaults(facts)) == [], key


def test_scores_that_were_not_recorded_are_accepted() -> None:
    facts = facts_of(scores="table")
    older = facts | {"pairs": {k: v for k, v in facts["pairs"].items() if k not in ("scores", "scorer")}}
    assert different_facts(older, facts, fact_defaults(facts)) == []


@pytest.mark.parametrize(("recorded", "warned"), [({}, True), ({"scores": "table", "scorer": ""}, False)])
def test_a_resume_says_that_the_scores_were_not_recorded(
    recorded: dict[str, str], warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = facts_of(scores="table")
    pairs = {k: v for k, v in facts["pairs"].items() if k not in ("scores", "scorer")} | recorded
    settings = toy.settings()
    engine = toy.make(settings)
    checkpoint.save(tmp_path, engine, Progress(step=1), World(), facts | {"pairs": pairs}, keep=1)
    announce_state(SimpleNamespace(config=settings, run_dir=tmp_path, facts=facts), Progress(step=1))  # type: ignore[arg-type]
    said = "".join(capsys.readouterr())
    assert "continues from its checkpoint of step 1" in said
    assert ("did not record which scores it was trained with; the run goes on with table" in said) is warned


def test_the_last_step_is_a_fact_where_the_learning_rate_falls_until_then() -> None:
    """The steps that were made had other rates than those of the longer run."""
    for schedule, changed in (("constant", []), ("linear", ["run.steps"]), ("cosine", ["run.steps"])):
        before, after = (facts_of({"optim": {"schedule": schedule}, "run": {"steps": n}}) for n in (4, 8))
        assert [name for name, _, _ in different_facts(before, after, fact_defaults(after))] == changed
        assert trajectory_facts(before) == trajectory_facts(after)
        unrecorded = {name: value for name, value in before.items() if name != "run"}
        assert different_facts(unrecorded, after, fact_defaults(after)) == [], "of an earlier version"


def test_a_resumed_run_may_begin_an_average_and_not_change_or_drop_one() -> None:
    off, on, longer = (facts_of({"optim": {"ema": decay}}) for decay in (0.0, 0.9, 0.99))
    assert different_facts(off, on, fact_defaults(on)) == []
    assert different_facts(on, longer, fact_defaults(longer)) == [("optim.ema", 0.9, 0.99)]
    dropped = different_facts(on, off, fact_defaults(off))
    assert [name for name, _, _ in dropped] == ["optim.ema", "optim.ema_dtype", "optim.ema_warmup"]
    assert off == facts_of({"optim": {"ema_dtype": "bf16-sr"}}), "of no average"


@pytest.mark.parametrize("steps", [1, 2], ids=["finished", "unfinished"])
@pytest.mark.parametrize("before", [0.0, 0.9])
def test_a_resume_says_that_an_average_begins(
    before: float, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, settings = facts_of({"optim": {"ema": 0.9}}), loading.from_dict({"run": {"steps": steps}})
    engine = toy.make(toy.settings())
    checkpoint.save(tmp_path, engine, Progress(step=1), World(), facts_of({"optim": {"ema": before}}), keep=1)
    announce_state(SimpleNamespace(config=settings, run_dir=tmp_path, facts=facts), Progress(step=1))  # type: ignore[arg-type]
    assert ("it begins with those of step 1" in capsys.readouterr().out) is (before == 0.0)


def test_a_checkpoint_without_the_facts_of_today_continues(cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, "run.steps=1") == 0
    file = tmp_path / "run" / "checkpoints" / "step-000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"], manifest["facts"]["pairs"]["scores"], manifest["facts"]["pairs"]["scorer"]
    del manifest["facts"]["optim"]["accumulate"], manifest["facts"]["lora"]["use_dora"]
    file.write_text(canonical_json(manifest))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert run(tmp_path / "run", cache, "run.steps=2") == 0
    assert run(tmp_path / "other", cache, "run.steps=2", "data.conditioning=original") == 2
