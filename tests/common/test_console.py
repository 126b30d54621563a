"""Text of others is printed so that every character of it can be seen."""

from __future__ import annotations

import pytest

from smpo_fast.common.console import printable
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
