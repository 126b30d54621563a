"""What ``run.speed`` makes of a run: a stored profile, a short measurement at its start, a file, or eager code."""

from __future__ import annotations

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import COMPUTE_DTYPES, print0, warn0
from smpo_fast.config import loading
from smpo_fast.engine import checkpoint
from smpo_fast.engine.collectives import on_rank_0
from smpo_fast.models.locate import schedule_of
from smpo_fast.planning import profiles
from smpo_fast.planning.gpus import find_gpu
from smpo_fast.planning.planned_run import PlannedRun
from smpo_fast.planning.profiles import Choice
from smpo_fast.planning.speed import modelled_seconds
from smpo_fast.training.job import Job
from smpo_fast.tuning.bench import Rejected, release
from smpo_fast.tuning.candidates import coordinates, without_given
from smpo_fast.tuning.tune import keep, make_tuner, overlay, planned_run
from smpo_fast.tuning.tuner import Tuner, start

CALIBRATION_SECONDS = 90.0
WORTH_HOURS = 1.0  # of training left: shorter runs are not worth a calibration


def known(job: Job) -> Job:
    """The job with the settings of ``run.speed``, where they need no stored profile: eager code, a file, or a CPU.

    With 'auto' on CUDA the job is returned as it is; ``measured`` completes it. Raises ConfigError for a file that
    cannot be used.
    """
    if job.config.run.speed == profiles.AUTO and job.world.device.type == "cuda":
        return job
    return _with(job, _stored(job))


def measured(job: Job) -> Job:
    """A job that ``known`` has left open, with what is stored for its GPU, or is measured now. Collective.

    All ranks take what rank 0 finds; what does not suit the run is left out, with a warning.
    """
    if job.speed:
        return job
    choice = on_rank_0(job.world, lambda: _stored_or_measured(job))
    try:
        return _with(job, choice)
    except UserError as error:
        warn0(f"run.speed = 'auto': what was measured does not suit this run ({error}): its own settings are used")
        return _with(job, Choice({}, "auto: what was measured does not suit this run"))


def describe(job: Job) -> str:
    """What ``run.speed`` will make of a job, by what is stored now."""
    return job.speed or _stored(job).why


def _with(job: Job, choice: Choice) -> Job:
    if choice.values:
        return Job(choice.apply(job.config), job.ds_file, speed=choice.why)
    job.speed = choice.why
    return job


def _planned(job: Job) -> PlannedRun:
    return planned_run(job.config, job.source, job.ds_settings, job.precision, job.world.size)


def _stored(job: Job) -> Choice:
    return profiles.choose(job.config, _planned(job), job.world.device)


def _stored_or_measured(job: Job) -> Choice:
    choice, planned = _stored(job), _planned(job)
    if choice.found:
        return choice
    hours = hours_left(job, planned)
    if hours is None or hours <= WORTH_HOURS:
        return Choice({}, f"{choice.why}; smpo tune with the same settings measures and keeps it")
    print0(f"run.speed = 'auto': about {hours:.3g} hours by plan, so {CALIBRATION_SECONDS:.0f} s go into measuring")
    return calibrate(job, planned)


def hours_left(job: Job, planned: PlannedRun) -> float | None:
    """Hours of the remaining steps by plan; None for a GPU of unknown speed."""
    schedule, gpu = schedule_of(job.source, job.config.inversion), find_gpu("", 0.0)
    seconds = modelled_seconds(planned, planned.variant(), schedule, gpu)
    if seconds is None:
        return None
    found = checkpoint.newest(job.run_dir)
    steps = job.config.run.steps - (found[1].step if found else 0)
    return sum(seconds.values()) * steps / 3600


def calibrate(job: Job, planned: PlannedRun) -> Choice:
    """Measure for at most ``CALIBRATION_SECONDS``, keep the profile, and choose from it; nothing where that fails.

    What the user gave is not varied, so the profile is kept for runs with the same given settings.
    """
    device, settings = job.world.device, job.config
    fixed = loading.given(settings) & set(profiles.KEYS)
    tuner: Tuner | None = None
    try:
        tuner = make_tuner(planned, job.source, device, CALIBRATION_SECONDS)
        free = without_given(coordinates(device.type, planned.pairs_of_rank, planned.examples_of_rank), fixed)
        begin = start(settings, device, COMPUTE_DTYPES[planned.precision], planned.network.latent)
        best = tuner.fastest(loading.replaced(begin, {name: profiles.get(settings, name) for name in fixed}), free)
        profile = tuner.profile(best, profiles.key_of(planned, device, settings))
        text = overlay(tuner, profile, {}, device)
    except (Rejected, UserError, RuntimeError) as error:  # a run must not end because measuring failed
        warn0(f"run.speed = 'auto': measuring failed ({error}): the run's own settings are used")
        return Choice({}, "auto: measuring failed")
    finally:
        tuner = None
        release(device)  # the run needs the memory
    keep(profile, text)
    return profiles.from_profile(settings, profile)
