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

import argparse
import os
from collections.abc import Sequence

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import Stopped, print0
from smpo_fast.config import arguments, loading
from smpo_fast.training.job import Job
from smpo_fast.training.loop import TrainingFailed
from smpo_fast.training.overview import overview
from smpo_fast.training.run import train


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done or stopped by a signal with a checkpoint saved, 2 a mistake in settings or data, 3 failed."""
    parser = argparse.ArgumentParser(description="Align SDXL or SD1.5 with preference pairs (SmPO-Diffusion).")
    arguments.add_arguments(parser)
    parser.add_argument("--ds_config", type=Path, metavar="FILE", help="DeepSpeed JSON: sharding, offload, precision")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, load nothing heavy")
    args = parser.parse_args(argv)
    try:
        settings = arguments.from_arguments(args)
        if args.print_config:
            print0(loading.dump(settings))
            return 0
        job = Job(settings, args.ds_config)
        print0(overview(job))
        if not args.dry_run:
            train(job)
    except Stopped as stopped:
        print0(
            f"\nstopped by {stopped}; the state is saved below {settings.run.dir}: the same command continues the run"
        )
        return 0
    except (UserError, TrainingFailed) as error:
        # on every rank: a file may be missing on one node only
        print(f"error (rank {os.environ.get('RANK', 0)}): {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
