"""Pre-training of the UNet and its two text encoders, together, on latents of rendered images."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from tqdm import tqdm, trange

from smpo_fast.embedded.build.networks import assemble
from smpo_fast.embedded.build.pretrain_vae import faulty_images, to_tensor
from smpo_fast.embedded.shapes import PIXELS

CAPTION_DROPOUT = 0.1  # classifier-free guidance needs a prediction without caption


def train_unet(
    vae: AutoencoderKL, steps: int, seed: int, batch: int = 64, lr: float = 1.5e-3, n_images: int = 32_768
) -> StableDiffusionXLPipeline:
    """Train UNet and text encoders from scratch on `n_images` faulty images; returns the whole pipeline."""
    torch.manual_seed(seed)
    pipeline = assemble(vae)
    latents, captions = encode_images(vae, n_images, np.random.default_rng(seed))
    tokens = tokenize(pipeline, captions + [""])
    unet = pipeline.unet.train().to(memory_format=torch.channels_last)
    networks = torch.nn.ModuleList([unet, pipeline.text_encoder.train(), pipeline.text_encoder_2.train()])
    optimizer = torch.optim.AdamW(networks.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    alphas = pipeline.scheduler.alphas_cumprod
    recent = math.nan
    bar = tqdm(range(steps), desc="unet", unit="step", mininterval=2)
    for _ in bar:
        rows = torch.randint(n_images, (batch,))
        words = tokens[torch.where(torch.rand(batch) < CAPTION_DROPOUT, n_images, rows)]
        t = torch.randint(len(alphas), (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        abar = alphas[t].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents[rows] + (1 - abar).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(predict(pipeline, noisy, t, words).float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = loss.item() if math.isnan(recent) else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
    networks.eval()
    unet.to(memory_format=torch.contiguous_format)
    return pipeline


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
    """Predicted noise [N, 4, 8, 8]: text encoders and UNet, conditioned exactly as the SDXL pipeline does it."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    time_ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]]).expand(len(tokens), -1)
    added = {"text_embeds": second.text_embeds, "time_ids": time_ids}
    return pipeline.unet(noisy, t, context, added_cond_kwargs=added).sample
