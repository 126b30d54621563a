"""Scorers by name: published checkpoints in their own layouts against a second reading of them; errors.

The networks below are written from the papers' descriptions, on the authors' names of weights, in plain functions.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.clip import write_clip
from PIL import Image

from smpo_fast.common.errors import UserError
from smpo_fast.data.rewards.published_weights import read_weights
from smpo_fast.data.rewards.reward_models import MEAN, STD, RewardModel, padded, squared
from smpo_fast.data.rewards.scorers import KINDS, check_scorer, load_scorer, scorer_identity, terms
from smpo_fast.embedded import reward, shapes

CPU = torch.device("cpu")


def pictures(count: int, size: tuple[int, int] = (40, 32)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


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
    with pytest.raises(UserError, match="only score images of the embedded world"):
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
    with pytest.raises(UserError, match="from safetensors"):
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
        ("picscore", "'picscore' is unknown; known are 'embedded', 'pickscore'"),
        ("0.5*pickscore + 0.5*clip", "combines scorers.*smpo score"),
        ("hpsv2.1:/no/such/folder", "neither a local file or folder nor a hub id"),
        ("", "is unknown"),
        ("no_such_module:f", "no module 'no_such_module'.*PYTHONPATH"),
        ("no.such.module:f", "no module 'no.such.module'"),
        ("taste_of_a_test:missing", "has no function 'missing'"),
        ("pickscore:/no/such/folder", "cannot be loaded"),
    ],
)
def test_names_that_lead_nowhere(module: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_scorer(name, CPU)


def test_check_names_the_setting_and_loads_nothing() -> None:
    with pytest.raises(UserError, match="eval.scorer: scorer 'nonsense' is unknown"):
        check_scorer("nonsense", "eval.scorer")
    check_scorer("pickscore", "eval.scorer")
    check_scorer("embedded", "eval.scorer")


def test_wrong_shape_of_scores_is_said(module: Path) -> None:
    with pytest.raises(UserError, match=r"returned an array of shape \[2, 1\] for 2 images"):
        load_scorer("taste_of_a_test:wrong", CPU)(pictures(2), ["", ""])


# --- published checkpoints --------------------------------------------------------------------------------------

Weights = dict[str, torch.Tensor]
F = torch.nn.functional


class Draw:
    """Random weights by name."""

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.source = torch.Generator().manual_seed(0)

    def add(self, name: str, *shape: int, near: float = 0.0) -> None:
        self.weights[name] = near + 0.15 * torch.randn(*shape, generator=self.source)

    def linear(self, name: str, outs: int, ins: int) -> None:
        self.add(f"{name}.weight", outs, ins)
        self.add(f"{name}.bias", outs)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, near=1.0)
        self.add(f"{name}.bias", width)


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Multi-head attention of [T, D] on [S, D]; mask: bool [T, S] or [S], False is not seen."""
    split = [x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(1, 2) / split[0].shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ split[2]).transpose(0, 1).flatten(1)


def patches(w: torch.Tensor, bias: torch.Tensor | None, picture: torch.Tensor) -> torch.Tensor:
    return F.conv2d(picture[None], w, bias, stride=w.shape[-1])[0].flatten(1).T


def open_clip_weights(vocabulary: int, context: int) -> Weights:
    draw = Draw()
    for tower, width in (("visual.transformer", 160), ("transformer", 128)):
        for i in range(2):
            name = f"{tower}.resblocks.{i}"
            draw.add(f"{name}.attn.in_proj_weight", 3 * width, width)
            draw.add(f"{name}.attn.in_proj_bias", 3 * width)
            draw.linear(f"{name}.attn.out_proj", width, width)
            draw.linear(f"{name}.mlp.c_fc", 2 * width, width)
            draw.linear(f"{name}.mlp.c_proj", width, 2 * width)
            for which in ("ln_1", "ln_2"):
                draw.norm(f"{name}.{which}", width)
    for name, width in (("visual.ln_pre", 160), ("visual.ln_post", 160), ("ln_final", 128)):
        draw.norm(name, width)
    draw.add("visual.conv1.weight", 160, 3, 8, 8)
    draw.add("visual.class_embedding", 160)
    draw.add("visual.positional_embedding", 5, 160)
    draw.add("visual.proj", 160, 24)
    draw.add("token_embedding.weight", vocabulary, 128)
    draw.add("positional_embedding", context, 128)
    draw.add("text_projection", 128, 24)
    return draw.weights | {"logit_scale": torch.tensor(4.6), "attn_mask": torch.zeros(context, context)}


