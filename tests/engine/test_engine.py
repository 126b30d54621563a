"""DeepSpeed on real ranks against plain PyTorch on one, and what must be refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toy
from helpers.ranks import free_port, run_ranks
from torch import nn

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.engine import create, ds_config, protocol
from smpo_fast.engine import zero as engine_zero
from smpo_fast.engine.protocol import Engine

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STEPS = range(4)
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

ALIGNED = "adamw8bit_aligned"

# optimizer, precision, stage, pairs, largest relative error of a loss and of a weight
AGREEMENTS: list[tuple[str, str, int | str, int, float, float]] = [
    # 10 pairs on 2 ranks in micro-batches of 2: the last one of a rank has 1 pair.
    *[("adamw", "fp32", stage, 10, 1e-6, 1e-6) for stage in (0, 1, 2, 3)],
    # 8 pairs: the micro-batches are the same on 1 and 2 ranks, so bf16 rounds the same way.
    *[("adamw", "bf16", stage, 8, 1e-6, 1e-6) for stage in (1, 2, 3)],
    *[("adamw", "bf16-autocast", stage, 8, 1e-6, 1e-6) for stage in (0, 2)],
    ("adamw", "bf16-autocast", "2_offload", 8, 1e-6, 1e-6),
    ("adamw", "bf16", "3_offload", 8, 1e-6, 1e-6),
    # A last digit of a gradient can move an 8-bit state to the next code.
    (ALIGNED, "fp32", 2, 10, 1e-4, 1e-3),
    # The blocks of the 8-bit states start where a rank's slice of a parameter does.
    ("adamw8bit", "fp32", 0, 10, 1e-6, 1e-6),
    *[("adamw8bit", "fp32", stage, 10, 1e-3, 2e-3) for stage in (1, 2, 3)],
    ("paged_adamw8bit", "bf16", 2, 8, 1e-3, 2e-3),
    ("lion8bit", "bf16", 3, 8, 1e-3, 2e-3),
    ("adafactor", "fp32", 0, 10, 1e-6, 1e-6),
]
# The same four pairs on every rank and no clipping: the mean over ranks is each rank's gradient, to the last bit.
EXACT: list[tuple[str, str, int | str]] = [
    *[(ALIGNED, "fp32", stage) for stage in (0, 1, 2, 3, "2_offload")],
    *[(ALIGNED, "bf16", stage) for stage in (1, "3_offload")],
    *[("adamw", "fp32", stage) for stage in (1, 2, "3_offload")],
]
FOUR: list[tuple[str, str, int]] = [("adamw", "fp32", stage) for stage in (0, 1, 2, 3)]
FOUR_EXACT: list[tuple[str, str, int | str]] = [(ALIGNED, "fp32", 1), (ALIGNED, "bf16", 2), (ALIGNED, "bf16", 3)]
SKIPS = [("fp32", stage) for stage in (0, 1, 2, 3)] + [("bf16", stage) for stage in (1, 2, 3)]
BAD = {"nan": (1, math.nan), "inf": (0, math.inf)}  # which rank's loss is multiplied by what


# --- on two ranks ---------------------------------------------------------------------------------------------


def on_ranks(rank: int, size: int) -> dict[str, Any]:
    """Everything that needs two ranks, in one start of them."""
    found: dict[str, Any] = {}
    for optimizer, precision, stage, pairs, *_ in AGREEMENTS:
        found[f"{optimizer} {precision} {stage}"] = agreement(rank, size, optimizer, precision, stage, pairs)
    for case in EXACT:
        found[f"exact {case}"] = on_the_same_pairs(rank, size, *case)
    for precision, stage in SKIPS:
        found[f"skip {precision} {stage}"] = skip_steps(rank, size, precision, stage)
    found["attributes"] = attributes(rank, size)
    return found


def on_four_ranks(rank: int, size: int) -> dict[str, Any]:
    """12 pairs on 4 ranks in micro-batches of 2: the last one of a rank has 1 pair."""
    found = {f"{case}": agreement(rank, size, *case, 12) for case in FOUR}
    return found | {f"exact {case}": on_the_same_pairs(rank, size, *case) for case in FOUR_EXACT}


def agreement(rank: int, size: int, optimizer: str, precision: str, stage: int | str, pairs: int) -> tuple[Any, ...]:
    settings = toy.settings(optimizer, precision, pairs)
    trained = toy.make(settings, rank, size, stage)
    margin = distance_from_reference(trained, precision)
    start = trained.full_state()
    told = toy.train(trained, settings, STEPS, rank, size)
    return told, start, trained.full_state(), margin


def on_the_same_pairs(rank: int, size: int, optimizer: str, precision: str, stage: int | str) -> tuple[Any, ...]:
    trained = toy.make(toy.settings(optimizer, precision, 4 * size, clip=0.0), rank, size, stage)
    told = toy.train(trained, toy.settings(optimizer, precision, 4, clip=0.0), STEPS)
    return [(loss, applied) for loss, applied, _ in told], trained.full_state()


def distance_from_reference(trained: Engine, precision: str) -> float:
    """Between the fresh policy's predictions, with and without gradients, and a frozen copy's in its dtype."""
    reference, (x, _) = toy.network().to(trained.dtype), toy.batch(0, 3)
    x = x.to(trained.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-autocast"):
        expected, evaluated = reference(x), trained.unet.eval()(x)
    predicted = trained.unet.train()(x)
    assert predicted.dtype is expected.dtype
    return max((predicted - expected).abs().max().item(), (evaluated - expected).abs().max().item())


def skip_steps(rank: int, size: int, precision: str, stage: int) -> dict[str, bool]:
    """Train steps 0 and 2 with bad steps between them, and without."""
    settings = toy.settings("adamw", precision)
    plain = toy.make(settings, rank, size, stage)
    toy.train(plain, settings, [0, 2], rank, size)
    skipping = toy.make(settings, rank, size, stage)
    toy.train(skipping, settings, [0], rank, size)
    before = skipping.full_state()
    verdicts = {}
    for name, (bad_rank, factor) in BAD.items():
        toy.accumulate(skipping, settings, 1, rank, size, factor=factor if rank == bad_rank else 1.0)
        result = skipping.step(1e-3)
        verdicts[f"{name} not applied"] = not result.applied and not math.isfinite(result.grad_norm)
    verdicts["weights unchanged"] = toy.same(before, skipping.full_state())
    toy.train(skipping, settings, [2], rank, size)
    verdicts["optimizer unchanged"] = toy.same(plain.full_state(), skipping.full_state())
    return verdicts


class Named(nn.Linear):
    config = {"in_channels": 4}


def attributes(rank: int, size: int) -> dict[str, Any]:
    """The engine's network must pass for the module."""
    settings = toy.settings()
    raw = ds_config.read_ds_file(toy.CONFIGS / "ds_zero3.json")
    ds, _ = ds_config.resolve_ds_settings(raw, "file", settings, size, "fp32")
    frozen = Named(3, 5)
    nn.init.constant_(frozen.weight, 0.25)
    frozen.weight.requires_grad_(False)
    trained = create.make_engine(frozen, settings, World(rank, size), "fp32", ds)
    trained.unet.eval()
    return {
        "config": trained.unet.config,
        "training": (trained.unet.training, frozen.training),
        "frozen": trained.full_state(),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(on_ranks, 2)


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, Any]]:
    return run_ranks(on_four_ranks, 4)


