"""The reference pages docs/settings.md and docs/cli.md: ``python -m smpo_fast.config.describe docs`` writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from smpo_fast.config import arguments
from smpo_fast.config.commands import Command, by_group
from smpo_fast.config.loading import toml_value
from smpo_fast.config.schema import Config
from smpo_fast.config.sibling_flags import ALIASES, SWITCHES

SETTINGS_HEAD = """# Settings

A run is described by one TOML file (`--config`) and `section.key=value` words on the command line, which override it.
What neither gives comes from the presets of `objective.name`, `inversion.fidelity` and `inversion.solver`, then from
the defaults below (printed by `smpo settings`). Without `--config`, the embedded run is used
(`smpo_fast/embedded/default.toml`). `--print-config` shows the resolved settings.

"""
CLI_HEAD = """# Command line

The subcommands of `smpo`. `smpo train` is the same program as `smpo_fast/train.py`, which the DeepSpeed launcher starts
in a checkout; with the installed package alone these are `deepspeed --module smpo_fast.train` and
`torchrun -m smpo_fast.train`. The exit status is 0 after success, 1 if a check has a negative answer (`smpo verify`,
`smpo plan`, `smpo doctor`), 2 for a mistake in the command line, the settings or the data, and 3 if training failed.

Each command has `--help` and `--version`; `smpo` alone lists the commands. The examples use the embedded miniature
and, as `my_pictures`, a folder of your own. To complete commands, flags, settings and recipes by Tab, store what
`smpo completion bash` prints (or `zsh`, `fish`) where its first line says.

With `--json`, standard output is one JSON object, whose keys are named below, and what is otherwise printed goes to
standard error. A number that is not finite is null. Nothing is printed as JSON if the command ends with status 2 or 3.

Errors, warnings and the verdicts of `smpo verify`, `smpo plan` and `smpo doctor` are coloured on a terminal, but not
with `NO_COLOR` set, and everywhere with `CLICOLOR_FORCE=1`. What is piped is plain text.

Where `[settings]` is shown, `--config FILE` names a TOML file or a shipped recipe (`--config sdxl_smpo`), and
`section.key=value` words override it; all settings are in [settings.md](settings.md). The flags of sibling scripts,
listed at the end, are accepted there as well.

"""


def settings_tables() -> str:
    """All settings with default and meaning, a Markdown table for each section."""
    lines: list[str] = []
    for section, field in Config.model_fields.items():
        lines += [
            f"## `[{section}]`",
            "",
            f"{field.annotation.__doc__}",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            lines.append(f"| `{key}` | `{toml_value(inner.default)}` | {_cell(inner.description)} |")
        lines.append("")
    return "\n".join(lines)


def settings_page() -> str:
    """The text of docs/settings.md."""
    return SETTINGS_HEAD + settings_tables()


def cli_page() -> str:
    """The text of docs/cli.md."""
    lines: list[str] = []
    for group, members in by_group().items():
        lines += [f"## {group}", ""]
        for name, command in members.items():
            lines += _command(f"smpo {name}", command)
    lines += ["## Flags of sibling scripts", "", "| flag | same as |", "|---|---|"]
    lines += [f"| `--{flag} VALUE` | `{key}=VALUE` |" for flag, key in ALIASES.items()]
    lines += [f"| `--{flag}` | `{word}` |" for flag, word in SWITCHES.items()]
    return CLI_HEAD + "\n".join(lines) + "\n"


def _command(name: str, command: Command) -> Iterator[str]:
    declared = list(arguments.declared(command.arguments))
    yield from (f"### `{name}`", "", f"    {arguments.usage(name, command)}", "", command.sentence, "")
    yield from (f"Example: `{command.example}`", "")
    if declared:
        yield from ("| argument | meaning |", "|---|---|")
        for argument in declared:
            written = argument.name.upper() if argument.positional else f"{argument.flag} {argument.metavar}".strip()
            yield f"| `{written}` | {_cell(argument.field.description)}{_default(argument)} |"
        yield ""


def _default(argument: arguments.Declared) -> str:
    value = argument.field.get_default()
    shown = argument.metavar and not argument.field.is_required() and value not in ("", None, {})
    return f" (default: `{value}`)" if shown and "default" not in (argument.field.description or "") else ""


def _cell(text: str | None) -> str:
    return (text or "").replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "settings.md").write_text(settings_page())
    (folder / "cli.md").write_text(cli_page())
