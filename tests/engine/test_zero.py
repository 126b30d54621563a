"""The DeepSpeed engine on real ranks against plain PyTorch in one process."""

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

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine import create, ds_config
from smpo_fast.engine import zero as engine_zero

STEPS = range(4)
ALIGNED = "adamw8bit_aligned"
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def slow(*values: Any) -> Any:
    """Parameters of a test that another combination covers in the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --- the results are those of one process ---------------------------------------------------------------------

# optimizer, precision, stage, pairs, largest relative error of a loss and of a weight
AGREEMENTS = [
    # 10 pairs on 2 ranks in micro-batches of 2: the last one of a rank has 1 pair.
    *[("adamw", "fp32", stage, 10, 1e-6, 1e-6) for stage in (0, 1, 2, 3)],
    # 8 pairs: the micro-batches are the same on 1 and 2 ranks, so bf16 rounds the same way.
    slow("adamw", "bf16", 1, 8, 1e-6, 1e-6),
    *[("adamw", "bf16", stage, 8, 1e-6, 1e-6) for stage in (2, 3)],
    ("adamw", "bf16-autocast", 0, 8, 1e-6, 1e-6),
    slow("adamw", "bf16-autocast", 2, 8, 1e-6, 1e-6),
    ("adamw", "bf16-autocast", "2_offload", 8, 1e-6, 1e-6),
    ("adamw", "bf16", "3_offload", 8, 1e-6, 1e-6),
    # The last digit of a gradient can move an 8-bit state to the next code.
    (ALIGNED, "fp32", 2, 10, 1e-4, 1e-3),
    # The blocks of the 8-bit states start where a rank's slice of a parameter does.
    slow("adamw8bit", "fp32", 0, 10, 1e-6, 1e-6),
    slow("adamw8bit", "fp32", 1, 10, 1e-3, 2e-3),
    ("adamw8bit", "fp32", 2, 10, 1e-3, 2e-3),
    slow("adamw8bit", "fp32", 3, 10, 1e-3, 2e-3),
    slow("paged_adamw8bit", "bf16", 2, 8, 1e-3, 2e-3),
    ("lion8bit", "bf16", 3, 8, 1e-3, 2e-3),
    ("adafactor", "fp32", 0, 10, 1e-6, 1e-6),
]


def agreement(rank: int, size: int, optimizer: str, precision: str, stage: int | str, pairs: int) -> tuple[Any, ...]:
    settings = toy.settings(optimizer, precision, pairs)
    trained = toy.make(settings, rank, size, stage)
    difference = toy.distance_from_reference(trained, precision)
    start = trained.full_state()
    logged = toy.train(trained, settings, STEPS, rank, size)
    return logged, start, trained.full_state(), difference


@pytest.mark.parametrize("optimizer, precision, stage, pairs, loss_error, weight_error", AGREEMENTS)
def test_two_ranks_agree_with_plain_pytorch(
    optimizer: str, precision: str, stage: int | str, pairs: int, loss_error: float, weight_error: float
) -> None:
    found = run_ranks(agreement, 2, optimizer=optimizer, precision=precision, stage=stage, pairs=pairs)
    check_agreement(found, toy.settings(optimizer, precision, pairs), loss_error, weight_error)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_ranks_agree_with_plain_pytorch(stage: int) -> None:
    """12 pairs on 4 ranks in micro-batches of 2: the last one of a rank has 1 pair."""
    found = run_ranks(agreement, 4, optimizer="adamw", precision="fp32", stage=stage, pairs=12)
    check_agreement(found, toy.settings("adamw", "fp32", 12), 1e-6, 1e-6)


def check_agreement(found: list[tuple[Any, ...]], settings: Config, loss_error: float, weight_error: float) -> None:
    logged, starts, states, differences = zip(*found, strict=True)
    assert set(differences) == {0.0}, "a fresh policy must predict exactly what its reference does"
    local = toy.make(settings)
    assert toy.same(starts[0], local.full_state()), "master weights have lost digits"
    expected = toy.train(local, settings, STEPS)
    for *ranks, (loss, applied, norm) in zip(*logged, expected, strict=True):
        assert applied and all(rank[1] for rank in ranks)
        assert sum(rank[0] for rank in ranks) / len(ranks) == pytest.approx(loss, rel=loss_error)
        assert len({rank[2] for rank in ranks}) == 1
        assert ranks[0][2] == pytest.approx(norm, rel=max(1e-6, loss_error))
        assert norm > toy.CLIP
    assert toy.distance(states[0], local.full_state()) < weight_error
    assert toy.distance(states[0], starts[0]) > 1e-4
    assert not any(states[1:]), "the full state is rank 0's"


# The same four pairs on every rank and no clipping: the mean over ranks is each rank's gradient, to the last bit.
EXACT = [
    (ALIGNED, "fp32", 0), slow(ALIGNED, "fp32", 1), (ALIGNED, "fp32", 2), (ALIGNED, "fp32", 3),
    slow(ALIGNED, "fp32", "2_offload"), slow(ALIGNED, "bf16", 1), slow(ALIGNED, "bf16", "3_offload"),
    slow("adamw", "fp32", 1), ("adamw", "fp32", 2), slow("adamw", "fp32", "3_offload"),
]  # fmt: skip


AVERAGED: dict[str, Any] = {"ema": 0.9, "ema_dtype": "bf16-sr"}


def on_the_same_pairs(rank: int, size: int, optimizer: str, precision: str, stage: int | str) -> tuple[Any, ...]:
    trained = toy.make(toy.settings(optimizer, precision, 4 * size, clip=0.0, **AVERAGED), rank, size, stage)
    logged = toy.train(trained, toy.settings(optimizer, precision, 4, clip=0.0), STEPS)
    return [(loss, applied) for loss, applied, _ in logged], trained.full_state(), trained.full_average()


@pytest.mark.parametrize("optimizer, precision, stage", EXACT)
def test_sharding_over_two_ranks_changes_no_bit(optimizer: str, precision: str, stage: int | str) -> None:
    check_exact(2, optimizer, precision, stage)


@pytest.mark.parametrize(
    "optimizer, precision, stage", [slow(ALIGNED, "fp32", 1), slow(ALIGNED, "bf16", 2), slow(ALIGNED, "bf16", 3)]
)
def test_sharding_over_four_ranks_changes_no_bit(optimizer: str, precision: str, stage: int) -> None:
    check_exact(4, optimizer, precision, stage)


def check_exact(size: int, optimizer: str, precision: str, stage: int | str) -> None:
    found = run_ranks(on_the_same_pairs, size, optimizer=optimizer, precision=precision, stage=stage)[0]
    settings = toy.settings(optimizer, precision, 4, clip=0.0, **AVERAGED)
    local = toy.make(settings)
    logged = toy.train(local, settings, STEPS)
    assert found[0] == [(loss, applied) for loss, applied, _ in logged]
    assert toy.same(found[1], local.full_state())
    assert toy.same(found[2], local.full_average())


# --- steps that are skipped -----------------------------------------------------------------------------------

BAD = {"nan": (1, math.nan), "inf": (0, math.inf)}  # which rank's loss is multiplied by what


def skip_steps(rank: int, size: int, optimizer: str, precision: str, stage: int) -> dict[str, bool]:
    """Train steps 0 and 2 with bad steps between them, and without."""
    settings = toy.settings(optimizer, precision, ema=0.9)
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
    with toy.infinite_gradient(skipping) if rank == 1 else nullcontext():
        toy.accumulate(skipping, settings, 1, rank, size)
    verdicts["infinite gradient not applied"] = not skipping.step(1e-3).applied
    verdicts["weights unchanged"] = toy.same(before, skipping.full_state())
    toy.train(skipping, settings, [2], rank, size)
    verdicts["optimizer unchanged"] = toy.same(plain.full_state(), skipping.full_state())
    verdicts["average unchanged"] = toy.same(plain.full_average(), skipping.full_average())
    return verdicts


@pytest.mark.parametrize(
    "optimizer, precision, stage",
    [
        ("adamw", "fp32", 0), slow("adamw", "fp32", 1), slow("adamw", "fp32", 2), ("adamw", "fp32", 3),
        slow("adamw", "bf16", 1), (ALIGNED, "bf16", 2), slow(ALIGNED, "fp32", 3), slow("adamw", "bf16", 3),
    ],
)  # fmt: skip
def test_a_nonfinite_loss_on_one_rank_changes_nothing_on_any(optimizer: str, precision: str, stage: int) -> None:
    for verdicts in run_ranks(skip_steps, 2, optimizer=optimizer, precision=precision, stage=stage):
        assert all(verdicts.values()), verdicts


def test_the_loss_scale_is_saved_in_numbers() -> None:
    """fp16 itself needs a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler, fresh = (DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2, False, True) for _ in range(2))
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 2.0**15, 4, 2, 1
    vars(fresh).update(json.loads(json.dumps(engine_zero.loss_scaler_state(scaler))))
    assert vars(fresh) == vars(scaler) and fresh.cur_scale == 2.0**15