def open_clip(w: Weights, picture: torch.Tensor, ids: torch.Tensor) -> float:
    """Cosine of a picture [3, 16, 16] and the tokens of a text [T]: pre-norm blocks, exact GELU, pooled at the end."""

    def tower(name: str, x: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
        for i in range(2):
            at = f"{name}.resblocks.{i}"
            h = norm(w, f"{at}.ln_1", x, 1e-5)
            q, k, v = F.linear(h, w[f"{at}.attn.in_proj_weight"], w[f"{at}.attn.in_proj_bias"]).chunk(3, -1)
            x = x + linear(w, f"{at}.attn.out_proj", attend(q, k, v, heads, mask))
            h = F.gelu(linear(w, f"{at}.mlp.c_fc", norm(w, f"{at}.ln_2", x, 1e-5)))
            x = x + linear(w, f"{at}.mlp.c_proj", h)
        return x

    x = torch.cat([w["visual.class_embedding"][None], patches(w["visual.conv1.weight"], None, picture)])
    x = norm(w, "visual.ln_pre", x + w["visual.positional_embedding"], 1e-5)
    seen = norm(w, "visual.ln_post", tower("visual.transformer", x, 2, None)[0], 1e-5) @ w["visual.proj"]
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    x = tower("transformer", w["token_embedding.weight"][ids] + w["positional_embedding"][: len(ids)], 2, causal)
    read = norm(w, "ln_final", x, 1e-5)[ids.argmax()] @ w["text_projection"]
    return float(F.cosine_similarity(seen, read, dim=0))


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPTokenizer

    folder = write_clip(tmp_path_factory.mktemp("hps") / "model")
    words = len(CLIPTokenizer.from_pretrained(folder))
    torch.save({"state_dict": open_clip_weights(words, 12), "epoch": 3}, folder / "HPS_v2.1_compressed.pt")
    return folder


def test_hps_reads_an_open_clip_checkpoint(hps: Path) -> None:
    from transformers import CLIPTokenizer

    images, prompts = [pictures(1)[0], pictures(1, (30, 70))[0]], ["a &amp;amp; b", "A  long cat, " * 9]
    tokenizer, weights = CLIPTokenizer.from_pretrained(hps), read_weights(hps / "HPS_v2.1_compressed.pt")
    expected = []
    for image, text in zip(images, ["a & b", prompts[1]], strict=True):
        ids = torch.tensor(tokenizer(text, truncation=True, max_length=12).input_ids)
        expected.append(open_clip(weights, padded(image, 16), ids))
    scores = load_scorer(f"hpsv2.1:{hps}", CPU)(images, prompts)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores[0] != scores[1] and scores.dtype == np.float32
    file = load_scorer(f"hpsv2.1:{hps / 'HPS_v2.1_compressed.pt'}", CPU)
    np.testing.assert_array_equal(file(images, prompts), scores)
    with pytest.raises(UserError, match="no file named HPS_v2_compressed.pt or HPS_v2_compressed.safetensors"):
        load_scorer(f"hpsv2:{hps}", CPU)


BERT = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "encoder_width": 128,
}  # fmt: skip
HEAD = ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1))


def head_weights(draw: Draw, prefix: str, width: int) -> None:
    for place, size in HEAD:
        draw.linear(f"{prefix}layers.{place}", size, width)
        width = size


def image_reward_weights() -> Weights:
    draw, vision, text = Draw(), "blip.visual_encoder", "blip.text_encoder"
    draw.add(f"{vision}.cls_token", 1, 1, 128)
    draw.add(f"{vision}.pos_embed", 1, 5, 128)
    draw.add(f"{vision}.patch_embed.proj.weight", 128, 3, 8, 8)
    draw.add(f"{vision}.patch_embed.proj.bias", 128)
    draw.norm(f"{vision}.norm", 128)
    for i in range(2):
        for name in ("norm1", "norm2"):
            draw.norm(f"{vision}.blocks.{i}.{name}", 128)
        for name, outs, ins in (
            ("attn.qkv", 384, 128),
            ("attn.proj", 128, 128),
            ("mlp.fc1", 64, 128),
            ("mlp.fc2", 128, 64),
        ):
            draw.linear(f"{vision}.blocks.{i}.{name}", outs, ins)
        layer = f"{text}.encoder.layer.{i}"
        for name, width in (("attention", 24), ("crossattention", 128)):
            for part in ("query", "key", "value"):
                draw.linear(f"{layer}.{name}.self.{part}", 24, 24 if part == "query" else width)
            draw.linear(f"{layer}.{name}.output.dense", 24, 24)
            draw.norm(f"{layer}.{name}.output.LayerNorm", 24)
        draw.linear(f"{layer}.intermediate.dense", 32, 24)
        draw.linear(f"{layer}.output.dense", 24, 32)
        draw.norm(f"{layer}.output.LayerNorm", 24)
    draw.add(f"{text}.embeddings.word_embeddings.weight", 40, 24)
    draw.add(f"{text}.embeddings.position_embeddings.weight", 40, 24)
    draw.norm(f"{text}.embeddings.LayerNorm", 24)
    head_weights(draw, "mlp.", 24)
    draw.add("blip.vision_proj.weight", 3, 3)  # belongs to pre-training
    return draw.weights | {f"{text}.embeddings.position_ids": torch.arange(40)[None]}


