"""The frozen reference: wherever it is kept the losses are the same, and no more of it is kept than is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks

from smpo_fast import train
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.method.batch import Conditioning
from smpo_fast.models import load
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.load import load_unet
from smpo_fast.models.locate import find, schedule_of
from smpo_fast.training import finish, reference
from smpo_fast.training.reference import Streamed
from smpo_fast.training.run_log import read_metrics

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = [
    "data.max_pairs=24", "run.steps=2", "batch.pairs_per_step=6", "batch.micro_pairs=2", "batch.inversion_pairs=4",
    "optim.warmup_steps=0", "optim.lr=1e-4", "eval.prompts=", "log.tensorboard=false", "model.export_dtype=float32",
]  # fmt: skip


def run(run_dir: Path, *words: str) -> list[dict[str, Any]]:
    """The logged rows of a run, without what depends on the clock."""
    assert train.main([*SMALL, f"run.dir={run_dir}", *words]) == 0
    clock = ("second", "memory")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, cache: str) -> list[dict[str, Any]]:
    """Two steps of full fine-tuning with the reference on the device."""
    rows = run(tmp_path_factory.mktemp("plain") / "run", cache)
    assert rows[0]["logit_max"] == 0.0 and rows[1]["logit_max"] > 0
    return rows


def denoiser_of(unet: torch.nn.Module, precision: str = "fp32") -> Denoiser:
    settings = loading.from_dict({})
    source = find(settings.model)
    return Denoiser(unet, source, schedule_of(source, settings.inversion), precision, CPU)


def loaded(dtype: torch.dtype = torch.float32) -> Any:
    settings = loading.from_dict({}).model
    return load_unet(find(settings), settings, dtype, CPU).requires_grad_(False).eval()


def question(unet: Any) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    seeded = torch.Generator().manual_seed(1)
    prompt = torch.randn(2, 16, unet.config.cross_attention_dim, generator=seeded)
    cond = Conditioning(prompt, torch.randn(2, 48, generator=seeded), torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2))
    return torch.randn(2, 2, 4, 8, 8, generator=seeded), torch.tensor([900, 10]), cond


# --- where it is ------------------------------------------------------------------------------------------------

INVERTED = {"source": "inversion", "network": "reference"}


@pytest.mark.parametrize(
    ("given", "ds", "where"),
    [
        ({}, None, "replicated"),
        ({"lora": {"rank": 4}}, None, "adapters-off"),
        ({"lora": {"rank": 4}, "model": {"reference": "streamed"}}, None, "streamed"),
        ({"model": {"reference": "sharded"}}, {"zero_optimization": {"stage": 1}}, "sharded"),
        ({"objective": {"name": "sft"}}, None, "none"),
        ({"objective": {"name": "sft"}, "inversion": INVERTED}, None, "replicated"),
        ({"objective": {"name": "dpo"}}, None, "replicated"),
    ],
)  # fmt: skip
def test_where_a_run_keeps_it(given: dict[str, Any], ds: dict[str, Any] | None, where: str) -> None:
    assert reference.resolve(loading.from_dict(given), ds) == where


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.reference=adapters-off"], "set lora.rank"),
        (["model.reference=sharded"], "needs DeepSpeed: give --ds_config"),
        (["model.reference=nowhere"], "model.reference"),
        (
            ["model.reference=sharded", "inversion.network=reference", "inversion.fp8=true"]
            + ["--ds_config", str(ROOT / "configs" / "ds_zero2.json")],
            "gathered module by module",
        ),
    ],
)
def test_places_that_a_run_does_not_have_are_refused_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_network", lambda *_: pytest.fail("something heavy was loaded"))
    assert train.main([*SMALL, f"run.dir={tmp_path / 'run'}", *words]) == 2
    assert message in capsys.readouterr().err


# --- streamed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_weights_live_on_the_device_only_while_they_are_needed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 100_000)  # so that a small network fills several
    precision = "fp32" if dtype is torch.float32 else "bf16"
    unet = loaded(dtype)
    unet.conv_in.to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    strides = {name: p.stride() for name, p in unet.named_parameters()}
    x, time, cond = question(unet)
    with torch.no_grad():
        expected = denoiser_of(unet, precision)(x, time, cond)
    streamed = Streamed(denoiser_of(unet, precision), CPU)

    def places() -> set[int]:
        return {p.untyped_storage().data_ptr() for p in unet.parameters()}

    host = places()
    assert 1 < len(host) < len(before), "a few blocks, not one a weight"
    assert sum(block.numel() for block, _ in streamed._blocks) < 1.2 * sum(t.nbytes for t in before.values())
    with streamed() as denoiser, torch.no_grad():
        inside = places()
        assert inside.isdisjoint(host)
        assert torch.equal(denoiser(x, time, cond), expected)
        with streamed() as again:
            assert again is denoiser and places() == inside, "who is inside already shares the copy"
        assert places() == inside
    assert places() == host, "the copy is dropped"
    for name, p in unet.named_parameters():
        assert torch.equal(p, before[name]) and p.stride() == strides[name]
        assert p.data_ptr() % 16 == 0


def test_streamed_weights_go_back_after_an_error() -> None:
    unet = loaded()
    streamed = Streamed(denoiser_of(unet), CPU)
    host = unet.conv_in.weight.data_ptr()
    with pytest.raises(KeyboardInterrupt), streamed():
        assert unet.conv_in.weight.data_ptr() != host
        raise KeyboardInterrupt
    assert unet.conv_in.weight.data_ptr() == host


# --- the same losses --------------------------------------------------------------------------------------------


def test_streamed_gives_the_same_losses_bitwise(plain: list[dict[str, Any]], cache: str, tmp_path: Path) -> None:
    assert run(tmp_path / "run", cache, "model.reference=streamed") == plain


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_adapters_off_gives_the_losses_of_a_second_network_bitwise(precision: str, cache: str, tmp_path: Path) -> None:
    words = [cache, "lora.rank=4", "optim.lr=1e-3", f"model.precision={precision}", "inversion.network=reference"]
    off, apart = (run(tmp_path / w, *words, f"model.reference={w}") for w in ("adapters-off", "replicated"))
    assert off == apart and off[0]["logit_max"] == 0.0 and off[1]["logit_max"] > 0


def sharded_and_whole(world: World) -> tuple[bool, int, int]:
    """Whether a sharded network predicts as a whole one, and the weights that this rank holds of how many."""
    whole, split = loaded(), loaded()
    total = sum(p.numel() for p in split.parameters())
    x, time, cond = question(whole)
    linear = torch.nn.functional.linear
    ds_settings = {"zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": 0}}
    split = reference.shard_frozen(split, world, "fp32", ds_settings)
    assert torch.nn.functional.linear is linear, "the policy's linear layers are left alone"
    with torch.no_grad():
        same = all(torch.equal(denoiser_of(split)(x, time, cond), denoiser_of(whole)(x, time, cond)) for _ in range(2))
    return same, sum(p.ds_tensor.numel() for p in split.parameters()), total


def train_on_ranks(rank: int, size: int, words: list[str]) -> tuple[bool, int, int, int]:
    """A look at a sharded network, then a run; its exit status comes last."""
    return *sharded_and_whole(World(rank, size)), train.main(words)


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_share_a_reference(stage: int, plain: list[dict[str, Any]], cache: str, tmp_path: Path) -> None:
    words = [*SMALL, cache, f"run.dir={tmp_path / 'run'}", "model.reference=sharded"]
    words += ["--ds_config", str(ROOT / "configs" / f"ds_zero{stage}.json")]
    for same, held, total, status in run_ranks(train_on_ranks, 2, words=words):
        assert same and held < 0.51 * total and status == 0
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["logit_max"] == 0.0
    for mine, theirs in zip(rows, plain, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=2e-4)
        assert mine["ref_mse"] == pytest.approx(theirs["ref_mse"], rel=1e-5)


# --- no copy more than needed -----------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """Class and dtype of every network that is loaded."""
    seen: list[tuple[str, torch.dtype]] = []
    really: Callable[..., Any] = load.load_network

    def spy(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
        seen.append((cls.__name__, dtype))
        return really(cls, folder, variant, dtype)

    monkeypatch.setattr(load, "load_network", spy)
    return seen


UNET = "UNet2DConditionModel"


@pytest.mark.parametrize(
    ("words", "networks"),
    [
        ([], [(UNET, torch.float32), (UNET, torch.bfloat16)]),
        (["lora.rank=2"], [(UNET, torch.bfloat16)]),
        (["optim.name=adamw8bit_aligned", "optim.master=none", "run.steps=0"], [(UNET, torch.bfloat16)] * 2),
        (["objective.name=sft"], [(UNET, torch.float32)]),
    ],
    ids=["full", "lora", "no-master", "sft"],
)
def test_a_prepared_run_loads_what_it_computes_with(
    words: list[str], networks: list[tuple[str, torch.dtype]], cache: str, tmp_path: Path, loads: list
) -> None:
    """No VAE, no text encoder, no fp32 copy of a frozen base, no reference that nobody asks."""
    run(tmp_path / "run", cache, "run.steps=1", "model.precision=bf16", *words)
    assert loads == networks


def test_stored_errors_need_no_reference(cache: str, tmp_path: Path, loads: list) -> None:
    words = [cache, f"inversion.store={tmp_path / 'store'}", "inversion.network=reference"]
    first = run(tmp_path / "first", *words)
    assert len(loads) == 2
    assert run(tmp_path / "again", *words) == first
    assert len(loads) == 3, "the second run loaded a policy and nothing else"
    run(tmp_path / "lora", *words, "lora.rank=2", "model.reference=replicated")
    assert len(loads) == 4
    run(tmp_path / "longer", *words, "run.steps=3")
    assert len(loads) == 6, "a step that is not stored needs it again"


@pytest.mark.parametrize("words", [[], ["lora.rank=2"], ["model.reference=streamed"]], ids=["full", "lora", "streamed"])
def test_evaluation_has_the_memory_of_the_networks_for_itself(
    words: list[str], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    really: Callable[..., Any] = load.load_network

    def spy(*args: Any) -> Any:
        network = really(*args)
        alive.append(weakref.ref(network))
        return network

    def evaluate(*_: Any) -> Any:
        assert alive and not [r for r in alive if r() is not None], "a network of training is still there"
        alive.clear()
        return SimpleNamespace(text=lambda config: "looked")

    monkeypatch.setattr(load, "load_network", spy)
    monkeypatch.setattr(finish.compare, "evaluate", evaluate)
    run(tmp_path / "run", cache, "run.steps=1", "eval.prompts=embedded", *words)
    assert not alive, "evaluation was reached"


def test_a_reference_that_was_not_loaded_is_never_used() -> None:
    settings = loading.from_dict({})
    absent = reference.make_reference(
        "cached", settings, find(settings.model), World(), "fp32", loaded(), denoiser_of, None
    )
    with pytest.raises(RuntimeError, match="cached"), absent():
        pass
