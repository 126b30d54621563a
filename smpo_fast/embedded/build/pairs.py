"""The pair table: images sampled from the miniature, of which two are kept per prompt, ordered by the reward."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tqdm import tqdm

from smpo_fast.embedded.reward import score
from smpo_fast.embedded.shapes import PIXELS

GUIDANCE, SAMPLING_STEPS = 1.5, 20  # stronger guidance alone would repair most of what the reward judges
TIE = 1e-3  # rewards closer than this are a tie
JPEG_QUALITY = 92
MODEL_NAME = "smpo-fast-embedded"
PROVENANCE = {
    "origin": "sampled from the pipeline beside this file, scored by smpo_fast.embedded.reward",
    "rebuild": "python -m smpo_fast.embedded.build --out DIR",
    "license": "Apache-2.0",
}


def sample(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seed: int,
    *,
    batch: int = 64,
    label: str = "sample",
) -> np.ndarray:
    """One image per prompt, uint8 [N, 32, 32, 3]; the noise is drawn for all at once, whatever the batch size."""
    latent = (
        pipeline.unet.config.in_channels,
        pipeline.unet.config.sample_size,
        pipeline.unet.config.sample_size,
    )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *latent, generator=generator)
    images = []
    for start in tqdm(range(0, len(prompts), batch), desc=label, unit="batch"):
        result = pipeline(
            list(prompts[start : start + batch]),
            latents=noise[start : start + batch].to(pipeline.device, pipeline.dtype),
            height=PIXELS,
            width=PIXELS,
            guidance_scale=GUIDANCE,
            num_inference_steps=SAMPLING_STEPS,
            output_type="np",
        )
        images.append(np.round(result.images * 255).astype(np.uint8))
    return np.concatenate(images)


def encode(image: np.ndarray) -> bytes:
    """An image, uint8 [H, W, 3], as JPEG bytes with full colour resolution."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of encoded bytes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def extremes(prompts: Sequence[str], images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The best and the worst of K images uint8 [K, N, 32, 32, 3] of each prompt, in random order.

    Two images at random often score nearly alike; the best and the worst of a few differ enough to learn from.
    """
    rewards = np.stack([score(candidates, prompts).reward for candidates in images])
    ends = np.stack([rewards.argmax(0), rewards.argmin(0)])
    rows = np.arange(len(prompts))
    swap = np.random.default_rng(seed).integers(2, size=len(prompts))
    return images[ends[swap, rows], rows], images[ends[1 - swap, rows], rows]


def pair_table(prompts: Sequence[str], images: tuple[np.ndarray, np.ndarray]) -> pa.Table:
    """The table of pairs: images 0 and 1 [N, 32, 32, 3] of each prompt, in Pick-a-Pic v2 columns plus rewards.

    The rewards are those of the encoded images, so whoever decodes and scores them again finds the same numbers.
    """
    data = [[encode(image) for image in side] for side in images]
    rewards = [score(np.stack([decode(item) for item in side]), prompts).reward for side in data]
    uids = [[hashlib.sha256(item).hexdigest()[:16] for item in side] for side in data]
    gap = rewards[0] - rewards[1]
    tie = np.abs(gap) < TIE
    label = np.where(tie, 0.5, (gap > 0).astype(float))
    best = [b if g < 0 else a for a, b, g in zip(*uids, gap, strict=True)]
    table = pa.table(
        {
            "caption": list(prompts),
            "jpg_0": pa.array(data[0], pa.binary()),
            "jpg_1": pa.array(data[1], pa.binary()),
            "label_0": label,
            "label_1": 1 - label,
            "image_0_uid": uids[0],
            "image_1_uid": uids[1],
            "model_0": [MODEL_NAME] * len(prompts),
            "model_1": [MODEL_NAME] * len(prompts),
            "best_image_uid": ["tie" if t else uid for t, uid in zip(tie, best, strict=True)],
            "are_different": [a != b for a, b in zip(*uids, strict=True)],
            "reward_0": rewards[0],
            "reward_1": rewards[1],
        }
    )
    return table.replace_schema_metadata(PROVENANCE)


def write(table: pa.Table, path: Path) -> None:
    """Write compactly: all JPEG headers are alike, and compression over a whole column removes them."""
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=["caption", "model_0", "model_1"],
        write_statistics=False,
        data_page_size=1 << 24,
        row_group_size=table.num_rows,
    )
