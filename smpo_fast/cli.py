"""Program ``smpo``: align SDXL or SD1.5 with preference pairs, from pairs of images to a pipeline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from smpo_fast.common import programs
from smpo_fast.common.json_report import json_report
from smpo_fast.config import arguments, commands, completion, describe, loading


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 something that does not verify or a plan that does not fit, 2 a mistake, 3 failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [completion.REQUEST]:
        print("\n".join(completion.candidates(words[1:])))
        return programs.DONE
    overview = arguments.overview_parser(
        "smpo", "Align SDXL or SD1.5 with preference pairs, from images to a pipeline."
    )
    place = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    overview.parse_args(words[:place])
    if place == len(words):
        overview.print_help()
        return programs.DONE
    name = words[place]
    if name not in commands.COMMANDS:
        overview.error(arguments.unknown_command("smpo", name))
    parser = arguments.command_parser(f"smpo {name}", commands.COMMANDS[name])
    args = arguments.parse(parser, words[place + 1 :])
    return programs.run(lambda: ACTIONS[name](args))


# Each command reads its arguments and settings, and imports what it needs only if they are good: torch and diffusers
# take seconds.


def _train(args: argparse.Namespace) -> int:
    from smpo_fast import train

    return train.run(arguments.settings_of(args), arguments.arguments_of(commands.TrainArguments, args))


def _import(args: argparse.Namespace) -> int:
    options = arguments.arguments_of(commands.ImportArguments, args)
    from smpo_fast.data.ingest import importer

    with json_report(options.json_output) as facts:
        if options.dry_run:
            understood = importer.dry_run(options.source, options)
            facts |= vars(understood)
            print(understood)
        else:
            facts |= {"out": options.out, **importer.import_pairs(options.source, options.out, options)}
    return programs.DONE


def _prepare(args: argparse.Namespace) -> int:
    settings = arguments.settings_of(args)
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.cache.location import locate
    from smpo_fast.data.cache.prepare import prepare
    from smpo_fast.models.encoders import Encoders
    from smpo_fast.models.locate import find

    world, source = world_from_environment(settings.run.device), find(settings.model)
    prepare(settings, Encoders(source, world.device), world.device, locate(settings), world=world)
    return programs.DONE


def _verify(args: argparse.Namespace) -> int:
    options, settings = arguments.arguments_of(commands.VerifyArguments, args), arguments.settings_of(args)
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.verification import report

    device = world_from_environment(settings.run.device).device
    given = settings if args.config or args.overrides else None
    return report.run(options.path, given, device, deep=options.deep, as_json=options.json_output)


def _score(args: argparse.Namespace) -> int:
    options, settings = arguments.arguments_of(commands.ScoreArguments, args), arguments.set_settings(args)
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.rewards import label_report, scoring

    with json_report(options.json_output) as facts:
        world = world_from_environment(options.device)
        found = scoring.score(options.pairs, options.out, options, world, settings.labels)
        facts |= {"out": options.out, "counts": found["counts"], "scorers": found["scorers"]}
        if world.rank == 0:  # which alone reports on the labels, and prints
            facts["labels"] = label_report.read_report(options.out)
    return programs.DONE


def _generate(args: argparse.Namespace) -> int:
    options = arguments.arguments_of(commands.GenerateArguments, args)
    settings = arguments.set_settings(args, [f"model.path={options.model}"] if options.model else [])
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.data.ingest import generate

    generate.generate(options.prompts, options.out, settings.model, options, world_from_environment(options.device))
    return programs.DONE


def _evaluate(args: argparse.Namespace) -> int:
    settings, options = arguments.settings_of(args), arguments.arguments_of(commands.EvaluateArguments, args)
    from smpo_fast.common.runtime import world_from_environment
    from smpo_fast.evaluation import compare
    from smpo_fast.publishing.web_report import renew

    world = world_from_environment(settings.run.device)
    compare.run(settings, world, as_json=options.json_output)
    if world.rank == 0 and (file := renew(Path(settings.run.dir))):
        print(f"{file}: open it in a browser", file=sys.stderr if options.json_output else sys.stdout)
    return programs.DONE


def _export(args: argparse.Namespace) -> int:
    from smpo_fast.training import exports

    exports.run(arguments.arguments_of(commands.ExportArguments, args))
    return programs.DONE


def _merge(args: argparse.Namespace) -> int:
    settings = arguments.settings_of(args)
    from smpo_fast.models import lora
    from smpo_fast.models.locate import find

    folder = Path(settings.run.dir) / "merged"
    lora.merge(settings, find(settings.model), Path(settings.run.dir) / "export", folder)
    print(f"{folder}: the pipeline, with the adapters merged into its weights")
    return programs.DONE


def _report(args: argparse.Namespace) -> int:
    options = arguments.arguments_of(commands.ReportArguments, args)
    from smpo_fast.publishing.web_report import write_web_report

    print(f"{write_web_report(options.run)}: open it in a browser")
    return programs.DONE


def _push(args: argparse.Namespace) -> int:
    from smpo_fast.publishing.push import push

    return push(arguments.arguments_of(commands.PushArguments, args))


def _plan(args: argparse.Namespace) -> int:
    settings, options = arguments.settings_of(args), arguments.arguments_of(commands.PlanArguments, args)
    from smpo_fast.planning import report

    return report.run(settings, options)


def _tune(args: argparse.Namespace) -> int:
    settings, options = arguments.settings_of(args), arguments.arguments_of(commands.TuneArguments, args)
    from smpo_fast.tuning import tune

    return tune.run(settings, options)


def _doctor(args: argparse.Namespace) -> int:
    options = arguments.arguments_of(commands.DoctorArguments, args)
    from smpo_fast.planning import doctor

    return doctor.run(options.ds_config, options.json_output)


def _settings(args: argparse.Namespace) -> int:
    with json_report(arguments.arguments_of(commands.SettingsArguments, args).json_output) as facts:
        known = loading.keys()
        facts |= {"settings": {key: {"default": field.default, "meaning": field.description} for key, field in known}}
        print(describe.settings_tables())
    return programs.DONE


def _completion(args: argparse.Namespace) -> int:
    print(completion.script(arguments.arguments_of(commands.CompletionArguments, args).shell), end="")
    return programs.DONE


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "import": _import,
    "prepare": _prepare,
    "verify": _verify,
    "score": _score,
    "generate": _generate,
    "evaluate": _evaluate,
    "export": _export,
    "merge": _merge,
    "report": _report,
    "push": _push,
    "plan": _plan,
    "tune": _tune,
    "doctor": _doctor,
    "settings": _settings,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
