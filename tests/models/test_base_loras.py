"""LoRAs that are part of the base: the weights that diffusers fuses, whatever program named the layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.pipelines import CPU, Maker, settings
from helpers.single_files import MINIATURE, pipeline_tensors
from helpers.small_run import run
from safetensors.torch import load_file, save_file

from smpo_fast.common.errors import ModelError
from smpo_fast.config import loading
from smpo_fast.models import locate
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.export import export_pipeline, exported_model
from smpo_fast.models.identity import base_identity, encoders_identity
from smpo_fast.models.load import load_pipeline, load_unet
from smpo_fast.models.single_file import layout
from smpo_fast.models.single_file.parts import classic_names
from smpo_fast.models.single_file.write import write_single_file

RANK, ONE = 2, torch.ones(1)
LAYERS = ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1", "conv_in",
          "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0")  # fmt: skip
Tensors = dict[str, torch.Tensor]


def unet(**values: object) -> torch.nn.Module:
    model = settings("embedded", **values)
    return load_unet(locate.find(model), model, torch.float32, CPU)


def matrices(layers: tuple[str, ...] = LAYERS) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random down and up matrices for some layers of the miniature."""
    weights, seeded = dict(unet().named_parameters()), torch.Generator().manual_seed(3)
    found = {}
    for layer in layers:
        out, *inner = weights[f"{layer}.weight"].shape
        up = torch.randn(out, RANK, *[1] * (len(inner) - 1), generator=seeded)
        found[layer] = (torch.randn(RANK, *inner, generator=seeded), up)
    return found


def kohya(alpha: float, original: bool) -> Tensors:
    names = {f"{layer}.weight" for layer in dict(unet().named_modules())}
    found = {}
    for layer, (down, up) in matrices().items():
        name = layer
        if original:
            known = layout.original_names("unet", set(unet().state_dict()) & names, unet().config)[f"{layer}.weight"]
            name = known.name.removesuffix(".weight")
        stem = f"lora_unet_{name.replace('.', '_')}"
        found |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
    return found


def peft(prefix: str) -> Tensors:
    pairs = matrices().items()
    return {f"{prefix}{n}.lora_{ab}.weight": t for n, both in pairs for ab, t in zip("AB", both, strict=True)}


def diffusers() -> Tensors:
    found = {}
    for layer, (down, up) in matrices().items():
        found |= {f"unet.{layer}.lora.down.weight": down, f"unet.{layer}.lora.up.weight": up}
    return found


def processors() -> Tensors:
    """diffusers' first names, of attention processors."""
    found = {}
    for layer, (down, up) in matrices((LAYERS[0], LAYERS[3])).items():
        stem = f"unet.{layer.removesuffix('.0').replace('.to_', '.processor.to_')}_lora"
        found |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return found


def said(**values: object) -> dict[str, str]:
    """peft's settings in a file's metadata."""
    settings_of_peft = {"unet.r": RANK, "unet.target_modules": list(LAYERS)}
    return {"lora_adapter_metadata": json.dumps(settings_of_peft | {f"unet.{k}": v for k, v in values.items()})}


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        (kohya(1.0, original=False), {}),
        (kohya(4.0, original=True), {}),
        (peft("unet."), {}),
        (peft("unet."), said(lora_alpha=6)),
        (peft("unet."), said(lora_alpha=6, use_rslora=True)),
        (peft("unet."), said(lora_alpha=6, alpha_pattern={"conv_in": 3, "^mid_block.resnets.0.conv1": 5, "q": 9})),
        (diffusers(), {}),
        (processors(), {}),
    ],
    ids=["kohya", "kohya, original names", "peft", "alpha in metadata", "rslora", "alphas of layers", "diffusers",
         "processors"],
)  # fmt: skip
def test_the_weights_are_those_that_diffusers_fuses(tensors: Tensors, facts: dict[str, str], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", **facts})
    pipe = StableDiffusionXLPipeline.from_pretrained(MINIATURE, dtype=torch.float32)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    fused = pipe.unet.state_dict()
    found = unet(lora=[f"{tmp_path}/a.safetensors:0.5"]).state_dict()
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert changed == {name for name in before if not torch.equal(fused[name], before[name])} and changed
    for name in changed:
        torch.testing.assert_close(found[name], fused[name], rtol=1e-5, atol=1e-5)


def test_a_folder_of_peft_has_its_alpha_beside_it(tmp_path: Path) -> None:
    save_file(peft("base_model.model."), tmp_path / "adapter_model.safetensors")
    plain = unet(lora=[str(tmp_path)]).state_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 2 * RANK}))
    double, twice = unet(lora=[str(tmp_path)]).state_dict(), unet(lora=[f"{tmp_path}:2"]).state_dict()
    base = unet().state_dict()["conv_in.weight"]
    once, *more = (state["conv_in.weight"] - base for state in (plain, double, twice))
    torch.testing.assert_close(more, [2 * once, 4 * once])


