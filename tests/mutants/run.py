"""Program: put each mutant into a copy of the code, and see whether the tests notice (``make mutants``).

Tests run in forks of this process, which has imported the libraries but nothing of the project: importing them takes
longer than most of the tests. A mutant is *killed* when one of its tests fails, which must then pass without the
mutant, or does not end in time; *invalid* when the tests cannot even be imported; otherwise it *survived*. The outcomes
are kept in ``results.json``, where those of a partial run replace the earlier ones.
"""

from __future__ import annotations

import argparse
import atexit
import compileall
import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutants.catalogue import HERE, RESULTS, ROOT, Mutant, load

REDIRECT = HERE.relative_to(ROOT) / "redirect"
LIBRARIES = (
    "torch", "diffusers", "transformers", "pytest", "hypothesis", "pyarrow.parquet", "PIL.Image", "fsspec",
    "pydantic", "peft", "torch.utils.tensorboard", "transformers.optimization",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
)  # fmt: skip
KILLED, SURVIVED, INVALID, TIMEOUT = "killed", "survived", "invalid", "killed: time limit"
USAGE_ERROR, NO_TESTS = 4, 5  # exit status of pytest
COLLECTING = "collecting "
LIMIT = 900.0  # seconds; some mutants make a test wait for ever
TESTS = {"survivors": "tests"}  # of a list, where they are not in tests/LIST


@dataclass
class Job:
    """Tests to run in a tree, with a mutant or without."""

    tests: tuple[str, ...]
    mutant: Mutant | None = None
    outcome: str = ""
    by: str = ""  # the test that failed
    seconds: float = 0.0
    log: str = ""


@dataclass
class Slot:
    """A copy of the repository in which one job at a time runs."""

    tree: Path
    job: Job | None = None
    pid: int = 0
    began: float = 0.0
    original: tuple[Path, str, float] | None = field(default=None)

    def start(self, job: Job, number: int) -> None:
        self.job, self.began = job, time.monotonic()
        if job.mutant:
            file = self.tree / job.mutant.file
            self.original = file, file.read_text(), file.stat().st_mtime
            file.write_text(job.mutant.applied_to(self.original[1]))
            os.utime(file, (number, number))  # no compiled file has this time: Python compiles the mutant
        self._log.write_bytes(b"")
        self._report.unlink(missing_ok=True)
        self.pid = os.fork()
        if not self.pid:
            _run_tests(self.tree, job.tests, self._log, self._report)

    def stop(self) -> None:
        """End a job that is not wanted any more."""
        if self.job:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def poll(self) -> Job | None:
        """The job, once it has ended."""
        assert self.job is not None
        late = time.monotonic() - self.began > LIMIT
        if late:
            os.killpg(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, 0 if late else os.WNOHANG)
        if not pid:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what the tests left behind
        job, self.job = self.job, None
        job.seconds, job.log = time.monotonic() - self.began, self._log.read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        job.by = self._report.read_text() if self._report.is_file() else ""
        unusable = code in (USAGE_ERROR, NO_TESTS) or job.by.startswith(COLLECTING)
        job.outcome = TIMEOUT if late else SURVIVED if code == 0 else INVALID if unusable else KILLED
        if self.original:
            file, text, changed = self.original
            file.write_text(text)
            os.utime(file, (changed, changed))
            self.original = None
        return job

    @property
    def _log(self) -> Path:
        return self.tree.with_suffix(".log")

    @property
    def _report(self) -> Path:
        return self.tree.with_suffix(".failed")


