"""LoRA: trained, resumed, saved, loaded by diffusers, merged and evaluated; the base stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from smpo_fast import cli, train
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.evaluation import compare
from smpo_fast.models import load, lora, lora_files
from smpo_fast.models.locate import find
from smpo_fast.training.policy import load_policy
from smpo_fast.training.run_log import read_metrics

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SLOW = pytest.mark.slow
SMALL = [
    "data.max_pairs=24", "run.steps=4", "run.save_every=2", "batch.pairs_per_step=6", "batch.micro_pairs=2",
    "batch.inversion_pairs=4", "optim.warmup_steps=0", "optim.lr=1e-3", "eval.prompts=", "log.tensorboard=false",
    "model.export_dtype=float32", "lora.rank=4",
]  # fmt: skip
Maker = Callable[[str], Path]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded pairs, prepared once: `data.cache=...`."""
    folder = tmp_path_factory.mktemp("prepared") / "cache"
    assert cli.main(["prepare", *SMALL, f"data.cache={folder}", f"run.dir={folder.parent}"]) == 0
    return f"data.cache={folder}"


def run(run_dir: Path, *words: str) -> list[dict[str, Any]]:
    """The logged rows of a run, without what depends on the clock."""
    assert train.main([*SMALL, f"run.dir={run_dir}", *words]) == 0
    return rows_of(run_dir)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    clock = ("second", "memory")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in read_metrics(run_dir)]


