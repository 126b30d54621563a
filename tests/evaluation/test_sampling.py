"""Images are drawn and scored once: kept by what decides them, shared by processes, resumed after a kill."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smpo_fast import embedded
from smpo_fast.common.errors import DataError
from smpo_fast.common.runtime import World
from smpo_fast.common.verification import BAD
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.data.rewards import scorers
from smpo_fast.evaluation import sampling
from smpo_fast.evaluation.compare import evaluate
from smpo_fast.evaluation.contenders import contenders
from smpo_fast.evaluation.image_store import ImageStore, verify_images
from smpo_fast.evaluation.sampling import draw, image_keys, sample, shots
from smpo_fast.models.load import load_pipeline, set_sampler
from smpo_fast.models.locate import find

SOURCE = find(loading.from_dict({}).model)


def settings(**values: Any) -> Config:
    return loading.from_dict({"eval": {"prompts": "embedded", "scorer": "embedded", "count": 5, "steps": 2, **values}})


def keys(**values: Any) -> list[str]:
    c = settings(**values)
    base = contenders(c, SOURCE, embedded.pipeline_path())[0]
    return image_keys(base, shots(c), c.eval, torch.float32)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the images that were really drawn."""
    found: list[int] = []
    inner = sampling.sample

    def counted(pipeline: Any, wanted: Any, of: Any) -> Any:
        found.extend(shot.number for shot in wanted)
        return inner(pipeline, wanted, of)

    monkeypatch.setattr(sampling, "sample", counted)
    return found


def test_a_key_depends_on_what_decides_the_image_and_on_nothing_else() -> None:
    plain = keys()
    assert len(set(plain)) == 5
    assert keys(batch=2, scorer="", images="elsewhere") == plain
    assert keys(count=3) == plain[:3], "more prompts keep the images of the first"
    for other in ({"steps": 3}, {"guidance": 2.0}, {"seed": 1}, {"sampler": "euler"}, {"noise": "same"}):
        assert not set(keys(**other)) & (set(plain) if "seed" in other else set(plain[1:])), other
    assert keys(noise="same", seed=12345)[0] == plain[0], "the same noise"


def test_more_prompts_and_another_evaluation_draw_only_what_is_missing(tmp_path: Path, drawn: list[int]) -> None:
    shared = str(tmp_path / "images")
    evaluate(settings(count=2, images=shared), SOURCE, embedded.pipeline_path(), tmp_path / "one", World())
    assert drawn == [0, 1], "base and export are the same here"
    first = (tmp_path / "one" / "scores.csv").read_text().splitlines()
    evaluate(settings(images=shared), SOURCE, embedded.pipeline_path(), tmp_path / "two", World())
    assert drawn == [0, 1, 2, 3, 4]
    assert (tmp_path / "two" / "scores.csv").read_text().splitlines()[:3] == first
    assert [f.name for f in (tmp_path / "images").iterdir() if f.name.startswith(".")] == [], (
        "no working files are left"
    )


def test_an_image_is_scored_once_by_each_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    inner = scorers._EmbeddedScorer.parts

    def counted(self: Any, images: Any, prompts: Any) -> Any:
        scored.append(len(images))
        return inner(self, images, prompts)

    monkeypatch.setattr(scorers._EmbeddedScorer, "parts", counted)
    for _ in range(2):
        evaluate(settings(), SOURCE, embedded.pipeline_path(), tmp_path / "out", World())
    assert sum(scored) == 5
    monkeypatch.setattr(scorers, "scorer_identity", lambda name: "another version")
    monkeypatch.setattr("smpo_fast.evaluation.compare.scorer_identity", lambda name: "another version")
    evaluate(settings(), SOURCE, embedded.pipeline_path(), tmp_path / "out", World())
    assert sum(scored) == 10


def test_several_scorers_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brightness.py").write_text(
        "import numpy as np\ndef mean(images, prompts):\n    return np.array([np.asarray(i).mean() for i in images])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    c = settings(scorer="embedded, brightness:mean")
    done = evaluate(c, SOURCE, embedded.pipeline_path(), tmp_path / "out", World())
    assert {"embedded", "embedded: shape", "brightness:mean"} <= set(done.scores)


