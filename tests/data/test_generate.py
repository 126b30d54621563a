"""smpo generate: pictures that hang on nothing but their seed, pairs that follow from them, a table that is ready."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from smpo_fast import cli
from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.commands import GenerateOptions
from smpo_fast.config.schema import Model
from smpo_fast.data import images as data_images
from smpo_fast.data.ingest import generate
from smpo_fast.data.ingest.generate import read_prompts
from smpo_fast.data.ingest.generated_pairs import GeneratedImage, pairs_of
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair, Rejected
from smpo_fast.data.rewards import scorers
from smpo_fast.embedded import pipeline_path
from smpo_fast.models import lora, lora_files
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find

FEW = {"steps": 2, "guidance": 1.0, "per_prompt": 3, "count": 4, "batch": 3}
MODEL = Model(path="embedded")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 9)).save(file, "PNG")
    return file.getvalue()


def made(*scores: float | None, problem: dict[int, str] | None = None) -> list[GeneratedImage]:
    return [GeneratedImage(i, png(i), (8, 8), score, (problem or {}).get(i, "")) for i, score in enumerate(scores)]


def names(found: Sequence[Any]) -> list[str]:
    return [item.candidate.uid if not isinstance(item, Rejected) else item.reason.partition(":")[0] for item in found]


def test_pairs_of_scored_pictures() -> None:
    pictures = made(0.3, 0.9, 0.1, 0.5)
    assert names(pairs_of(5, "p", pictures, "ends")) == ["5-1/5-2"]
    assert names(pairs_of(5, "p", pictures, "once")) == ["5-1/5-2", "5-0/5-3"]
    assert len(pairs_of(5, "p", pictures, "all")) == 6
    (best,) = pairs_of(5, "p", pictures, "ends")
    assert best.candidate.rewards == (0.9, 0.1)
    assert best.images[0].content == png(1)


def test_pairs_without_scores_and_what_gives_none() -> None:
    assert names(pairs_of(5, "p", made(None, None, None), "all")) == ["5-0/5-1", "5-0/5-2", "5-1/5-2"]
    assert pairs_of(5, "p", made(None, None), "all")[0].candidate.rewards is None
    assert names(pairs_of(5, "p", made(0.5, 0.5), "ends")) == ["equal scores"]
    bad = made(0.5, 0.7, 0.9, problem={0: "withheld: x", 1: "one colour only: y"})
    assert names(pairs_of(5, "p", bad, "ends")) == ["withheld", "one colour only", "fewer than two pictures"]
    twins = [made(0.1)[0], replace(made(0.2)[0], number=1)]
    assert names(pairs_of(5, "p", twins, "all")) == ["the same picture twice"]


def pictures_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for pair in reader.read_pairs(folder):
        assert isinstance(pair, RawPair)
        found |= {
            uid: np.asarray(data_images.decode(raw)) for uid, raw in zip(pair.uid.split("/"), pair.images, strict=True)
        }
    return found


def test_pictures_hang_neither_on_batches_nor_on_ranks_nor_on_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PART_IMAGES", 6)
    generate.generate("embedded", tmp_path / "one", MODEL, GenerateOptions(**FEW), World())
    one = pictures_of(tmp_path / "one")
    assert len(one) == 12
    assert not (one["0-0"] == one["0-1"]).all() and not (one["0-0"] == one["1-0"]).all()

    calls: list[int] = []

    def interrupted(images: Sequence[Any], prompts: Sequence[str]) -> np.ndarray:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.array([np.asarray(i).mean() for i in images], np.float32)

    monkeypatch.setattr(generate, "load_scorer", lambda name, device: interrupted)
    options = GenerateOptions(**{**FEW, "batch": 2}, scorer="embedded", pairs="all")
    with pytest.raises(KeyboardInterrupt):
        generate.generate("embedded", tmp_path / "two", MODEL, options, World(1, 2))
    assert not (tmp_path / "two").exists()
    generate.generate("embedded", tmp_path / "two", MODEL, options, World(0, 2))
    two = pictures_of(tmp_path / "two")
    assert sum(calls) == 12 + 2, "only the batch that was interrupted is made again"
    assert one.keys() == two.keys()
    for uid, picture in one.items():
        assert np.abs(picture.astype(int) - two[uid]).max() <= 1
    assert not list(tmp_path.glob(".*"))


def test_command_line_makes_a_table_that_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "embedded", str(tmp_path / "out"), "--model", str(pipeline_path()), "--scorer", "embedded"]
    words += ["--steps", "3", "--guidance", "1.5", "--per-prompt", "3", "--count", "2", "--format", "webp"]
    assert cli.main(words) == 0
    assert "2 pairs in 1 part(s)" in capsys.readouterr().out
    scorer = scorers.load_scorer("embedded", World().device)
    for pair in reader.read_pairs(tmp_path / "out"):
        assert isinstance(pair, RawPair)
        assert pair.images[0][8:12] == b"WEBP"
        again = scorer([data_images.decode(raw) for raw in pair.images], [pair.prompt] * 2)
        np.testing.assert_allclose(pair.rewards, again, rtol=1e-6)
    assert pq.read_table(tmp_path / "out" / "pairs-00000.parquet")["image_0_uid"][0].as_py().startswith("0-")
    before = (tmp_path / "out" / "import.json").read_text()
    assert cli.main(words) == 0
    assert "generated already" in capsys.readouterr().out
    assert (tmp_path / "out" / "import.json").read_text() == before
    assert json.loads(before)["options"]["pairs"] == "ends"
    assert cli.main([*words, "--seed", "1"]) == 2
    assert "holds another table (it differs in prompts, options)" in capsys.readouterr().err


def test_every_image_starts_from_noise_of_its_own() -> None:
    """Also the n-th images of two prompts; whatever the batch."""
    seeds: list[int] = []

    def pipe(prompts: list[str], *, generator: list[torch.Generator], **_: Any) -> Any:
        seeds.extend(each.initial_seed() for each in generator)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(prompts))

    options: Any = GenerateOptions(**FEW)
    made_by = generate._Generator(["a", "b"], Any, Path(), options, Any, World(), {})  # type: ignore[arg-type]
    made_by.pipe = pipe
    for tasks in ([(0, 0), (0, 1), (1, 0)], [(1, 1)], [(0, 0)]):
        made_by._sample(tasks)
    assert len(set(seeds[:4])) == 4 and seeds[4] == seeds[0]


def test_adapters_of_a_run_change_the_pictures(tmp_path: Path) -> None:
    settings = loading.from_dict({"lora": {"rank": 2}, "model": {"path": "embedded"}})
    source = find(settings.model)
    unet = load_unet(source, settings.model, torch.float32, torch.device("cpu"))
    lora.add_adapters(unet, settings.lora, 0)
    for name, weight in unet.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.constant_(weight, 0.2)
    adapted = lora.trained_adapters(settings, source, unet.state_dict())
    lora_files.write_diffusers(adapted, source, tmp_path / "export")
    few = {**FEW, "count": 1, "per_prompt": 2}
    found = []
    for name, adapters in (("base", ""), ("tuned", str(tmp_path / "export"))):
        generate.generate("embedded", tmp_path / name, MODEL, GenerateOptions(**few, adapters=adapters), World())
        found.append(pictures_of(tmp_path / name))
    assert found[0].keys() == found[1].keys()
    assert all(np.abs(found[0][uid].astype(int) - found[1][uid]).max() > 5 for uid in found[0])
    with pytest.raises(UserError, match="differs in adapters"):
        generate.generate("embedded", tmp_path / "tuned", MODEL, GenerateOptions(**few), World())


def test_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\n\n  a dog \na cat\nthree\n")
    assert read_prompts(str(file), GenerateOptions()) == ["a cat", "a dog", "three"]
    assert "1 repeated prompts are used once" in capsys.readouterr().out
    assert read_prompts(str(file), GenerateOptions(count=2)) == ["a cat", "a dog"]
    file.write_text("\n \n")
    with pytest.raises(UserError, match="has no prompt"):
        read_prompts(str(file), GenerateOptions())
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "none"), GenerateOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GenerateOptions(scorer="nonsense"), "scorer 'nonsense' is unknown"),
        (GenerateOptions(adapters="/no"), "has no pytorch_lora_weights"),
    ],
)
def test_what_cannot_be_made_is_said(tmp_path: Path, options: GenerateOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate.generate("embedded", tmp_path / "out", MODEL, options, World())