@pytest.mark.parametrize("optimizer, precision, stage, pairs, loss_error, weight_error", AGREEMENTS)
def test_two_ranks_agree_with_plain_pytorch(
    two_ranks: list[dict[str, Any]], optimizer: str, precision: str, stage: int | str, pairs: int,
    loss_error: float, weight_error: float,
) -> None:  # fmt: skip
    found = [r[f"{optimizer} {precision} {stage}"] for r in two_ranks]
    check_agreement(found, toy.settings(optimizer, precision, pairs), loss_error, weight_error)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_ranks_agree_with_plain_pytorch(four_ranks: list[dict[str, Any]], case: tuple[str, str, int]) -> None:
    check_agreement([r[f"{case}"] for r in four_ranks], toy.settings(case[0], case[1], 12), 1e-6, 1e-6)


def check_agreement(found: list[tuple[Any, ...]], settings: Config, loss_error: float, weight_error: float) -> None:
    told, starts, states, margins = zip(*found, strict=True)
    assert set(margins) == {0.0}, "a fresh policy must predict exactly what its reference does"
    local = toy.make(settings)
    assert toy.same(starts[0], local.full_state()), "master weights have lost digits"
    expected = toy.train(local, settings, STEPS)
    for *ranks, (loss, applied, norm) in zip(*told, expected, strict=True):
        assert applied and all(rank[1] for rank in ranks)
        assert sum(rank[0] for rank in ranks) / len(ranks) == pytest.approx(loss, rel=loss_error)
        assert len({rank[2] for rank in ranks}) == 1
        assert ranks[0][2] == pytest.approx(norm, rel=max(1e-6, loss_error))
        assert norm > toy.CLIP
    assert toy.distance(states[0], local.full_state()) < weight_error
    assert toy.distance(states[0], starts[0]) > 1e-4
    assert not any(states[1:]), "the full state is rank 0's"


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_sharding_over_two_ranks_changes_no_bit(
    two_ranks: list[dict[str, Any]], case: tuple[str, str, int | str]
) -> None:
    check_exact(two_ranks[0][f"exact {case}"], case)


