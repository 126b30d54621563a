"""Program ``smpo``: everything around training: import, generate and score pairs, prepare a cache, evaluate, plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from smpo_fast.common import programs
from smpo_fast.config import arguments, commands, describe


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 something that does not verify or a plan that does not fit, 2 a mistake, 3 failed."""
    parser = argparse.ArgumentParser(prog="smpo", description=__doc__.partition(": ")[2])
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in commands.COMMANDS.items():
        arguments.add_command(subparsers.add_parser(name, help=command.summary, description=command.summary), command)
    args = arguments.parse(parser, argv)
    return programs.run(lambda: ACTIONS[args.command](args))


# Each command imports what it needs: `smpo settings` answers without loading torch.


def _train(args: argparse.Namespace) -> int:
    from smpo_fast import train

    return train.run(arguments.settings_of(args), arguments.arguments_of(commands.TrainArguments, args))


def _import(args: argparse.Namespace) -> int:
    from smpo_fast.data.ingest import importer

    options = arguments.arguments_of(commands.ImportArguments, args)
    if options.dry_run:
        print(importer.dry_run(options.source, options))
    else:
        importer.import_pairs(options.source, options.out, options)
    return programs.DONE


def _prepare(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.cache.location import locate
    from smpo_fast.data.cache.prepare import prepare
    from smpo_fast.models.encoders import Encoders
    from smpo_fast.models.locate import find

    settings = arguments.settings_of(args)
    world, source = world_from_environment(settings.run.device), find(settings.model)
    prepare(settings, Encoders(source, world.device), world.device, locate(settings), world=world)
    return programs.DONE


def _verify(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.verification import report

    options, settings = arguments.arguments_of(commands.VerifyArguments, args), arguments.settings_of(args)
    device = world_from_environment(settings.run.device).device
    return report.run(options.path, settings if args.config or args.overrides else None, device, deep=options.deep)


def _score(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.rewards import scoring

    options, settings = arguments.arguments_of(commands.ScoreArguments, args), arguments.set_settings(args)
    scoring.score(options.pairs, options.out, options, world_from_environment(options.device), settings.labels)
    return programs.DONE


def _generate(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.ingest import generate

    options = arguments.arguments_of(commands.GenerateArguments, args)
    settings = arguments.set_settings(args, [f"model.path={options.model}"] if options.model else [])
    generate.generate(options.prompts, options.out, settings.model, options, world_from_environment(options.device))
    return programs.DONE


def _evaluate(args: argparse.Namespace) -> int:
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.evaluation import compare

    settings = arguments.settings_of(args)
    compare.run(settings, world_from_environment(settings.run.device).device)
    return programs.DONE


def _merge(args: argparse.Namespace) -> int:
    from pathlib import Path

    from smpo_fast.models import lora
    from smpo_fast.models.locate import find

    settings = arguments.settings_of(args)
    folder = Path(settings.run.dir) / "merged"
    lora.merge(settings, find(settings.model), Path(settings.run.dir) / "export", folder)
    print(f"{folder}: the pipeline, with the adapters merged into its weights")
    return programs.DONE


def _plan(args: argparse.Namespace) -> int:
    from smpo_fast.planning import report

    return report.run(arguments.settings_of(args), arguments.arguments_of(commands.PlanArguments, args))


def _tune(args: argparse.Namespace) -> int:
    from smpo_fast.tuning import tune

    return tune.run(arguments.settings_of(args), arguments.arguments_of(commands.TuneArguments, args))


def _doctor(args: argparse.Namespace) -> int:
    from smpo_fast.planning import doctor

    options = arguments.arguments_of(commands.DoctorArguments, args)
    return doctor.run(options.ds_config, options.json_output)


def _settings(args: argparse.Namespace) -> int:
    print(describe.settings_tables())
    return programs.DONE


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "import": _import,
    "prepare": _prepare,
    "verify": _verify,
    "score": _score,
    "generate": _generate,
    "evaluate": _evaluate,
    "merge": _merge,
    "plan": _plan,
    "tune": _tune,
    "doctor": _doctor,
    "settings": _settings,
}


if __name__ == "__main__":
    sys.exit(main())
