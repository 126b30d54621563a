"""What a reward does not see, on images whose values are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smpo_fast import embedded
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.evaluation.compare import evaluate
from smpo_fast.evaluation.measures import diversity, measure
from smpo_fast.models.locate import find


def half(left: str, right: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), left)
    image.paste(right, (32, 0, 64, 64))
    return image


def test_known_images() -> None:
    grey_and_red = measure(half("grey", "red"))
    assert grey_and_red["saturation"] == 0.5 and grey_and_red["failed"] == 0.0
    assert measure(half("black", "white")) == {"saturation": 0.0, "contrast": pytest.approx(0.5), "failed": 0.0}
    assert measure(Image.new("RGB", (8, 8), "black"))["failed"] == 1.0


def test_diversity_is_the_distance_of_a_prompts_images() -> None:
    black, white = Image.new("RGB", (64, 64), "black"), Image.new("RGB", (64, 64), "white")
    assert diversity([black, white]) == 1.0
    assert diversity([black, black]) == 0.0
    assert diversity([black, white, white]) == pytest.approx(2 / 3)
    assert diversity([half("black", "white"), black]) == pytest.approx(np.sqrt(0.5))


def test_several_images_of_a_prompt_measure_diversity(tmp_path: Path) -> None:
    values = {"prompts": "embedded", "scorer": "embedded", "count": 3, "steps": 2, "per_prompt": 2}
    settings = loading.from_dict({"eval": values})
    done = evaluate(settings, find(settings.model), embedded.pipeline_path(), tmp_path, World())
    assert len(done.keys["base"]) == 6 and len(done.scores["reward"]["base"]) == 3
    assert (done.measures["diversity"]["base"] > 0).all()
    assert {c.name for c in done.drifts} == {"saturation", "contrast", "failed", "diversity"}
    header = (tmp_path / "scores.csv").read_text().splitlines()[0]
    assert "diversity_base" in header and "saturation_aligned" in header
