"""From the words of a command line to typed values: the arguments of a program, and the settings of a run."""

from __future__ import annotations

import argparse
import difflib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from smpo_fast.common import programs
from smpo_fast.common.console import printable
from smpo_fast.common.errors import ConfigError
from smpo_fast.config import loading
from smpo_fast.config.commands import COMMANDS, Argument, Command, by_group
from smpo_fast.config.schema import Config
from smpo_fast.config.section import Section
from smpo_fast.config.sibling_flags import ALIASES, REFUSED, SWITCHES

S = TypeVar("S", bound=Section)


class Declared(NamedTuple):
    """A field of a section of arguments, and how it is written on the command line."""

    name: str
    field: FieldInfo
    flag: str  # '--dry-run'; of a positional argument its name
    metavar: str  # empty for a switch
    positional: bool


def declared(arguments: type[Section]) -> Iterator[Declared]:
    """The arguments that a section declares, positional ones first, in their order."""
    found = [_declaration(name, field) for name, field in arguments.model_fields.items()]
    yield from sorted(found, key=lambda argument: not argument.positional)


def usage(name: str, command: Command) -> str:
    """How a program or subcommand is called, in a line."""
    found = list(declared(command.arguments))
    words = [name, *(a.name.upper() for a in found if a.positional)]
    words += [f"{a.flag} {a.metavar}" for a in found if not a.positional and a.field.is_required()]
    if any(not a.positional and not a.field.is_required() for a in found):
        words.append("[options]")
    settings = {"run": ["[settings]"], "set": [f"[--config FILE] [--set {command.set_section}.key=value ..]"], "": []}
    return " ".join([*words, *settings[command.settings]])


def command_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """The parser of a program or subcommand."""
    parser = argparse.ArgumentParser(
        prog=name,
        usage=usage(name, command),
        description=command.sentence,
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_command(parser, command)
    _add_common(parser)
    return parser


def overview_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of the flags before a subcommand; its help lists the subcommands in their groups."""
    width = max(map(len, COMMANDS))
    listed: list[str] = []
    for group, members in by_group().items():
        listed += [f"{group.lower()}:", *(f"  {word:<{width}}  {c.summary}" for word, c in members.items()), ""]
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} [--help] [--version] COMMAND ..",
        description=description,
        epilog="\n".join([*listed, f"{name} COMMAND --help shows the arguments of a command, and an example."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Give a parser ``--version``, and what DeepSpeed's launcher adds to the words of a program."""
    parser.add_argument("--version", action=_Version, help="show the versions of this package and its libraries")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


class _Version(argparse.Action):
    """Print versions and end: they are looked up only if they are asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(programs.versions())
        parser.exit()


def unknown_command(prog: str, name: str) -> str:
    """What to say of a command that does not exist."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"there is no command '{printable(name)}': {hint}{prog} --help lists the commands"


def add_command(parser: argparse.ArgumentParser, command: Command) -> None:
    """Give a parser the arguments of a program or subcommand."""
    for argument in declared(command.arguments):
        _add(parser, argument)
    if command.settings == "run":
        add_settings(parser)
    elif command.settings == "set":
        section = command.set_section
        parser.add_argument("--config", type=Path, metavar="FILE", help="TOML settings of a run")
        text = f"settings of [{section}] that are used"
        parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar=f"{section}.key=value", help=text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; words ``section.key=value`` may be anywhere among the flags of a program that takes them.

    Like argparse, ends the process with status 2 for a flag or word that the program does not have.
    """
    args, rest = parser.parse_known_args(argv)  # argparse alone takes the words of one place only
    if rest and (not getattr(args, "takes_words", False) or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {printable(' '.join(rest))}{_nearest_flag(parser, rest)}")
    if rest:
        args.overrides += rest
    return args


def _nearest_flag(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """The flag that the first unknown flag among ``words`` may have been meant to be, as a question."""
    unknown = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
    known = [flag for action in parser._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
    near = difflib.get_close_matches(unknown, known, n=1)
    return f": did you mean '{near[0]}'?" if near else ""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, ``section.key=value`` words and the sibling scripts' flags to a parser."""
    parser.set_defaults(takes_words=True)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML settings (default: the embedded run)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file")
    group = parser.add_argument_group("flags of sibling scripts")
    for flag, key in ALIASES.items():
        group.add_argument(f"--{flag}", metavar="VALUE", help=f"same as {key}=VALUE")
    for flag, word in SWITCHES.items():
        group.add_argument(f"--{flag}", action="store_true", help=f"same as {word}")
    for flag in REFUSED:
        group.add_argument(f"--{flag}", nargs="?", const="", default=None, help=argparse.SUPPRESS)


def settings_of(args: argparse.Namespace) -> Config:
    """The settings that a parser with ``add_settings`` has read.

    Raises ConfigError like ``loading.load``, and for a sibling script's flag that has another meaning here.
    """
    for flag, why in REFUSED.items():
        if getattr(args, flag) is not None:
            raise ConfigError(f"command line: --{flag} is not a setting here: {why}")
    words = [f"{key}={getattr(args, flag)}" for flag, key in ALIASES.items() if getattr(args, flag) is not None]
    words += [word for flag, word in SWITCHES.items() if getattr(args, flag)]
    return loading.load(args.config, [*words, *args.overrides])


def set_settings(args: argparse.Namespace, first: Sequence[str] = ()) -> Config:
    """Defaults, ``--config`` if it is given, the words ``first``, then ``--set``. Raises ConfigError."""
    return loading.load(args.config or loading.NO_FILE, [*first, *args.overrides])


def arguments_of(section: type[S], args: argparse.Namespace) -> S:
    """The typed arguments that a parser with ``add_command`` has read.

    Raises ConfigError, which names the flag, what was found and what is right.
    """
    given = {name: getattr(args, name) for name in section.model_fields if getattr(args, name) is not None}
    try:
        return section.model_validate(given, strict=False)  # words become numbers and paths
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        name = str(first["loc"][0]) if first["loc"] else ""
        if not name:
            raise ConfigError(f"command line: {message}") from error
        argument = _declaration(name, section.model_fields[name])
        found = f"(found {first['input']!r}; meaning: {argument.field.description})"
        raise ConfigError(f"command line: {argument.flag}: {message} {found}") from error


def _declaration(name: str, field: FieldInfo) -> Declared:
    written = next((item for item in field.metadata if isinstance(item, Argument)), Argument())
    if written.positional:
        return Declared(name, field, name, name, True)
    flag = written.flag or "--" + name.replace("_", "-")
    return Declared(name, field, flag, written.metavar or _metavar(flag, field.annotation), False)


def _metavar(flag: str, annotation: Any) -> str:
    if annotation is bool:
        return ""
    if get_origin(annotation) is Literal:
        return "{" + ",".join(word for word in get_args(annotation) if word) + "}"
    if annotation in (int, float):
        return "N" if annotation is int else "X"
    return "FILE" if isinstance(annotation, types.UnionType) else flag.strip("-").replace("-", "_").upper()


def _add(parser: argparse.ArgumentParser, argument: Declared) -> None:
    text = (argument.field.description or "").replace("%", "%%")
    if argument.positional:
        parser.add_argument(argument.name, help=text)
    elif not argument.metavar:
        parser.add_argument(argument.flag, dest=argument.name, action="store_true", help=text)
    else:
        parser.add_argument(
            argument.flag,
            dest=argument.name,
            metavar=argument.metavar,
            required=argument.field.is_required(),
            help=text,
        )
