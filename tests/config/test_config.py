"""Settings: files, overrides, presets, and errors that name the key."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from smpo_fast.common.errors import UserError
from smpo_fast.config import arguments, describe, loading, schema, sibling_flags
from smpo_fast.config.loading import dump, from_dict, load
from smpo_fast.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"


def parse(*words: str) -> Config:
    parser = argparse.ArgumentParser()
    arguments.add_settings(parser)
    return arguments.settings_of(parser.parse_args(words))


def test_without_a_file_the_embedded_run_is_meant() -> None:
    assert load().model.path == "embedded" and load().data.pairs == "embedded"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda f: f.stem)
def test_shipped_files_load_and_survive_dump_and_load(file: Path, tmp_path: Path) -> None:
    loaded = load(file)
    (tmp_path / "again.toml").write_text(dump(loaded))
    assert load(tmp_path / "again.toml") == loaded


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda f: f.stem)
def test_shipped_files_say_how_to_run_them(file: Path) -> None:
    head = file.read_text().partition("\n[")[0]
    assert all(word in head for word in ("# command", "# hardware", "# expect", "# cost")) and file.name in head


def test_recipes_of_the_release() -> None:
    sdxl, sd15 = load(CONFIGS / "sdxl_release.toml"), load(CONFIGS / "sd15_release.toml")
    assert (sdxl.objective.beta, sdxl.inversion.steps, sdxl.optim.name) == (5000.0, 10, "adafactor")
    assert (sd15.objective.beta, sd15.inversion.steps, sd15.optim.name) == (2000.0, 5, "adamw")
    for recipe in (sdxl, sd15):
        assert recipe.batch.pairs_per_step == 1024 and recipe.optim.lr == 1.024e-5 and recipe.labels.gamma == 10.0
        assert recipe.inversion.landing == "mismatch" and recipe.inversion.renoise_time == "source"


def test_overrides_win_and_are_typed() -> None:
    c = load(
        None, ["optim.lr=1e-8", "run.steps=3", "data.flip=true", "run.dir=runs/2026", "labels.low=0", "data.pairs=12"]
    )
    assert (c.optim.lr, c.run.steps, c.data.flip, c.run.dir) == (1e-8, 3, True, "runs/2026")
    assert c.labels.low == 0.0 and c.data.pairs == "12"


def test_presets_fill_only_what_is_not_given() -> None:
    release = from_dict({"inversion": {"fidelity": "release"}}).inversion
    assert (release.grid, release.landing, release.first_step, release.average) == (
        "release",
        "mismatch",
        "keep",
        "mean",
    )
    mixed = from_dict({"inversion": {"fidelity": "release", "landing": "exact"}}).inversion
    assert mixed.landing == "exact" and mixed.grid == "release"
    assert from_dict({"objective": {"name": "dpo"}}).inversion.source == "noise"
    assert from_dict({"objective": {"name": "inpo"}}).inversion.noise == 0.1
    assert (
        from_dict({"objective": {"name": "dpo"}, "inversion": {"source": "inversion"}}).inversion.source == "inversion"
    )


def test_flags_of_sibling_scripts() -> None:
    c = parse(
        "--learning_rate", "1e-7", "--beta_dpo", "5000", "--max_train_steps", "7", "--use_8bit_adam", "--no_hflip"
    )
    assert (c.optim.lr, c.objective.beta, c.run.steps, c.optim.name, c.data.flip) == (
        1e-7,
        5000.0,
        7,
        "adamw8bit",
        False,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.learning_rate=1"], r"command line: unknown key 'optim.learning_rate'.*optim\.lr"),
        (["optimizer.lr=1"], "unknown key 'optimizer.lr': did you mean 'optim.lr'"),
        (["run.steps=many"], r"command line: run\.steps: .*integer.*'many'"),
        (["objective.name=ipo"], "objective.name: .*'smpo'.*'ipo'"),
        (["data.prompt_dropout=2"], "data.prompt_dropout: .*less than or equal to 1"),
        (["optim.lr=1"], "optim.lr: .*less than 1"),
        (["optim.lr=inf"], "optim.lr: .*finite"),
        (["optim.weight_decay=inf"], "optim.weight_decay: .*finite"),
        (["objective.beta=nan"], "objective.beta: .*finite"),
        (["inversion.landing=mismatch"], "inversion: landing = 'mismatch' needs grid = 'release'"),
        (["inversion.fidelity=release", "inversion.steps=7"], "steps = 7: the released grid needs a divisor of 1000"),
        (["steps"], "'steps' is not of the form section.key=value"),
        (["--scale_lr"], "--scale_lr is not a setting here: optim.lr"),
        (["--gradient_accumulation_steps", "128"], "--gradient_accumulation_steps is not a setting here"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nstep = 3\n", r"bad\.toml: unknown key 'run\.step': did you mean 'run\.steps'"),
        ("[run\n", r"bad\.toml: not valid TOML"),
        ("steps = 3\n", r"bad\.toml: 'steps' is outside any section"),
        ("[run]\nsteps = true\n", r"bad\.toml: run\.steps"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "bad.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml: cannot be read"):
        load(tmp_path / "none.toml")


def test_every_setting_says_what_it_means() -> None:
    assert all(field.description for _, field in loading.keys())


def test_every_setting_is_read_somewhere() -> None:
    """An option that does nothing is a defect: each key's name must occur in a package other than config."""
    config = Path(schema.__file__).parent
    rooms = [f.read_text() for f in config.parent.rglob("*.py") if config not in f.parents]
    text = "\n".join(rooms)
    unread = [name for name, _ in loading.keys() if f".{name.partition('.')[2]}" not in text]
    assert unread == []


def test_aliases_point_to_keys() -> None:
    names = {name for name, _ in loading.keys()}
    assert set(sibling_flags.ALIASES.values()) <= names
    assert {word.partition("=")[0] for word in sibling_flags.SWITCHES.values()} <= names


@pytest.mark.parametrize(("name", "page"), [("settings", describe.settings_page), ("cli", describe.cli_page)])
def test_the_generated_pages_are_current(name: str, page: Callable[[], str]) -> None:
    file = Path(__file__).parents[2] / "docs" / f"{name}.md"
    assert page() == file.read_text(), "run: python -m smpo_fast.config.describe docs"


@pytest.mark.parametrize("text", ["café 😀", "a\x7fb", 'say "no"\n\\', "\u2028\x00"])
def test_any_text_is_written_and_read_again(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(loading.dump(loading.from_dict({"run": {"dir": text}})), encoding="utf-8")
    assert loading.load(file).run.dir == text


def test_toml_numbers_are_numbers() -> None:
    """The reason for TOML: a learning rate written 1e-8 is a number."""
    assert tomllib.loads("lr = 1e-8")["lr"] == 1e-8
