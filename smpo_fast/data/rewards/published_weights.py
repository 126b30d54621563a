"""Loading published reward-model weights, and converting them to the layouts of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smpo_fast.common import remote
from smpo_fast.common.errors import ModelError


def weight_file(location: str, names: Sequence[str]) -> Path:
    """The first of the files ``names`` at a location: a folder, a hub id, or the path of the file itself.

    Raises ModelError if the location is none of them or has no such file, and EnvironmentProblem if the hub fails.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ModelError(f"the folder {path} has no file named {' or '.join(names)}")
        return found[0]
    if path.is_file():
        return path if path.suffix in {Path(name).suffix for name in names} else weight_file(str(path.parent), names)
    if not remote.is_hub_id(location):
        raise ModelError(f"'{location}' is neither a local file or folder nor a hub id (owner/name)")
    return remote.fetch_file(location, names)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors or PyTorch file, also those below its key 'state_dict'.

    Only tensors are read: nothing in the file is executed.  Raises ModelError if it holds anything else.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's errors, which this package does not import
        raise ModelError(f"{file} cannot be read as a file that contains only tensors: {error}") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{file} is not a dictionary of tensors by name")
    return dict(found)


def load_pretrained(cls: Any, location: str) -> Any:
    """Load a model of a class of transformers from safetensors.

    Raises ModelError if that fails, or if weights are missing: transformers initializes those at random with only a
    warning.
    """
    try:
        model, loading = cls.from_pretrained(
            location, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{location} cannot be loaded as a {cls.__name__} from safetensors: {error}") from error
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:
        raise ModelError(
            f"{location} is not a complete {cls.__name__}: {len(absent)} weights are missing, such as {absent[0]}"
        )
    return model


def load_first(cls: Any, locations: Sequence[str]) -> Any:
    """Load a tokenizer or processor from the first location that has one. Raises ModelError if none has."""
    errors = []
    for location in dict.fromkeys(locations):
        try:
            return cls.from_pretrained(str(Path(location).parent) if Path(location).is_file() else location)
        except (OSError, ValueError, TypeError) as error:
            errors.append(f"{location}: {error}")
    raise ModelError(f"no {cls.__name__} found: {'; '.join(errors)}")


_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_CLIP_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_CLIP_MATRICES = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}  # transposed
_CLIP_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_CLIP_PACKED = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_BLIP_VISION = (
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


def clip_from_open_clip(weights: Mapping[str, Tensor]) -> Any:
    """A CLIPModel from the weights of OpenCLIP's ViT-H-14, or of a network built like it.

    weights: tensors by name, any shape. The network has attention heads of width 80 for images and 64 for text, and
    exact GELU.  Raises ModelError for weights of another network.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        patch, image, text = (weights[n] for n in ("visual.conv1.weight", "visual.proj", "text_projection"))
        vocabulary, context = weights["token_embedding.weight"].shape[0], weights["positional_embedding"].shape[0]
        side = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5) * patch.shape[-1]
        vision = _dimensions(weights, "visual.transformer.resblocks", image.shape[0], 80)
        words = _dimensions(weights, "transformer.resblocks", text.shape[0], 64)
    except KeyError as error:
        raise ModelError(f"these are not the weights of an OpenCLIP ViT-H-14: there is no {error}") from error
    # OpenCLIP finds the end of a text at its highest token id, transformers at the first eos_token_id.
    words |= {"vocab_size": vocabulary, "max_position_embeddings": context, "eos_token_id": vocabulary - 1}
    vision |= {"image_size": side, "patch_size": patch.shape[-1]}
    model = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=image.shape[1]))
    return _filled(model, _clip_names(weights), "an OpenCLIP ViT-H-14")


def blip_from_original(weights: Mapping[str, Tensor], med: Mapping[str, Any]) -> tuple[Any, Any]:
    """BLIP's image and text encoders, from the weights ``visual_encoder.*`` and ``text_encoder.*``.

    weights: tensors by name, any shape; other parts of a checkpoint (projections, decoder, momentum copies) are
    ignored.  med: the configuration of BERT, as in med_config.json.  Raises ModelError for weights of another network.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    images, words = below(weights, "visual_encoder."), below(weights, "text_encoder.")
    words.pop("embeddings.position_ids", None)
    for old, new in _BLIP_VISION:
        images = {re.sub(old, new, name): value for name, value in images.items()}
    try:
        patch, positions = (images[f"embeddings.{n}"] for n in ("patch_embedding.weight", "position_embedding"))
        width, side = patch.shape[0], round((positions.shape[1] - 1) ** 0.5) * patch.shape[-1]
        shape = _dimensions(images, "encoder.layers", width, 64)
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        size = {key: med[key] for key in (*keys, "max_position_embeddings", "layer_norm_eps", "hidden_act")}
    except KeyError as error:
        raise ModelError(f"these are not ImageReward's weights and med_config.json: there is no {error}") from error
    vision = BlipVisionModel(
        BlipVisionConfig(**{**shape, "layer_norm_eps": 1e-6}, image_size=side, patch_size=patch.shape[-1])
    )
    text = BlipTextModel(BlipTextConfig(**size, encoder_hidden_size=width), add_pooling_layer=False)
    return _filled(vision, images, "ImageReward's BLIP"), _filled(text, words, "ImageReward's BLIP")


def head_from(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """An MLP of five linear layers with nothing between them, in float32.

    weights: ``layers.0 .. layers.7``, matrices [out, in] and biases [out].  Raises ModelError for other weights.
    """
    positions = (0, 2, 4, 6, 7)  # dropout was at the others
    if {f"layers.{i}.{kind}" for i in positions for kind in ("weight", "bias")} != set(weights):
        raise ModelError(f"these are not the weights of the head (layers.0 .. layers.7), but {', '.join(weights)}")
    head = nn.Sequential()
    for i in positions:
        weight = weights[f"layers.{i}.weight"].float()
        head.append(nn.Linear(weight.shape[1], weight.shape[0]))
        head[-1].load_state_dict({"weight": weight, "bias": weights[f"layers.{i}.bias"].float()})
    return head.eval().requires_grad_(False)


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors (any shape) whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _dimensions(weights: Mapping[str, Tensor], layers: str, width: int, head: int) -> dict[str, Any]:
    """Width, depth, heads and inner width of a transformer, from the names and shapes of its weights."""
    if width % head:
        raise ModelError(
            f"width {width} is no multiple of the heads' width {head}: these are weights of another network"
        )
    first = re.compile(re.escape(layers) + r"\.\d+\.mlp\.(c_fc|fc1)\.weight")
    inner = [value.shape[0] for name, value in weights.items() if first.fullmatch(name)]
    if not inner:
        raise KeyError(f"{layers}.0.mlp")
    return {
        "hidden_size": width,
        "num_hidden_layers": len(inner),
        "num_attention_heads": width // head,
        "intermediate_size": inner[0],
        "hidden_act": "gelu",
    }


def _clip_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        if packed := _CLIP_PACKED.fullmatch(name):
            for part, third in zip("qkv", value.chunk(3), strict=True):
                named[f"{_clip_layer(packed)}.self_attn.{part}_proj.{packed[3]}"] = third
        elif layer := _CLIP_LAYER.fullmatch(name):
            named[f"{_clip_layer(layer)}.{_LAYER.get(layer[3], 'self_attn.out_proj')}.{layer[4]}"] = value
        elif name in _CLIP_MATRICES:
            named[_CLIP_MATRICES[name]] = value.T
        elif name != "attn_mask":  # a constant
            named[_CLIP_NAMES.get(name, name)] = value
    return named


def _clip_layer(match: re.Match[str]) -> str:
    return f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"


def _filled(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> nn.Module:
    """The model with exactly these weights, in float32."""
    needed = {name for name, _ in model.named_parameters()}
    if needed != set(weights):
        wrong = sorted(needed ^ set(weights))
        raise ModelError(f"these are not the weights of {what}: {len(wrong)} names differ, such as {wrong[0]}")
    try:
        model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    except RuntimeError as error:
        raise ModelError(f"these are not the weights of {what}: {error}") from error
    return model
