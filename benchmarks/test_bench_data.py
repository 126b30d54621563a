"""Around the step: pairs per second from the prepared cache, and the time from start to the first step."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import SDXL, SDXL_TOY, Architecture
from PIL import Image

from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.data.cache.format import LATENTS_PART, PROMPTS_PART, Entry
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.cache.writer import CacheWriter
from smpo_fast.training.loader import Loader

ON_GPU = torch.cuda.is_available()
ARCHITECTURE = SDXL if ON_GPU else SDXL_TOY
BATCH = 16


def make_cache(root: Path, architecture: Architecture, rows: int) -> CachedPairs:
    """A prepared cache on disk: pairs of random latents, both flips, one prompt per eight pairs."""
    generator, side = torch.Generator().manual_seed(0), architecture.latent
    pixels, frame = (architecture.resolution, architecture.resolution), (architecture.resolution,) * 2 + (0, 0, 0)

    def pairs(number: int) -> dict[str, Any]:
        part = writer.pairs(number)
        for row in range(rows):
            mean, std = (torch.randn(2, 2, 4, side, side, generator=generator) for _ in range(2))
            rewards = (0.2, 0.3 + row / 100)
            entry = Entry(row, str(row), f"prompt {row % (rows // 8)}", rewards, None, False, pixels, (frame, frame))
            part.add(entry, mean, std.abs())
            part.commit(row + 1)
        return part.close()

    def prompts(number: int) -> dict[str, Any]:
        part, count = writer.prompts(number), len(writer.texts())
        embeds = torch.randn(count, architecture.tokens, architecture.prompt_width, generator=generator)
        part.add(embeds, torch.randn(count, architecture.pooled_width or 1, generator=generator))
        return part.close()

    with CacheWriter(root, {"kind": architecture.kind}, {}) as writer:
        writer.do_parts(LATENTS_PART, 1, pairs)
        writer.do_parts(PROMPTS_PART, 1, prompts)
        writer.finish()
    return CachedPairs(root)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CachedPairs:
    """A cache with the shapes of the architecture used on this machine."""
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", ARCHITECTURE, 64)


def _jpegs(count: int) -> list[bytes]:
    """Encoded images of about Pick-a-Pic's size."""
    drawn, made = np.random.default_rng(0), []
    side = 1024 if ON_GPU else 64
    for _ in range(count):
        buffer = io.BytesIO()
        smooth = drawn.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((side, side)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def _decode(data: bytes, side: int) -> torch.Tensor:
    """Like the released script's loader: decode, resize, centre crop, scale to [-1, 1]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("implementation", ["decode JPEGs", "prepared cache"])
def test_data_loading(bench: Any, device: torch.device, cache: CachedPairs, implementation: str) -> None:
    """16 pairs to the device, in one process. The decoded images still have to be encoded by the VAE."""
    values = {"data": {"resolution": ARCHITECTURE.resolution, "flip": True}, "batch": {"pairs_per_step": BATCH}}
    loader = Loader(cache, loading.from_dict(values), World(device=device))
    jpegs = _jpegs(2 * BATCH)

    def cached() -> torch.Tensor:
        return loader.step_batch(0)[0].latents

    def decoded() -> torch.Tensor:
        return torch.stack([_decode(data, ARCHITECTURE.resolution) for data in jpegs]).to(device)

    call = cached if implementation == "prepared cache" else decoded
    wanted = loader.step_batch(0)[0].latents if implementation == "prepared cache" else decoded()
    bench(
        "data loading", f"{BATCH} pairs {ARCHITECTURE.name}", implementation, call, baseline="decode JPEGs",
        reference=lambda: wanted, tolerance=0.0, seconds=0.5,
    )  # fmt: skip


def test_reading_at_sdxl_shapes(bench: Any, tmp_path: Path) -> None:
    """Pairs per second of the host alone: 256 pairs of [2, 4, 128, 128] with their prompts, flips and VAE samples."""
    pairs = 256
    values = {"data": {"resolution": SDXL.resolution}, "batch": {"pairs_per_step": pairs}}
    loader = Loader(make_cache(tmp_path / "cache", SDXL, pairs), loading.from_dict(values), World())
    taken, busy = [], time.process_time()
    for step in range(6):
        start = time.perf_counter()
        window = loader.step_batch(step)
        taken.append(time.perf_counter() - start)
    busy = (time.process_time() - busy) / 6 / pairs
    assert window[0].latents.shape == (pairs, 2, 4, 128, 128)
    seconds = sorted(taken[1:])
    median, best = (pairs / s for s in (seconds[len(seconds) // 2], seconds[0]))
    print(f"\nreading: {median:.0f} pairs/s (median), {best:.0f} (best); {busy * 1e3:.2f} ms of one core per pair")
    bench.record("reading", f"{pairs} pairs sdxl", "prepared cache", seconds, baseline="prepared cache")


@pytest.mark.parametrize("implementation", ["imports alone", "to the first step's end"])
def test_cold_start(bench: Any, tmp_path: Path, implementation: str) -> None:
    """A new process: the embedded default with 32 pairs, from start to one step, a checkpoint and an export."""
    imports = "import torch, transformers; from diffusers import UNet2DConditionModel, AutoencoderKL"
    taken = []
    for attempt in range(2):
        run = [sys.executable, "-m", "smpo_fast.train", "run.steps=1", f"run.dir={tmp_path / str(attempt)}",
               "eval.prompts=", "log.tensorboard=false", "batch.pairs_per_step=4", "data.max_pairs=32"]  # fmt: skip
        words = run if implementation != "imports alone" else [sys.executable, "-c", imports]
        start = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True, cwd=tmp_path)
        taken.append(time.perf_counter() - start)
        if implementation != "imports alone":
            assert (tmp_path / str(attempt) / "export" / "model_index.json").is_file(), "the run did not finish"
    bench.record("cold start", "embedded default", implementation, taken, baseline="imports alone")
