"""The networks of the reward models: published checkpoints in their authors' formats, on current transformers.

Preprocessing (how an image is resized and padded, how long a prompt may be) and the constants of the last step are
those that the models were trained with. The networks compute in float32 where the original programs use half
precision.
"""

from __future__ import annotations

import html
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from smpo_fast.common.captions import bounded
from smpo_fast.data.rewards.published_weights import (
    below,
    blip_from_original,
    clip_from_open_clip,
    head_from,
    load_first,
    load_pretrained,
    read_weights,
    weight_file,
)

if TYPE_CHECKING:
    from PIL.Image import Image


PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore and HPSv2 are fine-tuned versions of it
BERT = "google-bert/bert-base-uncased"
MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of CLIP's training images, RGB in 0..1
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

_BATCH = 32
_HEADS = (
    "sac+logos+ava1-l14-linearMSE.pth",
    "aesthetic-model.pth",
)  # two file names under which the same weights are published


class RewardModel(ABC):
    """A reward model on a device, in float32 or, with ``half``, in float16."""

    def __init__(self, device: torch.device, half: bool) -> None:
        self.device, self.dtype = device, torch.float16 if half else torch.float32

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> np.ndarray:
        """Scores float32 [N] of N RGB images of any sizes with their prompts."""
        parts = [
            self._score(images[i : i + _BATCH], prompts[i : i + _BATCH]).float().cpu()
            for i in range(0, len(images), _BATCH)
        ]
        return torch.cat([torch.zeros(0), *parts]).numpy()

    @abstractmethod
    def _score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Scores [n] of at most _BATCH images."""

    def _placed(self, module: Any) -> Any:
        return module.to(self.device, self.dtype).eval().requires_grad_(False)


class ClipCosine(RewardModel):
    """Cosine of CLIP's image and text embeddings, without the logit scale: PickScore and CLIP itself."""

    def __init__(self, location: str, device: torch.device, half: bool, processors: Sequence[str]) -> None:
        super().__init__(device, half)
        from transformers import CLIPModel, CLIPProcessor  # loads slowly, and most runs score nothing

        self.model = self._placed(load_pretrained(CLIPModel, location))
        self.processor = load_first(CLIPProcessor, [location, *processors])

    def _score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return _cosine(self.model, pixels, _tokens(self.processor.tokenizer, self.model, prompts), self)


class Hps(RewardModel):
    """HPSv2 and v2.1: cosine of a fine-tuned OpenCLIP ViT-H-14; images are padded to a square, not cropped.

    The scores are those of the package ``hpsv2`` 1.2 with a torchvision that antialiases (0.17 and later).
    """

    def __init__(self, location: str, device: torch.device, half: bool, file: str) -> None:
        super().__init__(device, half)
        from transformers import CLIPTokenizer

        weights = read_weights(weight_file(location, (file, Path(file).stem + ".safetensors")))
        self.model = self._placed(clip_from_open_clip(weights))
        self.tokenizer = load_first(CLIPTokenizer, [location, CLIP_H])

    def _score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        side = self.model.config.vision_config.image_size
        texts = [html.unescape(html.unescape(prompt)) for prompt in prompts]  # as OpenCLIP's tokenizer does
        pixels = torch.stack([padded(image, side) for image in images])
        return _cosine(self.model, pixels, _tokens(self.tokenizer, self.model, texts), self)


class ImageReward(RewardModel):
    """ImageReward 1.0: BLIP's text encoder attends to the image, and an MLP scores its first token."""

    LENGTH = 35  # tokens; longer prompts are cut
    CENTRE, SCALE = 0.16717362830052426, 1.0333394966054072

    def __init__(self, location: str, device: torch.device, half: bool) -> None:
        super().__init__(device, half)
        from transformers import BertTokenizer

        weights = read_weights(weight_file(location, ("ImageReward.pt", "ImageReward.safetensors")))
        config = json.loads(weight_file(location, ("med_config.json",)).read_text())
        vision, text = blip_from_original(below(weights, "blip."), config)
        self.vision, self.text = self._placed(vision), self._placed(text)
        self.head = head_from(below(weights, "mlp.")).to(device)
        self.tokenizer = load_first(BertTokenizer, [location, BERT])

    def _score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        side = self.vision.config.image_size
        pixels = torch.stack([squared(image, side) for image in images]).to(self.device, self.dtype)
        words = self.tokenizer(
            [bounded(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.LENGTH,
            return_tensors="pt",
        ).to(self.device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        return (self.head(read[:, 0].float())[:, 0] - self.CENTRE) / self.SCALE


class Aesthetic(RewardModel):
    """LAION's improved aesthetic predictor: an MLP on the normalized image embedding of CLIP ViT-L/14.

    It ignores the prompt. If the location holds only the MLP, CLIP is loaded from the hub.
    """

    def __init__(self, location: str, device: torch.device, half: bool) -> None:
        super().__init__(device, half)
        from transformers import CLIPModel

        head = weight_file(location, (*_HEADS, *(str(Path(name).with_suffix(".safetensors")) for name in _HEADS)))
        has_clip = (Path(location) / "config.json").is_file()
        clip = load_pretrained(CLIPModel, location if has_clip else CLIP_L)
        self.vision, self.projection = self._placed(clip.vision_model), self._placed(clip.visual_projection)
        self.head = head_from(read_weights(head)).to(device)

    def _score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([squared(image, self.vision.config.image_size) for image in images])
        embeds = self.projection(self.vision(pixel_values=pixels.to(self.device, self.dtype)).pooler_output)
        return self.head(nn.functional.normalize(embeds.float(), dim=-1))[:, 0]


def squared(image: Image, side: int) -> Tensor:
    """The shorter side resized (bicubic), then the center cropped and normalized for CLIP: [3, side, side]."""
    width, height = image.size
    short = min(width, height)
    size = (int(side * width / short), int(side * height / short))
    left, top = (round((length - side) / 2) for length in size)
    image = image if size == image.size else image.resize(size, BICUBIC)
    return _normalized(_tensor(image.crop((left, top, left + side, top + side))))


def padded(image: Image, side: int) -> Tensor:
    """The longer side resized (bicubic, antialiased), padded with black, normalized for CLIP: [3, side, side]."""
    pixels = _tensor(image)
    scale = side / max(pixels.shape[1:])
    size = [round(length * scale) for length in pixels.shape[1:]]
    if size != list(pixels.shape[1:]):
        pixels = nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    rows, columns = (side - length for length in size)
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return _normalized(nn.functional.pad(pixels, around))


def _tensor(image: Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def _normalized(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _tokens(tokenizer: Any, model: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    length = model.config.text_config.max_position_embeddings
    texts = [bounded(prompt) for prompt in prompts]
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def _cosine(model: Any, pixels: Tensor, words: Mapping[str, Tensor], at: RewardModel) -> Tensor:
    out = model(
        pixel_values=pixels.to(at.device, at.dtype),
        input_ids=words["input_ids"].to(at.device),
        attention_mask=words["attention_mask"].to(at.device),
    )
    return nn.functional.cosine_similarity(out.image_embeds.float(), out.text_embeds.float(), dim=-1)