class _FirstFailure:
    """A pytest plugin that notes the first test that failed, or the first file that could not be imported."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._file.write_text(COLLECTING + report.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self._file.exists():
            self._file.write_text(report.nodeid)


def _run_tests(tree: Path, tests: Sequence[str], log: Path, report: Path) -> None:
    """In the forked process: run tests of a tree, and end with pytest's exit status."""
    status = 3
    try:
        os.setsid()
        with log.open("wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(tree)
        temporary = tree.with_suffix(".tmp")
        temporary.mkdir(exist_ok=True)
        os.environ |= {"SMPO_MUTANT_TREE": str(tree), "PYTHONPATH": str(tree / REDIRECT), "TMPDIR": str(temporary)}
        sys.path.insert(0, str(tree / REDIRECT))
        atexit._clear()  # what this process has left to do at its end
        runpy.run_path(str(tree / REDIRECT / "sitecustomize.py"))
        pytest = importlib.import_module("pytest")
        words = ["-x", "-p", "no:cacheprovider", "--basetemp", str(temporary / "pytest"), *tests]
        status = int(pytest.main(words, plugins=[_FirstFailure(report)]))
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_all(jobs: Iterable[Job], slots: Sequence[Slot]) -> Iterable[Job]:
    """Run jobs in the slots; yields each when it has ended."""
    waiting, free, number = list(jobs)[::-1], list(slots), 1
    try:
        while waiting or len(free) < len(slots):
            while waiting and free:
                free.pop().start(waiting.pop(), number)
                number += 1
            for slot in [slot for slot in slots if slot.job]:
                if done := slot.poll():
                    free.append(slot)
                    yield done
            time.sleep(0.05)
    finally:
        for slot in slots:
            slot.stop()


def copy_repository(target: Path) -> None:
    """The files that git knows or would add, compiled."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for folder in ("smpo_fast", "kernels", "benchmarks"):
        compileall.compile_dir(target / folder, quiet=2)


def judge(chosen: Sequence[Mutant], slots: Sequence[Slot], whole: bool) -> dict[str, dict[str, str]]:
    """The outcome of each mutant, by its id, and the test that found it. Ends the program where a test always fails."""
    found: dict[str, dict[str, str]] = {}
    for job in run_all([Job(m.tests, m) for m in chosen], slots):
        _note(found, job)
    if whole:
        alive = [m for m in chosen if found[m.id]["outcome"] == SURVIVED]
        for job in run_all([Job((TESTS.get(m.package, f"tests/{m.package}"),), m) for m in alive], slots):
            _note(found, job)
    _check_tests_pass({result["by"] for result in found.values() if result["by"]}, slots)
    return found


def _note(found: dict[str, dict[str, str]], job: Job) -> None:
    assert job.mutant is not None
    found[job.mutant.id] = {"outcome": job.outcome, "by": job.by}
    print(f"{job.outcome:<18} {job.mutant.id}  {job.by}  ({job.seconds:.0f} s)", flush=True)
    if job.outcome == INVALID:
        print(job.log[-2000:], flush=True)


def _check_tests_pass(tests: Iterable[str], slots: Sequence[Slot]) -> None:
    """Run tests without a mutant: one that fails then proves nothing."""
    files: dict[str, list[str]] = defaultdict(list)
    for test in sorted(tests):
        files[test.partition("::")[0]].append(test)
    for job in run_all([Job(tuple(tests)) for tests in files.values()], slots):
        if job.outcome != SURVIVED:
            sys.exit(f"without a mutant: {' '.join(job.tests)}: {job.outcome} {job.by}\n{job.log[-3000:]}")


def record(chosen: Sequence[Mutant], found: dict[str, dict[str, str]]) -> str:
    """Write the outcomes, with those of earlier runs for the other mutants; returns the score as text."""
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    mutants = load()
    kept = {m.id: result for m in mutants if (result := found.get(m.id) or before.get(m.id))}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    lines = [f"{'package':<14}{'mutants':>8}{'killed':>8}"]
    here = [m for m in mutants if m.id in found]
    for package in [*dict.fromkeys(m.package for m in here), ""]:
        outcomes = Counter(found[m.id]["outcome"].partition(":")[0] for m in here if package in ("", m.package))
        lines.append(f"{package or 'all':<14}{outcomes.total():>8}{outcomes[KILLED]:>8}")
    lines += [f"{found[m.id]['outcome']}: {m.id} ({m.file}): {m.bug}" for m in here if not _is_killed(found[m.id])]
    return "\n".join(lines)


def _is_killed(result: dict[str, str]) -> bool:
    return result["outcome"].startswith(KILLED)


def main() -> int:
    """Exit status: 0 when every mutant was killed."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__.partition(": ")[2].partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="ID", help="these mutants")
    parser.add_argument("--package", nargs="+", help="the mutants of these lists")
    parser.add_argument("--whole", action="store_true", help="give survivors to all tests of their package")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    chosen = [m for m in load() if m.id in (given.only or [m.id]) and m.package in (given.package or [m.package])]
    if not chosen:
        parser.error("no such mutant")
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch imports Triton, as in tests/conftest.py
    # libraries would find our folders kernels/; the tests bring their own paths
    sys.path = [p for p in sys.path if p not in ("", str(ROOT), str(ROOT / "tests"))]
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        slots = [Slot(Path(name) / f"tree-{i}") for i in range(given.jobs)]
        for slot in slots:
            copy_repository(slot.tree)
        found = judge(chosen, slots, given.whole)
    print(record(chosen, found))
    return 0 if all(map(_is_killed, found.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
