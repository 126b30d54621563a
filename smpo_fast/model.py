"""The networks: find a diffusers pipeline, load its parts, encode, denoise, export.

Weights are read from safetensors only and no code of a repository is ever run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from smpo_fast import config as settings
from smpo_fast import embedded
from smpo_fast.batch import Conditioning
from smpo_fast.config import SettingsError
from smpo_fast.runtime import COMPUTE_DTYPES, warn0
from smpo_fast.schedule import NoiseSchedule

# Their bars count shards of a file; ours count pairs.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

KINDS = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
PREDICTIONS = ("epsilon", "v_prediction")
TEXT_PARTS = {
    "sdxl": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
    "sd15": (("tokenizer", "text_encoder"),),
}
_FILES = ("*.json", "*.txt", "*.safetensors")
_PARTS = ("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_OPTIONAL_PARTS = ("feature_extractor", "safety_checker")


@dataclass(frozen=True)
class Source:
    """A pipeline on disk that has been looked at but not loaded."""

    folder: Path
    vae_folder: Path
    unet_folder: Path
    kind: str  # "sdxl" | "sd15"
    prediction_type: str  # "epsilon" | "v_prediction"
    scheduler: Mapping[str, Any]
    variant: str | None


def find(model: settings.Model) -> Source:
    """Where the networks of ``[model]`` are, downloaded if they are a hub id.

    Raises SettingsError for a folder that is no diffusers pipeline, a pipeline other than SDXL or SD1.5, and a
    prediction type other than epsilon and v_prediction: each named.
    """
    folder = embedded.pipeline_path() if model.path == settings.EMBEDDED else _folder(model.path, "model.path", model)
    pipeline = _read_json(folder / "model_index.json", "model.path").get("_class_name", "nothing")
    if pipeline not in KINDS:
        raise SettingsError(f"model.path: {folder} holds a {pipeline}; supported are {', '.join(KINDS)}")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", "model.path")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTIONS:
        raise SettingsError(
            f"model.path: {folder}/scheduler predicts '{prediction_type}'; supported are {', '.join(PREDICTIONS)}"
        )
    vae = _folder(model.vae, "model.vae", model) if model.vae else folder
    unet = _folder(model.unet, "model.unet", model) if model.unet else folder
    source = Source(
        folder,
        _part(vae, "vae"),
        _part(unet, "unet"),
        KINDS[pipeline],
        prediction_type,
        scheduler,
        model.variant or None,
    )
    channels = _read_json(source.unet_folder / "config.json", "model.unet").get("in_channels")
    if channels != 4:
        raise SettingsError(
            f"model.path: {source.unet_folder} has {channels} input channels (inpainting?); 4 are supported"
        )
    return source


def schedule_of(source: Source, inversion: settings.Inversion) -> NoiseSchedule:
    """The noise schedule the pipeline was trained with."""
    return NoiseSchedule.from_config(source.scheduler, inversion.schedule_dtype)


def encoders_identity(source: Source) -> str:
    """A hash of all files of the VAE, text encoders and tokenizers: what a cache's content depends on."""
    digest = hashlib.sha256()
    parts = [source.vae_folder] + [source.folder / name for pair in TEXT_PARTS[source.kind] for name in pair]
    for part in parts:
        for file in sorted(f for pattern in _FILES for f in part.glob(pattern)):
            digest.update(f"{part.name}/{file.name}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def weights_identity(part: Path) -> str:
    """A quick hash of a network's folder: its configuration, and size, first and last MiB of its weight files.

    Fine-tuned weights differ in both ends; reading 10 GB to learn that would take longer than loading them.
    """
    digest = hashlib.sha256((part / "config.json").read_bytes())
    for file in sorted(part.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(f"{file.name}/{file.stat().st_size}\0".encode() + stream.read(2**20))
            stream.seek(-min(2**20, file.stat().st_size), 2)
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def load_unet(source: Source, model: settings.Model, dtype: torch.dtype, device: torch.device) -> UNet2DConditionModel:
    """A UNet in ``dtype`` on ``device``, with the attention and the checkpointing of ``[model]``.

    Two of them with equal weights give bitwise equal predictions.
    """
    unet = _load(UNet2DConditionModel, source.unet_folder, source.variant, dtype).to(device)
    set_attention([unet], model.attention, device)
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(memory_format=torch.channels_last) if model.channels_last else unet


def empty_unet(source: Source) -> UNet2DConditionModel:
    """The UNet on the meta device: modules, names and shapes, no weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source.unet_folder))


# model.attention -> the kernel that scaled_dot_product_attention takes first
_SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Those that serve where it cannot, as flash attention in float32: a choice of speed must not stop a run.
_SDPA_OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class Attention(AttnProcessor2_0):
    """SDPA, by a given kernel first or PyTorch's choice; with keys and values at hand, it projects the queries alone.

    ``attn.held``, where ``calls`` has set it, is (key, value) [pairs, heads, tokens, d] of a prompt's both pictures.
    """

    def __init__(self, kernel: SDPBackend | None = None) -> None:
        super().__init__()
        self.kernels = [] if kernel is None else [kernel, *(other for other in _SDPA_OTHERS if other is not kernel)]

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        with sdpa_kernel(self.kernels, set_priority=True) if self.kernels else nullcontext():
            held = getattr(attn, "held", None)
            if held is None or encoder_hidden_states is None:
                return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
            key, value = held
            # The two pictures of a pair stand next to each other and read the same prompt: one row of 2 L queries.
            query = attn.to_q(hidden_states).view(len(key), -1, attn.heads, key.shape[-1]).transpose(1, 2)
            out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            return attn.to_out[1](attn.to_out[0](out.reshape(*hidden_states.shape[:2], -1).to(query.dtype)))


_notice = cache(warn0)  # policy and reference are loaded one after the other: said once is enough


def set_attention(unets: Sequence[UNet2DConditionModel], name: str, device: torch.device) -> str:
    """Select the attention of UNets; returns the one in use.

    Where the wanted one cannot run (xformers needs CUDA and its package, a kernel its hardware), PyTorch's own choice
    serves, and one notice says so.
    """
    try:
        if name == "xformers":
            if device.type != "cuda":
                raise ModuleNotFoundError("it has no attention for the CPU")
            for unet in unets:
                unet.enable_xformers_memory_efficient_attention()
            return name
        kernel = _SDPA_KERNELS.get(name)
        if kernel is not None:
            _try_attention(kernel, device)
    except (ModuleNotFoundError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        _notice(f"model.attention = '{name}' cannot be used here ({reason}); SDPA serves instead")
        name, kernel = "sdpa", None
    for unet in unets:
        unet.set_attn_processor(AttnProcessor() if name == "eager" else Attention(kernel))
    return name


def _try_attention(kernel: SDPBackend, device: torch.device) -> None:
    """Raise RuntimeError where a kernel cannot compute attention of SDXL's heads, forward and backward."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    with sdpa_kernel(kernel), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells, at length, why each kernel was not taken
        F.scaled_dot_product_attention(x, x, x).sum().backward()


class Denoiser:
    """A UNet as the method sees it: predictions for pairs, in float32, whatever it computes in."""

    def __init__(
        self, unet: nn.Module, source: Source, schedule: NoiseSchedule, precision: str, device: torch.device
    ) -> None:
        self.unet = unet
        self.velocity = source.prediction_type == "v_prediction"
        self.dtype = COMPUTE_DTYPES[precision]
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if precision == "bf16-autocast":
            self.autocast = partial(torch.autocast, device.type, torch.bfloat16)
        alphas = torch.from_numpy(schedule.alphas_cumprod.astype(np.float64))
        self.signal = alphas.sqrt().float().to(device)
        self.noise = (1 - alphas).sqrt().float().to(device)

    def __call__(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """What the network predicts (eps or v): x [B, 2, C, H, W], time [B], cond of B rows -> like x, float32."""
        return self.predict(x, time, self.told(cond))

    def eps(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """The noise prediction, also of a network that predicts v = signal eps - noise x_0."""
        return self.as_eps(self(x, time, cond), x, time)

    def told(self, cond: Conditioning) -> dict[str, Any]:
        """What the UNet is given beside x and the timestep, a row a picture: 2 B rows in its dtype."""

        told: dict[str, Any] = {"encoder_hidden_states": cond.prompt.to(self.dtype).repeat_interleave(2, dim=0)}
        if cond.pooled is not None and cond.time_ids is not None:
            ids = (
                cond.time_ids
            )  # sizes and crops: a row a pair, or one for each picture; half precision would round them
            told["added_cond_kwargs"] = {
                "text_embeds": cond.pooled.to(self.dtype).repeat_interleave(2, dim=0),
                "time_ids": ids.flatten(0, 1) if ids.ndim == 3 else ids.repeat_interleave(2, dim=0),
            }
        return told

    def predict(self, x: Tensor, time: Tensor, told: Mapping[str, Any]) -> Tensor:
        """As a call, with what ``told`` made of the conditioning."""
        with self.autocast():
            out = self.unet(x.flatten(0, 1).to(self.dtype), time.repeat_interleave(2), return_dict=False, **told)[0]
        return out.float().unflatten(0, x.shape[:2])

    def as_eps(self, prediction: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """The noise that a prediction at x implies."""
        if not self.velocity:
            return prediction
        at = time.clamp(min=0)
        signal, noise = (table[at][:, None, None, None, None] for table in (self.signal, self.noise))
        return signal * prediction + noise * x

    def target(self, x_0: Tensor, tau: Tensor, time: Tensor) -> Tensor:
        """What the network should have predicted at x_t = signal_t x_0 + noise_t tau: [B, 2, C, H, W]; time [B]."""
        if not self.velocity:
            return tau
        signal, noise = (table[time][:, None, None, None, None] for table in (self.signal, self.noise))
        return signal * tau - noise * x_0


class Encoders:
    """VAE and text encoders in float32: what preparing a cache needs and training does not."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.kind, self.device = source.kind, device
        self.identity = encoders_identity(source)
        self.vae = _load(AutoencoderKL, source.vae_folder, source.variant, torch.float32).to(device).eval()
        self.channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # px of a picture to one of its latent
        encoders = (CLIPTextModel, CLIPTextModelWithProjection)
        self.text = [
            (
                CLIPTokenizer.from_pretrained(source.folder / tokenizer),
                _load(cls, source.folder / encoder, source.variant, torch.float32).to(device).eval(),
            )
            for (tokenizer, encoder), cls in zip(TEXT_PARTS[source.kind], encoders, strict=False)
        ]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, times the scaling factor: [N, 3, R, R'] in [-1, 1] -> [N, C, H, W].

        Raises FloatingPointError when the VAE gives NaN or infinity (SDXL's own VAE does in fp16; this is fp32).
        """
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        mean, std = (posterior.mean - shift) * scale, posterior.std * scale
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise FloatingPointError("the VAE gave NaN or infinity")
        return mean, std

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Token embeddings [N, S, D] and, for SDXL, the pooled embedding [N, E], as the pipelines make them."""
        states, pooled = [], None
        for tokenizer, encoder in self.text:
            ids = self._tokens(tokenizer, prompts, truncation=True, padding="max_length", return_tensors="pt")
            out = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if self.kind == "sdxl" else out.last_hidden_state)
            pooled = out.text_embeds if self.kind == "sdxl" and hasattr(out, "text_embeds") else pooled
        return torch.cat(states, dim=-1), pooled

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the text encoders read."""
        tokenizer = self.text[0][0]
        return sum(
            len(ids) > tokenizer.model_max_length for ids in self._tokens(tokenizer, list(prompts), truncation=False)
        )

    @staticmethod
    def _tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str], **options: Any) -> Any:
        return tokenizer(list(prompts), max_length=tokenizer.model_max_length, **options).input_ids


def export_pipeline(source: Source, state: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the pipeline with the trained UNet: a folder that diffusers loads as it is.

    state: all parameters of the UNet by name, written as ``dtype``. The other parts are copied, not loaded and saved:
    they are the very files that were trained with, readable by the library versions that read them before.
    Raises RuntimeError when names or shapes differ from the UNet's.
    """
    unet = empty_unet(source)
    unet.load_state_dict({name: value.to(getattr(torch, dtype)) for name, value in state.items()}, assign=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.folder / "model_index.json", folder / "model_index.json")
    for part in (*_PARTS[2:], *_OPTIONAL_PARTS):
        if (source.folder / part).is_dir():
            _copy_part(source.folder / part, folder / part, source.variant)
    _copy_part(source.vae_folder, folder / "vae", source.variant)
    unet.save_pretrained(folder / "unet", safe_serialization=True)


def _copy_part(here: Path, there: Path, variant: str | None) -> None:
    """Copy a part's configuration and weights; the chosen variant's weights get the plain name."""
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    weights = [f for f in here.glob("*.safetensors") if not _variant_of(f)]
    if variant and (chosen := [f for f in here.glob("*.safetensors") if _variant_of(f) == variant]):
        weights = chosen
    for file in [*here.glob("*.json"), *here.glob("*.txt"), *weights]:
        shutil.copyfile(file, there / file.name.replace(f".{_variant_of(file)}.", "."))


def _variant_of(file: Path) -> str:
    """'fp16' of ``model.fp16.safetensors``, '' of ``model.safetensors`` and of files that are no weights."""
    return "".join(file.name.split(".")[1:-1]) if file.suffix == ".safetensors" else ""


def pipeline_class(source: Source) -> Any:
    """The diffusers class of a source's pipeline."""
    return StableDiffusionXLPipeline if source.kind == "sdxl" else StableDiffusionPipeline


def pipeline(source: Source, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of a source, with the UNet and the VAE that training takes."""
    own = {"unet": (UNet2DConditionModel, source.unet_folder), "vae": (AutoencoderKL, source.vae_folder)}
    parts = {
        name: _load(cls, folder, source.variant, dtype)
        for name, (cls, folder) in own.items()
        if folder != source.folder / name
    }
    return pipeline_class(source).from_pretrained(
        source.folder, dtype=dtype, variant=source.variant, use_safetensors=True, **parts
    )


def _load(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    if variant and not list(folder.glob(f"*.{variant}*.safetensors")):
        warn0(f"{folder} has no '{variant}' weights; its plain ones are taken")
        variant = None
    try:
        return cls.from_pretrained(folder, variant=variant, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder}: cannot be loaded as {cls.__name__} (safetensors only): {error}") from error


def _folder(where: str, key: str, model: settings.Model) -> Path:
    if Path(where).is_dir():
        return Path(where)
    if where.startswith((".", "/", "~")) or where.count("/") != 1:
        raise SettingsError(f"{key}: '{where}' is neither a folder nor a hub id (owner/name)")
    try:
        wanted, unwanted = _wanted_files(model.variant)
        revision = model.revision or None
        return Path(snapshot_download(where, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(f"{key}: '{where}' is no folder here, and the hub gave: {error}") from error


def _wanted_files(variant: str) -> tuple[list[str], list[str]]:
    """Patterns of a hub repository's files to fetch, and not: configurations and one variant of the weights."""
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    inside = [f"{part}/{p}" for part in (*_PARTS, *_OPTIONAL_PARTS) for p in ("*.json", "*.txt", weights)]
    alone = ["config.json", "model_index.json", "diffusion_pytorch_model.safetensors"]
    others = [] if variant else ["*.fp16.safetensors", "*.bf16.safetensors", "*non_ema*"]
    return [*inside, *alone, f"diffusion_pytorch_model{weights[1:]}"], others


def _part(folder: Path, name: str) -> Path:
    """A part's folder: below a pipeline, or given itself."""
    part = folder / name if (folder / name).is_dir() else folder
    if not (part / "config.json").is_file():
        raise SettingsError(f"model.{name}: {folder} has neither {name}/config.json nor config.json")
    return part


def _read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{key}: {file} cannot be read: is this a diffusers pipeline folder? ({error})") from error