def adapters(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "export" / lora.FILE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """Four steps in plain PyTorch, merged at the end."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    run(run_dir, cache, "lora.merge=true")
    return run_dir


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["model.precision=bf16"], marks=SLOW),
        ["model.precision=bf16", "lora.use_dora=true", 'lora.targets=["attention", "ff"]'],
        ["model.precision=bf16-autocast", "lora.use_rslora=true", 'lora.targets=["all-linear"]', "lora.init=kaiming"],
        ["model.gradient_checkpointing=true", 'lora.targets=["attn2.to_k", "conv1"]', "lora.alpha=8"],
        pytest.param(["model.attention=eager", "optim.name=adamw8bit", "inversion.network=reference"], marks=SLOW),
    ],
    ids=["bf16", "dora", "autocast", "checkpointing", "eager"],
)
def test_every_choice_starts_with_margin_zero_and_moves(words: list[str], cache: str, tmp_path: Path) -> None:
    rows = run(tmp_path / "run", cache, "run.steps=2", *words)
    assert rows[0]["logit_max"] == 0.0, "adapters that start from nothing are the reference"
    assert rows[1]["logit_max"] > 0 and all(row["applied"] for row in rows)
    down, up = ([t for n, t in adapters(tmp_path / "run").items() if f"lora_{x}" in n] for x in "AB")
    assert down and len(down) == len(up) and all(t.any() for t in up), "every adapter has been trained"


@pytest.mark.slow  # Triton's interpreter
def test_fused_kernels_train_adapters(cache: str, tmp_path: Path) -> None:
    kernels = 'kernels.enabled=["group_norm_silu", "layer_norm", "geglu"]'
    words = [cache, "run.steps=2", "objective.name=dpo", "batch.pairs_per_step=2", 'lora.targets=["attention", "ff"]']
    fused, eager = run(tmp_path / "fused", *words, kernels), run(tmp_path / "eager", *words)
    assert fused[0]["logit_max"] == 0.0
    assert fused[1]["train_loss"] == pytest.approx(eager[1]["train_loss"], abs=1e-3)
    assert fused[0]["grad_norm"] == pytest.approx(eager[0]["grad_norm"], rel=1e-3)


def test_a_few_steps_raise_the_margins(cache: str, tmp_path: Path) -> None:
    words = ["run.steps=12", "objective.name=dpo", "objective.beta=500", "batch.pairs_per_step=24"]
    rows = run(tmp_path / "run", cache, *words, "batch.micro_pairs=12", "optim.lr=2e-3", "lora.rank=8")
    first, last = rows[0], rows[-3:]
    assert first["rewards/margins"] == 0.0
    assert np.mean([r["rewards/margins"] for r in last]) > 0.05
    assert np.mean([r["train_loss"] for r in last]) < first["train_loss"] - 0.02
    assert np.mean([r["implicit_acc"] for r in last]) > 0.6


def test_a_run_continued_from_a_checkpoint_is_bitwise_the_same(plain: Path, cache: str, tmp_path: Path) -> None:
    run(tmp_path / "run", cache, "run.steps=2")
    assert run(tmp_path / "run", cache) == rows_of(plain)
    ours, theirs = adapters(tmp_path / "run"), adapters(plain)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_run_is_not_continued_with_other_adapters(
    plain: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SMALL, f"run.dir={plain}", cache, "lora.rank=2"]) == 2
    error = capsys.readouterr().err
    assert "lora" in error and "made with other settings" in error


def train_on_ranks(rank: int, size: int, words: list[str]) -> int:
    return train.main(words)


def ds_file(folder: Path, stage: int) -> str:
    """The shipped file of a stage; at 3 no weight is so small that every rank keeps the whole of it."""
    settings = json.loads((ROOT / f"configs/ds_zero{stage}.json").read_text())
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "ds.json").write_text(json.dumps(settings))
    return str(folder / "ds.json")


@pytest.mark.parametrize(
    ("stage", "dora"), [pytest.param(*way, marks=SLOW) for way in ((2, False), (1, False), (3, False), (3, True))]
)
def test_two_ranks_agree_with_plain_pytorch(stage: int, dora: bool, plain: Path, cache: str, tmp_path: Path) -> None:
    words = [cache, "lora.use_dora=true"] if dora else [cache]
    if dora:
        run(alone := tmp_path / "alone", *words)
    else:
        alone = plain
    words += [f"run.dir={tmp_path / 'run'}", "--ds_config", ds_file(tmp_path, stage)]
    assert run_ranks(train_on_ranks, 2, words=[*SMALL, *words]) == [0, 0]
    rows, others = rows_of(tmp_path / "run"), rows_of(alone)
    assert rows[0]["logit_max"] == 0.0
    for mine, theirs in zip(rows, others, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=2e-3)
    mine, theirs = adapters(tmp_path / "run"), adapters(alone)
    assert mine.keys() == theirs.keys()
    assert all((mine[n] - theirs[n]).norm() < 0.02 * theirs[n].norm() for n in mine)


# --- the files --------------------------------------------------------------------------------------------------


def pictures(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        ["a red circle on a blue background", "a green square on a red background"], num_inference_steps=4,
        generator=[torch.Generator().manual_seed(i) for i in range(2)], output_type="np",
    )  # fmt: skip
    return out.images


def test_the_export_is_loaded_by_diffusers_and_merged_gives_the_same_pictures(plain: Path) -> None:
    base = StableDiffusionXLPipeline.from_pretrained(find(loading.from_dict({}).model).folder)
    before = pictures(base)
    base.load_lora_weights(plain / "export")
    adapted = pictures(base)
    merged = pictures(StableDiffusionXLPipeline.from_pretrained(plain / "merged"))
    assert np.abs(adapted - before).max() > 0.01, "the adapters do something"
    assert np.abs(adapted - merged).max() < 1e-3


def test_the_merged_weights_are_the_base_plus_low_rank(plain: Path) -> None:
    unets = (find(loading.from_dict({}).model).folder, plain / "merged")
    base, merged = (load_file(next((folder / "unet").glob("*.safetensors"))) for folder in unets)
    assert base.keys() == merged.keys()
    moved = {name for name in base if not torch.equal(base[name].float(), merged[name])}
    assert moved and all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0") for name in moved)
    for name in moved:
        values = torch.linalg.svdvals(merged[name] - base[name].float())
        assert values[4:].max() < 1e-4 * values[0]


def trained_like(settings: Config) -> Any:
    """A network with adapters as training leaves them: no longer at their start."""
    unet = load_policy(settings, find(settings.model), "fp32", CPU)
    seeded = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=seeded) * (p.std() if "magnitude" in name else 0.3))
    return unet.eval()


@pytest.mark.parametrize(
    "words",
    [
        {"rank": 4, "alpha": 9.0},
        {"rank": 4, "use_rslora": True, "targets": ["all-linear"]},
        {"rank": 2, "use_dora": True, "alpha": 3.0},
        {"rank": 2, "targets": ["conv1", "to_k"]},
    ],
    ids=["alpha", "rslora", "dora", "convolutions"],
)
def test_what_diffusers_loads_predicts_as_what_was_trained(words: dict[str, Any], tmp_path: Path) -> None:
    """Also where the scale is not 1: the file's metadata tells it."""
    settings = loading.from_dict({"lora": words, "model": {"export_dtype": "float32"}})
    unet, source = trained_like(settings), find(settings.model)
    adapted = lora.trained_adapters(settings, source, unet.state_dict())
    lora_files.write_diffusers(adapted, source, tmp_path / "export")
    lora.merge(settings, source, tmp_path / "export", tmp_path / "merged")
    loaded = load.load_pipeline(source, torch.float32)
    loaded.load_lora_weights(tmp_path / "export")
    merged = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = torch.randn(2, 16, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    added = {"text_embeds": torch.zeros(2, 48), "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}

    def predict(network: Any) -> torch.Tensor:
        with torch.no_grad():
            return network(x, 500, encoder_hidden_states=prompt, added_cond_kwargs=added).sample

    expected = predict(unet)
    with lora.adapters_off(unet):
        assert not torch.allclose(predict(unet), expected, atol=1e-2)
    assert torch.allclose(predict(unet), expected, atol=0), "on again"
    for network in (loaded.unet, merged.unet):
        assert torch.allclose(predict(network), expected, rtol=1e-4, atol=1e-4)


def test_the_file_names_its_settings(plain: Path) -> None:
    with safe_open(plain / "export" / lora.FILE, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        names = set(file.keys())
    assert (told["unet.r"], told["unet.lora_alpha"], told["unet.use_dora"]) == (4, 4, False)
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert sum(p.stat().st_size for p in (plain / "export").iterdir()) < 2e6, "the base is not in the export"


@pytest.mark.parametrize(("alpha", "scale"), [(0, 1.0), (8, 2.0)])
def test_alpha_over_rank_scales_the_adapters(alpha: float, scale: float) -> None:
    settings = loading.from_dict({"lora": {"rank": 4, "alpha": alpha}})
    unet = load_policy(settings, find(settings.model), "fp32", CPU)
    assert {m.scaling["default"] for m in unet.modules() if hasattr(m, "lora_A")} == {scale}


def test_adapters_are_on_again_after_an_error() -> None:
    settings = loading.from_dict({"lora": {"rank": 2}})
    unet = load_policy(settings, find(settings.model), "fp32", CPU)
    layers = [m for m in unet.modules() if hasattr(m, "lora_A")]
    with pytest.raises(KeyboardInterrupt), lora.adapters_off(unet):
        assert all(layer.disable_adapters for layer in layers)
        raise KeyboardInterrupt
    assert not any(layer.disable_adapters for layer in layers)


def test_sd15_trains_and_loads(sd15_pipeline: Maker, tmp_path: Path) -> None:
    path = sd15_pipeline("epsilon")
    words = [f"model.path={path}", "data.resolution=16", "data.max_pairs=6", "run.steps=2", "optim.lr=1e-2"]
    assert run(tmp_path / "run", *words)[0]["logit_max"] == 0.0
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    pipe.load_lora_weights(tmp_path / "run" / "export")
    assert any("lora_B" in name and p.any() for name, p in pipe.unet.named_parameters())


def test_adapters_are_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        settings = loading.from_dict({"lora": {"rank": 2}, "run": {"seed": seed}})
        before = torch.get_rng_state()
        unet = load_policy(settings, find(settings.model), "bf16", CPU)
        assert torch.equal(torch.get_rng_state(), before), "nobody else's randomness is touched"
        trained = {n: p for n, p in unet.named_parameters() if p.requires_grad}
        assert all(p.dtype is torch.float32 for p in trained.values())
        assert {p.dtype for n, p in unet.named_parameters() if n not in trained} == {torch.bfloat16}
        return {n: p.detach() for n, p in trained.items()}

    one, same, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if "lora_A" in n)
    assert not any(t.any() for n, t in one.items() if "lora_B" in n)


# --- evaluated, merged ------------------------------------------------------------------------------------------


def test_command_line_evaluates_and_merges_a_run(
    plain: Path, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the adapters and from the merged pipeline the scores are the same; the base is the run's own."""
    small = ["eval.prompts=embedded", "eval.scorer=embedded", "eval.count=4", "eval.steps=2"]
    assert cli.main(["evaluate", f"run.dir={plain}", *small]) == 0
    again = tmp_path / "again"
    (again / "export").mkdir(parents=True)
    assert cli.main(["merge", f"run.dir={again}"]) == 2
    assert "has no pytorch_lora_weights.safetensors" in capsys.readouterr().err
    (again / "export" / lora.FILE).write_bytes(b"cut off")
    assert cli.main(["merge", f"run.dir={again}"]) == 2
    assert f"{lora.FILE} cannot be read" in capsys.readouterr().err
    (again / "export" / lora.FILE).write_bytes((plain / "export" / lora.FILE).read_bytes())
    assert cli.main(["merge", f"run.dir={again}", "model.export_dtype=float32"]) == 0
    found = []
    for export in (plain / "export", again / "merged"):
        settings = loading.load(None, small)
        compare.evaluate(settings, find(settings.model), export, tmp_path / export.name, World())
        found.append(json.loads((tmp_path / export.name / "evaluation.json").read_text())["comparisons"][0])
    assert found[0]["base"] == found[1]["base"] and found[0]["gain"] != 0.0
    assert found[0]["aligned"] == pytest.approx(found[1]["aligned"], abs=1e-3)


def test_a_merged_run_starts_the_next_one(plain: Path, cache: str, tmp_path: Path) -> None:
    """Its base pictures are those of its own start, not of the pipeline that the start replaced."""
    merged = f"model.unet={plain / 'merged'}"
    assert run(tmp_path / "next", cache, merged, "run.steps=1", "lora.rank=2")[0]["logit_max"] == 0.0
    settings = loading.load(tmp_path / "next" / "config.toml")
    weights = load_file(next((plain / "merged" / "unet").glob("*.safetensors")))
    pipe = load.load_pipeline(find(settings.model), torch.float32)
    assert all(torch.equal(p, weights[name]) for name, p in pipe.unet.named_parameters())


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.targets=[]"], "lora.targets is empty"),
        (['lora.targets=["attention", "to_v_proj"]'], "'to_v_proj' ends the name of no linear or convolution layer"),
        (['lora.targets=["attn1"]'], "'attn1' ends the name of no linear"),
        (["lora.rank=0", "lora.merge=true"], "nothing to merge"),
        (["lora.rank=-1"], "lora.rank"),
        (["lora.dropout=0.1"], "unknown key 'lora.dropout'"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_network", lambda *_: pytest.fail("something heavy was loaded"))
    assert train.main([*SMALL, f"run.dir={tmp_path / 'run'}", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_peft_is_named_with_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    really = lora.importlib.util.find_spec
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None if name == "peft" else really(name))
    assert train.main([*SMALL, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "pip install peft" in capsys.readouterr().err
