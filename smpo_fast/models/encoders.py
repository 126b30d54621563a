"""The VAE and the text encoders: from images and prompts to the tensors that the UNet is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from smpo_fast.common.captions import bounded
from smpo_fast.models.identity import encoders_identity
from smpo_fast.models.load import load_part, load_tokenizer
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.pipeline_folder import TEXT_PARTS


class LoadedEncoders:
    """VAE and text encoders that are in memory.

    kind: 'sdxl' or 'sd15'.  vae: in float32.  text: tokenizers and their encoders, in the order of ``TEXT_PARTS``.
    """

    def __init__(self, kind: str, vae: Any, text: Sequence[tuple[Any, Any]], device: torch.device) -> None:
        self.kind, self.vae, self.text, self.device = kind, vae, text, device
        self.channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # image pixels per latent pixel, each way

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, times the scaling factor: [N, 3, R, R'] in [-1, 1] -> [N, C, H, W].

        Raises FloatingPointError when the VAE gives NaN or infinity (as SDXL's own VAE does in fp16; this is fp32).
        """
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        mean, std = (posterior.mean - shift) * scale, posterior.std * scale
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise FloatingPointError("the VAE gave NaN or infinity")
        return mean, std

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Token embeddings [N, S, D] and, for SDXL, the pooled embedding [N, E], as the pipelines compute them."""
        states, pooled = [], None
        for tokenizer, encoder in self.text:
            ids = self._tokens(tokenizer, prompts, truncation=True, padding="max_length", return_tensors="pt")
            out = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if self.kind == "sdxl" else out.last_hidden_state)
            pooled = out.text_embeds if self.kind == "sdxl" and hasattr(out, "text_embeds") else pooled
        return torch.cat(states, dim=-1), pooled

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the text encoders' input."""
        tokenizer = self.text[0][0]
        return sum(
            len(ids) > tokenizer.model_max_length for ids in self._tokens(tokenizer, list(prompts), truncation=False)
        )

    @staticmethod
    def _tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str], **options: Any) -> Any:
        return tokenizer(
            [bounded(prompt) for prompt in prompts], max_length=tokenizer.model_max_length, **options
        ).input_ids


class Encoders(LoadedEncoders):
    """The VAE and text encoders of a source in float32: needed to prepare a cache, not to train."""

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.identity = encoders_identity(source)
        vae = load_part(source, "vae", torch.float32).to(device).eval()
        text = []
        for tokenizer, encoder in TEXT_PARTS[source.kind]:
            network = load_part(source, encoder, torch.float32).to(device).eval()
            text.append((load_tokenizer(source.folder / tokenizer, network), network))
        super().__init__(source.kind, vae, text, device)