def draw_in_a_process(folder: str, rank: int) -> None:
    c = settings(count=150, steps=1)
    base = contenders(c, SOURCE, embedded.pipeline_path())[0]
    draw(base, shots(c), c, ImageStore(Path(folder)), World(rank, 2))


@pytest.mark.slow
def test_two_processes_share_the_images_and_a_killed_one_is_made_up_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=draw_in_a_process, args=(str(tmp_path), rank)) for rank in (0, 1)]
    for process in both:
        process.start()
    while not list(tmp_path.glob("*/*.png")):
        assert both[1].is_alive()
    both[1].kill()
    both[0].join(240)
    assert both[0].exitcode == 0
    c = settings(count=150, steps=1)
    wanted = image_keys(contenders(c, SOURCE, embedded.pipeline_path())[0], shots(c), c.eval, torch.float32)
    store = ImageStore(tmp_path)
    assert all(key in store for key in wanted) and not [f for f in verify_images(tmp_path) if f.grade == BAD]


# --- noise and samplers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> Any:
    found = load_pipeline(SOURCE, torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def same(a: Image.Image, b: Image.Image) -> bool:
    return bool(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1)


def test_running_noise_is_that_of_one_generator_in_the_prompts_order(pipeline: Any) -> None:
    c = settings(noise="running", seed=3, count=3)
    wanted = shots(c)
    generator = torch.Generator().manual_seed(3)
    given = {"num_inference_steps": c.eval.steps, "guidance_scale": c.eval.guidance, "generator": generator}
    expected = [pipeline(shot.prompt, **given).images[0] for shot in wanted]
    found = [*sample(pipeline, wanted[2:], c.eval), *sample(pipeline, wanted[:2], c.eval)]
    assert all(same(a, b) for a, b in zip([found[1], found[2], found[0]], expected, strict=True))


def test_the_same_noise_for_every_prompt(pipeline: Any) -> None:
    c = settings(noise="same", guidance=1.0)
    wanted = [sampling.Shot("a red circle", number) for number in (0, 7)]
    assert same(*sample(pipeline, wanted, c.eval))
    assert not same(*sample(pipeline, wanted, settings(guidance=1.0).eval))


def test_samplers_keep_the_noise_schedule() -> None:
    found = load_pipeline(SOURCE, torch.float32)
    betas = found.scheduler.config.beta_end
    for name in ("euler", "ddim"):
        set_sampler(found, name)
        assert type(found.scheduler).__name__.lower().startswith(name) and found.scheduler.config.beta_end == betas


@pytest.mark.parametrize(("name", "wanted"), [
    ("ours", ("pipeline", 30, 5.0, "index", 12345)), ("sdpo", ("euler", 50, 7.5, "same", 0)),
    ("linear-dpo", ("pipeline", 50, 5.0, "running", 0)), ("dro", ("pipeline", 50, 7.5, "index", 0)),
    ("lpo", ("pipeline", 30, 5.0, "index", 42)),
])  # fmt: skip
def test_a_protocol_is_a_preset(name: str, wanted: tuple[Any, ...]) -> None:
    e = loading.from_dict({"eval": {"protocol": name}}).eval
    assert (e.sampler, e.steps, e.guidance, e.noise, e.seed) == wanted
    assert loading.from_dict({"eval": {"protocol": name, "steps": 7}}).eval.steps == 7, "what is given stays"


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    for key in ("aa", "bb"):
        store.add(key, Image.new("RGB", (8, 8), "red"))
    content = store.file("bb").read_bytes()
    for damaged in (content[:-20], content[:45] + bytes([content[45] ^ 1]) + content[46:]):
        store.file("bb").write_bytes(damaged)
        (finding,) = [f for f in verify_images(tmp_path) if f.grade == BAD]
        assert finding.place == store.file("bb") and "draws the image again" in finding.text
        with pytest.raises(DataError, match="bb.png has changed"):
            store.image("bb")