@pytest.mark.parametrize("case", FOUR_EXACT, ids=str)
def test_sharding_over_four_ranks_changes_no_bit(
    four_ranks: list[dict[str, Any]], case: tuple[str, str, int | str]
) -> None:
    check_exact(four_ranks[0][f"exact {case}"], case)


def check_exact(found: tuple[Any, ...], case: tuple[str, str, int | str]) -> None:
    settings = toy.settings(*case[:2], 4, clip=0.0)
    local = toy.make(settings)
    told = toy.train(local, settings, STEPS)
    assert found[0] == [(loss, applied) for loss, applied, _ in told]
    assert toy.same(found[1], local.full_state())


@pytest.mark.parametrize("precision, stage", SKIPS)
def test_a_nonfinite_loss_on_one_rank_changes_nothing_on_any(
    two_ranks: list[dict[str, Any]], precision: str, stage: int
) -> None:
    for found in two_ranks:
        assert all(found[f"skip {precision} {stage}"].values()), found[f"skip {precision} {stage}"]


def test_the_network_behaves_like_the_module(two_ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two_ranks):
        seen = found["attributes"]
        assert seen["config"] == {"in_channels": 4}
        assert seen["training"] == (False, False)
        assert rank or torch.equal(seen["frozen"]["weight"], torch.full((5, 3), 0.25))


# --- without a launcher, and with it --------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path[:0] = {paths!r}
from helpers import toy
from smpo_fast.common.runtime import world_from_environment
if __name__ == "__main__":
    world, settings = world_from_environment("cpu"), toy.settings()
    trained = toy.make(settings, world.rank, world.size, 2)
    told = toy.train(trained, settings, range(2), world.rank, world.size)
    print("rank", world.rank, "of", world.size, "norm", told[-1][2], flush=True)
