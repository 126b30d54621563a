"""Pre-training of the UNet and its two text encoders, together, on latents of rendered images; then of one for v."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tqdm import tqdm, trange

from smpo_fast.embedded.build.networks import assemble
from smpo_fast.embedded.build.pretrain_vae import faulty_images, to_tensor
from smpo_fast.embedded.shapes import PIXELS

CAPTION_DROPOUT = 0.1  # classifier-free guidance needs a prediction without caption


Target = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What a UNet is to predict, from latents, noise, and the shares of both in the noisy latents."""


def train_unet(
    vae: AutoencoderKL, steps: int, seed: int, batch: int = 64, lr: float = 1.5e-3, n_images: int = 32_768
) -> StableDiffusionXLPipeline:
    """Train UNet and text encoders from scratch on `n_images` faulty images; returns the whole pipeline."""
    torch.manual_seed(seed)
    pipeline = assemble(vae)
    networks = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    data = encode_images(vae, n_images, np.random.default_rng(seed))
    _fit(pipeline, networks, data, pipeline.scheduler.alphas_cumprod, lambda x, noise, a, b: noise, steps, batch, lr)
    return pipeline


def train_v_unet(
    pipeline: StableDiffusionXLPipeline,
    steps: int,
    seed: int,
    batch: int = 64,
    lr: float = 1e-3,
    n_images: int = 32_768,
) -> UNet2DConditionModel:
    """Train the UNet of a finished pipeline on to predict v, down to zero terminal SNR; returns it.

    The text encoders stay as they are, so both UNets can share them.
    """
    torch.manual_seed(seed)
    data = encode_images(pipeline.vae, n_images, np.random.default_rng(seed))
    pipeline.text_encoder.requires_grad_(False)
    pipeline.text_encoder_2.requires_grad_(False)
    zero = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    _fit(
        pipeline, [pipeline.unet], data, zero.alphas_cumprod, lambda x, noise, a, b: a * noise - b * x, steps, batch, lr
    )
    return pipeline.unet


def _fit(
    pipeline: StableDiffusionXLPipeline,
    trained: Sequence[torch.nn.Module],
    data: tuple[torch.Tensor, list[str]],
    alphas: torch.Tensor,
    target: Target,
    steps: int,
    batch: int,
    lr: float,
) -> None:
    latents, captions = data
    tokens = tokenize(pipeline, captions + [""])
    networks = torch.nn.ModuleList(trained).train()
    pipeline.unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    recent = math.nan
    bar = tqdm(range(steps), desc="unet", unit="step", mininterval=2)
    for _ in bar:
        rows = torch.randint(len(latents), (batch,))
        words = tokens[torch.where(torch.rand(batch) < CAPTION_DROPOUT, len(latents), rows)]
        t = torch.randint(len(alphas), (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        abar = alphas[t].view(-1, 1, 1, 1)
        signal, level = abar.sqrt(), (1 - abar).sqrt()
        noisy = signal * latents[rows] + level * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = predict(pipeline, noisy, t, words).float()
        loss = F.mse_loss(predicted, target(latents[rows], noise, signal, level))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = loss.item() if math.isnan(recent) else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
    networks.eval()
    pipeline.unet.to(memory_format=torch.contiguous_format)


def warm_cosine(step: int, steps: int, warm: int = 200) -> float:
    """Learning rate factor: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, n: int, rng: np.random.Generator, batch: int = 256
) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents [n, 4, 8, 8] of `n` faulty images, and their captions."""
    latents, captions = [], []
    for start in trange(0, n, batch, desc="encode", unit="batch"):
        x, words = faulty_images(min(batch, n - start), rng)
        latents.append(vae.encode(to_tensor(x)).latent_dist.mean * vae.config.scaling_factor)
        captions += words
    return torch.cat(latents), captions


def tokenize(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> torch.Tensor:
    """Token ids [N, 16] of captions, padded."""
    words = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return words.input_ids


def predict(
    pipeline: StableDiffusionXLPipeline, noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The UNet's prediction [N, 4, 8, 8]: text encoders and UNet, conditioned exactly as the SDXL pipeline does it."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    time_ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]]).expand(len(tokens), -1)
    added = {"text_embeds": second.text_embeds, "time_ids": time_ids}
    return pipeline.unet(noisy, t, context, added_cond_kwargs=added).sample
