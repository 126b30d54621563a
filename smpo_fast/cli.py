"""Program ``smpo``: the road beside training: prepare a cache, verify it, evaluate a run, list the settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from smpo_fast import config
from smpo_fast.config import SettingsError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a cache that does not verify, 2 a mistake in settings or data."""
    parser = argparse.ArgumentParser(prog="smpo", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("prepare", "encode the pairs of [data] with the networks of [model] into the cache"),
        ("evaluate", "sample base and export of a run with the same noise, score and compare them"),
    ):
        config.add_arguments(commands.add_parser(name, help=text, description=text))
    verify = commands.add_parser("verify", help="check every file of a cache against its hashes")
    verify.add_argument("cache", type=Path)
    commands.add_parser("settings", help="all settings with defaults and meaning, as Markdown")
    args = parser.parse_args(argv)
    try:
        return {"prepare": _prepare, "evaluate": _evaluate, "verify": _verify, "settings": _settings}[args.command](
            args
        )
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _prepare(args: argparse.Namespace) -> int:
    from smpo_fast.model import Encoders, find
    from smpo_fast.prepare import prepare
    from smpo_fast.runtime import world_from_environment

    settings = config.from_arguments(args)
    device, source = world_from_environment(settings.run.device).device, find(settings.model)
    out = Path(settings.data.cache or Path(settings.run.dir) / "cache")
    prepare(settings, Encoders(source, device), device, out)
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from smpo_fast import evaluate
    from smpo_fast.runtime import world_from_environment

    settings = config.from_arguments(args)
    evaluate.run(settings, world_from_environment(settings.run.device).device)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from smpo_fast.cache import CachedPairs

    cached = CachedPairs(args.cache)
    problems = cached.verify()
    print("\n".join(problems) if problems else f"{args.cache}: {len(cached)} pairs, every file is as it was written")
    return 1 if problems else 0


def _settings(args: argparse.Namespace) -> int:
    print(config.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
