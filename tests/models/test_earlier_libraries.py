"""Folders in both directions between the installed libraries and transformers 4 with the diffusers of its time."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pipelines import settings
from helpers.small_run import run

from smpo_fast import embedded
from smpo_fast.models.load import load_pipeline
from smpo_fast.models.locate import find

EARLIER = ["transformers==4.57.3", "tokenizers==0.22.2", "huggingface_hub==0.36.2", "diffusers==0.35.2"]
SAMPLE = """
import sys, numpy, torch
from diffusers import StableDiffusionXLPipeline
import transformers
assert transformers.__version__.startswith("4.")
source, images, copy = sys.argv[1:]
pipeline = StableDiffusionXLPipeline.from_pretrained(source, torch_dtype=torch.float32, add_watermarker=False)
seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
found = pipeline(["a red circle", ""], num_inference_steps=3, generator=seeds, output_type="np").images
numpy.save(images, found)
pipeline.save_pretrained(copy)
"""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the earlier libraries; all others are those of this one."""
    folder = tmp_path_factory.mktemp("earlier")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "libraries.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps", "--target"]
    subprocess.run([*pip, str(site), *EARLIER], check=True)
    return folder / "bin" / "python"


def sampled_earlier(python: Path, folder: Path, copy: Path) -> np.ndarray:
    """Images [2, H, W, 3] of a pipeline with the earlier libraries, which also save it as ``copy``."""
    images = copy.with_suffix(".npy")
    subprocess.run([str(python), "-c", SAMPLE, str(folder), str(images), str(copy)], check=True, cwd=copy.parent)
    return np.load(images)


def sampled_now(folder: Path) -> np.ndarray:
    pipeline = load_pipeline(find(settings(folder)), torch.float32)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipeline(["a red circle", ""], num_inference_steps=3, generator=seeds, output_type="np").images


@pytest.mark.slow
def test_pipelines_are_read_across_transformers_4_and_5(earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "published")
    drawn = sampled_earlier(earlier, tmp_path / "published", tmp_path / "saved_by_4")
    np.testing.assert_array_equal(sampled_now(tmp_path / "published"), drawn)
    np.testing.assert_array_equal(sampled_now(tmp_path / "saved_by_4"), drawn)
    assert run(tmp_path / "run", "run.steps=1", f"model.path={tmp_path / 'saved_by_4'}") == 0
    export = tmp_path / "run" / "export"
    np.testing.assert_array_equal(sampled_earlier(earlier, export, tmp_path / "again"), sampled_now(export))