def test_several_loras_add_up_in_every_copy_of_the_base(tmp_path: Path) -> None:
    """Policy, reference and the evaluation's base: all are loaded from one source."""
    save_file(peft("unet."), tmp_path / "a.safetensors")
    words = [f"{tmp_path}/a.safetensors:0.25", f"{tmp_path}/a.safetensors:0.75"]
    one, both = unet(lora=[f"{tmp_path}/a.safetensors"]).state_dict(), unet(lora=words).state_dict()
    torch.testing.assert_close(both, one)
    source = locate.find(settings("embedded", lora=words))
    torch.testing.assert_close(load_pipeline(source, torch.float32).unet.state_dict(), both, rtol=0, atol=0)
    assert source.describe().endswith(f" + {tmp_path}/a.safetensors at 0.25 + {tmp_path}/a.safetensors at 0.75")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (peft("unet.") | {"text_encoder.layers.0.q_proj.lora_A.weight": ONE}, "text encoders do not have"),
        (peft("unet.") | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ONE}, "text encoders do not have"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ONE}, "is no LoRA of this pipeline|text encoders"),
        (kohya(1, original=False) | {"lora_unet_conv_in.dora_scale": torch.ones(1)}, "is a DoRA"),
        (kohya(1, original=False) | {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "is of LyCORIS"),
        (peft("unet.up_blocks.7."), "is no LoRA of this pipeline: .*and 5 more tensors"),
        ({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, "is no LoRA of this pipeline"),
        ({}, "it is empty"),
        ({"unet.conv_in.lora_A.weight": torch.ones(2, 9, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(40, 2, 1, 1)},
         r"do not fit conv_in.weight \[40, 4, 3, 3\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_refused_before_anything_is_loaded(
    tensors: Tensors, message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=message):
        locate.find(settings("embedded", lora=[f"{tmp_path}/a.safetensors"]))


@pytest.mark.parametrize(
    "facts",
    [
        "{",
        "3",
        "[[1, 2]]",
        *(json.dumps({"unet.alpha_pattern": found}) for found in (3, {"conv_in": "x"}, {"conv_.*": 4})),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(facts: str, tmp_path: Path) -> None:
    save_file(peft("unet."), tmp_path / "a.safetensors", {"lora_adapter_metadata": facts})
    with pytest.raises(ModelError, match=r"peft settings .* cannot be read|by a pattern \('conv_\.\*'\)"):
        locate.find(settings("embedded", lora=[f"{tmp_path}/a.safetensors"]))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ModelError, match="model.lora: './none:0.5' is neither a .safetensors file nor a folder"):
        locate.find(settings("embedded", lora=["./none:0.5"]))


def test_a_run_with_another_scale_does_not_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what it exports contains the LoRA, which is not added again."""
    save_file({name: 0.1 * value for name, value in peft("unet.").items()}, tmp_path / "a.safetensors")
    words = ["run.steps=1", "optim.lr=1e-6", "data.max_pairs=6"]
    assert run(tmp_path / "r", *words, f'model.lora=["{tmp_path}/a.safetensors"]') == 0
    assert run(tmp_path / "r", *words, f'model.lora=["{tmp_path}/a.safetensors:0.5"]', "run.steps=2") == 2
    assert "loras" in capsys.readouterr().err
    exported = exported_model(loading.load(tmp_path / "r" / "config.toml").model, tmp_path / "r" / "export")
    trained = load_pipeline(locate.find(exported), torch.float32).unet.state_dict()
    merged = unet(lora=[f"{tmp_path}/a.safetensors"]).state_dict()
    torch.testing.assert_close(trained, merged, rtol=0, atol=1e-4)


def test_the_base_is_identified_by_content_and_scale(tmp_path: Path) -> None:
    save_file(peft("unet."), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    words: list[list[str]] = [[], ["a.safetensors"], ["b.safetensors"], ["a.safetensors:0.5"]]
    found = [base_identity(locate.find(settings("embedded", lora=[f"{tmp_path}/{w}" for w in ws]))) for ws in words]
    assert isinstance(found[0], str) and found[1] == found[2]
    assert found[1] not in (found[0], found[3])


# --- text encoders ----------------------------------------------------------------------------------------------

TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc2")


def text_matrices(part: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random down and up matrices for some layers of a text encoder of the miniature."""
    weights, seeded = pipeline_tensors(MINIATURE, part), torch.Generator().manual_seed(len(part))
    names = [*TEXT_LAYERS, *(["text_projection"] if part == "text_encoder_2" else [])]
    found = {}
    for name in names:
        layer = name if name == "text_projection" else f"text_model.{name}"
        out, inner = weights[f"{layer}.weight"].shape
        found[layer] = (torch.randn(RANK, inner, generator=seeded), torch.randn(out, RANK, generator=seeded))
    return found


def kohya_text(prefixes: dict[str, str]) -> Tensors:
    found = {}
    for part, prefix in prefixes.items():
        for layer, (down, up) in text_matrices(part).items():
            stem = f"{prefix}_{layer.replace('.', '_')}"
            found |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(3.0),
            }
    return found


def peft_text(outer: str, parts: tuple[str, ...] = ("text_encoder", "text_encoder_2")) -> Tensors:
    return {
        f"{part}.{layer.replace('text_model.', outer)}.lora_{ab}.weight": tensor
        for part in parts
        for layer, both in text_matrices(part).items()
        for ab, tensor in zip("AB", both, strict=True)
    }


SDXL_TEXT = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


@pytest.mark.parametrize(
    ("tensors", "scale"),
    [(kohya_text(SDXL_TEXT), 3 / RANK), (peft_text("text_model."), 1), (peft_text(""), 1),
     (kohya_text(SDXL_TEXT) | kohya(3.0, original=True), 3 / RANK)],
    ids=["kohya", "peft", "flattened", "with a unet"],
)  # fmt: skip
def test_text_encoders_are_changed_by_their_own_layers(tensors: Tensors, scale: float, tmp_path: Path) -> None:
    """Both get W + scale * up @ down, wherever they are loaded: to encode prompts, in pipelines, in every export."""
    save_file(tensors, tmp_path / "a.safetensors")
    model = settings("embedded", lora=[f"{tmp_path}/a.safetensors:0.5"])
    source = locate.find(model)
    expected = {}
    for part in SDXL_TEXT:
        expected[part] = {name: value.float() for name, value in pipeline_tensors(MINIATURE, part).items()}
        for layer, (down, up) in text_matrices(part).items():
            expected[part][f"{layer}.weight"] += 0.5 * scale * up @ down
    encoders, pipe = Encoders(source, CPU), load_pipeline(source, torch.float32)
    export_pipeline(source, load_unet(source, model, torch.float32, CPU).state_dict(), tmp_path / "export", "float32")
    exported = load_pipeline(locate.find(exported_model(model, tmp_path / "export")), torch.float32)
    unet = load_unet(source, model, torch.float32, CPU).state_dict()
    file = write_single_file(source, unet, tmp_path / "file", {}, title="x", dtype="float32")
    for number, part in enumerate(SDXL_TEXT):
        for network in (encoders.text[number][1], getattr(pipe, part), getattr(exported, part)):
            found = classic_names(part, network.state_dict())
            for name, value in expected[part].items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    name = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc2.weight"
    torch.testing.assert_close(load_file(file)[name], expected["text_encoder"][name.partition("transformer.")[2]])


def test_diffusers_changes_the_same_text_encoders(tmp_path: Path) -> None:
    """By its own names: with transformers 5 it leaves out what kohya's scripts have for the attention."""
    save_file(peft_text("text_model.", ("text_encoder",)) | peft("unet."), tmp_path / "a.safetensors")
    pipe = StableDiffusionXLPipeline.from_pretrained(MINIATURE, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet", "text_encoder"])
    pipe.unload_lora_weights()
    source = locate.find(settings("embedded", lora=[f"{tmp_path}/a.safetensors"]))
    found = classic_names("text_encoder", load_pipeline(source, torch.float32).text_encoder.state_dict())
    fused, before = (
        classic_names("text_encoder", pipe.text_encoder.state_dict()),
        pipeline_tensors(MINIATURE, "text_encoder"),
    )
    for name, value in fused.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    assert {n for n in fused if not torch.equal(fused[n], before[n].float())} == {
        f"text_model.{layer}.weight" for layer in TEXT_LAYERS
    }


def test_sd15_has_one_text_encoder(sd15_pipeline: Maker, tmp_path: Path) -> None:
    path = sd15_pipeline("epsilon")
    layer = "text_model.encoder.layers.0.mlp.fc1"
    stem = f"lora_te_{layer.replace('.', '_')}"
    before = pipeline_tensors(path, "text_encoder")[f"{layer}.weight"]
    up, down = torch.ones(len(before), 1), torch.ones(1, before.shape[1])
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, tmp_path / "a.safetensors")
    source = locate.find(settings(path, lora=[f"{tmp_path}/a.safetensors"]))
    found = classic_names("text_encoder", load_pipeline(source, torch.float32).text_encoder.state_dict())
    torch.testing.assert_close(found[f"{layer}.weight"], before + 1)


def test_a_cache_belongs_to_the_loras_of_its_text_encoders(tmp_path: Path) -> None:
    save_file(kohya_text(SDXL_TEXT), tmp_path / "text.safetensors")
    save_file(kohya(1.0, original=True), tmp_path / "unet.safetensors")
    words: list[list[str]] = [[], ["unet.safetensors"], ["text.safetensors"], ["text.safetensors:0.5"]]
    found = [encoders_identity(locate.find(settings("embedded", lora=[f"{tmp_path}/{w}" for w in ws]))) for ws in words]
    assert found[0] == found[1] and len(set(found)) == 3
