"""Single-file checkpoints become diffusers folders with the same tensors, once, whoever asks."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers.pipelines import CPU, settings
from helpers.single_files import MINIATURE, original_tensors, pipeline_tensors, pretend_public, write
from safetensors.torch import load_file

from smpo_fast.common.errors import ModelError
from smpo_fast.config.schema import Inversion
from smpo_fast.models import locate
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.load import load_pipeline, load_unet
from smpo_fast.models.single_file import convert, layout
from smpo_fast.models.single_file.parts import WEIGHTS
from smpo_fast.models.single_file.recognise import recognise_vae
from smpo_fast.models.verify import is_export, verify_export

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CLIP = layout.PREFIXES["sdxl"]["text_encoder"]
MARKERS = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tensors:
    """The miniature as an SDXL checkpoint; its configurations stand for the public ones."""
    pretend_public(monkeypatch, {"sdxl": MINIATURE}, tmp_path / "cache")
    return {name: value.float() for name, value in original_tensors(MINIATURE, "sdxl").items()}


def check_tensors(folder: Path, *parts: str, dtype: torch.dtype = torch.float32) -> None:
    for part in parts:
        expected = pipeline_tensors(MINIATURE, part)
        found = load_file(folder / part / WEIGHTS[part])
        assert found.keys() == expected.keys()
        assert {value.dtype for value in found.values()} == {dtype}
        assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected), part


def test_a_checkpoint_becomes_a_pipeline_with_its_own_tensors(tensors: Tensors, tmp_path: Path) -> None:
    source = locate.find(settings(write(tmp_path / "model.safetensors", tensors)))
    assert (source.kind, source.prediction_type) == ("sdxl", "epsilon")
    check_tensors(source.folder, *PARTS)
    images = load_pipeline(source, torch.float32)("a", num_inference_steps=1, output_type="np", height=32, width=32)
    assert images.images.shape == (1, 32, 32, 3)
    assert is_export(source.folder)
    assert {finding.grade for finding in verify_export(source.folder)} == {"ok"}


def test_diffusers_reads_the_same_tensors_from_the_same_file(tensors: Tensors, tmp_path: Path) -> None:
    """Its own loader of whole pipelines, as an independent reader of the layout."""
    file = write(tmp_path / "model.safetensors", tensors)
    pipe = StableDiffusionXLPipeline.from_single_file(str(file), config=str(MINIATURE), local_files_only=True)
    for part in ("unet", "vae"):
        expected = pipeline_tensors(MINIATURE, part)
        found = getattr(pipe, part).state_dict()
        assert all(torch.equal(found[name], expected[name].float()) for name in expected), part


def without_outer_module(tensors: Tensors) -> Tensors:
    return {name.replace(f"{CLIP}text_model.", CLIP): value for name, value in tensors.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1) if name.startswith(old) else name: value
                            for name, value in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    "as_written",
    [
        without_outer_module,
        renamed("model.diffusion_model.", "diffusion_model."),
        renamed("first_stage_model.", "vae."),
        lambda t: (
            t | {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
        ),
        lambda t: t | {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6), "alphas_cumprod": torch.ones(9)},
        lambda t: t | {f"model_ema.{i}": torch.ones(1) for i in range(101)},
    ],
    ids=["no text_model", "no model", "vae", "position ids", "logit scale", "ema"],
)
def test_what_other_programs_write_is_read(
    as_written: Callable[[Tensors], Tensors], tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = locate.find(settings(write(tmp_path / "model.safetensors", as_written(tensors))))
    check_tensors(source.folder, *PARTS)
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_of_the_file_is_kept(dtype: torch.dtype, tensors: Tensors, tmp_path: Path) -> None:
    half = {name: value.to(dtype) for name, value in tensors.items()}
    check_tensors(locate.find(settings(write(tmp_path / "m.safetensors", half))).folder, *PARTS, dtype=dtype)


def test_a_part_of_mixed_dtypes_is_written_in_the_widest(tensors: Tensors, tmp_path: Path) -> None:
    name = "model.diffusion_model.out.2.bias"
    mixed = {n: value.half() if n.startswith("model.") and n != name else value for n, value in tensors.items()}
    folder = locate.find(settings(write(tmp_path / "m.safetensors", mixed))).folder
    found = load_file(folder / "unet" / WEIGHTS["unet"])
    assert torch.equal(found["conv_out.bias"], tensors[name]) and found["conv_in.bias"].dtype == torch.float32


def test_a_file_is_converted_once_and_another_one_again(tensors: Tensors, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", tensors)
    first = locate.find(settings(file)).folder
    made = (first / "export.json").stat().st_mtime_ns
    shutil.copy2(file, tmp_path / "copy.safetensors")
    assert locate.find(settings(tmp_path / "copy.safetensors")).folder == first
    assert (first / "export.json").stat().st_mtime_ns == made
    tensors["model.diffusion_model.out.2.bias"] += 1
    other = locate.find(settings(write(file, tensors))).folder
    assert other != first
    assert not torch.equal(*(load_file(f / "unet" / WEIGHTS["unet"])["conv_out.bias"] for f in (first, other)))


def test_processes_that_ask_at_once_share_one_conversion(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made, folders = write(tmp_path / "model.safetensors", tensors), [], []
    real = convert._convert
    monkeypatch.setattr(convert, "_convert", lambda *args: made.append(1) or real(*args))
    asking = [threading.Thread(target=lambda: folders.append(locate.find(settings(file)).folder)) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert (len(made), len(folders), len(set(folders))) == (1, 3, 1)


def test_a_conversion_that_is_killed_is_made_again(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "model.safetensors", tensors)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "publish_export", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        locate.find(settings(file))
    check_tensors(locate.find(settings(file)).folder, *PARTS)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.diffusion_model.middle_block.1.norm.weight", "unet"),
        ("first_stage_model.encoder.mid.attn_1.q.weight", None),
        ("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias", "text_encoder_2"),
    ],
)
def test_a_lost_tensor_is_named(name: str, part: str | None, tensors: Tensors, tmp_path: Path) -> None:
    if part is None:  # the miniature's VAE has no attention
        name, part = "first_stage_model.encoder.mid.block_1.conv1.bias", "vae"
    del tensors[name]
    file = write(tmp_path / "model.safetensors", tensors)
    lost = name.removeprefix(layout.PREFIXES["sdxl"][part])
    with pytest.raises(ModelError, match=f"no complete {part} of sdxl: {lost} missing"):
        locate.find(settings(file))


def test_tensors_of_other_shapes_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    tensors["model.diffusion_model.out.0.bias"] = torch.ones(3)
    with pytest.raises(ModelError, match="has no unet of sdxl: .*conv_norm_out.bias"):
        locate.find(settings(write(tmp_path / "model.safetensors", tensors)))


def test_tensors_that_the_network_has_not_are_mentioned(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors["model.diffusion_model.time_embed.cond_proj.weight"] = torch.ones(2, 2)
    locate.find(settings(write(tmp_path / "model.safetensors", tensors)))
    assert "time_embed.cond_proj.weight not used" in capsys.readouterr().err


def test_markers_decide_prediction_and_schedule(tensors: Tensors, tmp_path: Path) -> None:
    source = locate.find(settings(write(tmp_path / "model.safetensors", tensors | MARKERS)))
    assert source.prediction_type == "v_prediction"
    assert source.describe().startswith("sdxl, v_prediction with zero terminal SNR (v_pred marker, ztsnr marker), ")
    scheduler = load_pipeline(source, torch.float32).scheduler.config
    chosen = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert chosen.items() <= dict(scheduler).items()
    assert chosen.items() <= json.loads((source.folder / "scheduler" / "scheduler_config.json").read_text()).items()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ("v_prediction", True)),
        ({"prediction": "epsilon"}, ("epsilon", True)),
        ({"prediction": "epsilon", "zero_terminal_snr": "no"}, ("epsilon", False)),
        ({"zero_terminal_snr": "no"}, ("v_prediction", False)),
    ],
)
def test_settings_come_before_markers(
    values: dict[str, str], expected: tuple[str, bool], tensors: Tensors, tmp_path: Path
) -> None:
    source = locate.find(settings(write(tmp_path / "model.safetensors", tensors | MARKERS), **values))
    assert (source.prediction_type, bool(source.scheduler.get("rescale_betas_zero_snr"))) == expected
    scheduler = load_pipeline(source, torch.float32).scheduler.config
    assert (scheduler.prediction_type, scheduler.rescale_betas_zero_snr) == expected


def test_settings_hold_for_folders_and_for_what_is_exported_from_them(tmp_path: Path) -> None:
    source = locate.find(settings("embedded", prediction="v", zero_terminal_snr="yes"))
    state = load_unet(source, settings("embedded"), torch.float32, CPU).state_dict()
    export_pipeline(source, state, tmp_path / "export", "float32")
    again = locate.find(settings(tmp_path / "export"))
    assert (again.prediction_type, again.scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_a_unet_file_gives_the_policy_alone(tensors: Tensors, tmp_path: Path) -> None:
    """In both layouts; what its markers say holds for it, and the pipeline keeps its other parts."""
    original = {name: value for name, value in tensors.items() if name.startswith("model.")} | MARKERS
    bare = {name.removeprefix("model.diffusion_model."): value for name, value in original.items()}
    own = {name: value.float() for name, value in pipeline_tensors(MINIATURE, "unet").items()}
    for content, predicts in ((original, "v_prediction"), (bare, "v_prediction"), (own, "epsilon")):
        source = locate.find(settings("embedded", unet=str(write(tmp_path / "unet.safetensors", content))))
        assert (source.prediction_type, source.folder) == (predicts, MINIATURE)
        check_tensors(source.unet_folder.parent, "unet")


def test_a_checkpoint_without_vae_needs_one(tensors: Tensors, tmp_path: Path) -> None:
    pruned = {name: value for name, value in tensors.items() if not name.startswith("first_stage_model.")}
    file = write(tmp_path / "model.safetensors", pruned)
    with pytest.raises(ModelError, match="has no vae: name one as model.vae"):
        locate.find(settings(file))
    assert locate.find(settings(file, vae=str(MINIATURE))).vae_folder == MINIATURE / "vae"


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_a_vae_file_takes_the_place_of_the_pipelines(names: str, prefix: str, tensors: Tensors, tmp_path: Path) -> None:
    """By its original names or diffusers', alone or in a checkpoint; what is exported has it."""
    theirs = layout.PREFIXES["sdxl"]["vae"]
    plain = {name.removeprefix(theirs): value for name, value in tensors.items() if name.startswith(theirs)}
    if names == "diffusers":
        plain = {name: value.float() for name, value in pipeline_tensors(MINIATURE, "vae").items()}
    name = "encoder.conv_in.weight"
    plain[name] = plain[name] + 1
    others = {"model.diffusion_model.out.0.weight": torch.ones(3)} if prefix else {}
    file = write(tmp_path / "vae.safetensors", others | {prefix + n: value for n, value in plain.items()})
    source = locate.find(settings("embedded", vae=str(file)))
    found = load_file(source.vae_folder / WEIGHTS["vae"])
    expected = {n: v.float() for n, v in pipeline_tensors(MINIATURE, "vae").items()}
    expected[name] = expected[name] + 1
    assert found.keys() == expected.keys() and all(torch.equal(found[n], value) for n, value in expected.items())
    state = load_unet(source, settings("embedded"), torch.float32, CPU).state_dict()
    export_pipeline(source, state, tmp_path / "export", "float32")
    assert (tmp_path / "export" / "vae" / WEIGHTS["vae"]).read_bytes() == (
        source.vae_folder / WEIGHTS["vae"]
    ).read_bytes()
    assert locate.find(settings("embedded", vae=str(file)), weights=False).vae_folder == MINIATURE / "vae"


