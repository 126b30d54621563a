"""Scorers by name, and the errors of names that lead nowhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smpo_fast.config import SettingsError
from smpo_fast.embedded import reward, shapes
from smpo_fast.scorers import check_scorer, load_scorer, scorer_identity

CPU = torch.device("cpu")


def pictures(count: int, size: tuple[int, int] = (40, 32)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def write_clip(folder: Path, processor: bool = True, safe: bool = True) -> Path:
    """A tiny random CLIP model with tokenizer and processor."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip import image_processing_pil_clip as pil

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(words), "max_position_embeddings": 12}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    if safe:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    if processor:
        CLIPTokenizer.from_pretrained(folder, model_max_length=12).save_pretrained(folder)
        square = {"height": 16, "width": 16}
        pil.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "model")


def test_embedded_scores_pictures_of_any_size_and_names_the_parts() -> None:
    scorer, prompts = load_scorer("embedded", CPU), shapes.prompts("train", 3, 0)
    images = [pictures(1)[0], pictures(1, (32, 32))[0], pictures(1, (64, 64))[0]]
    expected = [reward.score(np.asarray(i)[None], [p]).reward[0] for i, p in zip(images, prompts, strict=True)]
    assert scorer(images, prompts).tolist() == [float(e) for e in expected]
    parts = scorer.parts(images, prompts)
    assert list(parts) == ["reward", "foreground", "background", "shape"]
    assert all(values.shape == (3,) and values.dtype == np.float32 for values in parts.values())


def test_embedded_refuses_prompts_of_another_world() -> None:
    with pytest.raises(SettingsError, match="embedded world only"):
        load_scorer("embedded", CPU)(pictures(1), ["a photo of a cat"])


def test_pickscore_is_the_bare_cosine(clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    scorer, images, prompts = load_scorer(f"pickscore:{clip}", CPU), pictures(18), [f"a cat {i}" for i in range(18)]
    scores = scorer(images, prompts)
    inputs = CLIPProcessor.from_pretrained(clip)(
        text=prompts, images=images, return_tensors="pt", padding="max_length", max_length=12, truncation=True
    )
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip).eval()
        logits = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    np.testing.assert_allclose(scores, logits.numpy(), atol=1e-5)
    assert scores.shape == (18,)
    assert scores.dtype == np.float32
    assert list(scorer.parts(images[:1], prompts[:1])) == ["reward"]


def test_pickscore_cuts_long_prompts_and_takes_empty_ones(clip: Path) -> None:
    assert np.isfinite(load_scorer(f"pickscore:{clip}", CPU)(pictures(2), ["", "x " * 500])).all()


def test_pickscore_reads_no_pickles(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "pickled", safe=False)
    with pytest.raises(SettingsError, match="from safetensors"):
        load_scorer(f"pickscore:{folder}", CPU)


def test_identity_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = scorer_identity(f"pickscore:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert scorer_identity(f"pickscore:{tmp_path}") != before
    assert scorer_identity("") == ""
    assert scorer_identity("embedded") == "embedded"
    assert scorer_identity("pickscore") == "pickscore:yuvalkirstain/PickScore_v1"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "taste_of_a_test.py"
    file.write_text(
        "import numpy, torch\n"
        "def bright(images, prompts): return [numpy.asarray(i).mean() + len(p) for i, p in zip(images, prompts)]\n"
        "def tensor(images, prompts): return torch.arange(len(images)).requires_grad_(False)\n"
        "def wrong(images, prompts): return [[1.0]] * len(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return file


def test_a_function_of_your_own(module: Path) -> None:
    images = pictures(2)
    scores = load_scorer("taste_of_a_test:bright", CPU)(images, ["a", "bcd"])
    np.testing.assert_allclose(scores, [np.asarray(images[0]).mean() + 1, np.asarray(images[1]).mean() + 3], rtol=1e-6)
    assert scores.dtype == np.float32
    assert load_scorer("taste_of_a_test:tensor", CPU)(images, ["", ""]).tolist() == [0, 1]
    before = scorer_identity("taste_of_a_test:bright")
    module.write_text(module.read_text() + "# changed\n")
    assert scorer_identity("taste_of_a_test:bright") != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("picscore", "'picscore' is unknown; there are 'embedded', 'pickscore'"),
        ("", "is unknown"),
        ("no_such_module:f", "no module 'no_such_module'.*PYTHONPATH"),
        ("no.such.module:f", "no module 'no.such.module'"),
        ("taste_of_a_test:missing", "has no function 'missing'"),
        ("pickscore:/no/such/folder", "cannot be loaded"),
    ],
)
def test_names_that_lead_nowhere(module: Path, name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_scorer(name, CPU)


def test_check_names_the_setting_and_loads_nothing() -> None:
    with pytest.raises(SettingsError, match="eval.scorer: scorer 'nonsense' is unknown"):
        check_scorer("nonsense", "eval.scorer")
    check_scorer("pickscore", "eval.scorer")
    check_scorer("embedded", "eval.scorer")


def test_wrong_shape_of_scores_is_said(module: Path) -> None:
    with pytest.raises(SettingsError, match=r"gave an array \[2, 1\] for 2 pictures"):
        load_scorer("taste_of_a_test:wrong", CPU)(pictures(2), ["", ""])
