"""Pre-training of the autoencoder on rendered images."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from smpo_fast.embedded.build.networks import autoencoder
from smpo_fast.embedded.shapes import render, scenes

PALE, WRONG_COLOUR = 0.25, 0.08  # the faults of the images that the base learns from (see `shapes.render`)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to fp32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def faulty_images(n: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """`n` faulty images uint8 [N, 32, 32, 3] of random scenes, and their captions."""
    world = scenes()
    batch = [world[i] for i in rng.integers(len(world), size=n)]
    return render(batch, rng, pale=PALE, wrong_colour=WRONG_COLOUR), [scene.caption for scene in batch]


def train_vae(steps: int, seed: int, batch: int = 16, lr: float = 4e-3) -> AutoencoderKL:
    """Train an autoencoder; its scaling factor makes the latents' standard deviation 1."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = autoencoder().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="vae", unit="step", mininterval=2)
    for _ in bar:
        x = to_tensor(faulty_images(batch, rng)[0]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(x).latent_dist.mean
            # Noise in the latents makes the decoder robust to the small errors of sampled latents.
            reconstruction = vae.decode(mean + 0.05 * torch.randn_like(mean)).sample
        error = reconstruction.float() - x
        loss = error.abs().mean() + error.square().mean() + 1e-4 * mean.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(psnr=f"{psnr(error.detach()):.1f} dB", refresh=False)
    vae.eval().to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, rng), 5))
    return vae


def psnr(error: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of errors of any shape, on the scale -1..1."""
    return float(10 * torch.log10(4 / error.square().mean()))


@torch.no_grad()
def latent_std(vae: AutoencoderKL, rng: np.random.Generator, n: int = 512) -> float:
    """Standard deviation of the latents of `n` images before scaling."""
    return float(vae.encode(to_tensor(faulty_images(n, rng)[0])).latent_dist.mean.std())


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, seed: int, n: int = 256) -> float:
    """Mean PSNR in dB of reconstructed images that were not in the training."""
    x = to_tensor(faulty_images(n, np.random.default_rng(seed + 1_000_003))[0])
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return float(np.mean([psnr(a - b) for a, b in zip(x, y, strict=True)]))
