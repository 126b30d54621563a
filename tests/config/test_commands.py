"""Arguments of the programs: declared once, typed, bounded, and mistakes named by their flag."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import get_args

import pytest

from smpo_fast import __version__, cli, train
from smpo_fast.config import arguments, commands
from smpo_fast.config.commands import GenerateOptions, ImportOptions
from smpo_fast.data.ingest import columns, containers, generate, ranking


def parse(command: str, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_command(parser, commands.COMMANDS[command])
    return parser.parse_args(words)


def test_words_become_typed_arguments() -> None:
    words = ["in.parquet", "out", "--columns", "prompt=text,chosen=good", "--check", "--pairs", "ends"]
    found = arguments.arguments_of(commands.ImportArguments, parse("import", *words))
    assert found.columns == {"prompt": "text", "chosen": "good"} and found.check and not found.dry_run
    assert (found.source, str(found.out), found.pairs) == ("in.parquet", "out", "ends")
    words = ["embedded", "out", "--guidance", "1.5", "--width", "64", "--format", "webp"]
    sampled = arguments.arguments_of(commands.GenerateArguments, parse("generate", *words))
    assert (sampled.guidance, sampled.width, sampled.encoding, sampled.pairing) == (1.5, 64, "webp", "all")
    assert sampled.model_copy(update={"scorer": "embedded"}).pairing == "ends"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["score", "in", "out", "--scorer", "clip", "--batch", "0"],
            "--batch: .*greater than or equal to 1.*found '0'",
        ),
        (["score", "in", "out", "--scorer", "clip", "--max-pairs", "few"], "--max-pairs: .*integer.*found 'few'"),
        (["score", "in", "out", "--scorer", "clip", "--device", "tpu"], "--device: .*'auto', 'cpu' or 'cuda'"),
        (["generate", "embedded", "out", "--per-prompt", "1"], "--per-prompt: .*a pair needs two"),
        (["generate", "embedded", "out", "--pairs", "ends"], "--pairs ends needs --scorer"),
        (["generate", "embedded", "out", "--pairs", "some"], "--pairs: .*'all', 'ends' or 'once'.*found 'some'"),
        (["generate", "embedded", "out", "--format", "jpeg"], "--format: .*'png' or 'webp'"),
        (["generate", "embedded", "out", "--batch", "0"], "--batch: "),
        (["generate", "embedded", "out", "--guidance", "nan"], "--guidance: .*finite"),
        (["import", "in", "out", "--pairs", "some"], "--pairs: .*'all', 'ends' or 'once'.*found 'some'"),
        (["import", "in", "out", "--format", "pair"], "--format: .*'pairs', 'chosen', 'ranking' or 'single'"),
        (["import", "in", "out", "--columns", "prompt"], "--columns: give meaning=column"),
        (["plan", "--gpus", "0"], "--gpus: .*greater than or equal to 1"),
        (["plan", "--gpu-memory", "-1"], "--gpu-memory: .*greater than or equal to 0"),
    ],
)
def test_mistakes_name_the_flag(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert re.search(f"^error: command line: {message}", printed) and printed.count("\n") == 1


def test_the_names_of_the_options_are_those_that_the_packages_know() -> None:
    def words(section: type, name: str) -> set[str]:
        return set(get_args(section.model_fields[name].annotation)) - {""}  # type: ignore[attr-defined]

    assert words(ImportOptions, "format") == set(columns.FORMATS)
    assert words(ImportOptions, "container") == set(containers.CONTAINERS)
    assert words(ImportOptions, "pairs") == words(GenerateOptions, "pairs") == set(ranking.PAIRINGS)
    assert words(GenerateOptions, "encoding") == set(generate.ENCODINGS)


def test_every_command_does_something_and_its_group_is_in_one_place() -> None:
    assert set(cli.ACTIONS) == set(commands.COMMANDS)
    assert [name for members in commands.by_group().values() for name in members] == list(commands.COMMANDS)


@pytest.mark.parametrize("words", [[], ["--help"], ["--local_rank=0"]])
def test_help_lists_the_commands_in_the_order_of_use(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert cli.main(words) == 0
    except SystemExit as ended:
        assert ended.code == 0
    lines = capsys.readouterr().out.splitlines()
    places = [lines.index(f"{group.lower()}:") for group in commands.by_group()]
    assert places == sorted(places)
    for name, command in commands.COMMANDS.items():
        (line,) = (line for line in lines if line.endswith(command.summary))
        assert line.split()[0] == name and len(line) <= 110


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["plam"], "there is no command 'plam': did you mean 'plan'?"),
        (["xyzzy"], "there is no command 'xyzzy': smpo --help lists"),
        (["plan", "--gpuss", "3"], "unrecognized arguments: --gpuss: did you mean '--gpus'?"),
        (["import", "in", "out", "--colums=a=b"], "did you mean '--columns'?"),
    ],
)
def test_the_nearest_name_is_suggested(words: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and advice in capsys.readouterr().err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_example_of_a_command_is_in_its_help_and_can_be_typed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = commands.COMMANDS[name]
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert f"example:\n  {command.example}\n" in capsys.readouterr().out
    program, called, *words = shlex.split(command.example.partition(" > ")[0])
    args = arguments.parse(arguments.command_parser("smpo", command), words)
    assert (program, called) == ("smpo", name)
    arguments.arguments_of(command.arguments, args)
    if command.settings:
        (arguments.settings_of if command.settings == "run" else arguments.set_settings)(args)


HEAVY = """
import contextlib, os, sys
from smpo_fast import cli, train
calls = [(cli.main, words) for words in WORDS] + [(train.main, ["--help"]), (train.main, ["run.stepz=1"])]
for program, words in calls:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:
            program(words)
        except SystemExit:
            pass
    heavy = {"torch", "numpy", "diffusers", "transformers", "deepspeed", "pyarrow", "PIL"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def test_nothing_heavy_is_imported_before_arguments_and_settings_are_good() -> None:
    given = {"score": ["in", "out"], "generate": ["in", "out"], "import": ["in", "out"], "verify": ["x"]}
    calls: list[list[str]] = [[], ["--version"], ["settings"], ["plam"], ["completion", "bash"]]
    for name, command in commands.COMMANDS.items():
        calls += [[name, "--help"], [name, "--nothing"]]
        if command.settings == "run":
            calls.append([name, *given.get(name, []), "run.stepz=1"])
    calls += [["score", "in", "out", "--scorer", "clip", "--batch", "x"], ["import", "in", "out", "--format", "x"]]
    calls.append(["generate", "in", "out", "--set", "model.pth=x"])
    subprocess.run([sys.executable, "-c", HEAVY.replace("WORDS", repr(calls))], check=True)


@pytest.mark.parametrize("program", [cli.main, train.main])
def test_version_names_the_libraries(program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program(["--version"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed.startswith(f"smpo_fast {__version__}, Python ")
    assert f"torch {importlib.metadata.version('torch')}" in printed


@pytest.mark.parametrize("command", [*commands.COMMANDS.values(), commands.TRAIN], ids=lambda c: c.arguments.__name__)
def test_every_argument_says_what_it_means(command: commands.Command) -> None:
    assert all(argument.field.description for argument in arguments.declared(command.arguments))


def test_help_shows_flags_with_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--ds_config FILE", "--print-config", "--dry-run", "--config FILE"))


@pytest.mark.parametrize(
    "words",
    [
        ["run.seed=1", "--dry-run", "optim.lr=2", "--config", "f.toml", "data.flip=true"],
        ["--dry-run", "run.seed=1", "optim.lr=2", "data.flip=true", "--config", "f.toml"],
        ["--config", "f.toml", "--dry-run", "run.seed=1", "optim.lr=2", "data.flip=true"],
    ],
)
def test_settings_may_be_anywhere_among_the_flags(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    arguments.add_command(parser, commands.TRAIN)
    found = arguments.parse(parser, words)
    assert found.overrides == ["run.seed=1", "optim.lr=2", "data.flip=true"]
    assert found.dry_run and str(found.config) == "f.toml"


def test_settings_after_the_folder_and_the_flags_of_verify() -> None:
    parser = argparse.ArgumentParser()
    arguments.add_command(parser, commands.COMMANDS["verify"])
    found = arguments.parse(parser, ["folder", "--config", "f.toml", "data.flip=true"])
    assert found.overrides == ["data.flip=true"] and str(found.config) == "f.toml"


@pytest.mark.parametrize(
    "words", [["plan", "--gpu", "H100", "--gpuz", "3"], ["doctor", "a=b"], ["score", "in", "out", "more"]]
)
def test_unknown_flags_and_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "\x1b[31m"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and ("unrecognized arguments" in printed or "required" in printed)
