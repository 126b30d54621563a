"""Reading published reward-model weights and converting them to the layouts of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smpo_fast.common import remote
from smpo_fast.common.errors import UserError


def checkpoint(place: str, names: Sequence[str]) -> Path:
    """The first of the files ``names`` at ``place``: a folder, a hub id, or the file itself; raises SettingsError."""
    path = Path(place).expanduser()
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"the folder {path} has no file named {' or '.join(names)}")
        return found[0]
    if path.is_file():
        return path if path.suffix in {Path(name).suffix for name in names} else checkpoint(str(path.parent), names)
    if not remote.is_hub_id(place):
        raise UserError(f"'{place}' is neither a file or folder here nor a hub id (owner/name)")
    return remote.fetch_file(place, names)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name from safetensors or a PyTorch file, also below its key 'state_dict'; no object is made of it."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's errors, which are imported nowhere here
        raise UserError(f"{file} cannot be read as a file of nothing but tensors: {error}") from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} holds no table of tensors by name")
    return dict(found)


def _pretrained(cls: Any, place: str) -> Any:
    """A model of which every weight was there; transformers draws the others at random, and merely says so."""
    try:
        model, loading = cls.from_pretrained(place, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{place} cannot be loaded as a {cls.__name__} from safetensors: {error}") from error
    absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if absent:
        raise UserError(f"{place} is no whole {cls.__name__}: {len(absent)} weights are not there, as {absent[0]}")
    return model


def _first(cls: Any, places: Sequence[str]) -> Any:
    """A tokenizer or processor from the first of the places that has one."""
    errors = []
    for place in dict.fromkeys(places):
        try:
            return cls.from_pretrained(str(Path(place).parent) if Path(place).is_file() else place)
        except (OSError, ValueError, TypeError) as error:
            errors.append(f"{place}: {error}")
    raise UserError(f"no {cls.__name__}: {'; '.join(errors)}")


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
    """OpenCLIP's ViT-H-14, or one of its shape (heads of 80 in pictures, 64 in text, exact GELU), as a CLIPModel.

    Raises SettingsError for weights of another network.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        patch, picture, text = (weights[n] for n in ("visual.conv1.weight", "visual.proj", "text_projection"))
        vocabulary, context = weights["token_embedding.weight"].shape[0], weights["positional_embedding"].shape[0]
        side = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5) * patch.shape[-1]
        vision = _shape(weights, "visual.transformer.resblocks", picture.shape[0], 80)
        words = _shape(weights, "transformer.resblocks", text.shape[0], 64)
    except KeyError as error:
        raise UserError(f"these are not the weights of an OpenCLIP ViT-H-14: there is no {error}") from error
    # The end of a text is its highest token id; transformers looks for the first of eos_token_id.
    words |= {"vocab_size": vocabulary, "max_position_embeddings": context, "eos_token_id": vocabulary - 1}
    vision |= {"image_size": side, "patch_size": patch.shape[-1]}
    model = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=picture.shape[1]))
    return _filled(model, _clip_names(weights), "an OpenCLIP ViT-H-14")


def blip_from_original(weights: Mapping[str, Tensor], med: Mapping[str, Any]) -> tuple[Any, Any]:
    """BLIP's picture and text encoders (``visual_encoder.*``, ``text_encoder.*``; ``med``: BERT's configuration).

    Other parts of a checkpoint (projections, decoder, momentum copies) are left out.  Raises SettingsError.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    pictures, words = _below(weights, "visual_encoder."), _below(weights, "text_encoder.")
    words.pop("embeddings.position_ids", None)
    for old, new in _BLIP_VISION:
        pictures = {re.sub(old, new, name): value for name, value in pictures.items()}
    try:
        patch, places = (pictures[f"embeddings.{n}"] for n in ("patch_embedding.weight", "position_embedding"))
        width, side = patch.shape[0], round((places.shape[1] - 1) ** 0.5) * patch.shape[-1]
        shape = _shape(pictures, "encoder.layers", width, 64)
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        size = {key: med[key] for key in (*keys, "max_position_embeddings", "layer_norm_eps", "hidden_act")}
    except KeyError as error:
        raise UserError(f"these are not ImageReward's weights and med_config.json: there is no {error}") from error
    vision = BlipVisionModel(
        BlipVisionConfig(**{**shape, "layer_norm_eps": 1e-6}, image_size=side, patch_size=patch.shape[-1])
    )
    text = BlipTextModel(BlipTextConfig(**size, encoder_hidden_size=width), add_pooling_layer=False)
    return _filled(vision, pictures, "ImageReward's BLIP"), _filled(text, words, "ImageReward's BLIP")


def head_from(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """The MLP of five linear layers and nothing between them, ``layers.0 .. layers.7``, in float32."""
    places = (0, 2, 4, 6, 7)  # dropout stood between
    if {f"layers.{i}.{kind}" for i in places for kind in ("weight", "bias")} != set(weights):
        raise UserError(f"these are not the weights of the head (layers.0 .. layers.7), but {', '.join(weights)}")
    head = nn.Sequential()
    for i in places:
        weight = weights[f"layers.{i}.weight"].float()
        head.append(nn.Linear(weight.shape[1], weight.shape[0]))
        head[-1].load_state_dict({"weight": weight, "bias": weights[f"layers.{i}.bias"].float()})
    return head.eval().requires_grad_(False)


def _shape(weights: Mapping[str, Tensor], layers: str, width: int, head: int) -> dict[str, Any]:
    """Width, depth, heads and inner width of a transformer, from the names and shapes of its weights."""
    if width % head:
        raise UserError(f"a network of width {width} has no heads of {head}: these are weights of another one")
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
    """A model with exactly these weights in float32: none missing, none left over."""
    needed = {name for name, _ in model.named_parameters()}
    if needed != set(weights):
        wrong = sorted(needed ^ set(weights))
        raise UserError(f"these are not the weights of {what}: {len(wrong)} names differ, such as {wrong[0]}")
    try:
        model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    except RuntimeError as error:
        raise UserError(f"these are not the weights of {what}: {error}") from error
    return model


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
