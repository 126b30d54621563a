"""Program ``smpo``: the road beside training: import, generate and score pairs, prepare a cache, evaluate."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from smpo_fast.common.errors import UserError
from smpo_fast.config import arguments, describe, loading

_NO_FILE = Path(os.devnull)  # settings as they are without any file


class Command(NamedTuple):
    """A subcommand: what it says of itself, its arguments, and what it does; ``act`` returns the exit status."""

    text: str
    arguments: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a cache that does not verify, 2 a mistake in settings or data."""
    parser = argparse.ArgumentParser(prog="smpo", description=__doc__.partition(": ")[2])
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.text, description=command.text))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].act(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# --- prepare, verify --------------------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.cache.location import locate
    from smpo_fast.data.cache.prepare import prepare
    from smpo_fast.models.encoders import Encoders
    from smpo_fast.models.locate import find

    settings = arguments.from_arguments(args)
    world, source = world_from_environment(settings.run.device), find(settings.model)
    prepare(settings, Encoders(source, world.device), world.device, locate(settings), world=world)
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", type=Path, help="folder of the cache")
    arguments.add_arguments(parser)


def _verify(args: argparse.Namespace) -> int:
    from smpo_fast.data.cache.format import CacheError
    from smpo_fast.data.cache.identity import open_cache
    from smpo_fast.data.cache.reader import CachedPairs
    from smpo_fast.data.cache.verify import verify
    from smpo_fast.models.identity import encoders_identity
    from smpo_fast.models.locate import find

    cached = CachedPairs(args.cache)
    problems = verify(cached)
    if problems:
        problems.append(f"put back a good copy of these files, or remove {args.cache} and run 'smpo prepare' again")
    settings = arguments.from_arguments(args)
    if args.config or args.overrides:
        source = find(settings.model)
        try:
            open_cache(settings, args.cache, encoders=encoders_identity(source), kind=source.kind)
        except CacheError as error:
            problems.append(str(error))
    whole = f"{args.cache}: {len(cached)} pairs, every file is as it was written, every number finite"
    print("\n".join(problems) if problems else whole)
    return 1 if problems else 0


# --- import -----------------------------------------------------------------------------------------------------


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a file, a folder, an address (s3://..), or a hub id; see docs/data.md")
    parser.add_argument("out", type=Path, help="folder of the table, to be named as data.pairs")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; show what is understood")
    parser.add_argument("--format", default="", help="pairs, chosen, ranking or single; default: found out")
    parser.add_argument("--container", default="", help="parquet, arrow, tar, json, csv, w-l or suffix")
    parser.add_argument("--columns", default="", help="what a column means, as in prompt=text,chosen=good")
    parser.add_argument("--split", default="", help="default: train, where there are several")
    parser.add_argument("--revision", default="", help="branch, tag or commit on the hub")
    parser.add_argument("--root", default="", help="folder that paths in the source start from, and may not leave")
    parser.add_argument("--pairs", default="", help="of several pictures: all, ends (best against worst) or once")
    parser.add_argument("--paths", action="store_true", help="store where the pictures are, not the pictures")
    parser.add_argument("--check", action="store_true", help="decode every picture, not only its header")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")


def _import(args: argparse.Namespace) -> int:
    from smpo_fast.data.ingest import importer
    from smpo_fast.data.ingest.importer import ImportOptions

    columns = dict(word.partition("=")[::2] for word in args.columns.split(",") if word)
    if not all(columns.values()):
        raise UserError(f"--columns {args.columns}: give meaning=column, as in prompt=text,chosen=good")
    names = ("format", "container", "split", "revision", "root", "pairs", "paths", "check", "strict")
    options = ImportOptions(columns=columns, **{name: getattr(args, name) for name in names})
    if args.dry_run:
        print(importer.dry_run(args.source, options))
        return 0
    importer.import_pairs(args.source, args.out, options)
    return 0


# --- score, generate --------------------------------------------------------------------------------------------


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", help="a table as data.pairs takes it: a parquet file, a folder of them, 'embedded'")
    parser.add_argument("out", type=Path, help="folder of the scores, to be named as data.scores")
    parser.add_argument("--scorer", required=True, help="see docs/data.md; or as in '0.7*pickscore + 0.3*aesthetic'")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time")
    parser.add_argument("--half", action="store_true", help="in float16 where a sample in float32 agrees with it")
    parser.add_argument("--max-pairs", type=int, default=0, help="only the first so many rows")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    _add_settings(parser, "labels.key=value", "settings of [labels] that the report is made with")


def _score(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.rewards import scoring
    from smpo_fast.data.rewards.scoring import ScoreOptions

    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least 1")
    options = ScoreOptions(args.scorer, args.batch, args.half, args.max_pairs)
    settings = loading.load(args.config or _NO_FILE, args.overrides)
    scoring.score(args.pairs, args.out, options, world_from_environment(args.device), settings.labels)
    return 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", help="a text file, a prompt a line, or 'embedded'")
    parser.add_argument("out", type=Path, help="folder of the table, to be named as data.pairs")
    parser.add_argument("--model", default="", help="a pipeline as model.path takes it, such as a run's export folder")
    parser.add_argument("--adapters", default="", help="folder of a LoRA run's export, for the base it started from")
    parser.add_argument("--per-prompt", type=int, default=4, help="pictures of a prompt")
    parser.add_argument("--count", type=int, default=0, help="only the first so many prompts")
    parser.add_argument("--pairs", default="", help="all, ends (best against worst: default with a scorer) or once")
    parser.add_argument("--scorer", default="", help="see docs/data.md; none: score the table afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30, help="sampler steps")
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance scale; 1 is off")
    parser.add_argument("--negative", default="", help="negative prompt")
    parser.add_argument("--width", type=int, default=0, help="px; 0: the pipeline's own")
    parser.add_argument("--height", type=int, default=0, help="px; 0: the pipeline's own")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time")
    parser.add_argument("--format", dest="encoding", default="png", help="png, or webp (lossless, smaller, slower)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    _add_settings(parser, "model.key=value", "its revision, variant, vae or unet")


def _generate(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.ingest import generate
    from smpo_fast.data.ingest.generate import GenerateOptions

    options = GenerateOptions(**{field.name: getattr(args, field.name) for field in fields(GenerateOptions)})
    path = [f"model.path={args.model}"] if args.model else []
    settings = loading.load(args.config or _NO_FILE, [*path, *args.overrides])
    generate.generate(args.prompts, args.out, settings.model, options, world_from_environment(args.device))
    return 0


def _add_settings(parser: argparse.ArgumentParser, form: str, text: str) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML settings of a run")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar=form, help=text)


# --- evaluate, merge, settings ----------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.evaluation import compare

    settings = arguments.from_arguments(args)
    compare.run(settings, world_from_environment(settings.run.device).device)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from smpo_fast.models import lora
    from smpo_fast.models.locate import find

    settings = arguments.from_arguments(args)
    adapters, folder = (Path(settings.run.dir) / name for name in ("export", "merged"))
    if not (adapters / lora.FILE).is_file():
        raise UserError(f"run.dir = '{settings.run.dir}': export/ has no {lora.FILE}: train with lora.rank first")
    lora.merge(settings, find(settings.model), adapters, folder)
    print(f"{folder}: the pipeline, with the adapters in its weights")
    return 0


def _settings(args: argparse.Namespace) -> int:
    print(describe.settings_page())
    return 0


# --- plan, doctor -----------------------------------------------------------------------------------------------


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all (default 1)")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a host (default 8)")
    parser.add_argument("--gpu", default="", metavar="NAME", help="e.g. H100 (default: the one here)")
    parser.add_argument("--gpu-memory", type=float, default=0.0, metavar="GB", help="its memory in 1e9 bytes")
    parser.add_argument("--ds_config", type=Path, metavar="FILE", help="DeepSpeed JSON: sharding, offload, precision")
    parser.add_argument("--measure", action="store_true", help="run one real step of each phase on the device here")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _plan(args: argparse.Namespace) -> int:
    from smpo_fast.planning import plan
    from smpo_fast.planning.plan import Request

    if args.gpus < 1 or args.per_node < 1 or args.gpu_memory < 0:
        raise UserError("command line: --gpus and --per-node are at least 1, --gpu-memory is not negative")
    wanted = Request(args.gpus, args.gpu, args.gpu_memory, args.per_node, args.ds_config, args.measure)
    return plan.run(arguments.from_arguments(args), wanted, args.json)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ds_config", type=Path, metavar="FILE", help="also look for what this DeepSpeed file needs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(args: argparse.Namespace) -> int:
    from smpo_fast.planning import doctor

    return doctor.run(args.ds_config, args.json)


def _none(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


COMMANDS = {
    "import": Command("bring preference pairs of any format into one table", _import_arguments, _import),
    "prepare": Command(
        "encode the pairs of [data] with the networks of [model] into the cache", arguments.add_arguments, _prepare
    ),
    "verify": Command(
        "check a cache: hashes, counts, numbers, and with settings given also whether it serves them",
        _verify_arguments,
        _verify,
    ),
    "score": Command("score every picture of a pair table with a reward model", _score_arguments, _score),
    "generate": Command("make pairs from prompts with a pipeline", _generate_arguments, _generate),
    "evaluate": Command(
        "sample base and export of a run with the same noise, score and compare them",
        arguments.add_arguments,
        _evaluate,
    ),
    "merge": Command(
        "write <run.dir>/merged: the base of [model] with a run's LoRA adapters in its weights",
        arguments.add_arguments,
        _merge,
    ),
    "plan": Command(
        "what a run needs before it is started: memory, disk, hours, and the settings that fit", _plan_arguments, _plan
    ),
    "doctor": Command("what was found here, what will be used, and what mends the rest", _doctor_arguments, _doctor),
    "settings": Command("all settings with defaults and meaning, as Markdown", _none, _settings),
}


if __name__ == "__main__":
    sys.exit(main())
