"""Program: pairs of one's own: several pictures a prompt from a pipeline, scored or not, as a canonical table.

Any number of processes share the work through a folder, and what a process had finished outlives its kill.  A
picture's noise is a function of (seed, prompt, picture), so it hangs neither on batches nor on ranks.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from smpo_fast.common import storage
from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World, print0, rng
from smpo_fast.common.shared_work import Finished, SharedWork
from smpo_fast.config.schema import EMBEDDED, Model
from smpo_fast.data import images
from smpo_fast.data.ingest import importer
from smpo_fast.data.ingest import pairing as ingest_pairing
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.rules import equal_scores, no_finite_score, same_image
from smpo_fast.data.pairs.schema import Candidate, FoundImage, Rejected
from smpo_fast.data.pairs.writer import PART_BYTES, Pair, Seen, TableWriter, schema
from smpo_fast.data.rewards.scorers import Scorer, check_scorer, load_scorer, scorer_identity
from smpo_fast.embedded import shapes
from smpo_fast.models import lora
from smpo_fast.models.identity import encoders_identity, weights_identity
from smpo_fast.models.load import load_pipeline
from smpo_fast.models.locate import ModelSource, find

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
ENCODINGS: dict[str, dict[str, Any]] = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True}}
PART_PICTURES = 64
EMBEDDED_PROMPTS = 64  # where no number is given


@dataclass(frozen=True)
class GenerateOptions:
    """How to generate; width and height 0: the pipeline's own."""

    per_prompt: int = 4
    count: int = 0  # prompts; 0: all
    seed: int = 0
    steps: int = 30
    guidance: float = 5.0
    negative: str = ""
    width: int = 0
    height: int = 0
    batch: int = 8
    encoding: str = "png"
    scorer: str = ""
    pairs: str = ""  # formats.PAIRINGS; '': ends with a scorer, all without
    adapters: str = ""  # folder with LoRA weights

    @property
    def pairing(self) -> str:
        return self.pairs or ("ends" if self.scorer else "all")


