"""Program ``smpo``: the road beside training: prepare a cache, verify it, evaluate a run, list the settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from smpo_fast import config
from smpo_fast.config import SettingsError


class Command(NamedTuple):
    """A subcommand: what it says of itself, its arguments, and what it does; ``act`` returns the exit status."""

    text: str
    arguments: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a cache that does not verify, 2 a mistake in settings or data."""
    parser = argparse.ArgumentParser(prog="smpo", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.text, description=command.text))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].act(args)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# --- prepare, verify --------------------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> int:
    from smpo_fast.model import Encoders, find
    from smpo_fast.prepare import prepare
    from smpo_fast.runtime import world_from_environment

    settings = config.from_arguments(args)
    device, source = world_from_environment(settings.run.device).device, find(settings.model)
    out = Path(settings.data.cache or Path(settings.run.dir) / "cache")
    prepare(settings, Encoders(source, device), device, out)
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", type=Path)


def _verify(args: argparse.Namespace) -> int:
    from smpo_fast.cache import CachedPairs

    cached = CachedPairs(args.cache)
    problems = cached.verify()
    print("\n".join(problems) if problems else f"{args.cache}: {len(cached)} pairs, every file is as it was written")
    return 1 if problems else 0


# --- evaluate, settings -----------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> int:
    from smpo_fast import evaluate
    from smpo_fast.runtime import world_from_environment

    settings = config.from_arguments(args)
    evaluate.run(settings, world_from_environment(settings.run.device).device)
    return 0


def _settings(args: argparse.Namespace) -> int:
    print(config.describe())
    return 0


def _none(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


COMMANDS = {
    "prepare": Command(
        "encode the pairs of [data] with the networks of [model] into the cache", config.add_arguments, _prepare
    ),
    "verify": Command("check every file of a cache against its hashes", _verify_arguments, _verify),
    "evaluate": Command(
        "sample base and export of a run with the same noise, score and compare them", config.add_arguments, _evaluate
    ),
    "settings": Command("all settings with defaults and meaning, as Markdown", _none, _settings),
}


if __name__ == "__main__":
    sys.exit(main())
