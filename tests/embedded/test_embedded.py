"""The embedded world: captions, images, reward, shipped assets, and the script that builds them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from smpo_fast import embedded
from smpo_fast.config import loading
from smpo_fast.embedded import reward, shapes
from smpo_fast.embedded.build import __main__, networks, pairs, pretrain_unet
from smpo_fast.embedded.build.__main__ import Sizes
from smpo_fast.embedded.build.pretrain_vae import to_tensor
from smpo_fast.models.locate import find

SIZE_LIMIT = 7_000_000
PART_NAMES = ("foreground", "background", "shape")


@pytest.fixture(scope="module")
def clean() -> tuple[np.ndarray, list[str]]:
    """256 clean images of random scenes, and their captions."""
    rng = np.random.default_rng(0)
    world = shapes.scenes()
    batch = [world[i] for i in rng.integers(len(world), size=256)]
    return shapes.render(batch, rng), [scene.caption for scene in batch]


@pytest.fixture(scope="module")
def table() -> dict[str, list]:
    return pq.read_table(embedded.pairs_path()).to_pydict()


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return networks.load(embedded.pipeline_path())


@pytest.fixture(scope="module")
def images(table: dict[str, list]) -> list[np.ndarray]:
    """The images 0 and 1 of all pairs, decoded: two arrays uint8 [N, 32, 32, 3]."""
    return [np.stack([pairs.decode(data) for data in table[name]]) for name in ("jpg_0", "jpg_1")]


# ---- captions and their split


def test_every_caption_parses_back_and_names_one_scene() -> None:
    world = shapes.scenes()
    assert len(world) == 6 * 8 * 7 * 3 * 5
    assert len({scene.caption for scene in world}) == len(world)
    assert all(shapes.parse(scene.caption) == scene for scene in world)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "a red circle",
        "a red circle on a red background",
        "a huge red circle on a blue background",
        "a red circle on a blue background on the left please",
        "A red circle on a blue background",
    ],
)
def test_other_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption") as refusal:
        reward.score(np.zeros((1, 32, 32, 3), np.uint8), [text])
    assert repr(text) in str(refusal.value)


def test_split_is_disjoint_down_to_the_combination() -> None:
    train, held_out = (shapes.prompts(name, 900) for name in shapes.SPLITS)
    combination = [{(s.shape, s.colour, s.background) for s in map(shapes.parse, side)} for side in (train, held_out)]
    assert not combination[0] & combination[1]
    assert len(set(train)) == len(set(held_out)) == 900
    assert {s.shape for s in map(shapes.parse, held_out)} == set(shapes.SHAPES)


def test_prompts_depend_on_the_seed_and_know_their_number() -> None:
    assert shapes.prompts("train", 50, seed=3) == shapes.prompts("train", 50, seed=3)
    assert shapes.prompts("train", 50, seed=3) != shapes.prompts("train", 50, seed=4)
    with pytest.raises(ValueError, match="captions, fewer than 5000"):
        shapes.prompts("held-out", 5000)
    with pytest.raises(ValueError, match="'test'"):
        shapes.prompts("test", 1)


# ---- reward


def test_clean_images_score_high_in_every_part(clean: tuple[np.ndarray, list[str]]) -> None:
    scores = reward.score(*clean)
    assert scores.reward.mean() > 0.97 and scores.reward.min() > 0.93
    assert all(getattr(scores, name).mean() > 0.95 for name in PART_NAMES)
    combined = 0.4 * scores.foreground + 0.3 * scores.background + 0.3 * scores.shape
    np.testing.assert_allclose(scores.reward, combined, atol=1e-6)


def test_prompts_of_other_images_score_low(clean: tuple[np.ndarray, list[str]]) -> None:
    images, captions = clean
    assert reward.score(np.roll(images, 1, axis=0), captions).reward.mean() < 0.4


@pytest.mark.parametrize("part", PART_NAMES)
def test_a_fault_lowers_its_own_part_only(part: str) -> None:
    wrong = {
        "foreground": "a green circle on a blue background",
        "background": "a red circle on a white background",
    }
    wrong["shape"] = "a red cross on a blue background"
    caption = "a red circle on a blue background"
    image = shapes.render([shapes.parse(caption)], np.random.default_rng(0))
    right, fault = reward.score(image, [caption]), reward.score(image, [wrong[part]])
    for name in PART_NAMES:
        drop = float(getattr(right, name)[0] - getattr(fault, name)[0])
        assert drop > 0.3 if name == part else abs(drop) < 1e-6, name


def test_colour_parts_fall_steadily_with_saturation() -> None:
    caption = "a large red square on a cyan background"
    mask = shapes.coverage("square", np.full((5, 2), 16.0), np.full(5, 9.0))
    grey, saturation = shapes.GREY, np.linspace(1, 0.2, 5)[:, None]
    red, cyan = shapes.rgb(["red"]), shapes.rgb(["cyan"])
    images = shapes.paint(mask, grey + saturation * (red - grey), np.repeat(cyan, 5, axis=0))
    scores = reward.score(images, [caption] * 5)
    assert (np.diff(scores.foreground) < -0.1).all()
    np.testing.assert_allclose(scores.background, scores.background[0], atol=1e-3)
    np.testing.assert_allclose(scores.shape, scores.shape[0], atol=0.05)


def test_an_empty_image_has_no_shape() -> None:
    flat = np.full((1, 32, 32, 3), 25, np.uint8)
    scores = reward.score(flat, ["a red circle on a black background"])
    assert scores.shape[0] == 0 and scores.background[0] > 0.95 and scores.reward[0] < 0.5


@pytest.mark.parametrize("size", [64, 48, 96])
def test_other_image_sizes_score_alike(clean: tuple[np.ndarray, list[str]], size: int) -> None:
    images, captions = clean[0][:64], clean[1][:64]
    larger = np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BILINEAR)) for x in images])
    assert abs(reward.score(larger, captions).reward - reward.score(images, captions).reward).max() < 0.08


def test_score_refuses_wrong_arrays() -> None:
    caption = "a red circle on a blue background"
    with pytest.raises(ValueError, match="uint8"):
        reward.score(np.zeros((1, 32, 32, 3)), [caption])
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        reward.score(np.zeros((2, 32, 32, 3), np.uint8), [caption])
    assert len(reward.score(np.zeros((0, 32, 32, 3), np.uint8), []).reward) == 0


# ---- shipped assets


def test_assets_fit_into_seven_megabytes() -> None:
    assert 1_000_000 < __main__.total_bytes(embedded.assets()) <= SIZE_LIMIT


def test_pipeline_is_a_stock_sdxl() -> None:
    loaded = StableDiffusionXLPipeline.from_pretrained(embedded.pipeline_path(), variant=None)
    assert isinstance(loaded.scheduler, DDIMScheduler)
    wanted = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "prediction_type": "epsilon",
        "clip_sample": False,
    }
    assert {key: loaded.scheduler.config[key] for key in wanted} == wanted
    assert loaded.unet.config.addition_embed_type == "text_time"
    assert loaded.config.force_zeros_for_empty_prompt is False
    assert all(value.isfinite().all() for value in loaded.unet.state_dict().values())


def test_pipeline_folder_is_laid_out_as_published_ones_are() -> None:
    """What older versions of the libraries need, and nothing about the machine it was made on."""
    folder = embedded.pipeline_path()
    for name in ("text_encoder", "text_encoder_2"):
        weights = load_file(folder / name / "model.safetensors")
        assert all(key.startswith(("text_model.", "text_projection.")) for key in weights)
        assert {value.dtype for value in weights.values()} == {torch.float32}, "loads without a dtype given"
    assert {file.name for file in (folder / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt", "tokenizer.json"}
    for config in folder.rglob("*.json"):
        assert not networks.ORIGIN_KEYS & set(json.loads(config.read_text())), config


def test_tokenizer_knows_the_world_and_survives_other_text(pipeline: StableDiffusionXLPipeline) -> None:
    words = pipeline.tokenizer
    ids = words([scene.caption for scene in shapes.scenes()]).input_ids
    assert len({tuple(row) for row in ids}) == len(ids)
    assert max(map(len, ids)) <= words.model_max_length == networks.TOKENS
    scene = "a small red circle on a blue background at the bottom"
    assert len(words(scene).input_ids) == len(scene.split()) + 2
    strange = words("Émile, 42 ☕?", padding="max_length", truncation=True).input_ids
    assert len(strange) == networks.TOKENS and max(strange) < len(words)


def test_the_unet_for_v_predicts_down_to_zero_terminal_snr(pipeline: StableDiffusionXLPipeline) -> None:
    """At the last timestep its input is noise alone, and v is minus the latents: their mean is the best guess."""
    source = find(loading.from_dict({"model": {"path": "embedded-v"}}).model)
    assert (source.kind, source.prediction_type) == ("sdxl", "v_prediction")
    assert source.scheduler["rescale_betas_zero_snr"] is True
    captions = shapes.prompts("train", 32, 0)
    images = shapes.render([shapes.parse(caption) for caption in captions], np.random.default_rng(0))
    zero = DDIMScheduler.from_config(source.scheduler)
    unet = UNet2DConditionModel.from_pretrained(source.unet_folder)
    v_pipeline = StableDiffusionXLPipeline(**{**pipeline.components, "unet": unet, "scheduler": zero})
    tokens, seeded = pretrain_unet.tokenize(v_pipeline, captions), torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipeline.vae.encode(to_tensor(images)).latent_dist.mean * pipeline.vae.config.scaling_factor
        for time, most in ((999, 0.4), (500, 0.06)):
            noise, at = torch.randn(latents.shape, generator=seeded), torch.full((32,), time)
            noisy, v = zero.add_noise(latents, noise, at), zero.get_velocity(latents, noise, at)
            error = pretrain_unet.predict(v_pipeline, noisy, at, tokens) - v
            assert error.square().mean() < most * v.square().mean(), time


def test_base_follows_its_prompts_and_leaves_room(pipeline: StableDiffusionXLPipeline) -> None:
    captions = shapes.prompts("held-out", 48, seed=1)
    images = pairs.sample(pipeline, captions, seed=5)
    assert images.shape == (48, 32, 32, 3) and images.dtype == np.uint8
    scores = reward.score(images, captions)
    assert 0.6 < scores.reward.mean() < 0.85
    assert reward.score(np.roll(images, 1, axis=0), captions).reward.mean() < scores.reward.mean() - 0.2


def test_sampling_does_not_depend_on_the_batch(pipeline: StableDiffusionXLPipeline) -> None:
    captions = shapes.prompts("train", 3)
    together, apart = (pairs.sample(pipeline, captions, seed=0, batch=size) for size in (3, 2))
    assert np.abs(together.astype(int) - apart).max() <= 2
    assert np.abs(together.astype(int) - pairs.sample(pipeline, captions, seed=1)).max() > 20


def test_pair_table_has_pick_a_pic_columns(table: dict[str, list]) -> None:
    schema = pq.read_schema(embedded.pairs_path())
    assert {field.name: str(field.type) for field in schema} == {
        "caption": "string",
        "jpg_0": "binary",
        "jpg_1": "binary",
        "label_0": "double",
        "label_1": "double",
        "image_0_uid": "string",
        "image_1_uid": "string",
        "model_0": "string",
        "model_1": "string",
        "best_image_uid": "string",
        "are_different": "bool",
        "reward_0": "float",
        "reward_1": "float",
    }
    assert schema.metadata[b"license"] == b"Apache-2.0"
    assert len(table["caption"]) >= 1000
    assert len(set(table["image_0_uid"]) | set(table["image_1_uid"])) == 2 * len(table["caption"])


def test_pairs_use_train_prompts_only(table: dict[str, list]) -> None:
    assert {shapes.split_of(shapes.parse(caption)) for caption in table["caption"]} == {"train"}
    assert len(set(table["caption"])) == len(table["caption"])


def test_stored_rewards_are_those_of_the_stored_images(table: dict[str, list], images: list[np.ndarray]) -> None:
    for side in (0, 1):
        found = reward.score(images[side], table["caption"]).reward
        np.testing.assert_allclose(found, table[f"reward_{side}"], atol=0.02)  # JPEG decoders may round differently
        assert abs(found - np.array(table[f"reward_{side}"])).mean() < 0.002


def test_labels_follow_the_rewards(table: dict[str, list]) -> None:
    gap = np.array(table["reward_0"]) - np.array(table["reward_1"])
    label = np.where(abs(gap) < pairs.TIE, 0.5, (gap > 0).astype(float))
    np.testing.assert_array_equal(table["label_0"], label)
    np.testing.assert_array_equal(table["label_1"], 1 - label)
    rows = zip(label, table["image_0_uid"], table["image_1_uid"], strict=True)
    assert table["best_image_uid"] == [{1.0: first, 0.0: second, 0.5: "tie"}[value] for value, first, second in rows]
    assert 0.4 < (label == 1).mean() < 0.6
    assert abs(gap).mean() > 0.08


# ---- building


def test_tie_and_identical_images_are_labelled() -> None:
    captions = shapes.prompts("train", 4)
    images = shapes.render([shapes.parse(caption) for caption in captions], np.random.default_rng(0))
    worse = np.full_like(images, 128)
    table = pairs.pair_table(captions, (images, np.concatenate([images[:2], worse[2:]]))).to_pydict()
    assert table["label_0"] == [0.5, 0.5, 1, 1] and table["label_1"] == [0.5, 0.5, 0, 0]
    assert table["are_different"] == [False, False, True, True]
    assert table["best_image_uid"] == ["tie", "tie", *table["image_0_uid"][2:]]


def test_training_latents_have_unit_scale(pipeline: StableDiffusionXLPipeline) -> None:
    latents, captions = pretrain_unet.encode_images(pipeline.vae, 64, np.random.default_rng(0))
    assert latents.shape == (64, 4, 8, 8) and len(captions) == 64
    assert 0.9 < float(latents.std()) < 1.1


def test_training_predicts_as_the_pipeline_does(pipeline: StableDiffusionXLPipeline) -> None:
    """The base was trained with the conditioning that `encode_prompt` and SDXL's time ids give at inference."""
    captions = shapes.prompts("train", 3)
    noisy, t = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([5, 500, 999]),
    )
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        time_ids = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, networks.WIDTHS[1])
        added = {"text_embeds": pooled, "time_ids": time_ids.repeat(3, 1)}
        wanted = pipeline.unet(noisy, t, context, added_cond_kwargs=added).sample
        found = pretrain_unet.predict(pipeline, noisy, t, pretrain_unet.tokenize(pipeline, captions))
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_build_runs_from_nothing_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = Sizes(vae_steps=3, unet_steps=3, unet_v_steps=3, unet_images=32, unet_batch=8, pairs=6, evaluated=4)
    with pytest.raises(SystemExit, match="needs the result of stage vae"):
        __main__.build(tmp_path, ("unet",), 0, sizes)
    __main__.build(tmp_path, __main__.STAGES, 0, sizes)
    loaded = networks.load(tmp_path / embedded.PIPELINE)
    assert isinstance(loaded, StableDiffusionXLPipeline)
    built = pq.read_table(tmp_path / embedded.PAIRS)
    assert built.num_rows == 6 and built.schema.equals(pq.read_schema(embedded.pairs_path()))
    assert built["caption"].to_pylist() == shapes.prompts("train", 6, 0)

    v = UNet2DConditionModel.from_pretrained(tmp_path / embedded.UNET_V)
    v.load_state_dict(loaded.unet.state_dict())  # the same names and shapes

    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    (tmp_path / embedded.PAIRS).unlink()
    capsys.readouterr()
    __main__.build(tmp_path, __main__.STAGES, 0, sizes)
    assert capsys.readouterr().out.count("skipped") == 3
    assert pq.read_table(tmp_path / embedded.PAIRS).equals(built)
    changed = [file for file, stamp in stamps.items() if file.stat().st_mtime_ns != stamp]
    assert changed == [tmp_path / embedded.PAIRS]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, smpo_fast.embedded.reward; "
        "sys.exit(', '.join({'torch', 'diffusers', 'transformers', 'pyarrow', 'PIL'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
