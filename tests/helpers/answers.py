"""What a command answers with ``--json``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smpo_fast import cli
from smpo_fast.config import arguments, commands


def json_answer(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[dict[str, Any], str]:
    """The object on standard output, and what is on standard error: the text.

    Standard output must be that object alone, and its keys those that the flag's description names.
    """
    capsys.readouterr()
    assert cli.main([*words, "--json"]) == status
    printed = capsys.readouterr()
    facts = json.loads(printed.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    declared = {a.name: a for a in arguments.declared(commands.COMMANDS[words[0]].arguments)}
    meaning = declared["json_output"].field.description or ""
    if words[0] != "import":  # whose keys are those of a file, or with --dry-run others
        assert all(key in meaning for key in facts), (sorted(facts), meaning)
    return facts, printed.err
