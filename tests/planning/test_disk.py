"""Disk space of a run, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from smpo_fast import embedded
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.models.locate import find
from smpo_fast.models.network_spec import network_spec
from smpo_fast.planning.disk import count_pairs, disk_bytes
from smpo_fast.planning.planned_run import PlannedRun

LATENT = 4 * 8 * 8  # of the embedded model: 32 px


def planned(**sections: dict[str, Any]) -> dict[str, float]:
    settings = loading.from_dict({"data": {"max_pairs": 10, **sections.pop("data", {})}, **sections})
    source = find(settings.model)
    return disk_bytes(PlannedRun(settings, network_spec(source, 32, lora=settings.lora), "fp32"), source)


def test_a_cache_has_mean_and_deviation_of_both_images_plain_and_mirrored() -> None:
    plain, mirrored = (planned(data={"flip": flip})["cache"] for flip in (False, True))
    assert mirrored - plain == 10 * 2 * 2 * LATENT * 2  # pairs, images, moments, numbers, bytes of float16


@pytest.mark.parametrize("keep", [1, 3])
def test_one_more_checkpoint_than_is_kept_is_on_the_disk(keep: int) -> None:
    sizes = [planned(run={"keep": n})["checkpoints"] for n in (keep, keep + 1)]
    assert sizes[0] == (sizes[1] - sizes[0]) * (keep + 1)


def test_pairs_without_their_table_are_those_that_the_run_visits(tmp_path: Path) -> None:
    def count(max_pairs: int) -> int:
        values = {"data": {"pairs": str(tmp_path / "none"), "max_pairs": max_pairs}, "run": {"steps": 5}}
        settings: Config = loading.from_dict(values | {"batch": {"pairs_per_step": 4}})
        return count_pairs(settings)[0]

    assert (count(0), count(7), count(100)) == (20, 7, 20)


def test_adapters_are_small_and_a_merged_pipeline_is_not() -> None:
    """The frozen weights are on disk only where they are merged with the adapters: in a pipeline, or in one file."""
    weights = [load_file(file) for file in embedded.pipeline_path().rglob("*.safetensors")]
    values, bytes_ = (sum(f(v) for w in weights for v in w.values()) for f in (lambda v: v.numel(), lambda v: v.nbytes))
    unet = load_file(next((embedded.pipeline_path() / "unet").glob("*.safetensors")))
    adapters = 4 * sum(
        sum(v.shape) for n, v in unet.items() if any(f".to_{x}.weight" in n for x in ("q", "k", "v", "out.0"))
    )
    formats = {"formats": ["diffusers", "single-file", "lora-kohya", "lora-peft"]}
    found = planned(lora={"rank": 4, "merge": True}, export=formats, model={"export_dtype": "float32"})
    assert (found["export"], found["LoRA files"]) == (4 * adapters, 2 * 4 * adapters)
    assert found["single file"] == 4 * values
    assert found["merged pipeline"] == pytest.approx(
        bytes_ + sum(4 * v.numel() - v.nbytes for v in unet.values()), rel=1e-2
    )


def test_an_extracted_lora_has_factors_of_every_matrix() -> None:
    found = planned(export={"formats": ["diffusers", "lora-kohya"], "lora_rank": 8}, model={"export_dtype": "float16"})
    unet = load_file(next((embedded.pipeline_path() / "unet").glob("*.safetensors")))
    sides = [(len(v), v[0].numel()) for v in unet.values() if v.ndim > 1]
    assert found["LoRA files"] == 2 * sum(min(8, *both) * sum(both) for both in sides)
    assert planned()["LoRA files"] == planned()["merged pipeline"] == 0


def test_a_single_file_has_all_networks_in_the_dtype_of_the_export() -> None:
    found = planned(export={"formats": ["diffusers", "single-file"]}, model={"export_dtype": "float16"})
    weights = embedded.pipeline_path().rglob("*.safetensors")
    values = sum(value.numel() for file in weights for value in load_file(file).values())
    assert (planned()["single file"], found["single file"]) == (0, 2 * values)


def test_both_kinds_of_weights_take_twice_the_disk() -> None:
    optim, one = {"ema": 0.9}, planned(optim={"ema": 0.9})
    both = planned(optim=optim, export={"weights": "both"})
    assert both["export"] == 2 * one["export"] and both["checkpoints"] == one["checkpoints"] > planned()["checkpoints"]
