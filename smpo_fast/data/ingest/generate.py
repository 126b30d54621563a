"""``smpo generate``: several images a prompt from a pipeline, scored or not, as a pair table.

Any number of processes share the work through a folder, and what a process finished survives its kill. The noise of
an image is a function of (seed, prompt, image), so it depends neither on batches nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from smpo_fast.common.errors import ConfigError, DataError
from smpo_fast.common.runtime import World, print0, rng
from smpo_fast.common.shared_work import AlreadyFinished, SharedWork
from smpo_fast.config.commands import GenerateOptions
from smpo_fast.config.schema import EMBEDDED, Model
from smpo_fast.data.ingest.generated_pairs import GeneratedImage, pairs_of
from smpo_fast.data.pairs import summary as pairs_summary
from smpo_fast.data.pairs.rules import no_finite_score
from smpo_fast.data.pairs.schema import table_schema
from smpo_fast.data.pairs.writer import PART_BYTES, TableWriter, remove_working_files
from smpo_fast.data.rewards.scorers import Scorer, check_scorer, load_scorer, scorer_identity
from smpo_fast.embedded import shapes
from smpo_fast.models import lora
from smpo_fast.models.identity import base_identity, encoders_identity
from smpo_fast.models.load import load_pipeline
from smpo_fast.models.locate import ModelSource, find

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
ENCODINGS: dict[str, dict[str, Any]] = {"png": {"format": "PNG"}, "webp": {"format": "WEBP", "lossless": True}}
PART_IMAGES = 64
EMBEDDED_PROMPTS = 64  # where the options give no number


def generate(prompts: str, out: Path, model: Model, options: GenerateOptions, world: World) -> dict[str, Any]:
    """Generate images for the prompts of a text file, write the table of their pairs to ``out``, return its summary.

    Every process that calls this does a share of the work; all return when the table is complete. An ``out`` that
    holds this very table is returned as it is. Raises ConfigError for impossible options; DataError for unreadable
    prompts, an ``out`` that holds something else, and images that make no pair; ModelError for a pipeline that cannot
    be loaded.
    """
    _check(options)
    texts, source = read_prompts(prompts, options), find(model)
    folder = out.absolute().parent / f".{out.name}.pictures"
    identity = _identity(texts, source, options)
    there = pairs_summary.exists(out)
    if not there:
        try:
            with SharedWork(folder, identity) as shared:
                if not pairs_summary.exists(out):
                    _Generator(texts, source, out, options, shared, world, identity).run()
        except AlreadyFinished:
            pass
    if not pairs_summary.exists(out):
        raise DataError(f"{out}: the process that was writing it ended before it was complete: start again")
    summary = pairs_summary.read(out)
    pairs_summary.check_identity(out, summary, identity)
    if world.rank == 0:
        remove_working_files(out)
        shutil.rmtree(folder, ignore_errors=True)
    print0(f"{out}: {'generated already' if there else 'generated'}\n{pairs_summary.report(summary)}")
    return summary


def read_prompts(prompts: str, options: GenerateOptions) -> list[str]:
    """The distinct prompts of a text file with one prompt a line; 'embedded': prompts of the embedded data set.

    Raises DataError for a file that cannot be read and one without a prompt, ConfigError if 'embedded' has too few.
    """
    if prompts == EMBEDDED:
        available = shapes.count_prompts("train")
        if options.count > available:
            raise ConfigError(f"--count {options.count}: 'embedded' has {available} prompts")
        return shapes.prompts("train", options.count or EMBEDDED_PROMPTS, options.seed)
    try:
        lines = [line.strip() for line in Path(prompts).expanduser().read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"prompts: '{prompts}' cannot be read as text ({error}): give a file with one prompt a line"
        ) from error
    found = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise DataError(f"prompts: '{prompts}' has no prompt")
    if len(found) < (total := sum(bool(line) for line in lines)):
        print0(f"{prompts}: {total - len(found)} repeated prompts are used once")
    return found[: options.count] if options.count else found


class _Generator:
    """The share of one process in the work."""

    def __init__(
        self,
        prompts: Sequence[str],
        source: ModelSource,
        out: Path,
        options: GenerateOptions,
        shared: SharedWork,
        world: World,
        identity: dict[str, Any],
    ) -> None:
        self.prompts, self.source, self.out, self.options = (prompts, source, out, options)
        self.shared, self.world, self.identity = shared, world, identity
        self.prompts_per_part = max(1, PART_IMAGES // options.per_prompt)
        self.parts = -(-len(prompts) // self.prompts_per_part)

    def run(self) -> None:
        names = [f"pictures-{i:05d}" for i in range(self.parts)]
        first = self.world.rank * self.parts // self.world.size
        total = len(self.prompts) * self.options.per_prompt
        alone, shown = self.world.size == 1, self.world.rank == 0
        with tqdm(total=total if alone else None, unit="image", desc="generate", disable=not shown) as self._progress:
            self.shared.do_parts([*names[first:], *names[:first]], self._generate_part)
        self.shared.do_parts(["table-00000"], self._write_table)

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

    def _generate_part(self, name: str) -> dict[str, Any]:
        """Generate the images of a part, resuming what is in its draft; returns the part's manifest."""
        first = int(name.rpartition("-")[2]) * self.prompts_per_part
        prompts = range(first, min(first + self.prompts_per_part, len(self.prompts)))
        tasks = [(prompt, image) for prompt in prompts for image in range(self.options.per_prompt)]
        draft = self.shared.draft(name)
        done = sum(len(record["items"]) for record in draft.records)
        self._progress.update(done)
        for start in range(done, len(tasks), self.options.batch):
            items, contents = self._sample(tasks[start : start + self.options.batch])
            draft.append({"items": items}, contents)
            self._progress.update(len(items))
        items = [item for record in draft.records for item in record["items"]]
        return {"items": items, **self.shared.keep(name, draft.data())}

    @torch.no_grad()
    def _sample(self, tasks: Sequence[tuple[int, int]]) -> tuple[list[dict[str, Any]], list[bytes]]:
        """Facts (as JSON) and encoded bytes of a batch of images. tasks: (prompt, image) of each."""
        prompts = [self.prompts[prompt] for prompt, _ in tasks]
        given: dict[str, Any] = (
            {"negative_prompt": [self.options.negative] * len(prompts)} if self.options.negative else {}
        )
        given |= {key: value for key in ("width", "height") if (value := getattr(self.options, key))}
        seeds = [int(rng(self.options.seed, "picture", *task).integers(2**63)) for task in tasks]
        out = self.pipe(
            prompts,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **given,
        )
        withheld = getattr(out, "nsfw_content_detected", None) or [False] * len(prompts)
        scores = self.scorer(out.images, prompts).tolist() if self.scorer else [None] * len(prompts)
        contents = [_encode(image, self.options.encoding) for image in out.images]
        items = [
            {
                "prompt": prompt,
                "picture": number,
                "bytes": len(content),
                "size": image.size,
                "score": score,
                "problem": _problem(image, score, hidden),
            }
            for (prompt, number), image, content, score, hidden in zip(
                tasks, out.images, contents, scores, withheld, strict=True
            )
        ]
        return items, contents

    def _write_table(self, name: str) -> dict[str, Any]:
        if pairs_summary.exists(self.out):  # written by a process that was killed before it could record it
            return {}
        with TableWriter(self.out, self.identity, table_schema(self.out), PART_BYTES) as table:
            for prompt, images in enumerate(self._images_by_prompt()):
                if prompt >= table.next_unit:
                    table.add(pairs_of(prompt, self.prompts[prompt], images, self.options.pairing))
            summary = {**self.identity, "rejected": dict(table.rejected_by_kind.most_common()), **table.finish()}
            if not summary["pairs"]:
                raise DataError(f"{self.out}: the images make no usable pair. {table.first_rejected}")
            table.publish(summary)
        return {}

    def _images_by_prompt(self) -> Iterator[list[GeneratedImage]]:
        for i in range(self.parts):
            name = f"pictures-{i:05d}"
            items = self.shared.manifest(name)["items"]
            with self.shared.kept(name).open("rb") as stream:
                images = [_read_image(item, stream) for item in items]
            for start in range(0, len(images), self.options.per_prompt):
                yield images[start : start + self.options.per_prompt]


