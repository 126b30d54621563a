"""Text of others is printed so that every character of it can be seen."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from smpo_fast import cli
from smpo_fast.common.console import BAD, GOOD, coloured, highlighted, printable
from smpo_fast.common.runtime import print0, warn0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a photo of a cat, naïve 海", "a photo of a cat, naïve 海"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("one\nerror: two\r\x08", r"one\nerror: two\r\x08"),
        ("\x9b31m", r"\x9b31m"),  # an escape sequence in one C1 character
        ("name\u202egpj.exe\u2028", r"name\u202egpj.exe\u2028"),
        ("lone \udc80", r"lone \udc80"),  # of a file name that is not UTF-8
        ("\u00a0narrow\u202f \U0001f469\u200d\U0001f680", "\u00a0narrow\u202f \U0001f469\u200d\U0001f680"),
    ],
)
def test_control_characters_are_escaped_and_text_is_not(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_the_programs_print_keeps_its_lines_only(capsys: pytest.CaptureFixture[str]) -> None:
    print0("two\nlines\x1b[31m", 3)
    warn0("\x07")
    captured = capsys.readouterr()
    assert captured.out == "two\nlines\\x1b[31m 3\n"
    assert captured.err == "warning: \\x07\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "on_terminal", "piped"),
    [
        ({}, True, False),
        ({"NO_COLOR": ""}, True, False),  # as no-color.org has it
        ({"NO_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"CLICOLOR_FORCE": "1"}, True, True),
        ({"CLICOLOR_FORCE": "0"}, True, False),
        ({"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_where_there_are_colours(
    variables: dict[str, str], on_terminal: bool, piped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    text = "\x1b[1;31mBAD\x1b[0m"
    assert coloured("BAD", BAD, Terminal()) == (text if on_terminal else "BAD")
    assert coloured("BAD", BAD, io.StringIO()) == (text if piped else "BAD")


def test_words_are_highlighted(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {"good": GOOD, "bad": BAD}
    monkeypatch.delenv("CLICOLOR_FORCE", raising=False)
    assert highlighted("good or bad", marks) == "good or bad"  # standard output is captured here, so no terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    assert highlighted("good or bad", marks) == "\x1b[32mgood\x1b[0m or \x1b[1;31mbad\x1b[0m"


def test_reports_have_the_same_text_with_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = []
    for force in ("0", "1"):
        monkeypatch.setenv("CLICOLOR_FORCE", force)
        assert cli.main(["plan", "--gpu", "RTX 4090"]) == 0
        printed.append(capsys.readouterr().out)
    assert "\x1b" not in printed[0] and "\x1b[32mit fits\x1b[0m" in printed[1]
    assert re.sub(r"\x1b\[[\d;]+m", "", printed[1]) == printed[0]


def test_a_real_terminal_shows_errors_in_colour() -> None:
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CLICOLOR_FORCE")} | {"TERM": "xterm"}
    words = [sys.executable, "-m", "smpo_fast.cli", "plan", "run.stepz=1"]
    subprocess.run(words, stderr=theirs, env=environment, check=False)
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"\x1b[1;31merror:\x1b[0m command line: unknown key 'run.stepz'")
    os.close(ours)
