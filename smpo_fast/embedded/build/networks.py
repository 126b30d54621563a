"""The miniature SDXL, untrained: stock diffusers and transformers classes in small sizes."""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from smpo_fast.embedded.shapes import PIXELS, scenes

LATENT = 8  # 32 pixels, halved twice
TOKENS = 16
WIDTHS = (32, 48)  # of the two text encoders; the UNet attends to both side by side
TIME_ID_WIDTH = 16  # of the embedding of each of the six SDXL time ids
ORIGIN_KEYS = {"_name_or_path", "is_local", "local_files_only"}
PRINTABLE = "".join(chr(code) for code in range(33, 127) if not chr(code).isupper())


def write_vocabulary(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`: the captions' words are whole; other ASCII text falls into pieces."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False, end_of_word_suffix="</w>")
    bpe.train_from_iterator(sorted(scene.caption for scene in scenes()), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*PRINTABLE, *(f"{char}</w>" for char in PRINTABLE), *("".join(pair) for pair in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    model = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, end_of_word_suffix="</w>")
    model.save(str(folder))


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of the world's own vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def autoencoder() -> AutoencoderKL:
    """32 x 32 x 3 pixels to 8 x 8 x 4 latents and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=PIXELS,
        force_upcast=False,
    )


def text_encoders(vocabulary: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The pair of text encoders that SDXL has; only the second one gives a pooled embedding."""
    common = {
        "vocab_size": len(vocabulary),
        "num_hidden_layers": 2,  # the pipeline reads the last layer but one
        "max_position_embeddings": TOKENS,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
    }
    first, second = (
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=width // 16,
            projection_dim=width,
            **common,
        )
        for width in WIDTHS
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def unet() -> UNet2DConditionModel:
    """An SDXL UNet: cross attention at the lower level, `text_time` conditioning on pooled text and time ids."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(40, 64),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers means the number of heads: 16 channels each
        cross_attention_dim=sum(WIDTHS),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + WIDTHS[1],
    )


def scheduler() -> DDIMScheduler:
    """SDXL's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """A whole pipeline around a trained autoencoder; UNet and text encoders are still random."""
    words = tokenizer()
    first, second = text_encoders(words)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(),
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=False,  # captions are dropped to the encoding of "", as the trainer drops them
        add_watermarker=False,
    )


def load(folder: Path) -> StableDiffusionXLPipeline:
    """The saved miniature, in fp32, quiet."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


def save(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Save the miniature the way a published SDXL folder looks, with VAE and UNet in fp16.

    The text encoders stay fp32: transformers loads them in the dtype they are stored in and diffusers the others in
    fp32, so a folder of halves would not run unless a dtype is given.
    """
    for part in (pipeline.vae, pipeline.unet):
        part.half()
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        write_vocabulary(folder / name)  # transformers 4 reads these two files, 5 writes and reads tokenizer.json
    _prefix_weights(folder / "text_encoder" / "model.safetensors")
    _finish(folder)


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Save a UNet alone, in fp16."""
    unet.half().save_pretrained(folder)
    _finish(folder)


def _finish(folder: Path) -> None:
    for config in folder.rglob("*.json"):
        _forget_origin(config)
    for file in folder.rglob("*.*"):
        file.chmod(0o644)  # safetensors files come out readable by their owner alone


def _prefix_weights(file: Path) -> None:
    """Name a CLIPTextModel's weights as published ones are named.

    transformers 5 leaves out the prefix but reads it; transformers 4 ignores weights without it, and says so only in
    a warning.
    """
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _forget_origin(config: Path) -> None:
    """Drop what a config file tells of the folder that it was loaded from."""
    settings = json.loads(config.read_text())
    kept = {key: value for key, value in settings.items() if key not in ORIGIN_KEYS}
    if kept != settings:
        config.write_text(json.dumps(kept, indent=2) + "\n")
