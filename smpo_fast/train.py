"""Program: train on preference pairs.

``deepspeed smpo_fast/train.py --ds_config configs/ds_zero2.json`` trains the embedded default; with
``--config FILE`` it trains what the file describes. The same command started again continues the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a script: neither this folder's modules nor kernels/ beside it may hide a library's
    _HERE = Path(__file__).resolve().parent
    sys.path = [p for p in sys.path if Path(p or ".").resolve() not in (_HERE, _HERE.parent)]

from collections.abc import Sequence

from smpo_fast.common import programs
from smpo_fast.common.json_report import json_report
from smpo_fast.config import arguments, loading
from smpo_fast.config.commands import TRAIN, TrainArguments
from smpo_fast.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done or stopped by a signal with a checkpoint saved, 2 a mistake in settings or data, 3 failed."""
    args = arguments.parse(arguments.command_parser("train.py", TRAIN), argv)
    return programs.run(lambda: run(arguments.settings_of(args), arguments.arguments_of(TrainArguments, args)))


def run(settings: Config, options: TrainArguments) -> int:
    """Train; returns the exit status. Raises UserError for settings or data that cannot be used."""
    if options.print_config:
        print(loading.dump(settings))
        return programs.DONE
    # Only now, with good settings: they import torch and diffusers, which takes seconds.
    with programs.ended_by_interrupt():
        from smpo_fast.common.runtime import Stopped, print0
        from smpo_fast.publishing.model_card import write_card
        from smpo_fast.publishing.web_report import write_web_report
        from smpo_fast.training.dry_run import survey
        from smpo_fast.training.job import Job
        from smpo_fast.training.overview import overview
        from smpo_fast.training.run import train
        from smpo_fast.tuning import speed

    with json_report(options.json_output) as facts:
        job = speed.known(Job(settings, options.ds_config))
        described = overview(job)
        print0("\n".join(f"{name:<11}{text}" for name, text in described.items()))
        if options.dry_run:
            found, chosen = survey(job), speed.describe(job)
            facts |= {**described, **vars(found), "speed": chosen}
            print0(f"{found}\nspeed      {chosen}")
            return programs.DONE
    try:
        train(job, speed.measured)
        if job.world.rank == 0:
            card = write_card(job.run_dir)
            print0(f"  {write_web_report(job.run_dir).name:<15} all of this on one page: open it in a browser")
            print0(f"  {card.name:<15} the model card; smpo push {job.run_dir} OWNER/NAME uploads it with the export")
    except Stopped as stopped:
        where = f"the state is saved below {settings.run.dir}"
        print0(f"\nstopped by {stopped}; {where}: the same command continues the run")
    return programs.DONE


if __name__ == "__main__":
    sys.exit(main())
