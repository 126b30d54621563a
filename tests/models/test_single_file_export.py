"""Pipelines written as single files: original names, marked and described, and the same tensors when read back."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from helpers.pipelines import CPU, settings
from helpers.single_files import MINIATURE, original_tensors, pipeline_tensors, pretend_public, true_shapes
from helpers.small_run import run
from safetensors import safe_open
from safetensors.torch import load_file

from smpo_fast.common.errors import ConfigError, EnvironmentProblem
from smpo_fast.config import loading
from smpo_fast.models import locate
from smpo_fast.models.config_files import read_object
from smpo_fast.models.load import load_unet
from smpo_fast.models.single_file import layout, write
from smpo_fast.models.single_file import modelspec as modelspec_module
from smpo_fast.models.single_file.modelspec import modelspec
from smpo_fast.models.single_file.parts import CLASSES, classic_names, empty_state
from smpo_fast.models.single_file.write import write_single_file
from smpo_fast.models.verify import verify_export


def written(folder: Path, dtype: str = "float32", **values: object) -> Path:
    """The miniature, or another pipeline, as a single file."""
    model = settings(values.pop("path", "embedded"), **values)  # type: ignore[arg-type]
    source = locate.find(model)
    unet = load_unet(source, model, torch.float32, CPU).state_dict()
    return write_single_file(source, unet, folder, modelspec(source, "mine", 1024), title="mine", dtype=dtype)


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_diffusers_reads_back_the_same_tensors(dtype: str, tmp_path: Path) -> None:
    """Its own loaders, bit for bit: UNet, VAE, and both text encoders."""
    file, kind = written(tmp_path / "out", dtype), getattr(torch, dtype)
    options = {"config": str(MINIATURE), "torch_dtype": kind, "local_files_only": True}
    content = load_file(file)
    for part in layout.PREFIXES["sdxl"]:
        if part.startswith("text"):
            network = create_diffusers_clip_model_from_ldm(CLASSES[part], content, subfolder=part, **options)
        else:
            network = CLASSES[part].from_single_file(str(file), subfolder=part, **options)
        found, expected = classic_names(part, network.state_dict()), pipeline_tensors(MINIATURE, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name].to(kind)) for name in expected), part
    assert {str(value.dtype) for value in content.values() if value.ndim != 2 or value.shape[0] != 1} == {
        f"torch.{dtype}"
    }


def test_reading_it_back_gives_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_public(monkeypatch, {"sdxl": MINIATURE}, tmp_path / "cache")
    again = locate.find(settings(written(tmp_path / "out"))).folder
    images = []
    for folder in (MINIATURE, again):
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        images.append(pipe("a red circle", num_inference_steps=2, generator=noise, output_type="np").images)
    assert (images[0] == images[1]).all()


def test_the_sd15_layout(sd15_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    """The VAE here has attention, whose matrices are convolutions of one pixel in the original."""
    base = sd15_pipeline("epsilon")
    file = written(tmp_path / "out", path=base)
    content = load_file(file)
    expected = original_tensors(base, "sd15")
    assert content.keys() == expected.keys() | {layout.PREFIXES["sd15"]["text_encoder"] + layout.POSITION_IDS}
    assert all(torch.equal(content[name], value) for name, value in expected.items())
    assert content["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    vae = AutoencoderKL.from_single_file(
        str(file), config=str(base), subfolder="vae", local_files_only=True
    ).state_dict()
    assert all(torch.equal(vae[name], value) for name, value in pipeline_tensors(base, "vae").items())
    assert metadata(file)["modelspec.architecture"] == "stable-diffusion-v1"


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_shapes_at_true_size_are_the_public_ones(kind: str) -> None:
    """On the meta device: what is written has the shapes that a checkpoint of the public kind has."""
    public, found = locate.public_pipelines.folder(kind), {}
    for part, prefix in layout.PREFIXES[kind].items():
        state = empty_state(part, read_object(public / part / "config.json"))
        for name, value in write._as_original(part, state, public / part).items():
            found[prefix + name] = tuple(value.shape)
    expected = true_shapes(kind)
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {
        f"first_stage_model.{way}.mid.attn_1.{part}.weight"
        for way in ("encoder", "decoder")
        for part in ("q", "k", "v", "proj_out")
    }
    assert found["first_stage_model.encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)


@pytest.mark.parametrize(
    ("values", "markers", "said"),
    [
        ({}, set(), "epsilon"),
        ({"prediction": "v"}, {"v_pred"}, "v"),
        ({"prediction": "v", "zero_terminal_snr": "yes"}, {"v_pred", "ztsnr"}, "v"),
    ],
)
def test_markers_and_metadata(
    values: dict[str, str], markers: set[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "out", **values)
    content, facts = load_file(file), metadata(file)
    assert markers == {"v_pred", "ztsnr"} & content.keys()
    assert all(content[name].numel() == 0 for name in markers)
    assert (facts["modelspec.prediction_type"], facts["modelspec.title"]) == (said, "mine")
    assert (facts["modelspec.resolution"], facts["modelspec.architecture"]) == (
        "1024x1024",
        "stable-diffusion-xl-v1-base",
    )
    pretend_public(monkeypatch, {"sdxl": MINIATURE}, tmp_path / "cache")
    again = locate.find(settings(file))
    expected = locate.find(settings("embedded", **values))
    assert again.prediction_type == expected.prediction_type
    assert again.scheduler.get("rescale_betas_zero_snr") == expected.scheduler.get("rescale_betas_zero_snr")


def test_the_hash_is_of_all_that_follows_the_header(tmp_path: Path) -> None:
    raw = written(tmp_path / "out").read_bytes()
    content = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    header = json.loads(raw[8 : len(raw) - len(content)])
    assert header["__metadata__"]["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content).hexdigest()}"


def test_the_same_pipeline_gives_the_same_bytes_and_replaces_the_earlier_file(tmp_path: Path) -> None:
    first = written(tmp_path / "out", prediction="v").read_bytes()
    assert written(tmp_path / "other", prediction="v").read_bytes() == first
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert written(tmp_path / "out").read_bytes() != first
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"mine.safetensors", "export.json", "notes.txt"}
    assert {finding.grade for finding in verify_export(tmp_path / "out")} == {"ok", "note"}


def test_what_does_not_read_back_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = modelspec_module.save_file

    def damaged(tensors: dict[str, torch.Tensor], file: Path, facts: dict[str, str]) -> None:
        real(tensors, file, facts)
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(modelspec_module, "save_file", damaged)
    with pytest.raises(EnvironmentProblem, match="does not read back as it was written"):
        written(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_from_a_file_writes_a_file_of_the_same_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that predicts v, with zero terminal SNR: found by its markers, trained, and marked again."""
    start = written(tmp_path / "start", prediction="v", zero_terminal_snr="yes")
    pretend_public(monkeypatch, {"sdxl": MINIATURE}, tmp_path / "cache")
    words = ["run.steps=1", "data.max_pairs=6", 'export.formats=["diffusers", "single-file"]']
    assert run(tmp_path / "aligned", f"model.path={start}", *words) == 0
    again = locate.find(settings(tmp_path / "aligned" / "single-file" / "aligned.safetensors"))
    assert again.prediction_type == "v_prediction" and again.scheduler["rescale_betas_zero_snr"]
    base, trained = (pipeline_tensors(folder, "unet") for folder in (MINIATURE, tmp_path / "aligned" / "export"))
    found = pipeline_tensors(again.folder, "unet")
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    assert not torch.equal(found["conv_in.weight"], base["conv_in.weight"].float())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"export": {"formats": ["single-file"]}}, "must have 'diffusers'"),
        ({"export": {"formats": ["diffusers", "lora-kohya"]}, "lora": {"rank": 2, "use_dora": True}}, "what a DoRA is"),
    ],
)
def test_formats_that_cannot_be_written_are_refused(values: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loading.from_dict(values)