def generate(prompts: str, out: Path, model: Model, options: GenerateOptions, world: World) -> dict[str, Any]:
    """Pictures for the prompts of a text file and the table of their pairs at ``out``; returns what import.json says.

    Every process that calls this makes parts of the pictures; all return when the table is there.  An ``out`` that
    holds this very table is returned as it is.  Raises SettingsError.
    """
    _check(options)
    words, source = read_prompts(prompts, options), find(model)
    folder = out.absolute().parent / f".{out.name}.pictures"
    identity = _identity(words, source, options)
    there = (out / reader.IMPORT_INFO).is_file()
    if not there:
        try:
            with SharedWork(folder, identity, lambda note: _is_whole(folder, note)) as shared:
                if not (out / reader.IMPORT_INFO).is_file():
                    _Generating(words, source, out, options, shared, world, identity).run()
        except Finished:
            pass
    try:
        summary = json.loads((out / reader.IMPORT_INFO).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: another process was to write it, and did not ({error}): start again") from error
    other = [key for key, value in identity.items() if summary.get(key) != value]
    if other:
        raise UserError(f"{out} holds another table (it differs in {', '.join(other)}): remove it, or name another")
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    print0(f"{out}: {'generated already' if there else 'generated'}\n{importer.report(summary)}")
    return summary


def read_prompts(prompts: str, options: GenerateOptions) -> list[str]:
    """The distinct prompts of a text file, a line each; of 'embedded' the embedded world's. Raises SettingsError."""
    if prompts == EMBEDDED:
        return shapes.prompts("train", options.count or EMBEDDED_PROMPTS, options.seed)
    try:
        lines = [line.strip() for line in Path(prompts).expanduser().read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts: '{prompts}' cannot be read as text ({error}): give a file, a prompt a line"
        ) from error
    found = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise UserError(f"prompts: '{prompts}' has no prompt")
    if len(found) < (repeated := sum(bool(line) for line in lines)):
        print0(f"{prompts}: {repeated - len(found)} repeated prompts are taken once")
    return found[: options.count] if options.count else found


class _Generating:
    """The work of one process."""

    def __init__(
        self,
        words: Sequence[str],
        source: ModelSource,
        out: Path,
        options: GenerateOptions,
        shared: SharedWork,
        world: World,
        identity: dict[str, Any],
    ) -> None:
        self.words, self.source, self.out, self.options = words, source, out, options
        self.shared, self.world, self.identity = shared, world, identity
        self.prompts_per_part = max(1, PART_PICTURES // options.per_prompt)
        self.count = -(-len(words) // self.prompts_per_part)

    def run(self) -> None:
        names = [f"pictures-{i:05d}" for i in range(self.count)]
        first = self.world.rank * self.count // self.world.size
        total = len(self.words) * self.options.per_prompt
        alone, shown = self.world.size == 1, self.world.rank == 0
        with tqdm(total=total if alone else None, unit="picture", desc="generate", disable=not shown) as self._progress:
            self.shared.share([*names[first:], *names[:first]], self._pictures)
        self.shared.share(["table-00000"], self._table)

    @cached_property
    def pipe(self) -> Any:
        dtype = torch.float16 if self.world.device.type == "cuda" else torch.float32
        pipe = load_pipeline(self.source, dtype).to(self.world.device)
        if self.options.adapters:
            pipe.load_lora_weights(self.options.adapters, weight_name=lora.FILE)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def scorer(self) -> Scorer | None:
        return load_scorer(self.options.scorer, self.world.device) if self.options.scorer else None

    def _pictures(self, name: str) -> dict[str, Any]:
        """Make the pictures of a part, from where it was left."""
        first = int(name.rpartition("-")[2]) * self.prompts_per_part
        prompts = range(first, min(first + self.prompts_per_part, len(self.words)))
        tasks = [(prompt, picture) for prompt in prompts for picture in range(self.options.per_prompt)]
        draft = self.shared.draft(name)
        done = sum(len(record["items"]) for record in draft.records)
        self._progress.update(done)
        for start in range(done, len(tasks), self.options.batch):
            items, contents = self._sample(tasks[start : start + self.options.batch])
            draft.append({"items": items}, contents)
            self._progress.update(len(items))
        content, file = draft.data(), _kept(self.shared.folder, name)
        with storage.atomic_write(file) as building:
            building.write_bytes(content)
        items = [item for record in draft.records for item in record["items"]]
        return {"items": items, "kept": {file.name: len(content)}}

    @torch.no_grad()
    def _sample(self, tasks: Sequence[tuple[int, int]]) -> tuple[list[dict[str, Any]], list[bytes]]:
        """Facts and encoded bytes of the pictures of a batch."""
        words = [self.words[prompt] for prompt, _ in tasks]
        given: dict[str, Any] = (
            {"negative_prompt": [self.options.negative] * len(words)} if self.options.negative else {}
        )
        given |= {key: value for key in ("width", "height") if (value := getattr(self.options, key))}
        seeds = [int(rng(self.options.seed, "picture", *task).integers(2**63)) for task in tasks]
        out = self.pipe(
            words,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **given,
        )
        withheld = getattr(out, "nsfw_content_detected", None) or [False] * len(words)
        scores = self.scorer(out.images, words).tolist() if self.scorer else [None] * len(words)
        contents = [_encoded(image, self.options.encoding) for image in out.images]
        items = [
            {
                "prompt": prompt,
                "picture": picture,
                "bytes": len(content),
                "size": image.size,
                "score": score,
                "problem": _problem(image, score, hidden),
            }
            for (prompt, picture), image, content, score, hidden in zip(
                tasks, out.images, contents, scores, withheld, strict=True
            )
        ]
        return items, contents

    def _table(self, name: str) -> dict[str, Any]:
        if (self.out / reader.IMPORT_INFO).is_file():  # written by a process that was killed before it could say so
            return {}
        with TableWriter(self.out, self.identity, schema(self.out), PART_BYTES) as output:
            for prompt, pictures in enumerate(self._by_prompt()):
                if prompt >= output.next_unit:
                    output.add(pairs_of(prompt, self.words[prompt], pictures, self.options.pairing))
            summary = {**self.identity, "rejected": dict(output.reasons.most_common()), **output.finish()}
            if not summary["pairs"]:
                raise UserError(f"{self.out}: no pair came of the pictures. {output.example}")
            output.publish(summary)
        return {}

    def _by_prompt(self) -> Iterator[list[tuple[dict[str, Any], bytes]]]:
        """The facts and bytes of each prompt's pictures."""
        for i in range(self.count):
            name = f"pictures-{i:05d}"
            items = self.shared.note(name)["items"]
            with _kept(self.shared.folder, name).open("rb") as stream:
                pictures = [(item, stream.read(item["bytes"])) for item in items]
            for start in range(0, len(pictures), self.options.per_prompt):
                yield pictures[start : start + self.options.per_prompt]


def pairs_of(
    number: int, prompt: str, pictures: Sequence[tuple[dict[str, Any], bytes]], pairing: str
) -> list[Pair | Rejected]:
    """The pairs of a prompt's pictures (facts and encoded bytes), the picture that was made first on the left.

    ``pairing`` as formats.PAIRINGS has it; without scores the order in which they were made stands in for them.
    """
    found: list[Pair | Rejected] = [
        Rejected(number, _uid(number, item), item["problem"]) for item, _ in pictures if item["problem"]
    ]
    usable = [picture for picture in pictures if not picture[0]["problem"]]
    if len(usable) < 2:
        return [*found, Rejected(number, f"prompt-{number}", f"fewer than two pictures: {len(usable)} of a prompt")]
    ranked = sorted(usable, key=lambda p: -math.inf if p[0]["score"] is None else p[0]["score"])
    couples = {
        "all": list(combinations(usable, 2)),
        "ends": [(ranked[0], ranked[-1])],
        "once": [(ranked[i], ranked[-1 - i]) for i in range(len(ranked) // 2)],
    }[pairing]
    for couple in couples:
        one, two = sorted(couple, key=lambda p: p[0]["picture"])
        uids = [_uid(number, item) for item, _ in (one, two)]
        scores = one[0]["score"], two[0]["score"]
        if reason := same_image(one[1], two[1]) or equal_scores(*scores):
            found.append(Rejected(number, "/".join(uids), reason))
        else:
            found.append(_pair(number, prompt, (one, two), None if scores[0] is None else scores))
    return found


def _pair(number: int, prompt: str, couple: tuple[Any, Any], rewards: tuple[float, float] | None) -> Pair:
    seen = [Seen(content, None, images.content_hash(content), tuple(item["size"])) for item, content in couple]
    pictures = [FoundImage(partial(bytes, content), uid=_uid(number, item)) for item, content in couple]
    uid = "/".join(_uid(number, item) for item, _ in couple)
    candidate = Candidate(number, uid, prompt, (pictures[0], pictures[1]), None, rewards)
    return Pair(candidate, (seen[0], seen[1]))


def _uid(number: int, item: dict[str, Any]) -> str:
    return f"{number}-{item['picture']}"


def _problem(image: Image, score: float | None, withheld: bool) -> str:
    if withheld:
        return "withheld: the pipeline's safety checker made it black"
    if all(low == high for low, high in np.array(image.getextrema()).reshape(-1, 2)):
        return "one colour only: the networks gave NaN, or nothing"
    return "" if score is None else no_finite_score(score) or ""


def _encoded(image: Image, encoding: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **ENCODINGS[encoding])
    return stream.getvalue()


def _check(options: GenerateOptions) -> None:
    if options.per_prompt < 2:
        raise UserError(f"--per-prompt {options.per_prompt}: a pair needs two pictures")
    if min(options.steps, options.batch) < 1:
        raise UserError("--steps and --batch must be at least 1")
    if options.encoding not in ENCODINGS:
        raise UserError(f"--format: '{options.encoding}' is none of {', '.join(ENCODINGS)}")
    if options.pairing not in ingest_pairing.PAIRINGS:
        raise UserError(f"--pairs: '{options.pairing}' is none of {', '.join(ingest_pairing.PAIRINGS)}")
    if options.pairing == "ends" and not options.scorer:
        raise UserError("--pairs ends needs --scorer, which says what is best and worst")
    if options.adapters and not (Path(options.adapters) / lora.FILE).is_file():
        raise UserError(f"--adapters: {options.adapters} holds no {lora.FILE}")
    if options.scorer:
        check_scorer(options.scorer, "--scorer")


def _identity(words: Sequence[str], source: ModelSource, options: GenerateOptions) -> dict[str, Any]:
    """What decides the table's content, and ``paths``, which the table's writer asks for."""
    adapters = Path(options.adapters) / lora.FILE
    digest = hashlib.sha256(adapters.read_bytes()).hexdigest() if options.adapters else ""
    chosen = {key: value for key, value in asdict(options).items() if key not in ("batch", "adapters", "scorer")}
    return {
        "generated": FORMAT,
        "prompts": {"count": len(words), "sha256": hashlib.sha256("\n".join(words).encode()).hexdigest()},
        "unet": weights_identity(source.unet_folder),
        "encoders": encoders_identity(source),
        "adapters": digest,
        "options": {**chosen, "pairs": options.pairing},
        "scorer": scorer_identity(options.scorer),
        "paths": False,
    }


def _kept(folder: Path, name: str) -> Path:
    return folder / f"kept_{name}.data"


def _is_whole(folder: Path, note: dict[str, Any]) -> bool:
    return all((folder / name).stat().st_size == size for name, size in note.get("kept", {}).items())
