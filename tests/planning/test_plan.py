"""The plan against what really happens: real engines followed storage by storage, and choices that hold."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from architectures import SCHEDULER, SDXL, SDXL_TOY, Architecture, make_inputs, make_unet  # noqa: E402
from helpers.answers import json_answer  # noqa: E402
from helpers.ranks import run_ranks  # noqa: E402

from smpo_fast import cli
from smpo_fast.common.errors import UserError  # noqa: E402
from smpo_fast.common.runtime import World  # noqa: E402
from smpo_fast.config import loading
from smpo_fast.config.schema import Config, Model, Optim
from smpo_fast.engine import create, ds_config
from smpo_fast.engine.optimizer_states import STATE_BYTES
from smpo_fast.method.schedule import NoiseSchedule  # noqa: E402
from smpo_fast.models import footprint
from smpo_fast.models.network_spec import NetworkSpec
from smpo_fast.models.tracing import LiveBytes
from smpo_fast.planning import gpus, memory, search, speed
from smpo_fast.planning.gpus import (
    GPUS,
    Gpu,  # noqa: E402
)
from smpo_fast.planning.planned_run import PlannedRun  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"


def settings(**sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"precision": "bf16"},
        "inversion": {"source": "noise"},
        "batch": {"pairs_per_step": 2, "micro_pairs": 1},
    }
    return loading.from_dict({k: {**values.get(k, {}), **sections.get(k, {})} for k in values | sections})


def subject(a: Architecture, c: Config, **more: Any) -> PlannedRun:
    network = NetworkSpec.make(a.unet, a.kind, (4, a.latent, a.latent), (a.tokens, a.prompt_width), lora=c.lora)
    return PlannedRun(c, network, c.model.precision, **more)


# --- memory ---------------------------------------------------------------------------------------------------


# latents of 4x4: weights and gradients are most of the memory, as they are in SDXL at its true size
SMALL = replace(SDXL_TOY, latent=4, tokens=4)


class FusedAdamW(torch.optim.AdamW):
    """As on a GPU: torch's other implementations make tensors of the size of the weights in a step."""

    def __init__(self, *args: Any, fused: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, fused=True, **kwargs)


def followed(rank: int, size: int, stages: list[int | None]) -> dict[int | None, dict[str, int]]:
    """Peak bytes of the second step's phases under each ZeRO stage, on a CPU that plays the GPU."""
    torch.optim.AdamW = FusedAdamW  # type: ignore[misc]
    return {stage: _followed(stage, rank, size) for stage in stages}


def small_buckets(stage: int) -> dict[str, Any]:
    raw = ds_config.read_ds_file(CONFIGS / f"ds_zero{stage}.json")
    sizes = {"bucket": 100_000, "live_parameters": 500_000, "persistence": 1000}
    zero = raw["zero_optimization"] | ({"sub_group_size": 1_000_000} if stage == 3 else {})
    return raw | {"zero_optimization": zero | {k: n for k in zero for word, n in sizes.items() if word in k and n}}


def averaged_settings(ranks: int) -> Config:
    return settings(batch={"pairs_per_step": 2 * ranks}, optim={"ema": 0.9})


def _followed(stage: int | None, rank: int, size: int) -> dict[str, int]:
    c, cpu = averaged_settings(size), torch.device("cpu")
    unet = make_unet(SMALL, cpu, torch.float32).train()
    peaks: dict[str, int] = {}
    with LiveBytes(unet.parameters(), device="cpu") as live:
        ds = None
        if stage is not None:
            ds, _ = ds_config.resolve_ds_settings(small_buckets(stage), "file", c, size, "bf16")
        trained = create.make_engine(unet, c, World(rank, size), "bf16", ds)
        args, kwargs = make_inputs(SMALL, 2, cpu, torch.bfloat16)
        for _ in range(2):
            live.peak = live.now
            for last in (False, True):
                trained.backward(trained.unet(*args, **kwargs)[0].float().square().mean(), last=last)
                gc.collect()  # DeepSpeed's hooks make cycles, which a larger network's many objects soon sweep away
            peaks["policy"], live.peak = live.peak, live.now
            trained.step(1e-5)
            peaks["optimizer"] = live.peak
    return peaks