def test_a_vae_has_the_scale_of_its_pipelines_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tensors of SDXL's and SD1.5's are the same: one file, converted for each."""
    kinds = {kind: tmp_path / kind for kind in ("sdxl", "sd15")}
    for kind, scale in (("sdxl", 0.13), ("sd15", 0.18)):
        shutil.copytree(MINIATURE, kinds[kind])
        config = kinds[kind] / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))
    pretend_public(monkeypatch, kinds, tmp_path / "cache")
    file = write(tmp_path / "vae.safetensors", pipeline_tensors(MINIATURE, "vae"))
    found = {kind: convert.converted(recognise_vae(file, "model.vae", kind), ["vae"]) for kind in kinds}
    scales = {
        kind: json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
        for kind, folder in found.items()
    }
    assert scales == {"sdxl": 0.13, "sd15": 0.18}


@pytest.mark.parametrize(
    ("tensors_there", "message"),
    [
        ({"model.diffusion_model.out.0.weight": torch.ones(1)}, "model.vae: .* has no VAE of SDXL or SD1.5"),
        ({"decoder.mid.block_1.norm1.weight": torch.ones(4), "decoder.conv_in.weight": torch.ones(4, 16, 3, 3)},
         "VAE with 16 latent channels"),
        ({"decoder.mid.block_1.norm1.weight": torch.ones(4, dtype=torch.uint8)}, "is quantised"),
        ({"decoder.mid.block_1.norm1.weight": torch.ones(4)}, "has no complete vae of sdxl: .* missing"),
    ],
)  # fmt: skip
def test_what_is_no_vae_is_refused(tensors_there: Tensors, message: str, tensors: Tensors, tmp_path: Path) -> None:
    file = write(tmp_path / "vae.safetensors", tensors_there)
    with pytest.raises(ModelError, match=message):
        locate.find(settings("embedded", vae=str(file)))


def test_a_checkpoint_without_text_encoders_is_a_unet(tensors: Tensors, tmp_path: Path) -> None:
    file = write(tmp_path / "m.safetensors", {n: t for n, t in tensors.items() if not n.startswith("conditioner.")})
    with pytest.raises(ModelError, match="has no text_encoder: a whole checkpoint is needed"):
        locate.find(settings(file))


def test_nothing_is_converted_for_a_plan(tensors: Tensors, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", tensors | MARKERS)
    source = locate.find(settings(file), weights=False)
    assert (source.kind, source.prediction_type) == ("sdxl", "v_prediction")
    assert not (tmp_path / "cache").exists()


def test_the_sd15_layout_is_read_too(
    sd15_pipeline: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = sd15_pipeline("epsilon")
    pretend_public(monkeypatch, {"sd15": base}, tmp_path / "cache")
    file = write(tmp_path / "model.safetensors", original_tensors(base, "sd15"), modelspec_prediction_type="v")
    source = locate.find(settings(file))
    assert (source.kind, source.prediction_type) == ("sd15", "v_prediction")
    for part in ("unet", "vae", "text_encoder"):
        expected, found = pipeline_tensors(base, part), load_file(source.folder / part / WEIGHTS[part])
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not locate.schedule_of(source, Inversion()).alphas_cumprod[-1] == 0
    load_pipeline(source, torch.float32)
