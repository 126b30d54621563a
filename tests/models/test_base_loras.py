"""LoRAs that are part of the base: the weights that diffusers fuses, whatever program named the layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.pipelines import CPU, settings
from helpers.single_files import MINIATURE
from helpers.small_run import run
from safetensors.torch import save_file

from smpo_fast.common.errors import ModelError
from smpo_fast.config import loading
from smpo_fast.models import locate
from smpo_fast.models.export import exported_model
from smpo_fast.models.identity import base_identity
from smpo_fast.models.load import load_pipeline, load_unet
from smpo_fast.models.single_file import layout

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
        (peft("unet.") | {"text_encoder.layers.0.q_proj.lora_A.weight": ONE}, "changes the text encoders too"),
        (peft("unet.") | {"lora_te1_text_model_encoder_layers_0.alpha": ONE}, "changes the text encoders too"),
        (kohya(1, original=False) | {"lora_unet_conv_in.dora_scale": torch.ones(1)}, "is a DoRA"),
        (kohya(1, original=False) | {"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "is of LyCORIS"),
        (peft("unet.up_blocks.7."), "is no LoRA of this UNet: .*and 5 more tensors"),
        ({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, "is no LoRA of this UNet"),
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
    "facts", ["{", "3", *(json.dumps({"unet.alpha_pattern": found}) for found in (3, {"conv_in": "x"}, {"conv_.*": 4}))]
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