def check_stages(size: int, stages: list[int | None]) -> None:
    for found in run_ranks(followed, size, stages=stages):
        for stage, peaks in found.items():
            ds = None if stage is None else small_buckets(stage)
            s = subject(SMALL, averaged_settings(size), ranks=size, ds=ds)
            told = memory.memory(s, replace(s.variant(), reference="none"))
            for phase, peak in peaks.items():
                planned = told.phases[phase] - memory.LIBRARY_BYTES - told.parts["window"]
                assert planned == pytest.approx(peak, rel=0.05), f"stage {stage}, {size} ranks, {phase}"


@pytest.mark.slow
def test_memory_of_real_engines() -> None:
    """Weights, masters, gradients and states are where ``memory.ZERO_LAYOUTS`` says, with and without DeepSpeed."""
    check_stages(1, [None, 2])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_memory_of_every_stage(size: int) -> None:
    check_stages(size, [1, 2, 3])


def test_every_optimizer_and_precision_of_the_settings_has_its_bytes() -> None:
    names = get_args(Optim.model_fields["name"].annotation)
    precisions = set(get_args(Model.model_fields["precision"].annotation)) - {"auto"}
    sums = get_args(Optim.model_fields["accumulate"].annotation)
    assert set(names) == set(STATE_BYTES) and precisions == set(memory.MASTER_BYTES)
    assert set(sums) == set(memory.GRADIENT_BYTES)


@pytest.mark.slow
def test_the_float8_copy_of_the_weights_is_planned_for() -> None:
    """A byte for each weight of SDXL's transformer blocks but the keys and values of the prompt, and scales."""
    allocated = []
    for fp8 in (False, True):
        s = subject(SDXL, settings(inversion={"fp8": fp8}))
        allocated.append(memory.memory(s, s.variant()).allocated)
    assert allocated[1] - allocated[0] == 1_848_192_000


def test_merged_projections_are_planned_for() -> None:
    """0.307 G parameters of SDXL are q, k and v of self-attention."""
    allocated = []
    for merged in (False, True):
        s = subject(SDXL, settings(model={"merge_qkv": merged, "precision": "bf16"}))
        allocated.append(memory.memory(s, s.variant()).allocated)
    assert allocated[1] - allocated[0] == pytest.approx(614_400_000, rel=0.01)


def test_channels_last_copies_are_planned_for_under_deepspeed() -> None:
    """0.333 G parameters of SDXL are convolutions; without DeepSpeed they are channels-last themselves."""
    for ds, extra in ((None, 0), ({"zero_optimization": {"stage": 2}}, 665_000_000)):
        allocated = []
        for turned in (False, True):
            s = subject(SDXL, settings(model={"channels_last": turned, "precision": "bf16"}), ds=ds)
            allocated.append(memory.memory(s, s.variant()).allocated)
        assert allocated[1] - allocated[0] == pytest.approx(extra, rel=0.01)


def test_states_by_optimizer() -> None:
    """Bytes for SDXL: two fp32 moments, two bytes, and row and column means (0.98 GB in transformers' Adafactor)."""
    network = subject(SDXL, settings()).network
    count = footprint.numel(footprint.parameter_shapes(network).trained)
    found = {name: memory.state_bytes(name, network) for name in STATE_BYTES}
    assert found["adamw"] == 8 * count
    assert found["adamw8bit"] == pytest.approx(2.03 * count, rel=0.01)
    assert found["adafactor"] == pytest.approx(0.98e9, rel=0.01)


@pytest.mark.parametrize("per_node", [1, 4])
def test_ranks_share_what_their_stage_shards(per_node: int) -> None:
    """Of 4 ranks each has a quarter of the states, and a node as many quarters as ranks."""
    to_host = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    plans = []
    for zero in ({"stage": 2}, to_host):
        c = settings(batch={"pairs_per_step": 4})
        s = subject(SDXL_TOY, c, ranks=4, per_node=per_node, ds={"zero_optimization": zero})
        plans.append(memory.memory(s, s.variant()))
    states = memory.state_bytes("adamw", s.network)
    masters, sums = 4 * s.counts[0], 4 * s.counts[0]
    assert plans[0].parts["optimizer states"] == states / 4 and plans[0].host["offloaded states"] == 0
    assert plans[1].parts["optimizer states"] == 0
    assert plans[1].host["offloaded states"] == (states + masters + sums) / 4 * per_node