def largest_weights(rank: int, size: int, stage: int) -> list[float]:
    """As it is, and with a weight of the last rank made NaN."""
    trained = toy.make(toy.settings("adamw", "fp32"), rank, size, stage)
    found = [trained.largest_weight(), max((w.abs().max().item() for w in trained.full_state().values()), default=0.0)]
    if rank == size - 1:
        trained._slices[-1].values().fill_(math.nan)  # type: ignore[attr-defined]
    return [*found, trained.largest_weight()]


@pytest.mark.parametrize("stage", [2, 3])
def test_every_rank_knows_the_largest_weight_of_all(stage: int) -> None:
    (first, expected, broken), (second, _, broken_too) = run_ranks(largest_weights, 2, stage=stage)
    assert first == second == expected
    assert math.isnan(broken) and math.isnan(broken_too)


# --- the network ----------------------------------------------------------------------------------------------


class Named(nn.Linear):
    config = {"in_channels": 4}


def attributes(rank: int, size: int) -> dict[str, Any]:
    """The engine's network has the attributes of the module."""
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


def test_the_network_behaves_like_the_module() -> None:
    for rank, seen in enumerate(run_ranks(attributes, 2)):
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
    logged = toy.train(trained, settings, range(2), world.rank, world.size)
    # in one piece: both ranks write to the same pipe
    sys.stdout.write(f"rank {{world.rank}} of {{world.size}} norm {{logged[-1][2]}}\\n")
    sys.stdout.flush()
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


@pytest.mark.parametrize("stage", [slow(1), slow(2), 3])
def test_a_closed_engine_leaves_nothing(stage: int) -> None:
    """The evaluation after training needs the memory."""
    for peak, left in run_ranks(toy.bytes_left, 1, stage=stage, precision="bf16", close=True):
        assert peak > 100_000 and left < 0.02 * peak