def _read_image(item: dict[str, Any], stream: io.BufferedReader) -> GeneratedImage:
    content, (width, height) = stream.read(item["bytes"]), item["size"]
    return GeneratedImage(item["picture"], content, (width, height), item["score"], item["problem"])


def _problem(image: Image, score: float | None, withheld: bool) -> str:
    """Why a generated image cannot be used, or ''."""
    if withheld:
        return "withheld: the pipeline's safety checker made it black"
    if all(low == high for low, high in np.array(image.getextrema()).reshape(-1, 2)):
        return "one colour only: the networks produced NaN, or nothing"
    return "" if score is None else no_finite_score(score) or ""


def _encode(image: Image, encoding: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **ENCODINGS[encoding])
    return stream.getvalue()


def _check(options: GenerateOptions) -> None:
    if options.adapters and not (Path(options.adapters) / lora.FILE).is_file():
        raise ConfigError(f"--adapters: {options.adapters} has no {lora.FILE}")
    if options.scorer:
        check_scorer(options.scorer, "--scorer")


def _identity(prompts: Sequence[str], source: ModelSource, options: GenerateOptions) -> dict[str, Any]:
    """What decides the table's content."""
    adapters = Path(options.adapters) / lora.FILE
    digest = hashlib.sha256(adapters.read_bytes()).hexdigest() if options.adapters else ""
    deciding = set(GenerateOptions.model_fields) - {"batch", "adapters", "scorer"}
    return {
        "generated": FORMAT,
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest()},
        "unet": base_identity(source),
        "encoders": encoders_identity(source),
        "adapters": digest,
        "options": {**options.model_dump(include=deciding), "pairs": options.pairing},
        "scorer": scorer_identity(options.scorer),
        "paths": False,  # as in the summary of an import
    }