def test_the_average_is_sharded_and_offloaded_like_the_states() -> None:
    to_host = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    for dtype, size in (("fp32", 4), ("bf16-sr", 2)):
        for zero, here, there in (({"stage": 2}, size / 4, 0.0), (to_host, 0.0, size / 4), ({"stage": 0}, size, 0.0)):
            told = []
            for ema in (0.0, 0.9):
                c = settings(batch={"pairs_per_step": 4}, optim={"ema": ema, "ema_dtype": dtype})
                s = subject(SDXL_TOY, c, ranks=4, per_node=1, ds={"zero_optimization": zero})
                told.append(memory.memory(s, s.variant()))
            assert told[1].parts["average of the weights"] == here * s.counts[0] and not memory.average_bytes(
                subject(SDXL_TOY, settings())
            )
            assert told[1].host["offloaded states"] - told[0].host["offloaded states"] == there * s.counts[0]
            for phase, peak in told[0].phases.items():
                assert told[1].phases[phase] - peak == pytest.approx(here * s.counts[0])


def test_weights_without_masters() -> None:
    """optim.master, accumulate and offload of one process: each takes away what it says."""
    base = {"name": "adamw8bit_aligned"}
    ladder = [base, base | {"master": "none"}, base | {"master": "none", "accumulate": "bf16-sr"},
              base | {"master": "none", "accumulate": "bf16-sr", "offload": "states+gradients"}]  # fmt: skip
    s = subject(SDXL_TOY, settings(optim=base))
    plans = [memory.memory(s, subject(SDXL_TOY, settings(optim=o)).variant()) for o in ladder]
    count, states = s.counts[0], memory.state_bytes("adamw8bit_aligned", s.network)
    for before, after, saved in zip(plans, plans[1:], (4 * count, 2 * count, 2 * count + states), strict=False):
        assert before.phases["policy"] - after.phases["policy"] == pytest.approx(saved)
    assert plans[-1].host["offloaded states"] == pytest.approx(states + 2 * count)


def test_what_offload_and_streaming_free() -> None:
    ds = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    here, there = (subject(SDXL_TOY, settings(), ranks=2, ds=d) for d in ({"zero_optimization": {"stage": 2}}, ds))
    kept, moved = (memory.memory(s, s.variant()) for s in (here, there))
    assert moved.parts["masters"] == moved.parts["optimizer states"] == 0 and moved.host["offloaded states"] > 0
    assert moved.allocated < kept.allocated
    streamed = memory.memory(here, replace(here.variant(), reference="streamed"))
    freed = kept.phases["policy"] - streamed.phases["policy"]
    assert freed == kept.parts["reference"] and streamed.host["streamed reference"] == 2 * freed


# --- seconds and choices --------------------------------------------------------------------------------------


def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_config(SCHEDULER)


def test_work_of_a_pair_is_the_method_s() -> None:
    release = {"fidelity": "release", "steps": 10, "timesteps": "stratified"}
    c = loading.from_dict({"inversion": release, "model": {"precision": "bf16"}})
    found = speed.work(subject(SDXL_TOY, c), schedule(), False)
    assert found.calls["inversion"] == pytest.approx(12.764, abs=0.02) and found.calls["reference"] == 1
    sft = settings(objective={"name": "sft"})
    assert speed.work(subject(SDXL_TOY, sft), schedule(), False).calls == {"inversion": 0, "reference": 0, "policy": 1}


def test_modelled_seconds_shrink_with_ranks_and_speed() -> None:
    c = settings(batch={"pairs_per_step": 64}, inversion={"source": "inversion"})

    def seconds(gpu: str, ranks: int) -> float:
        s = subject(SDXL_TOY, c, ranks=ranks, ds={"zero_optimization": {"stage": 1}} if ranks > 1 else None)
        return sum((speed.modelled_seconds(s, s.variant(), schedule(), GPUS[gpu]) or {}).values())

    assert seconds("H100", 8) < seconds("H100", 1) < seconds("A100-80GB", 1) < seconds("RTX-3090", 1)
    s = subject(SDXL_TOY, settings(model={"precision": "fp32"}))
    assert speed.modelled_seconds(s, s.variant(), schedule(), GPUS["H100"]) is None, "the table knows bf16 alone"


@pytest.mark.parametrize(("ranks", "gigabytes"), [(8, 450), (16, 25)])
def test_nodes_are_linked_by_the_network(ranks: int, gigabytes: float) -> None:
    run = subject(SDXL_TOY, settings(batch={"pairs_per_step": 16}), ranks=ranks, per_node=8)
    assert gpus.link_gb(run, GPUS["H100"]) == gigabytes


