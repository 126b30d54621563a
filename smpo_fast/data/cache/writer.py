"""Writing a cache together with other processes: its parts, then its index and description."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

from smpo_fast.common.shared_work import AlreadyFinished, SharedWork
from smpo_fast.common.storage import file_facts, sealed, write_json
from smpo_fast.data.cache import location
from smpo_fast.data.cache.format import (
    FORMAT,
    INFO,
    LAST_PART,
    LATENTS_PART,
    PAIRS,
    PROMPTS,
    PROMPTS_PART,
    REJECTED,
    SURVEY_PART,
    CacheInfo,
    Entry,
    entry_from_json,
    part_name,
)
from smpo_fast.data.cache.index import IndexWriter, write_prompts, write_rejected
from smpo_fast.data.cache.parts import PairsPart, PromptsPart, shard_is_intact


class CacheWriter:
    """Writes a cache together with any number of other processes: parts of pairs, parts of prompts, then ``finish``.

    plan: how the work is divided; DataError is raised while a process works with another plan or identity.
    Raises DataError if something else is at ``root``, and AlreadyFinished once another process completes the cache.
    """

    def __init__(
        self, root: Path, identity: Mapping[str, Any], source: Mapping[str, Any], plan: Mapping[str, Any] | None = None
    ) -> None:
        location.check_target(root)
        self.root, self.folder = root, location.partial(root)
        self.identity, self.source = dict(identity), dict(source)
        work = {"identity": self.identity, **(plan or {})}
        self._work = SharedWork(self.folder, work, lambda manifest: shard_is_intact(self.folder, manifest))
        self._counts = {LATENTS_PART: 0, SURVEY_PART: 0, PROMPTS_PART: 0}  # parts of each kind

    def __enter__(self) -> CacheWriter:
        location.publish(self.root)  # a process may have been killed just before publishing a complete cache
        if location.exists(self.root):
            raise AlreadyFinished
        self._work.__enter__()
        if location.exists(self.root):
            self._work.discard()
            raise AlreadyFinished
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.__exit__(kind, error, trace)

    def do_parts(self, kind: str, count: int, do: Callable[[int], dict[str, Any]]) -> None:
        """Do parts 0 .. count-1 of a kind together with the other processes; returns when all are finished.

        do: does the part of a number and returns what ``PairsPart.close`` or ``PromptsPart.close`` gave.
        """
        self._counts[kind] = max(count, self._counts[kind])
        self._work.do_parts(self._names(kind), lambda name: do(int(name.rpartition("-")[2])))

    def pairs(self, number: int, kind: str = LATENTS_PART) -> PairsPart:
        """A part of the pairs, to be filled; one of kind SURVEY_PART holds no latents."""
        return PairsPart(self._work, part_name(kind, number), by_size=bool(self.identity.get("buckets")))

    def prompts(self, number: int) -> PromptsPart:
        """A part of the prompts, to be filled."""
        return PromptsPart(self._work, part_name(PROMPTS_PART, number))

    def finished(self, kind: str, count: int) -> list[bool]:
        """Which of the parts 0 .. count-1 of a kind are finished."""
        return [self._work.is_finished(part_name(kind, i)) for i in range(count)]

    def entries(self) -> Iterator[tuple[Entry, int, int]]:
        """All usable pairs by row, with the shard and the position of their latents; -1 if they have none."""
        if not self._counts[SURVEY_PART]:
            yield from self._encoded()
            return
        rejected = {row for row, _, _ in self._rejected(LATENTS_PART)}
        places = {entry.row: (shard, position) for entry, shard, position in self._encoded()}
        for manifest in self._manifests(SURVEY_PART):
            for entry in map(entry_from_json, manifest["entries"]):
                if entry.row not in rejected:
                    yield entry, *places.get(entry.row, (-1, -1))

    def rejected(self) -> list[tuple[int, str, str]]:
        """Row, uid and reason of all rejected rows, ascending."""
        return sorted(chain(self._rejected(LATENTS_PART), self._rejected(SURVEY_PART)))

    def texts(self) -> list[str]:
        """The distinct prompts of the pairs in order of appearance, after the empty prompt."""
        return list(dict.fromkeys(chain([""], (entry.prompt for entry, *_ in self.entries()))))

    def finish(self, depends_on_scorer: Sequence[str] = ()) -> None:
        """Write the index and publish the cache, unless another process does.

        depends_on_scorer: beginnings of the reasons of rejected rows that another scorer might have made usable.
        """
        with self._work.claim(LAST_PART, wait=True):
            if not location.exists(self.folder):
                self._describe(depends_on_scorer)
        location.publish(self.root)

    def discard(self) -> None:
        """Remove what was written, unless another process is at work."""
        self._work.discard()

    def _describe(self, depends_on_scorer: Sequence[str]) -> None:
        """Write the index, then ``cache.json``, which marks the cache as complete."""
        latents = [
            {key: manifest[key] for key in ("name", "file", "latent")} for manifest in self._manifests(LATENTS_PART)
        ]
        prompts = list(self._manifests(PROMPTS_PART))
        rejected, texts = self.rejected(), self.texts()
        latent = next((manifest["latent"] for manifest in latents if manifest["file"]), None)
        if latent is None or sum(manifest["count"] for manifest in prompts) != len(texts):
            raise ValueError(f"{len(texts)} prompts, {len(prompts)} shards of prompts: not complete")
        pixels = sorted({entry.pixels for entry, *_ in self.entries()})
        index = IndexWriter(self.folder / PAIRS, texts, pixels)
        for pair in self.entries():
            index.add(*pair)
        counts = index.close()
        write_prompts(self.folder, texts, [manifest["count"] for manifest in prompts])
        write_rejected(self.folder, rejected)
        files = {manifest["name"]: manifest["file"] for manifest in [*latents, *prompts] if manifest["file"]}
        files |= {name: file_facts(self.folder / name) for name in (PAIRS, PROMPTS, REJECTED)}
        unscored = [reason for *_, reason in rejected if reason.startswith(tuple(depends_on_scorer))]
        info = CacheInfo(
            root=self.root,
            identity=self.identity,
            source=self.source,
            counts={
                **counts,
                "rejected": len(rejected),
                "prompts": len(texts),
                # pairs whose rewards, or whose rejection, depend on data.scorer
                "unrewarded": counts["pairs"] - counts["stored"] + len(unscored),
            },
            pixels=tuple(pixels),
            channels=latent["channels"],
            factor=latent["factor"],
            flips=latent["flips"],
            prompt=tuple(prompts[0]["shape"]),
            pooled=prompts[0]["pooled"],
            rewards=index.range,
            files=dict(sorted(files.items())),
            versions={name: version(name) for name in ("torch", "numpy", "pillow", "diffusers", "transformers")},
        )
        facts = {key: value for key, value in asdict(info).items() if key != "root"}
        write_json(self.folder / INFO, sealed({"format": FORMAT, **facts}), indent=1)

    def _encoded(self) -> Iterator[tuple[Entry, int, int]]:
        for shard, manifest in enumerate(self._manifests(LATENTS_PART)):
            filled: dict[tuple[int, int], int] = {}
            for entry in map(entry_from_json, manifest["entries"]):
                position = filled.get(entry.pixels, 0)
                filled[entry.pixels] = position + 1
                yield entry, shard, position

    def _rejected(self, kind: str) -> Iterator[tuple[int, str, str]]:
        return ((row, uid, reason) for part in self._manifests(kind) for row, uid, reason in part["rejected"])

    def _names(self, kind: str) -> list[str]:
        return [part_name(kind, number) for number in range(self._counts[kind])]

    def _manifests(self, kind: str) -> Iterator[dict[str, Any]]:
        return map(self._work.manifest, self._names(kind))
