"""Program: a process that has imported everything, and forks one child for each job, which costs a tenth of a second.

It reads jobs, one JSON line each, from standard input and answers each with a JSON line. A job is a list of processes
that start at the same time in one folder; each runs a program of ``faults.programs``, perhaps with a fault. Every child
leads a session of its own, so that what it leaves running is seen and ended.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from faults.shim import Fault, Shim

SLOWEST = 300.0  # seconds that a process may take; all programs but the soak need a few
RANK = "RANK"  # in the environment of processes that form one world
FAREWELL = 10.0  # seconds that the other ranks may take to end by themselves when one has been killed


@dataclass(frozen=True)
class Process:
    """One process of a job. start_after, signal_after: seconds until it starts and until it gets ``signal``.

    descriptors: how many more files than now it may open.  environment: added to that of the server.
    """

    program: str
    fault: Fault | None = None
    start_after: float = 0.0
    signal_after: float | None = None
    signal: int = signal.SIGKILL
    descriptors: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ending:
    """How a process ended. status: negative if killed by that signal, None if it hung.  left: others it left behind."""

    status: int | None
    output: str
    errors: str
    boundaries: list[str]
    left: int
    seconds: float


class Server:
    """The client's side: starts the server, which ends with it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "faults.server", str(work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
        )  # fmt: skip

    def run(self, *processes: Process) -> list[Ending]:
        """Run processes side by side in the work folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([dataclasses.asdict(p) for p in processes]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of the fault campaign died; its words are above"
        return [Ending(**ending) for ending in json.loads(answer)]

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _serve(work: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_what_programs_import(work)
    for line in sys.stdin:
        jobs = [Process(**{**job, "fault": job["fault"] and Fault(**job["fault"])}) for job in json.loads(line)]
        answers.write(json.dumps([dataclasses.asdict(ending) for ending in _run(work, jobs)]) + "\n")
        answers.flush()


def _import_what_programs_import(work: Path) -> None:
    from faults import programs

    programs.make_parts_small()
    for name in programs.IMPORTED_LATE:
        importlib.import_module(name)
    work.mkdir(parents=True, exist_ok=True)


def _run(work: Path, jobs: list[Process]) -> list[Ending]:
    notes = work.with_name(f"{work.name}.notes")
    notes.mkdir(exist_ok=True)
    began = time.monotonic()
    children = [_start(work, notes / str(i), job) for i, job in enumerate(jobs)]
    due = {child: job for child, job in zip(children, jobs, strict=True) if job.signal_after is not None}
    ended: dict[int, tuple[int | None, float]] = {}
    while len(ended) < len(children):
        now = time.monotonic() - began
        for child in [child for child in children if child not in ended]:
            pid, status = os.waitpid(child, 0 if now > SLOWEST else os.WNOHANG)
            if pid:
                ended[child] = (None if now > SLOWEST else os.waitstatus_to_exitcode(status), now)
            elif child in due and now > (due[child].signal_after or 0):
                os.kill(child, due.pop(child).signal)
        _end_the_rest(children, jobs, ended, now)
        time.sleep(0.002)
    return [_ending(notes / str(i), child, *ended[child]) for i, child in enumerate(children)]


def _end_the_rest(
    children: list[int], jobs: list[Process], ended: dict[int, tuple[int | None, float]], now: float
) -> None:
    """Kill what hangs, and ranks whose neighbour has gone, as a launcher does: with a signal, then for good."""
    failed = [seconds for status, seconds in ended.values() if status != 0]
    for child in [child for child in children if child not in ended]:
        if now > SLOWEST or (RANK in jobs[0].environment and failed and now > failed[0] + FAREWELL):
            os.kill(child, signal.SIGKILL)
        elif RANK in jobs[0].environment and failed and now > failed[0] + FAREWELL / 2:
            os.kill(child, signal.SIGTERM)


def _ending(notes: Path, child: int, status: int | None, seconds: float) -> Ending:
    left = _end_session(child)
    files = [notes.with_suffix(suffix) for suffix in (".out", ".err", ".json")]  # none, if it was killed at once
    out, errors, boundaries = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    return Ending(status, out, errors, json.loads(boundaries or "[]"), left, seconds)


def _end_session(leader: int) -> int:
    """Kill what is left of a child's session; returns how many processes that were."""
    left = session_of(leader)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return len(left)


def session_of(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = folder.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(session) == leader and state != "Z":
            found.append(int(folder.name))
    return found


def _start(work: Path, notes: Path, job: Process) -> int:
    for suffix in (".out", ".err", ".json"):
        notes.with_suffix(suffix).unlink(missing_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        for stream, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(notes.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = _act(work, notes, job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _act(work: Path, notes: Path, job: Process) -> int:
    from faults import programs

    time.sleep(job.start_after)
    os.chdir(work)
    os.environ |= job.environment
    shim = Shim(work, job.fault)
    if job.descriptors is not None:
        in_use = len(os.listdir("/proc/self/fd")) - 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + job.descriptors,) * 2)
    else:
        shim.install()
    try:
        return programs.PROGRAMS[job.program].run()
    finally:
        if job.descriptors is None:
            notes.with_suffix(".json").write_text(json.dumps(shim.boundaries))


def main(arguments: list[str]) -> int:
    """Serve until standard input is closed."""
    _serve(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
