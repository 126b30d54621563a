"""Builds the embedded assets from scratch: `python -m smpo_fast.embedded.build --out DIR [--stage ...] [--seed N]`.

Four stages, each reading what those before have written below DIR: `vae` (the autoencoder), `unet` (UNet, text
encoders and tokenizer: the whole pipeline), `pairs` (the pair table), `unet_v` (another UNet for the same pipeline,
which predicts v down to zero terminal SNR).  `all` runs what is missing; naming a stage runs it again.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from smpo_fast.embedded import PAIRS, PIPELINE, UNET_V
from smpo_fast.embedded.build.networks import load, save, save_unet
from smpo_fast.embedded.build.pairs import extremes, pair_table, sample, write
from smpo_fast.embedded.build.pretrain_unet import train_unet, train_v_unet
from smpo_fast.embedded.build.pretrain_vae import reconstruction_psnr, train_vae
from smpo_fast.embedded.reward import WEIGHTS, Scores, score
from smpo_fast.embedded.shapes import prompts

STAGES = ("vae", "unet", "pairs", "unet_v")
HELD_OUT_SEED = 10_000  # of the evaluation's noise: far from the pairs' seeds


@dataclass(frozen=True)
class Sizes:
    """How much work each stage does; the defaults make the shipped assets."""

    vae_steps: int = 5000
    unet_steps: int = 6000
    unet_images: int = 32_768
    unet_batch: int = 64
    unet_v_steps: int = 4000
    pairs: int = 1280
    candidates: int = 4
    evaluated: int = 512


def build_vae(out: Path, seed: int, sizes: Sizes) -> None:
    """Train the autoencoder and save it in fp16."""
    vae = train_vae(sizes.vae_steps, seed)
    print(f"vae: {reconstruction_psnr(vae, seed):.1f} dB on images not trained on")
    vae.half().save_pretrained(out / PIPELINE / "vae")


def build_unet(out: Path, seed: int, sizes: Sizes) -> None:
    """Train UNet and text encoders on the saved autoencoder's latents and save the pipeline in fp16."""
    vae = AutoencoderKL.from_pretrained(out / PIPELINE / "vae").float()
    pipeline = train_unet(vae, sizes.unet_steps, seed, batch=sizes.unet_batch, n_images=sizes.unet_images)
    save(pipeline, out / PIPELINE)


def build_pairs(out: Path, seed: int, sizes: Sizes) -> None:
    """Sample a few images per train prompt, write the table of best and worst, and say how good the base is."""
    pipeline = load(out / PIPELINE)
    captions = prompts("train", sizes.pairs, seed)
    seeds = range(seed * sizes.candidates, (seed + 1) * sizes.candidates)
    images = np.stack([sample(pipeline, captions, number, label=f"images, seed {number}") for number in seeds])
    table = pair_table(captions, extremes(captions, images, seed))
    write(table, out / PAIRS)
    gap = np.abs(table["reward_0"].to_numpy() - table["reward_1"].to_numpy())
    print(f"pairs: {table.num_rows}, mean reward gap {gap.mean():.3f}")
    held_out = prompts("held-out", sizes.evaluated, seed)
    images = sample(pipeline, held_out, HELD_OUT_SEED + seed, label="held-out")
    print(f"base: {summary(score(images, held_out))}")


def build_unet_v(out: Path, seed: int, sizes: Sizes) -> None:
    """Train a UNet that predicts v, from the saved pipeline's on, and save it in fp16."""
    unet = train_v_unet(
        load(out / PIPELINE), sizes.unet_v_steps, seed, batch=sizes.unet_batch, n_images=sizes.unet_images
    )
    save_unet(unet, out / UNET_V)


def summary(scores: Scores) -> str:
    """Means of the reward and its parts, with the standard error of the reward."""
    error = scores.reward.std() / np.sqrt(len(scores.reward))
    parts = ", ".join(f"{name} {getattr(scores, name).mean():.3f}" for name in WEIGHTS)
    return f"reward {scores.reward.mean():.3f} +- {error:.3f} ({parts}; {len(scores.reward)} held-out prompts)"


RESULTS = {
    "vae": f"{PIPELINE}/vae/config.json",
    "unet": f"{PIPELINE}/model_index.json",
    "pairs": PAIRS,
    "unet_v": f"{UNET_V}/config.json",
}
BUILDERS = {"vae": build_vae, "unet": build_unet, "pairs": build_pairs, "unet_v": build_unet_v}


def build(out: Path, stages: Sequence[str], seed: int, sizes: Sizes = Sizes(), *, again: bool = False) -> None:
    """Run the stages in order; a stage whose result exists is skipped unless `again`."""
    for stage in stages:
        if (out / RESULTS[stage]).exists() and not again:
            print(f"{stage}: skipped, {out / RESULTS[stage]} is there (--stage {stage} builds it again)")
            continue
        for needed in STAGES[: STAGES.index(stage)]:
            if not (out / RESULTS[needed]).exists():
                raise SystemExit(f"stage {stage} needs the result of stage {needed}: {out / RESULTS[needed]}")
        start = time.perf_counter()
        BUILDERS[stage](out, seed, sizes)
        print(f"{stage}: done in {time.perf_counter() - start:.0f} s", flush=True)


def total_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    """Build what ``--stage`` asks for below ``--out``; finished stages are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to build in")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the layers are too small to share: one thread is as fast and leaves the rest free
    options.out.mkdir(parents=True, exist_ok=True)
    stages = STAGES if options.stage == "all" else (options.stage,)
    build(options.out, stages, options.seed, again=options.stage != "all")
    print(f"{options.out}: {total_bytes(options.out):,} bytes")


if __name__ == "__main__":
    main()
