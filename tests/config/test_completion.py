"""Shell completion: what is offered at the cursor, and in the shells themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smpo_fast import cli
from smpo_fast.config import commands, loading, recipes
from smpo_fast.config.completion import FILES, candidates


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pl", ["plan"]),
        ("--v", ["--version"]),
        ("nothing --", []),
        ("plan --gpu", ["--gpus", "--gpu", "--gpu-memory"]),
        ("import --container t", ["tar"]),
        ("import --container=t", ["--container=tar"]),
        ("train --ds_config ds_zero3_o", ["ds_zero3_offload", FILES]),
        ("train --config sdxl_r", ["sdxl_release", FILES]),
        ("train op", ["optim."]),
        ("train optim.sched", ["optim.schedule="]),
        ("train --dry-run data.flip=", ["data.flip=true", "data.flip=false"]),
        ("train optim.name=adaf", ["optim.name=adafactor"]),
        ("train data.pairs=", [FILES]),
        ("train optim.nothing=", []),
        ("train --lr_scheduler co", ["constant", "cosine"]),
        ("verify runs/mi", [FILES]),
        ("verify --deep runs/mi", [FILES]),
        ("score a b --set labels.drop", ["labels.drop_ties="]),
        ("score a b --scorer clip --set labels.drop_ties=t", ["labels.drop_ties=true"]),
        ("generate --set labels.", []),
        ("completion z", ["zsh"]),
        ("doctor x", []),
    ],
)
def test_what_may_stand_at_the_cursor(line: str, expected: list[str]) -> None:
    found = candidates(line.split(" "))
    assert [word for word in found if word != FILES or FILES in expected] == expected


def test_everything_is_offered() -> None:
    assert {"--help", *commands.COMMANDS} <= set(candidates([""]))
    assert {*recipes.names(".toml"), FILES} == set(candidates(["plan", "--config", ""]))
    sections = candidates(["train", ""])
    offered = [name for section in sections if section != FILES for name in candidates(["train", section])]
    assert {name.rstrip("=") for name in offered} - {FILES} == {name for name, _ in loading.keys()}


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with ``smpo`` on the path."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "smpo"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m smpo_fast.cli "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "my pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


BASH = """
source completion
ask() { COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); _smpo; printf '%s|' "${COMPREPLY[@]}"; echo; }
ask smpo pl
ask smpo plan optim.na
ask smpo plan optim.name = adaf
ask smpo plan data.flip =
ask smpo verify my
"""


def test_bash_completes(on_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As readline calls the function: it splits words at '='."""
    assert cli.main(["completion", "bash"]) == 0
    (on_path / "completion").write_text(capsys.readouterr().out)
    done = subprocess.run(["bash", "--norc", "-c", BASH], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["plan|", "optim.name=|", "adafactor|", "true|false|", "my pictures|"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(on_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 0
    (on_path / "completion").write_text(capsys.readouterr().out)
    lines = ("smpo pl", "smpo plan optim.name=adaf", "smpo verify my", "smpo train data.pairs=my")
    code = "; ".join(["source completion", *(f"complete -C '{line}'" for line in lines)])
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
    found = [answer.partition("\t")[0] for answer in done.stdout.splitlines()]
    assert found == ["plan", "optim.name=adafactor", "my pictures/", "data.pairs=my pictures/"]


ZSH = """
compdef() { }
source ./completion
compadd() { print -r -- ${(P)@[-1]}; }
compset() { }
_files() { print files; }
ask() { words=(smpo "$@") CURRENT=$(($# + 1)); _smpo; }
ask pl
ask plan optim.na
ask plan data.flip=
ask verify my
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_completes(on_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own builtins work at a prompt only: here they print what they are given."""
    assert cli.main(["completion", "zsh"]) == 0
    (on_path / "completion").write_text(capsys.readouterr().out)
    done = subprocess.run(["zsh", "-f", "-c", ZSH], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [
        "", "plan", "optim.name=", "", "", "data.flip=true data.flip=false", "", "", "files",
    ]  # fmt: skip
