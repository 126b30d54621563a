"""Settings on the command line of a program."""

from __future__ import annotations

import argparse
from pathlib import Path

from smpo_fast.common.errors import ConfigError
from smpo_fast.config.loading import load
from smpo_fast.config.schema import Config
from smpo_fast.config.sibling_flags import ALIASES, REFUSED, SWITCHES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, the overrides and the sibling scripts' flags to a program's parser."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML settings (default: the embedded run)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file")
    group = parser.add_argument_group("flags as sibling scripts name them")
    for flag, key in ALIASES.items():
        group.add_argument(f"--{flag}", metavar="VALUE", help=f"same as {key}=VALUE")
    for flag, word in SWITCHES.items():
        group.add_argument(f"--{flag}", action="store_true", help=f"same as {word}")
    for flag in REFUSED:
        group.add_argument(f"--{flag}", nargs="?", const="", default=None, help=argparse.SUPPRESS)


def from_arguments(args: argparse.Namespace) -> Config:
    """The settings that a parser made by ``add_arguments`` has read.

    Raises ConfigError like ``load``, and for a flag of a sibling script that has another meaning here.
    """
    for flag, why in REFUSED.items():
        if getattr(args, flag) is not None:
            raise ConfigError(f"command line: --{flag} is not a setting here: {why}")
    words = [f"{key}={getattr(args, flag)}" for flag, key in ALIASES.items() if getattr(args, flag) is not None]
    words += [word for flag, word in SWITCHES.items() if getattr(args, flag)]
    return load(args.config, [*words, *args.overrides])
