"""Tries faults on programs and judges how they end: the same bytes as undisturbed, or one clear sentence.

``Campaign`` has a work folder and the bytes that every program makes when nothing disturbs it. Each ``try_`` method
disturbs once and returns what was wrong, or '' where all promises of docs/reliability.md were kept.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.ranks import free_port

from faults import programs
from faults.programs import PROGRAMS
from faults.server import Ending, Process, Server
from faults.shim import KILLS, Fault
from smpo_fast.common.runtime import rng

Digests = dict[str, str]  # by the path of a file below the work folder; of a folder: ''

# Each after what it reads. The second are as deterministic, but only read and disturbed in their own ways.
ROAD = ("import", "score", "prepare", "train", "evaluate", "generate", "save", "export")
BYWAYS = ("invert", "reuse", "verify export")
DOCUMENTED = (0, 1, 2, 3, 130)  # exit statuses; 1 is that of smpo verify
# Of the numbers in a log and a checkpoint, those that depend on the clock or the machine.
_CLOCK = re.compile(r'"mtime_ns": \d+|"seal": "\w+"|"(pairs_per_|mega)?second[^"]*": [^,}\n]+|"memory_gb": [^,}\n]+')
_OWN_HASH = re.compile(rb'"sha256": "[0-9a-f]{64}",\n "versions"')  # of a manifest over the seconds in it
# With the seconds of the run in them: a plot and a page, whose sizes vary, and with them the number of their writes;
# hashes of the plot and of the log; the model card.
_SIZE_OF_TIME = ("curves.png", "report.html")
_OF_TIME = (*_SIZE_OF_TIME, "finished.json", "README.md")
# What a kill while a small file is replaced may leave, where no lock says that nobody else is writing.
_LEFTOVERS = re.compile(
    r"(scores|store|run/evaluation(?:/images/..)?)/[^/]+\.\d+-[0-9a-f]{8}\.tmp|run/report\.html\.\d+-[0-9a-f]{8}\.tmp"
)


class Campaign:
    """The programs, undisturbed once, and a folder in which they are disturbed."""

    def __init__(self, folder: Path) -> None:
        began = time.monotonic()
        self.server = Server(folder / "work")
        self.work, self._whole = folder / "work", folder / "whole"
        self.work.mkdir(parents=True)
        self._whole.mkdir()
        programs.write_source(self.work)
        self._keep("mine")
        self.boundaries: dict[str, list[str]] = {}
        self.expected: dict[str, Digests] = {}
        self.seconds: dict[str, float] = {}
        assert self.run("export").status == 0
        self._keep("export")
        for name in (*ROAD, *BYWAYS):
            self._undisturbed(name)
        self.ready_after = time.monotonic() - began  # seconds

    def close(self) -> None:
        """End the server."""
        self.server.close()

    def set_up(self, program: str, *more: str) -> None:
        """The work folder as it is before a program: with what it reads, as it was made undisturbed."""
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in (*PROGRAMS[program].reads, *more):
            self._copy(name)

    def digests(self) -> Digests:
        """What is in the work folder."""
        return {p.relative_to(self.work).as_posix(): _digest(p) for p in sorted(self.work.rglob("*"))}

    def run(self, program: str, **how: Any) -> Ending:
        """Run a program in the work folder as it is."""
        return self.server.run(Process(program, **how))[0]

    def faults(self, program: str, kind: str) -> list[Fault]:
        """All faults of a kind (of KILLS or ERRORS, or 'kill' for every kill) that a program can meet."""
        kinds = KILLS if kind == "kill" else (kind,)
        all_ = [Fault(k, i) for k in kinds for i in range(1, len(self.boundaries[program]) + 1)]
        return [f for f in all_ if f.applies_to(self.boundaries[program][f.boundary - 1].partition(" ")[0])]

    def try_fault(self, program: str, fault: Fault) -> str:
        """Disturb a program at a boundary, run it again, and compare."""
        self.set_up(program)
        before, ending = self.digests(), self.run(program, fault=fault)
        missed = ending.status == 0 and len(ending.boundaries) < fault.boundary  # a plot may take fewer writes
        told = killed(ending) if fault.kind in KILLS and not missed else refused(ending)
        problem = told or self._torn(program, before) or self.continue_(program)
        where = self.boundaries[program][fault.boundary - 1]
        return problem and f"{program}, {fault.kind} at boundary {fault.boundary} ({where}): {problem}"

    def try_moment(self, program: str, share: float) -> str:
        """Kill a program after a share of the time that it needs, run it again, and compare."""
        self.set_up(program)
        before = self.digests()
        ending = self.run(program, signal_after=share * self.seconds[program])
        told = "" if ending.status == 0 else killed(ending)
        problem = told or self._torn(program, before) or self.continue_(program)
        return problem and f"{program}, killed after {share:.0%} of its time: {problem}"

    def try_together(self, programs: Sequence[str], delay: float, there: bool) -> str:
        """Start programs in the same folders, the second ``delay`` of its time later; then each of them alone.

        there: whether the folders that they make are there already.
        """
        self.set_up(programs[0], *(name for other in programs for name in PROGRAMS[other].reads))
        made = {name for program in programs for name in PROGRAMS[program].makes}
        for name in made if there else ():
            self._copy(name)
        own = {name for program in programs for name in PROGRAMS[program].makes if name not in PROGRAMS[program].reads}
        for name in () if there else own:
            shutil.rmtree(self.work / name, ignore_errors=True)
        wait = delay * max(self.seconds[program] for program in programs)
        endings = self.server.run(*(Process(p, start_after=wait * i) for i, p in enumerate(programs)))
        problems = [f"{p}: {wrong}" for p, e in zip(programs, endings, strict=True) if (wrong := refused(e))]
        for program in sorted(programs, key=ROAD.index):
            alone = self.run(program)
            if alone.status != 0:
                problems.append(f"afterwards {program} ends with {alone.status}: {tail(alone)}")
        wanted = {name: value for program in programs for name, value in self.expected[program].items()}
        wrong = differences(_below_any(made, self.digests()), _below_any(made, wanted))
        return "; ".join([*problems, wrong] if wrong else problems)

    def try_damage(self, reader: str, files: Sequence[str], damage: Callable[[], None]) -> str:
        """Damage files that a program reads: it must notice, or make the bytes that it makes of the whole ones."""
        self.set_up(reader, *PROGRAMS[reader].makes)
        damage()
        ending, made = self.run(reader), PROGRAMS[reader].makes
        found, wanted = self.digests(), dict(self.expected[reader])
        if PROGRAMS[reader].reads:  # what it was given need not be mended; what it makes itself must be
            for file in files:
                wanted[file] = found.setdefault(file, "")
        silent = "" if ending.status else differences(_below_any(made, found), _below_any(made, wanted))
        if ending.status == 0 and not made and f"{Path(files[0]).name}: is missing" not in ending.output:
            silent = "verified, as if it were whole"
        wrong = refused(ending) or silent
        return wrong and f"{reader}, {files[0]} damaged: {wrong}"

    def try_ranks(self, rank: int, fault: Fault) -> str:
        """Disturb one of two ranks at a boundary, start both again, and compare."""
        if "two ranks" not in self.expected:
            self.set_up("two ranks")
            endings = self._two_ranks()
            assert [e.status for e in endings] == [0, 0], endings
            self.expected["two ranks"] = self.digests()
        self.set_up("two ranks")
        before, ending = self.digests(), self._two_ranks(rank, fault)[rank]
        met = ending.status == -9 if fault.kind in KILLS else ending.status != 0
        told = refused(ending) if fault.kind not in KILLS else "" if not met else killed(ending)
        again = self._two_ranks()
        problem = told or self._torn("two ranks", before)
        if not problem and [e.status for e in again] != [0, 0]:
            problem = f"started again: {[tail(e) for e in again]}"
        problem = problem or differences(self.digests(), self.expected["two ranks"])
        return problem and f"two ranks, {fault.kind} at boundary {fault.boundary} of rank {rank}: {problem}"

    def _two_ranks(self, rank: int = 0, fault: Fault | None = None) -> list[Ending]:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        of_rank = [world | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
        return self.server.run(
            *(Process("two ranks", fault if i == rank else None, environment=of_rank[i]) for i in range(2))
        )

    def continue_(self, program: str) -> str:
        """Run a program that was disturbed; it must end as if it had not been, with nothing left over."""
        ending = self.run(program)
        if ending.status != 0 or ending.left:
            return f"started again, it ends with {ending.status}, {ending.left} processes left: {tail(ending)}"
        return differences(self.digests(), self.expected[program])

    def _undisturbed(self, name: str) -> None:
        """Learn boundaries and bytes of a program, which must be the same twice."""
        found = []
        for _ in range(2):
            self.set_up(name)
            ending = self.run(name)
            assert ending.status == 0, f"{name}: {ending.errors}"
            found.append((ending.boundaries, self.digests()))
        orders = [[b for b in boundaries if not any(name in b for name in _SIZE_OF_TIME)] for boundaries, _ in found]
        assert orders[0] == orders[1], f"{name}: another order of writes without any fault"
        assert not (other := differences(found[0][1], found[1][1])), f"{name}, run twice without any fault: {other}"
        self.boundaries[name], self.expected[name] = found[0]
        self.seconds[name] = ending.seconds
        for folder in set(PROGRAMS[name].makes) - set(PROGRAMS[name].reads):
            self._keep(folder)

    def _copy(self, name: str) -> None:
        """Copy a folder as it was made undisturbed to the work folder, unless it is there or was never made."""
        if not (self.work / name).exists() and (self._whole / name).exists():
            shutil.copytree(self._whole / name, self.work / name)

    def _keep(self, name: str) -> None:
        shutil.rmtree(self._whole / name, ignore_errors=True)
        shutil.copytree(self.work / name, self._whole / name)

    def _torn(self, program: str, before: Mapping[str, str]) -> str:
        """What of the published folders is neither whole, nor absent, nor as it was before."""
        now, whole = self.digests(), self.expected[program]
        for pattern in PROGRAMS[program].published:
            for folder in self.work.glob(pattern):
                name = folder.relative_to(self.work).as_posix()
                found, after, earlier = (_below(name, d) for d in (now, whole, before))
                if after and not (after.items() <= found.items() or earlier == found):
                    return f"{name} is half done: {differences(found, after)}"
        return ""


def killed(ending: Ending) -> str:
    """What is wrong with the end of a process that was to be killed."""
    return "" if ending.status == -9 and not ending.left else f"it ended with {ending.status}: {tail(ending)}"


def refused(ending: Ending) -> str:
    """What is wrong with the end of a process that met a problem: '' if it did its work, or said one sentence."""
    said = [line for line in ending.errors.splitlines() if line.startswith("error")]
    if ending.status is None or ending.left:
        return f"it hangs, or leaves {ending.left} processes: {tail(ending)}"
    if "Traceback" in ending.errors or ending.status not in DOCUMENTED:
        return f"it ended with {ending.status}: {tail(ending)}"
    if ending.status in (2, 3) and len(said) != 1:
        return f"it ended with {ending.status} and said {said or 'nothing'}"
    return ""


def tail(ending: Ending) -> str:
    """The last lines that a process wrote to standard error."""
    return "\n".join(ending.errors.strip().splitlines()[-12:])


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Which files are missing, left over, or other than wanted; '' if none is."""
    texts = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(name for name in found.keys() - wanted.keys() if not _LEFTOVERS.fullmatch(name)),
        "other bytes": sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name]),
    }
    return "; ".join(f"{what}: {', '.join(names[:6])}" for what, names in texts.items() if names)


def shuffled(faults: Sequence[Any], seed: int, *about: str) -> list[Any]:
    """The faults in an order that is a function of a seed and of what they are about."""
    order = rng(seed, "/".join(("faults", *about))).permutation(len(faults))
    return [faults[i] for i in order]


def _below_any(folders: Iterable[str], digests: Mapping[str, str]) -> Digests:
    return {name: value for folder in folders for name, value in _below(folder, digests).items()}


def _below(folder: str, digests: Mapping[str, str]) -> Digests:
    return {name: value for name, value in digests.items() if name == folder or name.startswith(f"{folder}/")}


def _digest(path: Path) -> str:
    """The hash of a file without what depends on the clock."""
    if not path.is_file():
        return ""
    if path.name in _OF_TIME:
        return "of the clock"
    content = path.read_bytes()
    if path.name in ("metrics.jsonl", "manifest.json", "cache.json"):
        content = _OWN_HASH.sub(b"", _CLOCK.sub("", content.decode(errors="replace")).encode())
    return hashlib.sha256(content).hexdigest()
