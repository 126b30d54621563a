"""What a file's header says: which checkpoints are supported, and what all others are called. Headers of true size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as diffusers_tables
from helpers.pipelines import settings
from helpers.single_files import true_shapes, write, write_header
from transformers import CLIPTokenizer

from smpo_fast.common.errors import ModelError
from smpo_fast.config import loading
from smpo_fast.config.commands import PlanArguments
from smpo_fast.models import locate, public_pipelines
from smpo_fast.models.config_files import read_object
from smpo_fast.models.load import load_network
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.parts import empty_state
from smpo_fast.models.single_file.recognise import recognise
from smpo_fast.planning.plan import plan

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."
# Tensors and parameters of the published networks.
COUNTS = {
    ("sdxl", "unet"): (1680, 2_567_463_684),
    ("sdxl", "vae"): (248, 83_653_863),
    ("sdxl", "text_encoder"): (196, 123_060_480),
    ("sdxl", "text_encoder_2"): (517, 694_659_840),
    ("sd15", "unet"): (686, 859_520_964),
    ("sd15", "vae"): (248, 83_653_863),
    ("sd15", "text_encoder"): (196, 123_060_480),
}


@pytest.fixture(scope="module")
def shapes() -> dict[str, Shapes]:
    """Names and shapes of the tensors of SDXL and SD1.5 checkpoints."""
    return {kind: true_shapes(kind) for kind in ("sdxl", "sd15")}


@pytest.mark.parametrize(("kind", "part"), COUNTS, ids="-".join)
def test_the_shipped_configurations_are_the_published_networks(kind: str, part: str) -> None:
    state = empty_state(part, read_object(public_pipelines.folder(kind) / part / "config.json"))
    assert (len(state), sum(value.numel() for value in state.values())) == COUNTS[kind, part]


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_names_are_those_that_diffusers_conversion_expects(kind: str) -> None:
    """Its tables turn each of our names back into the one that it came from, and none is left over."""
    for part, cls, convert in (
        ("unet", UNet2DConditionModel, diffusers_tables.convert_ldm_unet_checkpoint),
        ("vae", AutoencoderKL, diffusers_tables.convert_ldm_vae_checkpoint),
    ):
        config = cls.load_config(public_pipelines.folder(kind) / part)
        names = layout.original_names(part, empty_state(part, config), config)
        numbered = dict(enumerate(names))
        marked = {layout.PREFIXES[kind][part] + names[name].name: torch.tensor([i]) for i, name in numbered.items()}
        assert len(marked) == len(names)
        assert {name: numbered[int(value)] for name, value in convert(marked, config).items()} == {n: n for n in names}


def test_a_checkpoint_has_as_many_tensors_as_the_published_one(shapes: dict[str, Shapes]) -> None:
    """sd_xl_base_1.0.safetensors has 2,515: these, position_ids of the first encoder, logit_scale of the second."""
    assert len(shapes["sdxl"]) == 1680 + 248 + 196 + 389 == 2515 - 2
    assert shapes["sdxl"]["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert len(shapes["sd15"]) == 686 + 248 + 196


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_checkpoint_is_recognised_by_its_tensors(kind: str, shapes: dict[str, Shapes], tmp_path: Path) -> None:
    found = recognise(write_header(tmp_path / "a.safetensors", shapes[kind]), "model.path")
    assert (found.kind, found.prediction_type, found.zero_terminal_snr) == (kind, "epsilon", False)
    assert set(found.parts) == set(layout.PREFIXES[kind])
    assert found.bytes_of("unet") == 2 * COUNTS[kind, "unet"][1]


@pytest.mark.parametrize(
    ("extra", "metadata", "expected"),
    [
        ({"v_pred": (0,)}, {}, ("v_prediction", False, "v_pred marker")),
        ({"v_pred": (0,), "ztsnr": (0,)}, {}, ("v_prediction", True, "v_pred marker, ztsnr marker")),
        ({}, {"modelspec.prediction_type": "v"}, ("v_prediction", False, "modelspec.prediction_type")),
        ({}, {"modelspec.prediction_type": "epsilon"}, ("epsilon", False, "modelspec.prediction_type")),
        ({}, {"ss_zero_terminal_snr": "True"}, ("epsilon", True, "ss_zero_terminal_snr")),
        ({}, {"ss_zero_terminal_snr": "False"}, ("epsilon", False, "")),
    ],
)
def test_markers_and_metadata(
    extra: Shapes, metadata: dict[str, str], expected: tuple[str, bool, str], shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    found = recognise(write_header(tmp_path / "a.safetensors", shapes["sdxl"] | extra, **metadata), "model.path")
    assert (found.prediction_type, found.zero_terminal_snr, found.clues) == expected
    assert not found.warnings


def test_a_marker_that_the_metadata_contradict_is_believed_with_a_warning(
    shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    content = shapes["sdxl"] | {"v_pred": (0,)}
    file = write_header(tmp_path / "a.safetensors", content, **{"modelspec.prediction_type": "epsilon"})
    found = recognise(file, "model.path")
    assert found.prediction_type == "v_prediction" and "'epsilon': v is taken" in found.warnings[0]


@pytest.mark.parametrize("name", ["dreamshaperXL_v21TurboDPMSDE", "sdxl_lightning_4step", "LCM dreamshaper"])
def test_distilled_networks_are_warned_of(name: str, shapes: dict[str, Shapes], tmp_path: Path) -> None:
    by_name = recognise(write_header(tmp_path / f"{name}.safetensors", shapes["sdxl"]), "model.path")
    title = {"modelspec.title": name}
    by_title = recognise(write_header(tmp_path / "a.safetensors", shapes["sdxl"], **title), "model.path")
    assert "its file name: a network distilled" in by_name.warnings[0]
    assert "its modelspec.title: a network distilled" in by_title.warnings[0]


def wider(name: str, size: int) -> Callable[[Shapes], Shapes]:
    """The same checkpoint with ``size`` in the second dimension of all tensors with this ending."""
    return lambda shapes: {n: (s[0], size, *s[2:]) if n.endswith(name) else s for n, s in shapes.items()}


def refiner(shapes: Shapes) -> Shapes:
    found = wider("attn2.to_k.weight", 1280)(wider("label_emb.0.0.weight", 2560)(shapes))
    return {n.replace("embedders.1.", "embedders.0."): s for n, s in found.items() if ".embedders.0." not in n}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (refiner, "prompts of width 1280, added embeddings of width 2560: it is the SDXL refiner"),
        (wider("input_blocks.0.0.weight", 9), "9 input channels, 4 are supported: it is an inpainting UNet"),
        (wider("input_blocks.0.0.weight", 16), "a UNet for the latents of Flux's VAE"),
        (wider("input_blocks.0.0.weight", 32), "a UNet for the latents of Flux.2's VAE"),
        (wider("input_blocks.0.0.weight", 7), "7 input channels, 4 are supported: it is a UNet for other inputs"),
        (wider("first_stage_model.decoder.conv_in.weight", 16), "VAE with 16 latent channels"),
        (wider("attn2.to_k.weight", 640), "another architecture than SDXL and SD1.5"),
        (lambda s: s | {"edm_mean": (4,)}, "'edm_mean': it was trained with EDM noise levels"),
        (lambda s: s | {"edm_vpred.sigma_max": ()}, "'edm_vpred.sigma_max'"),
        (lambda s: s | {"scaled_fp8": (0,)}, "is quantised"),
        (lambda s: {n: v for n, v in s.items() if n.startswith("first_stage")}, "is a VAE without a UNet"),
        (lambda s: {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (2, 2)}, "Stable Diffusion 3"),
        (lambda s: {"double_blocks.0.img_attn.norm.key_norm.scale": (2,)}, "is Flux, not SDXL"),
        (lambda s: {"control_model.time_embed.0.weight": (2, 2)}, "is a ControlNet"),
        (lambda s: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 2)}, "is a LoRA: give it as"),
        (lambda s: {"unet.conv_in.lora_A.weight": (2, 2)}, "is a LoRA: give it as"),
        (lambda s: {"clip_g": (2, 1280), "clip_l": (2, 768)}, "has no UNet of SDXL or SD1.5 .it holds 'clip_g'"),
        (lambda s: {}, "it holds no tensors"),
    ],
)
def test_other_files_are_refused_by_name(
    change: Callable[[Shapes], Shapes], message: str, shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    file = write_header(tmp_path / "a.safetensors", change(shapes["sdxl"]))
    with pytest.raises(ModelError, match=f"model.path: {file} .*{message}"):
        locate.find(settings(file))


def test_stable_diffusion_2_is_refused_by_name(shapes: dict[str, Shapes], tmp_path: Path) -> None:
    file = write_header(tmp_path / "a.safetensors", wider("attn2.to_k.weight", 1024)(shapes["sd15"]))
    with pytest.raises(ModelError, match="it is Stable Diffusion 2: use an SDXL or SD1.5 checkpoint"):
        locate.find(settings(file))


def test_float8_is_refused(shapes: dict[str, Shapes], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is F8_E4M3., which cannot be trained"):
        locate.find(settings(write_header(tmp_path / "a.safetensors", shapes["sd15"], "F8_E4M3")))


def test_rectified_flow_is_refused(shapes: dict[str, Shapes], tmp_path: Path) -> None:
    said = {"modelspec.prediction_type": "rectified_flow"}
    with pytest.raises(ModelError, match="predicts 'rectified_flow'"):
        locate.find(settings(write_header(tmp_path / "a.safetensors", shapes["sdxl"], **said)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"PK", "is a pickled checkpoint"),
        ("a.safetensors", b"<html>not found</html>", "is not a safetensors file"),
        ("a.safetensors", b"", "is not a safetensors file"),
        ("a.safetensors", b"\x02\0\0\0\0\0\0\0[]", "is not a safetensors file"),
        ("a.safetensors", b'\x0a\0\0\0\0\0\0\0{"a": "b"}', "is not a safetensors file"),
        ("a.gguf", b"GGUF\x03\0\0\0\0\0\0\0", "is not a safetensors file"),
    ],
)
def test_other_formats_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        locate.find(settings(tmp_path / name))


def test_a_download_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": torch.ones(99)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="it was cut off; fetch it again"):
        locate.find(settings(file))


def test_a_file_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(ModelError, match="'models/noob.safetensors' is neither a folder .* there is no such file"):
        locate.find(settings("models/noob.safetensors"))


def test_a_unet_of_another_kind_is_refused(shapes: dict[str, Shapes], tmp_path: Path) -> None:
    file = write_header(tmp_path / "unet.safetensors", shapes["sd15"])
    with pytest.raises(ModelError, match="model.unet: .* is a UNet of sd15, but model.path is of sdxl"):
        locate.find(settings("embedded", unet=str(file)))


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_run_is_planned_without_hub_and_weights(kind: str) -> None:
    run = loading.from_dict({"model": {"path": kind}, "data": {"resolution": 1024 if kind == "sdxl" else 512}})
    found: dict[str, Any] = plan(run, PlanArguments(gpu="H100"))
    assert found["parameters"]["trained"] == COUNTS[kind, "unet"][1]
    with pytest.raises(ModelError, match=f"'{kind}' has configurations only.*'{public_pipelines.HUB_IDS[kind]}'"):
        source = locate.find(run.model)
        load_network(UNet2DConditionModel, source.unet_folder, None, torch.float32)


def test_the_plan_of_a_file_shows_what_was_recognised_and_counts_the_converted_copy(
    shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    file = write_header(tmp_path / "v.safetensors", shapes["sd15"] | {"v_pred": (0,)})
    run = loading.from_dict({"model": {"path": str(file)}, "data": {"resolution": 512}})
    found = plan(run, PlanArguments(gpu="H100"))
    assert found["model"] == f"sd15, v_prediction (v_pred marker), {file}"
    assert found["disk"]["converted model"] == 2 * sum(COUNTS["sd15", part][1] for part in layout.PREFIXES["sd15"])


@pytest.mark.parametrize(("part", "pad"), [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_the_tokenizer_is_clips(part: str, pad: int, tmp_path: Path) -> None:
    """Known ids of a known prompt, and of what lies outside ASCII; SDXL's second tokenizer pads with '!'."""
    config = (public_pipelines.folder("sdxl") / part / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    public_pipelines.write_vocabulary(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
    ids = tokenizer("a photo of an astronaut riding a horse", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 49407, *[pad] * 67]
    text = "café, über naïve 東京 🚀 42"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(
        " ", ""
    )