def test_the_words_of_a_choice_are_what_differs_from_the_settings() -> None:
    run, file = subject(SDXL_TOY, settings()), "configs/ds_zero2.json"
    option = search.FittingVariant(
        replace(run.variant(), checkpointing=True), file, memory.memory(run, run.variant()), 1
    )
    words = ["model.gradient_checkpointing=true"]
    assert search.changed_settings(option, run, file) == words
    assert search.changed_settings(option, run, "") == [*words, f"--ds_config {file}"]


def test_choices_fit_and_the_first_is_the_fastest_or_the_nearest() -> None:
    s = subject(SDXL_TOY, settings(batch={"pairs_per_step": 16}, inversion={"source": "inversion"}))
    roomy = search.fitting_variants(s, schedule(), GPUS["H100"], "")
    assert roomy[0].seconds <= 1.03 * min(o.seconds for o in roomy)
    assert roomy[0].variant.optimizer == s.variant().optimizer, "what alters the arithmetic is not changed for nothing"
    needed = memory.memory(s, s.variant()).needed
    tight = replace_gpu(needed - 5e6)
    assert all(o.memory.needed <= tight.bytes for o in search.fitting_variants(s, schedule(), tight, ""))
    assert not search.fitting_variants(s, schedule(), replace_gpu(memory.CONTEXT_BYTES), "")


def replace_gpu(size: float) -> Gpu:
    return GPUS["H100"]._replace(bytes=size)


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA L40", None),
    ],
)
def test_devices_as_torch_names_them(device: str, key: str | None) -> None:
    found = gpus.gpu_named(device)
    assert (found and found.name) == key


def test_shipped_files_are_as_the_plan_thinks() -> None:
    for name, thought in search.SHIPPED.items():
        real = ds_config.read_ds_file(CONFIGS.parent / name)["zero_optimization"]
        for key, value in thought["zero_optimization"].items():
            there = real.get(key, value)  # where a file has no such key, nothing depends on it
            both = [v["device"] if isinstance(v, dict) else v for v in (there, value)]
            assert both[0] == both[1], f"{name}: {key}"


# --- the command ----------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    status = cli.main(["plan", *args])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_the_command_tells_everything(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = command(capsys, "--gpu", "rtx 4090", "--gpus", "2", "--ds_config", str(CONFIGS / "ds_zero2.json"))
    assert status == 0
    for word in (
        "ZeRO 2",
        "it fits",
        "host memory of a node",
        "cache",
        "TFLOP per pair",
        "modelled:",
        "best settings that fit",
    ):
        assert word in text
    assert "measured" not in text


def test_json_and_a_gpu_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = json_answer(capsys, "plan", "--gpu-memory", "0.7", status=1)
    assert found["fits"] is False and found["needed"] > 0.7e9
    assert found["time"]["basis"].startswith("no figure") and found["time"]["hours"] is None


def test_measured_on_this_device(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["batch.pairs_per_step=4", "batch.micro_pairs=2", "batch.inversion_pairs=2", "run.device=cpu"]
    found, _ = json_answer(capsys, "plan", *words, "--measure")
    told = found["time"]
    assert told["basis"].startswith("measured on") and "modelled" not in told["basis"]
    assert set(told["seconds"]) == {"inversion", "reference", "policy", "optimizer"} and told["step_seconds"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "GTX-999"], "known GPUs are B200"),
        (["--gpu", "H100", "--measure"], "leave --gpu"),
        (["--gpus", "0"], "--gpus: Input should be greater than or equal to 1"),
        (["--gpus", "7", "--gpu", "H100"], "does not divide among 7 ranks"),
        (["--ds_config", "none.json"], "none.json: cannot be read"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = command(capsys, *words)
    assert status == 2 and message in text


def test_pairs_that_memory_allows() -> None:
    """batch.inversion_pairs = 0 asks batch.inversion_gb."""

    def chosen(gigabytes: float) -> int:
        batch = {"inversion_pairs": 0, "inversion_gb": gigabytes, "pairs_per_step": 4096}
        return subject(SDXL_TOY, settings(batch=batch)).variant().inversion_pairs

    assert 1 < chosen(0.1) < chosen(0.2)
    with pytest.raises(UserError, match="inversion_gb"):
        chosen(0.0)
