"""The exported pipeline."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.pipelines import CPU, Maker, settings
from safetensors.torch import load_file, save_file

from smpo_fast import embedded
from smpo_fast.common import storage
from smpo_fast.common.errors import ModelError
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.models import lora, lora_files
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.identity import encoders_identity
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import ModelSource, find
from smpo_fast.models.pipeline_folder import EXPORT_INFO


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_export_is_a_pipeline_with_the_new_weights(kind: str, sd15_pipeline: Maker, tmp_path: Path) -> None:
    source = find(settings("embedded" if kind == "sdxl" else sd15_pipeline("epsilon")))
    policy = load_unet(source, settings(source.folder), torch.float32, CPU)
    state = {name: value + 0.01 for name, value in policy.state_dict().items()}
    export_pipeline(source, state, tmp_path / "export", "float32")
    cls = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipe = cls.from_pretrained(tmp_path / "export")
    assert all(torch.equal(value, state[name]) for name, value in pipe.unet.state_dict().items())
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2, height=side, width=side).images[0].size == (side, side)
    assert encoders_identity(find(settings(tmp_path / "export"))) != "", "an export is a start for the next run"


def test_export_copies_what_was_not_trained(tmp_path: Path) -> None:
    """A chosen variant gets the plain name, other variants stay behind, and no path of this machine is written."""
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    encoder = tmp_path / "p" / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    (tmp_path / "p" / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    source = find(settings(tmp_path / "p"))
    state = load_unet(source, settings(tmp_path / "p"), torch.float32, CPU).state_dict()
    for variant, weights in (("fp16", {"model.safetensors"}), (None, set())):
        export_pipeline(replace(source, variant=variant), state, tmp_path / "export", "float16")
        exported = tmp_path / "export" / "text_encoder"
        assert {f.name for f in exported.glob("*.safetensors")} == weights
    here, there = (f / "vae" / "diffusion_pytorch_model.safetensors" for f in (tmp_path / "p", tmp_path / "export"))
    assert here.read_bytes() == there.read_bytes()
    for file in (tmp_path / "export").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file


def test_export_has_the_vae_of_the_run(tmp_path: Path) -> None:
    """``model.vae``, with which the latents were made, and not the base's own."""
    shutil.copytree(embedded.pipeline_path() / "vae", tmp_path / "other")
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    source = find(settings("embedded", vae=str(tmp_path / "other")))
    export_pipeline(source, state_of(source), tmp_path / "export", "float16")
    assert (tmp_path / "export" / "vae" / weights.name).read_bytes() == weights.read_bytes()


def test_export_refuses_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        export_pipeline(find(settings("embedded")), {}, tmp_path / "export", "float32")


def state_of(source: ModelSource, add: float = 0.0) -> dict[str, torch.Tensor]:
    unet = load_unet(source, settings("embedded"), torch.float32, CPU)
    return {name: value + add for name, value in unet.state_dict().items()}


def adapted_state(run: Config) -> dict[str, torch.Tensor]:
    unet = load_unet(find(run.model), run.model, torch.float32, CPU)
    lora.add_adapters(unet, run.lora, seed=0)
    return unet.state_dict()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_every_file_is_on_disk_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, synced = find(settings("embedded")), set[Path]()
    sync, replace_folder = storage.sync, storage.replace_folder

    def checked(building: Path, target: Path) -> None:
        assert {f for f in building.rglob("*") if f.is_file()} <= synced
        replace_folder(building, target)

    monkeypatch.setattr(storage, "sync", lambda path: synced.add(path) or sync(path))
    monkeypatch.setattr(storage, "replace_folder", checked)
    export_pipeline(source, state_of(source), tmp_path / "export", "float32")
    assert (tmp_path / "export" / "model_index.json").is_file()


class Killed(BaseException):
    """Stands for a process that is killed: nothing handles it."""


@pytest.mark.parametrize("exchanged", [True, False], ids=["exchange", "two renames"])
def test_an_export_that_is_killed_leaves_the_earlier_one(
    exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = find(settings("embedded")), tmp_path / "export"
    state = state_of(source)
    export_pipeline(source, state, folder, "float32")
    (folder / "README.md").write_text("my notes")
    before = contents(folder)
    shutil.copytree(folder, tmp_path / "first")
    export_pipeline(source, {n: t + 1 for n, t in state.items()}, tmp_path / "other", "float32")
    after = contents(tmp_path / "other") | {"README.md": b"my notes"}
    if not exchanged:
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)

    def export(killed_at: float) -> int:
        """Export once more; returns how many of the calls below were made."""
        made = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal made
                made += 1
                if made > killed_at:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch, suppress(Killed):
            for owner, name in ((shutil, "copyfile"), (storage, "sync"), (storage, "_exchange"), (shutil, "rmtree")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            export_pipeline(source, {n: t + 1 for n, t in state.items()}, folder, "float32")
        return made

    total, seen = export(math.inf), []
    assert total > 20 and contents(folder) == after
    for point in (0, total // 2, *range(total - 7, total)):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "first", folder)
        export(point)
        found = contents(folder)
        assert found in (before, after), f"killed before call {point}"
        seen.append(found == after)
    assert seen == sorted(seen) and len(set(seen)) == 2
    export(math.inf)
    assert contents(folder) == after
    assert {p.name for p in tmp_path.iterdir()} == {"export", "first", "other"}, "nothing hidden is left"


def test_exported_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    source, before = find(settings("embedded")), os.umask(0o027)
    try:
        export_pipeline(source, state_of(source), tmp_path / "export", "float16")
        run = loading.from_dict({"lora": {"rank": 2}})
        adapted = lora.trained_adapters(run, source, adapted_state(run))
        lora_files.write_diffusers(adapted, source, tmp_path / "adapters")
    finally:
        os.umask(before)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {f.stat().st_mode & 0o777 for f in files} == {0o640}
    assert {f.name for f in (tmp_path / "adapters").iterdir()} == {lora.FILE, EXPORT_INFO}


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "float32", "conv_in.weight has NaN or infinite values"),
        (float("-inf"), "float16", "conv_in.weight has NaN or infinite values"),
        (7e4, "float16", "conv_in.weight has values up to 7e.04, beyond the range of model.export_dtype = 'float16'"),
        (7e4, "bfloat16", ""),
    ],
)
def test_weights_that_no_network_should_have_are_not_exported(
    value: float, dtype: str, message: str, tmp_path: Path
) -> None:
    source = find(settings("embedded"))
    state = state_of(source)
    state["conv_in.weight"][0, 0, 0, 0] = value
    if not message:
        export_pipeline(source, state, tmp_path / "export", dtype)
        return
    with pytest.raises(ModelError, match=message):
        export_pipeline(source, state, tmp_path / "export", dtype)
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_fit_the_export_are_refused() -> None:
    run = loading.from_dict({"lora": {"rank": 2}})
    state = adapted_state(run)
    name = next(n for n in state if ".lora_B" in n)
    state[name][0, 0] = 1e6
    with pytest.raises(ModelError, match="lora_B.* beyond the range"):
        lora.trained_adapters(run, find(run.model), state)
