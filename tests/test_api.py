"""The public Python API: what it is, that it computes what the programs do, and the examples of its page."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.paths import ROOT
from PIL import Image
from torch import nn

import smpo_fast
from smpo_fast.config import loading
from smpo_fast.config.schema import Model
from smpo_fast.method import inversion
from smpo_fast.method.batch import Conditioning
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find, schedule_of

PAGE = (ROOT / "docs" / "api.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S))
SLOW = ("Load a recipe and train",)
CPU = torch.device("cpu")
SIGNATURES = {
    "load_recipe": "(recipe: 'str | Path | None' = None, settings: 'Mapping[str, Any] | None' = None) -> 'Config'",
    "align": "(settings: 'Config', *, ds_config: 'str | Path | None' = None) -> 'Path'",
    "score_images": "(images: 'Sequence[Image]', prompts: 'Sequence[str]', scorer: 'str', *, device: 'str' = 'auto')"
    " -> 'np.ndarray[Any, Any]'",
    "score_pairs": "(pairs: 'str | Path', out: 'str | Path', scorer: 'str', *, batch: 'int' = 32, "
    "max_pairs: 'int' = 0, device: 'str' = 'auto') -> 'np.ndarray[Any, Any]'",
    "invert": "(pipeline: 'Any', image: 'Image | Tensor | Sequence[Image | Tensor]', prompt: 'str', t: 'int', "
    "settings: 'Config | None' = None) -> 'Inverted'",
    "pair_errors": "(prediction: 'Tensor', target: 'Tensor') -> 'Tensor'",
}


def test_what_is_public_is_this_and_is_on_the_page() -> None:
    values = {"Config", "Inverted", "Losses", "OBJECTIVES", "Objective", "UserError", "__version__", "kernels"}
    assert set(smpo_fast.__all__) == values | set(SIGNATURES)
    for name in smpo_fast.__all__:
        assert getattr(smpo_fast, name) is not None and f"`{name}`" in PAGE
    found = {name: str(inspect.signature(getattr(smpo_fast, name))) for name in SIGNATURES}
    assert found == SIGNATURES
    assert smpo_fast.Inverted._fields == ("x_t", "tau", "x_0")
    assert smpo_fast.Losses._fields == ("loss", "logit", "policy", "reference")
    assert set(smpo_fast.OBJECTIVES) == {"smpo", "dpo", "inpo", "sft"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = smpo_fast.nothing


def test_importing_the_package_and_reading_a_recipe_is_light() -> None:
    code = (
        "import sys, smpo_fast; assert set(smpo_fast.__all__) <= set(dir(smpo_fast));"
        "smpo_fast.load_recipe('sdxl_smpo'); assert not {'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXAMPLES])
def test_an_example_of_the_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(EXAMPLES[name], "docs/api.md", "exec"), scope)
    printed = capsys.readouterr().out
    if name == "Load a recipe and train":
        assert "'unet', 'vae'" in printed and printed.endswith("5000.0\n")
    if name == "Invert an image":
        assert float(re.findall(r"tensor\((.+)\)", printed)[0]) < 1e-5


def test_every_topic_of_the_page_has_an_example() -> None:
    assert set(EXAMPLES) == set(re.findall(r"^## (.+)$", PAGE, re.M))


def test_settings_of_a_recipe_may_be_any_values() -> None:
    given = {"run.dir": 'a "b" 😀\n\x7f', "lora.targets": ["to_q", "to_k"], "optim.weight_decay": 1, "data.flip": False}
    found = smpo_fast.load_recipe(settings=given)
    assert (found.run.dir, list(found.lora.targets)) == (given["run.dir"], given["lora.targets"])
    assert found.optim.weight_decay == 1.0 and found.data.flip is False
    assert smpo_fast.load_recipe(settings={"objective.name": "dpo"}).inversion.source == "noise"  # presets follow
    with pytest.raises(smpo_fast.UserError, match=r"unknown key 'run\.stepz': did you mean 'run\.steps'"):
        smpo_fast.load_recipe(settings={"run.stepz": 1})


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_invert_is_the_inversion_of_training(
    sd15_pipeline: Callable[[str], Path], pictures: list[Image.Image], prediction: str
) -> None:
    folder, t = sd15_pipeline(prediction), 90
    settings = smpo_fast.load_recipe(settings={"model.path": str(folder)})
    source = find(Model(path=str(folder)))
    schedule, encoders = schedule_of(source, settings.inversion), Encoders(source, CPU)
    denoiser = Denoiser(load_unet(source, settings.model, torch.float32, CPU), source, schedule, "fp32", CPU)
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures])
    clean, cond = encoders.encode_images(pixels)[0][None], Conditioning(encoders.encode_prompts(["a picture"])[0])
    x_t, tau = inversion.invert(
        lambda rows: lambda x, times, refinement=False: denoiser.eps(x, times[:, 0], cond),
        clean, [schedule.path(t, settings.inversion)], settings.inversion, chunk=1,
    )  # fmt: skip
    pair = smpo_fast.invert(folder, pictures, "a picture", t, settings)
    assert torch.equal(pair.x_0, clean[0])
    torch.testing.assert_close(pair.x_t, x_t[0, 0])
    torch.testing.assert_close(pair.tau, tau[0, 0])
    alone = smpo_fast.invert(str(folder), pixels[1], "a picture", t, settings)
    assert alone.x_t.shape == (1, *clean.shape[2:])
    torch.testing.assert_close(alone.x_t[0], pair.x_t[1])


def test_invert_leaves_a_pipeline_in_half_precision_as_it_was(
    sd15_pipeline: Callable[[str], Path], pictures: list[Image.Image]
) -> None:
    folder = sd15_pipeline("epsilon")
    exact = smpo_fast.invert(folder, pictures, "a picture", 90)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    kinds = [type(module) for module in pipeline.unet.modules()]
    found = smpo_fast.invert(pipeline, pictures, "a picture", 90)
    assert pipeline.vae.dtype == pipeline.unet.dtype == torch.bfloat16
    assert found.tau.dtype == torch.float32 and torch.equal(found.x_0, _rounded(pipeline, pictures))
    assert (found.tau - exact.tau).abs().mean() < 0.05 * exact.tau.abs().mean()
    assert [type(module) for module in pipeline.unet.modules()] == kinds


def _rounded(pipeline: StableDiffusionPipeline, pictures: list[Image.Image]) -> torch.Tensor:
    """Latents by the VAE's rounded weights, in float32."""
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures])
    with torch.no_grad():
        return (
            nn.Module.to(pipeline.vae, torch.float32).encode(pixels).latent_dist.mean
            * pipeline.vae.config.scaling_factor
        )


def test_invert_says_what_does_not_fit(sd15_pipeline: Callable[[str], Path], pictures: list[Image.Image]) -> None:
    folder = sd15_pipeline("epsilon")
    for message, words in {
        "t = 1000 is not a timestep": (pictures, "", 1000),
        "one image, or two of the same size": ([pictures[0], pictures[1].resize((16, 16))], "", 3),
        "pixels of shape \\[3, 15, 24\\]": (torch.zeros(3, 15, 24), "", 3),
    }.items():
        with pytest.raises(smpo_fast.UserError, match=message):
            smpo_fast.invert(folder, *words)
    with pytest.raises(smpo_fast.UserError, match="inversion.source"):
        smpo_fast.invert(folder, pictures, "", 3, smpo_fast.load_recipe(settings={"objective.name": "dpo"}))
    with pytest.raises(smpo_fast.UserError, match="class dict is not supported"):
        smpo_fast.invert({}, pictures, "", 3)


def test_score_images_wants_a_prompt_for_each_image(pictures: list[Image.Image]) -> None:
    with pytest.raises(smpo_fast.UserError, match="2 images, but 1 prompts"):
        smpo_fast.score_images(pictures, ["one"], "embedded")
    assert loading.load().eval.scorer == "embedded"
