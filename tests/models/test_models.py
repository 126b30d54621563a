"""Real loading, encoding, denoising and export, on small pipelines in diffusers layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from smpo_fast import embedded
from smpo_fast.common import runtime
from smpo_fast.common.errors import UserError
from smpo_fast.config import loading
from smpo_fast.config.schema import Model
from smpo_fast.embedded import shapes
from smpo_fast.method.batch import Conditioning
from smpo_fast.models import attention, load, locate
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.encoders import Encoders
from smpo_fast.models.export import export_pipeline
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import encoders_identity, find, schedule_of

CPU = torch.device("cpu")
Maker = Callable[[str], Path]


def settings(path: Path | str, **values: object) -> Model:
    return loading.from_dict({"model": {"path": str(path), **values}}).model


def unet_inputs(cross: int, sdxl: bool) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    seeded = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 4, 8, 8, generator=seeded)
    prompt = torch.randn(3, 16, cross, generator=seeded)
    if not sdxl:
        return x, torch.tensor([999, 500, 0]), Conditioning(prompt)
    pooled = torch.randn(3, 48, generator=seeded)
    return x, torch.tensor([999, 500, 0]), Conditioning(prompt, pooled, torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 3))


def test_embedded_pipeline_is_found_as_sdxl() -> None:
    source = find(settings("embedded"))
    assert (source.kind, source.prediction_type) == ("sdxl", "epsilon")


def test_prompts_are_encoded_as_the_sdxl_pipeline_does() -> None:
    source = find(settings("embedded"))
    pipe = StableDiffusionXLPipeline.from_pretrained(source.folder, dtype=torch.float32)
    prompts = ["a red circle on a blue background", ""]
    theirs, _, pooled, _ = pipe.encode_prompt(prompts, device=CPU, do_classifier_free_guidance=False)
    ours, our_pooled = Encoders(source, CPU).encode_prompts(prompts)
    assert torch.allclose(ours, theirs, atol=1e-6) and our_pooled is not None
    assert torch.allclose(our_pooled, pooled, atol=1e-6)


def test_prompts_are_encoded_as_the_sd15_pipeline_does(sd15_pipeline: Maker) -> None:
    folder = sd15_pipeline("epsilon")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs, _ = pipe.encode_prompt(["a cat", ""], CPU, 1, False)
    encoders = Encoders(find(settings(folder)), CPU)
    ours, pooled = encoders.encode_prompts(["a cat", ""])
    assert pooled is None and torch.allclose(ours, theirs, atol=1e-6)
    assert encoders.truncated(["a cat", "a very long caption about a cat on a mat"]) == 1


def test_latents_decode_back_to_the_picture() -> None:
    source = find(settings("embedded"))
    encoders, caption = Encoders(source, CPU), shapes.prompts("train", 1, 0)[0]
    drawn = shapes.render([shapes.parse(caption)], np.random.default_rng(0))
    picture = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = encoders.encode_images(picture)
    assert mean.shape == std.shape == (1, 4, 8, 8) and (std > 0).all()
    decoded = encoders.vae.decode(mean / encoders.vae.config.scaling_factor).sample
    assert (decoded - picture).square().mean() < 0.02, "the scaling factor is applied once"


def test_images_that_overflow_are_refused() -> None:
    with pytest.raises(FloatingPointError):
        Encoders(find(settings("embedded")), CPU).encode_images(torch.full((1, 3, 32, 32), float("nan")))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
def test_policy_and_reference_predict_bitwise_the_same_at_the_start(precision: str) -> None:
    source = find(settings("embedded"))
    dtype = runtime.COMPUTE_DTYPES[precision]
    policy = load_unet(source, settings("embedded"), torch.float32, CPU).to(dtype)
    reference = load_unet(source, settings("embedded"), dtype, CPU)
    schedule = schedule_of(source, loading.from_dict({}).inversion)
    x, time, cond = unet_inputs(policy.config.cross_attention_dim, sdxl=True)
    a = Denoiser(policy.train(), source, schedule, precision, CPU)(x, time, cond)
    with torch.no_grad():
        b = Denoiser(reference, source, schedule, precision, CPU)(x, time, cond)
    assert a.dtype == torch.float32 and a.shape == x.shape
    assert a.requires_grad and torch.equal(a.detach(), b)


def test_every_pair_has_its_own_time_and_prompt() -> None:
    """A pair's prediction does not depend on its neighbours: bit for bit when computed alone in eager fp32."""
    source = find(settings("embedded"))
    policy = load_unet(source, settings("embedded"), torch.float32, CPU)
    denoise = Denoiser(policy.eval(), source, schedule_of(source, loading.from_dict({}).inversion), "fp32", CPU)
    x, time, cond = unet_inputs(policy.config.cross_attention_dim, sdxl=True)
    with torch.no_grad():
        whole = denoise(x, time, cond)
        for i in range(3):
            rows = slice(i, i + 1)
            assert torch.allclose(whole[rows], denoise(x[rows], time[rows], cond.take(rows)), atol=2e-5)
        assert not torch.allclose(whole[:1], denoise(x[:1], time[1:2], cond.take(slice(0, 1))), atol=1e-3)