"""


def started(tmp_path: Path, *command: str) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(paths=[str(toy.CONFIGS.parent / "tests"), str(toy.CONFIGS.parent)]))
    launcher_sets = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {k: v for k, v in os.environ.items() if k not in launcher_sets} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(program)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("rank")]


def test_deepspeed_needs_no_launcher(tmp_path: Path) -> None:
    settings = toy.settings()
    norm = toy.train(toy.make(settings), settings, range(2))[-1][2]
    (line,) = started(tmp_path, sys.executable)
    assert line.startswith("rank 0 of 1 norm ")
    assert float(line.split()[-1]) == pytest.approx(norm, rel=1e-6)


@pytest.mark.slow
def test_the_launcher_starts_cpu_ranks(tmp_path: Path) -> None:
    launcher = Path(sys.executable).with_name("deepspeed")
    lines = started(tmp_path, str(launcher), "--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank")
    assert sorted(line.split(" norm")[0] for line in lines) == ["rank 0 of 2", "rank 1 of 2"]


# --- plain PyTorch --------------------------------------------------------------------------------------------


def test_local_engine_is_adamw_on_the_whole_batch() -> None:
    settings, reference = toy.settings(), toy.network()
    trained = toy.make(settings)
    adamw = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    for step in STEPS:
        x, y = toy.batch(step, 10)
        adamw.zero_grad()
        (reference(x) - y).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), toy.CLIP)
        adamw.param_groups[0]["lr"] = 1e-3 * (step + 1) / 4
        adamw.step()
        ((_, applied, got),) = toy.train(trained, settings, [step])
        assert applied and got == pytest.approx(norm.item(), rel=1e-6)
    assert toy.distance(trained.full_state(), reference.state_dict()) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-autocast"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_a_nonfinite_step_is_as_if_it_had_not_been(optimizer: str, precision: str) -> None:
    settings = toy.settings(optimizer, precision)
    plain, skipping = toy.make(settings), toy.make(settings)
    toy.train(plain, settings, [0, 2])
    toy.train(skipping, settings, [0])
    for factor in (math.nan, math.inf, -math.inf):
        toy.accumulate(skipping, settings, 1, factor=factor)
        assert not skipping.step(1e-3).applied
    toy.train(skipping, settings, [2])
    assert toy.same(plain.full_state(), skipping.full_state())


def test_a_nonfinite_loss_with_finite_gradients_is_skipped() -> None:
    settings = toy.settings()
    trained = toy.make(settings)
    before = trained.full_state()
    x, y = toy.batch(0, 2)
    trained.backward(toy.losses(trained, x, y).sum() + math.inf, last=True)
    assert not trained.step(1e-3).applied
    assert toy.same(before, trained.full_state())


def test_bf16_weights_move_below_their_own_resolution() -> None:
    """At lr 1e-6 no bf16 weight of size 1 can move; the fp32 master weights do, and add up."""
    settings = toy.settings(precision="bf16")
    trained = toy.make(settings)
    before = trained.full_state()
    for step in range(3):
        toy.accumulate(trained, settings, step)
        trained.step(1e-6)
    moved = {k: (trained.full_state()[k] - before[k]).abs().max().item() for k in before}
    assert all(1e-6 < m < 4e-6 for m in moved.values()), moved
    for name, half in trained.unet.named_parameters():
        assert half.dtype is torch.bfloat16
        assert torch.equal(half, trained.full_state()[name].bfloat16())


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """256 + 1 + 1 + ... stays 256 in bf16."""
    parameter = nn.Linear(1, 1, bias=False)
    settings = toy.settings(precision="bf16", clip=0.0)
    trained = create.make_engine(parameter, settings, World(), "bf16", None)
    for gradient in (256.0, 1.0, 1.0, 1.0):
        x = torch.full((1, 1), gradient, dtype=torch.bfloat16)
        trained.backward(trained.unet(x).float().sum(), last=True)
    assert trained.step(0.0).grad_norm == 259.0


def test_adafactor_is_the_recipes() -> None:
    """The first update of a matrix: factored second moments, RMS clipped at 1, the given rate, decay."""
    layer = nn.Linear(7, 5, bias=False)
    settings = toy.settings("adafactor", clip=0.0)
    trained = create.make_engine(layer, settings, World(), "fp32", None)
    before = layer.weight.detach().clone()
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    trained.backward((layer.weight * gradient).sum(), last=True)
    assert trained.step(1e-2).applied
    squares = gradient.square() + 1e-30  # the running averages start with weight 1 on the first step
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    update = gradient / (rows / rows.mean() * columns).sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    expected = before - 1e-2 * 0.01 * before - 1e-2 * update
    assert torch.allclose(layer.weight, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16-autocast", torch.bfloat16)])
def test_autocast_is_the_engines_own(precision: str, dtype: torch.dtype) -> None:
    trained = toy.make(toy.settings(precision=precision))
    assert trained.dtype is torch.float32
    assert trained.unet(torch.zeros(1, 3, 8, 8)).dtype is dtype
    assert distance_from_reference(trained, precision) == 0.0


def test_step_needs_the_last_backward() -> None:
    trained = toy.make(toy.settings())
    with pytest.raises(RuntimeError, match="last=True"):
        trained.step(1e-3)


def test_weights_of_any_dtype_train_in_the_asked_one() -> None:
    trained = create.make_engine(toy.network().half(), toy.settings(), World(), "fp32", None)
    assert {p.dtype for p in trained.unet.parameters()} == {torch.float32}


# --- settings -------------------------------------------------------------------------------------------------


def resolve(raw: dict[str, Any], size: int = 2, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = toy.settings(**changes)
    precision = ds_config.resolve_precision(settings, raw, CPU)
    return ds_config.resolve_ds_settings(raw, "my.json", settings, size, precision)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "2_offload", "3_offload"])
def test_the_files_in_configs_leave_the_run_to_decide(stage: int | str) -> None:
    raw = ds_config.read_ds_file(toy.CONFIGS / f"ds_zero{stage}.json")
    assert ds_config.zero_stage(raw) == int(str(stage)[0])
    offloaded = {"zero_force_ds_cpu_optimizer": False} if str(stage).endswith("offload") else {}
    settings, filled = resolve(raw)
    assert "auto" not in json.dumps(settings)
    assert filled == {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": toy.CLIP,
        "bf16.enabled": False,
        "fp16.enabled": False,
        "data_types.grad_accum_dtype": "fp32",
        "zero_allow_untested_optimizer": True,
        **offloaded,
    }
    assert settings["train_batch_size"] == 2 * 3 * 2, "DeepSpeed's own product, with the last micro-batch full"


def test_half_precision_gradients_travel_in_fp32_unless_told() -> None:
    settings, filled = resolve({}, precision="bf16")
    assert settings["communication_data_type"] == filled["communication_data_type"] == "fp32"
    settings, filled = resolve({"communication_data_type": "bf16"}, precision="bf16")
    assert settings["communication_data_type"] == "bf16" and "communication_data_type" not in filled


def test_other_autos_become_deepspeeds_defaults() -> None:
    settings, filled = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert settings["zero_optimization"] == {"stage": 2}
    assert filled["zero_optimization.reduce_bucket_size"] == "DeepSpeed's default"


def test_values_that_agree_are_accepted() -> None:
    raw = {
        "train_batch_size": 10,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": toy.CLIP,
        "bf16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    _, filled = resolve(raw)
    assert set(filled) == {"fp16.enabled", "zero_allow_untested_optimizer"}


@pytest.mark.parametrize(
    "raw, words",
    [
        ({"train_batch_size": 64}, ["train_batch_size = 64", "batch.pairs_per_step = 10"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu = 4", "batch.micro_pairs = 2"]),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps = 8", "ranks = 2", "give 3"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "optim.clip = 0.05"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = true", 'model.precision = "fp32"']),
        ({"bfloat16": {"enabled": True}}, ["bf16.enabled = true", 'model.precision = "fp32"']),
        ({"fp16": {"enabled": True}}, ["fp16.enabled = true", 'model.precision = "fp32"']),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "summed in fp32"]),
        ({"zero_allow_untested_optimizer": False}, ["zero_allow_untested_optimizer = false", 'optim.name = "adamw"']),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "[optim]"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "[optim]"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast", "bf16-autocast"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "averaged"]),
        ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation = false"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["zero_optimization.compute_grad_norm = false"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": True},
            ["zero_force_ds_cpu_optimizer = true", 'optim.name = "adamw"'],
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ['device = "nvme"', 'take "cpu"']),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param.device", 'take "cpu"']),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}, ["offload_optimizer.ratio = 0.3"]),
        ({"zero_optimization": {"mics_shard_size": 8}}, ["zero_optimization.mics_shard_size = 8", "all ranks"]),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow = false"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16.bf16_master_weights_and_grads = true"]),
    ],
)
def test_a_contradiction_names_both_places(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(raw)
    for word in ["my.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("stage", [4, -1, "2", 2.0, True])
def test_an_unknown_stage_is_refused(stage: Any) -> None:
    with pytest.raises(UserError, match="zero_optimization.stage"):
        ds_config.zero_stage({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("text, words", [("{", "not valid JSON"), ("[]", "is an object"), (None, "cannot be read")])
def test_a_file_that_is_no_settings(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "my.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        ds_config.read_ds_file(path)
    assert str(path) in str(caught.value)


def test_pairs_must_divide_among_the_ranks() -> None:
    with pytest.raises(UserError, match="pairs_per_step = 10 does not divide among 3"):
        protocol.micro_steps(toy.settings(), 3)
    assert protocol.micro_steps(toy.settings(), 2) == 3
    assert protocol.micro_steps(toy.settings(pairs=2, micro=4), 2) == 1


AUTO: list[tuple[dict[str, Any] | None, torch.device, str]] = [
    (None, CPU, "fp32"),
    (None, CUDA, "bf16"),
    ({}, CUDA, "bf16-autocast"),
    ({"zero_optimization": {"stage": 2}}, CUDA, "bf16"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, CUDA, "bf16-autocast"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, CUDA, "bf16"),
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}, CPU, "fp32"),
    ({"bf16": {"enabled": True}}, CPU, "bf16"),
    ({"fp16": {"enabled": True}}, CUDA, "fp16"),
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}, CUDA, "fp32"),
]


@pytest.mark.parametrize("raw, device, expected", AUTO)
def test_auto_precision(
    monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any] | None, device: torch.device, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert ds_config.resolve_precision(loading.from_dict({}), raw, device) == expected
    assert ds_config.resolve_precision(toy.settings(precision="bf16-autocast"), raw, device) == "bf16-autocast"


def test_two_half_precisions_are_refused() -> None:
    with pytest.raises(UserError, match="both true"):
        ds_config.resolve_precision(loading.from_dict({}), {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, CPU)


REFUSED: list[tuple[str, str, World, int | None, str]] = [
    ("adafactor", "fp32", World(), 1, "flat pieces"),
    ("adafactor", "bf16", World(), 2, "flat pieces"),
    ("adamw", "fp16", World(), None, "loss scaling"),
    ("adamw", "fp16", World(), 2, "CUDA"),
    ("adamw", "bf16", World(), 0, "stage 1, 2 or 3"),
    ("adamw", "fp16", World(device=CUDA), 0, "stage 1, 2 or 3"),
    ("adamw", "fp32", World(0, 2), None, "--ds_config"),
]


@pytest.mark.parametrize("optimizer, precision, world, stage, words", REFUSED)
def test_combinations_that_do_not_work(
    optimizer: str, precision: str, world: World, stage: int | None, words: str
) -> None:
    ds = None if stage is None else {"zero_optimization": {"stage": stage}}
    with pytest.raises(UserError, match=words):
        ds_config.check_combination(toy.settings(optimizer, precision), precision, world, ds)


def test_the_loss_scale_is_saved_in_numbers() -> None:
    """fp16 itself needs a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler, fresh = (DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2, False, True) for _ in range(2))
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 2.0**15, 4, 2, 1
    vars(fresh).update(json.loads(json.dumps(engine_zero._numbers_of(scaler))))
    assert vars(fresh) == vars(scaler) and fresh.cur_scale == 2.0**15


OFFLOADED: list[tuple[dict[str, Any], str, int, str]] = [
    ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "fp32", 2, "needs zero_optimization.stage = 1, 2 or 3"),
    ({"stage": 2, "offload_param": {"device": "cpu"}}, "fp32", 2, "needs zero_optimization.stage = 3, and it is 2"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16", 2, "a step's 5 micro-batches in bf16.*stage 3"),
    ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16", 10, ""),
    ({"stage": 2, "offload_optimizer": {"device": "none"}}, "bf16", 2, ""),
]


@pytest.mark.parametrize("zero, precision, micro, words", OFFLOADED)
def test_offloading_that_does_not_work(zero: dict[str, Any], precision: str, micro: int, words: str) -> None:
    settings = toy.settings(precision=precision, micro=micro)
    with pytest.raises(UserError, match=words) if words else nullcontext():
        ds_config.check_combination(settings, precision, World(), {"zero_optimization": zero})


def test_a_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        toy.make(toy.settings("adamw8bit"))
