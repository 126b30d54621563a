"""Small real pipelines that the tests share, made once a session."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Triton, which torch imports, decides when it is imported whether kernels are interpreted: they are where no GPU is
# (on Windows' Linux a GPU is /dev/dxg).
if not any(path for name in ("nvidia[0-9]*", "dxg") for path in Path("/dev").glob(name)):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# With this folder on the path, tests/kernels looks like the Hugging Face package of that name, and bitsandbytes prints
# that it has no get_kernel.
if "kernels" not in sys.modules:
    sys.modules["kernels"] = None  # type: ignore[assignment]

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip the tests that would start later than this")


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes and time.monotonic() - _STARTED > 60 * minutes:
        pytest.skip(f"more than {minutes:g} minutes have passed (--minutes)")


SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every letter is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


@pytest.fixture(scope="session")
def sd15_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny untrained SD1.5 pipeline folder for a prediction type; 16 px pictures, 8x8 latents."""
    made: dict[str, Path] = {}

    def make(prediction_type: str) -> Path:
        if prediction_type in made:
            return made[prediction_type]
        folder = tmp_path_factory.mktemp("pipelines") / f"sd15_{prediction_type}"
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer(folder / "tokenizer_source")
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=16, eos_token_id=len(tokenizer) - 1,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 16), latent_channels=4, norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, safety_checker=None,
            scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction_type), feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
        made[prediction_type] = folder
        return folder

    return make
