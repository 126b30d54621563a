"""Finding a pipeline, and refusing those that are not supported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers.pipelines import edit_json, settings

from smpo_fast import embedded
from smpo_fast.common.errors import EnvironmentProblem, ModelError
from smpo_fast.models import locate
from smpo_fast.models.locate import find


def test_embedded_pipeline_is_found_as_sdxl() -> None:
    source = find(settings("embedded"))
    assert (source.kind, source.prediction_type) == ("sdxl", "epsilon")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: edit_json(p / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
        (lambda p: edit_json(p / "scheduler" / "scheduler_config.json", prediction_type="sample"), "'sample'"),
        (lambda p: edit_json(p / "unet" / "config.json", in_channels=9), "9 input channels"),
        (lambda p: (p / "model_index.json").unlink(), "model_index.json cannot be read"),
        (lambda p: shutil.rmtree(p / "vae"), "model.vae"),
    ],
)
def test_unsupported_pipelines_are_refused_by_name(break_it: Callable, message: str, tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    break_it(tmp_path / "p")
    with pytest.raises(ModelError, match=message):
        find(settings(tmp_path / "p"))


def test_a_wrong_place_is_named() -> None:
    with pytest.raises(ModelError, match="model.path: './nowhere' is neither a folder nor a hub id"):
        find(settings("./nowhere"))


def test_a_hub_id_without_the_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        EnvironmentProblem, match="model.path: 'nobody/nothing' is not a local folder, and the hub answered"
    ):
        find(settings("nobody/nothing"))


def test_only_one_variant_is_fetched() -> None:

    def wanted(variant: str, file: str) -> bool:
        yes, no = locate.wanted_files(variant)
        return any(fnmatch(file, p) for p in yes) and not any(fnmatch(file, p) for p in no)

    plain, half = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
    assert wanted("", plain) and not wanted("", half)
    assert wanted("fp16", half) and not wanted("fp16", plain)
    assert not wanted("", "sd_xl_base_1.0.safetensors") and not wanted("", "unet/diffusion_pytorch_model.bin")
    assert wanted("", "tokenizer/merges.txt") and wanted("", "model_index.json")