def test_v_prediction_is_converted(sd15_pipeline: Maker) -> None:
    """eps = signal v + noise x, and the target of v is signal tau - noise x_0, so that errors are in v."""
    source = find(settings(sd15_pipeline("v_prediction")))
    schedule = schedule_of(source, loading.from_dict({}).inversion)
    policy = load_unet(source, settings(source.folder), torch.float32, CPU)
    denoise = Denoiser(policy.eval(), source, schedule, "fp32", CPU)
    x, time, cond = unet_inputs(16, sdxl=False)
    paths = [schedule.path(int(t), loading.from_dict({}).inversion) for t in time]
    with torch.no_grad():
        v, eps = denoise(x, time, cond), denoise.eps(x, time, cond)
    x_0 = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for i, path in enumerate(paths):
        assert torch.allclose(eps[i], path.final_level.signal * v[i] + path.final_level.noise * x[i], atol=1e-5)
        tau = (x[i] - path.final_level.signal * x_0[i]) / path.final_level.noise
        target = denoise.target(x_0[i : i + 1], tau[None], torch.tensor([path.final_level.timestep]))[0]
        recovered = path.final_level.signal * target + path.final_level.noise * x[i]
        assert torch.allclose(recovered, tau, atol=1e-3 * max(1.0, tau.abs().max().item()))


def test_gradient_checkpointing_changes_memory_not_gradients(sd15_pipeline: Maker) -> None:
    source = find(settings(sd15_pipeline("epsilon")))
    x, time, cond = unet_inputs(16, sdxl=False)
    gradients = []
    for on in (False, True):
        policy = load_unet(source, settings(source.folder, gradient_checkpointing=on), torch.float32, CPU)
        schedule = schedule_of(source, loading.from_dict({}).inversion)
        Denoiser(policy.train(), source, schedule, "fp32", CPU)(x, time, cond).square().sum().backward()
        assert policy.is_gradient_checkpointing is on
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_attention_choices_agree(sd15_pipeline: Maker) -> None:
    source = find(settings(sd15_pipeline("epsilon")))
    x, time, cond = unet_inputs(16, sdxl=False)
    schedule = schedule_of(source, loading.from_dict({}).inversion)
    found = {}
    for name in ("sdpa", "eager"):
        policy = load_unet(source, settings(source.folder, attention=name), torch.float32, CPU)
        with torch.no_grad():
            found[name] = Denoiser(policy, source, schedule, "fp32", CPU)(x, time, cond)
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)


def test_xformers_falls_back_and_says_so(sd15_pipeline: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    attention._notice.cache_clear()
    source = find(settings(sd15_pipeline("epsilon")))
    policy, _ = (load_unet(source, settings(source.folder, attention="xformers"), torch.float32, CPU) for _ in range(2))
    assert {type(p).__name__ for p in policy.attn_processors.values()} == {"Attention"}
    assert capsys.readouterr().err.count("SDPA serves instead") == 1, "once for policy and reference"


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


def test_a_pipeline_has_the_networks_of_the_run(tmp_path: Path) -> None:
    """What ``model.unet`` and ``model.vae`` put in place of the pipeline's own is sampled with, too."""
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    for part in ("unet", "vae"):
        file = next((tmp_path / "p" / part).glob("*.safetensors"))
        weights = load_file(file)
        save_file({name: value + 1 for name, value in weights.items()}, file)
    own = load.load_pipeline(find(settings("embedded")), torch.float32)
    source = find(settings("embedded", unet=str(tmp_path / "p"), vae=str(tmp_path / "p" / "vae")))
    pipe = load.load_pipeline(source, torch.float32)
    for part in ("unet", "vae"):
        here, there = (dict(getattr(p, part).named_parameters()) for p in (pipe, own))
        assert all(torch.allclose(here[name], there[name] + 1, atol=1e-2) for name in there)


def test_export_refuses_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        export_pipeline(find(settings("embedded")), {}, tmp_path / "export", "float32")


def test_identity_follows_the_encoders_content(tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "a")
    before = encoders_identity(find(settings(tmp_path / "a")))
    assert before == encoders_identity(find(settings("embedded"))), "the place does not matter"
    weights = next((tmp_path / "a" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert encoders_identity(find(settings(tmp_path / "a"))) != before


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: edit_json(p / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
        (lambda p: edit_json(p / "scheduler" / "scheduler_config.json", prediction_type="sample"), "'sample'"),
        (lambda p: edit_json(p / "unet" / "config.json", in_channels=9), "9 input channels"),
        (lambda p: (p / "model_index.json").unlink(), "model_index.json cannot be read"),
        (lambda p: shutil.rmtree(p / "vae"), "model.vae"),
    ],
)
def test_unsupported_pipelines_are_refused_by_name(break_it: Callable, message: str, tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    break_it(tmp_path / "p")
    with pytest.raises(UserError, match=message):
        find(settings(tmp_path / "p"))


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    shutil.copytree(embedded.pipeline_path(), tmp_path / "p")
    next((tmp_path / "p" / "unet").glob("*.safetensors")).unlink()
    torch.save({}, tmp_path / "p" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors only"):
        load_unet(find(settings(tmp_path / "p")), settings(tmp_path / "p"), torch.float32, CPU)


def test_a_wrong_place_is_named() -> None:
    with pytest.raises(UserError, match="model.path: './nowhere' is neither a folder nor a hub id"):
        find(settings("./nowhere"))


def test_a_hub_id_without_the_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model.path: 'nobody/nothing' is no folder here, and the hub gave"):
        find(settings("nobody/nothing"))


def test_only_one_variant_is_fetched() -> None:
    from fnmatch import fnmatch

    def wanted(variant: str, file: str) -> bool:
        yes, no = locate._wanted_files(variant)
        return any(fnmatch(file, p) for p in yes) and not any(fnmatch(file, p) for p in no)

    plain, half = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
    assert wanted("", plain) and not wanted("", half)
    assert wanted("fp16", half) and not wanted("fp16", plain)
    assert not wanted("", "sd_xl_base_1.0.safetensors") and not wanted("", "unet/diffusion_pytorch_model.bin")
    assert wanted("", "tokenizer/merges.txt") and wanted("", "model_index.json")