def image_reward(weights: Weights, picture: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """A ViT (pre-norm, eps 1e-6), BERT (post-norm) that also looks at it, and an MLP without anything between."""
    w = {name.removeprefix("blip.visual_encoder."): value for name, value in weights.items()}
    x = torch.cat([w["cls_token"][0], patches(w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], picture)])
    x = x + w["pos_embed"][0]
    for i in range(2):
        q, k, v = linear(w, f"blocks.{i}.attn.qkv", norm(w, f"blocks.{i}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(w, f"blocks.{i}.attn.proj", attend(q, k, v, 2, None))
        h = F.gelu(linear(w, f"blocks.{i}.mlp.fc1", norm(w, f"blocks.{i}.norm2", x, 1e-6)))
        x = x + linear(w, f"blocks.{i}.mlp.fc2", h)
    seen = norm(w, "norm", x, 1e-6)

    w = {name.removeprefix("blip.text_encoder."): value for name, value in weights.items()}
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(w, "embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        for name, other, seen_by in (("attention", None, mask), ("crossattention", seen, None)):
            at = f"encoder.layer.{i}.{name}"
            from_ = x if other is None else other
            q = linear(w, f"{at}.self.query", x)
            k, v = (linear(w, f"{at}.self.{part}", from_) for part in ("key", "value"))
            h = linear(w, f"{at}.output.dense", attend(q, k, v, 4, seen_by))
            x = norm(w, f"{at}.output.LayerNorm", x + h, 1e-12)
        h = F.gelu(linear(w, f"encoder.layer.{i}.intermediate.dense", x))
        x = norm(w, f"encoder.layer.{i}.output.LayerNorm", x + linear(w, f"encoder.layer.{i}.output.dense", h), 1e-12)
    x = x[0]
    for place, _ in HEAD:
        x = linear(weights, f"mlp.layers.{place}", x)
    return (float(x) - 0.16717362830052426) / 1.0333394966054072


def test_every_image_is_scored_with_its_own_prompt_whatever_their_number() -> None:
    class Echo(RewardModel):
        def _score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
            assert len(images) == len(prompts) <= 32
            return torch.tensor([float(p) + np.asarray(i)[0, 0, 0] for i, p in zip(images, prompts, strict=True)])

    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(70)]
    scores = Echo(CPU, False)(images, [f"{1000 * i}" for i in range(70)])
    assert scores.tolist() == [1001.0 * i for i in range(70)]


def test_image_reward_reads_its_checkpoint(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(97, 114)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "med_config.json").write_text(json.dumps({**BERT, "model_type": "bert", "add_cross_attention": True}))
    weights = image_reward_weights()
    torch.save(weights, tmp_path / "ImageReward.pt")
    images, prompts = [pictures(1)[0], pictures(1, (30, 70))[0], pictures(1)[0]], ["A bad cafe", "", "deep " * 60]
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        words_ = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        ids, mask = words_.input_ids[0], words_.attention_mask[0].bool()
        expected.append(image_reward(weights, squared(image, 16), ids, mask))
    scorer = load_scorer(f"imagereward:{tmp_path}", CPU)
    np.testing.assert_allclose(scorer(images, prompts), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scorer(images[:1], prompts[:1]), expected[:1], rtol=1e-4, atol=1e-5)


def test_aesthetic_is_an_mlp_on_the_normalised_embedding(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder, draw = write_clip(tmp_path / "model"), Draw()
    head_weights(draw, "", 8)
    torch.save(draw.weights, folder / "sac+logos+ava1-l14-linearMSE.pth")
    images = [pictures(1)[0], pictures(1, (30, 70))[0]]
    scores = load_scorer(f"aesthetic:{folder}", CPU)(images, ["a", "b"])
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        inside = model.vision_model(torch.stack([squared(i, 16) for i in images])).pooler_output
        x = model.visual_projection(inside)
        x = x / x.norm(dim=-1, keepdim=True)
        for place, _ in HEAD:
            x = linear(draw.weights, f"layers.{place}", x)
    np.testing.assert_allclose(scores, x[:, 0].numpy(), rtol=1e-5)
    np.testing.assert_array_equal(load_scorer(f"aesthetic:{folder}", CPU)(images, ["other", ""]), scores)


def test_clip_is_pickscore_with_other_weights(clip: Path) -> None:
    images = pictures(3)
    expected = load_scorer(f"pickscore:{clip}", CPU)(images, ["a", "b", "c"])
    np.testing.assert_array_equal(load_scorer(f"clip:{clip}", CPU)(images, ["a", "b", "c"]), expected)


def test_a_clip_with_weights_missing_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_clip(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(without("visual_projection.weight")(weights), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 weights are missing, such as visual_projection.weight"):
        load_scorer(f"pickscore:{folder}", CPU)
    save_file(
        weights | {"visual_projection.weight": torch.zeros(3, 16)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="pickscore.*cannot be loaded"):
        load_scorer(f"pickscore:{folder}", CPU)


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda w: {key: value for key, value in w.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("visual.proj"), "not the weights of an OpenCLIP ViT-H-14"),
        (without("ln_final.bias"), "1 names differ, such as text_model.final_layer_norm.bias"),
        (lambda w: w | {"visual.proj": torch.zeros(128, 24)}, "width 128 is no multiple of the heads' width 80"),
        (lambda w: w | {"visual.ln_pre.bias": torch.zeros(7)}, "not the weights of an OpenCLIP"),
        (lambda w: w | {"more.weight": torch.zeros(7)}, "1 names differ, such as more.weight"),
    ],
)
def test_weights_of_another_network_are_refused(
    tmp_path: Path, hps: Path, spoil: Callable[[Weights], Weights], message: str
) -> None:
    torch.save(spoil(read_weights(hps / "HPS_v2.1_compressed.pt")), tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match=message):
        load_scorer(f"hpsv2.1:{tmp_path}", CPU)


def test_no_object_is_made_of_a_weight_file(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return Path.touch, (ran,)

    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Payload()}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="contains only tensors"):
        load_scorer(f"imagereward:{tmp_path}", CPU)
    assert not ran.exists()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a dictionary of tensors"):
        read_weights(tmp_path / "list.pt")


def test_pictures_are_padded_or_cut_to_a_square() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 51))
    whole, cut = padded(wide, 16), squared(wide, 16)
    assert whole.shape == cut.shape == (3, 16, 16)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    colour, black = (torch.tensor([1, 0, 0.2]) - mean) / std, -mean / std
    torch.testing.assert_close(cut, colour[:, None, None].expand(3, 16, 16))
    torch.testing.assert_close(whole[:, 4:12], colour[:, None, None].expand(3, 8, 16))
    torch.testing.assert_close(whole[:, :4], black[:, None, None].expand(3, 4, 16))
    torch.testing.assert_close(whole[:, 12:], black[:, None, None].expand(3, 4, 16))


def test_combinations_are_read() -> None:
    assert terms("pickscore") == [(1.0, "pickscore")]
    assert terms("0.7*pickscore:/a/b+c + 0.3*aesthetic") == [(0.7, "pickscore:/a/b+c"), (0.3, "aesthetic")]
    assert terms("2*a:b+-0.5*clip") == [(2.0, "a:b"), (-0.5, "clip")]
    assert terms("module:f") == [(1.0, "module:f")]


def test_half_precision_is_near_and_only_where_there_are_networks(clip: Path) -> None:
    images, prompts = pictures(4), list("abcd")
    full, half = (load_scorer(f"clip:{clip}", CPU, half=half)(images, prompts) for half in (False, True))
    assert 0 < np.abs(full - half).max() < 0.01
    with pytest.raises(UserError, match="'embedded' has no half precision"):
        load_scorer("embedded", CPU, half=True)


def test_every_kind_has_an_identity_that_follows_its_files(tmp_path: Path) -> None:
    for kind, known in KINDS.items():
        assert scorer_identity(kind) == f"{kind}:{known.location}"
        (tmp_path / "weights.pt").write_bytes(kind.encode())
        before = scorer_identity(f"{kind}:{tmp_path}")
        (tmp_path / "weights.pt").write_bytes(b"others")
        assert before.startswith(f"{kind}@") and scorer_identity(f"{kind}:{tmp_path}") != before
