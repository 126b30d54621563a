"""The real training step on a device that has shapes and CUDA's rules, but no values: what would fail or wait fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ours
import pytest
import torch
from architectures import SDXL, SDXL_TOY, Architecture
from helpers.fake_cuda import CUDA, FakeCuda, Fault
from torch import Tensor, nn

from smpo_fast.method.batch import Pairs

OVERRIDES: dict[str, dict[str, Any]] = {
    "model": {"precision": "bf16", "gradient_checkpointing": True},
    "batch": {"pairs_per_step": 2, "micro_pairs": 1, "inversion_pairs": 2},
    "inversion": {"fidelity": "paper", "steps": 2},
    "optim": {"name": "adamw8bit_aligned", "master": "none"},
}
Plant = Callable[[Any], None]


def rehearse(architecture: Architecture, plant: Plant = lambda trainer: None, steps: int = 1, **optim: Any) -> FakeCuda:
    """Steps with the settings of a run on CUDA; ``plant`` changes the trainer before. Raises Fault."""
    with FakeCuda(torch.bfloat16) as fake:
        with fake.waiting():  # loading a network may copy as it likes
            trainer: Any = ours.make_trainer(
                architecture, CUDA, {**OVERRIDES, "optim": {**OVERRIDES["optim"], **optim}}
            )
        may_wait(fake, trainer.engine, "step")
        may_wait(fake, trainer.meter, "flush")
        plant(trainer)
        for step in range(steps):
            trainer.step(step)
    return fake


def may_wait(fake: FakeCuda, owner: Any, method: str) -> None:
    inner = getattr(owner, method)

    def watched(*args: Any) -> Any:
        with fake.waiting():
            return inner(*args)

    setattr(owner, method, watched)


def test_a_step_of_sdxl_on_cuda() -> None:
    """Nothing is on the wrong device or in a wrong dtype, and the host waits only where it needs the step's numbers."""
    counts = rehearse(SDXL).counts
    assert counts["reads"] == 3, "the gradients' norm twice, and the table of the step"


def test_waits_and_uploads_of_a_step() -> None:
    """However many steps and micro-batches there are; uploads are those of the prefetcher and of the step's numbers."""
    one, four = (rehearse(SDXL_TOY, steps=steps).counts for steps in (1, 4))
    assert {name: four[name] - one[name] for name in ("reads", "waits", "uploads")} == {
        "reads": 9, "waits": 12, "uploads": 24
    }  # fmt: skip


def test_offloaded_states_cost_one_wait() -> None:
    """They travel through pinned memory, all at once: the host does not wait for each of a network's parameters."""
    here, offloaded = (rehearse(SDXL_TOY, offload=where).counts["waits"] for where in ("none", "states"))
    assert offloaded == here + 1


@pytest.mark.slow
def test_an_average_of_the_weights_costs_two_uploads() -> None:
    """A table of the parameters, and how many programs each has; and the same of those that are not aligned."""
    plain, averaged = (rehearse(SDXL_TOY, ema=decay).counts for decay in (0.0, 0.9))
    assert averaged == plain | {"uploads": plain["uploads"] + 2 * 2}


@pytest.mark.slow
def test_an_average_on_the_host_costs_one_wait() -> None:
    waits = [rehearse(SDXL_TOY, steps=n, offload="states", ema=e).counts["waits"] for e in (0.0, 0.9) for n in (1, 2)]
    assert waits[3] - waits[2] == waits[1] - waits[0] + 1


# --- each fault is seen ---------------------------------------------------------------------------------------


def in_the_loss(trainer: Any, change: Callable[[Tensor], Tensor]) -> None:
    """The predictions of the policy pass through ``change``."""
    inner = trainer.ops.pair_loss
    trainer.ops = trainer.ops._replace(pair_loss=lambda prediction, *rest: inner(change(prediction), *rest))


def wrong_device(trainer: Any) -> None:
    in_the_loss(trainer, lambda x: x + torch.ones(x.shape[-1]))


def number_read(trainer: Any) -> None:
    in_the_loss(trainer, lambda x: x * float(x.abs().max() > 0))


def tensor_read(trainer: Any) -> None:
    in_the_loss(trainer, lambda x: x if x.cpu().isfinite().all() else x)


def pageable_upload(trainer: Any) -> None:
    in_the_loss(trainer, lambda x: x * torch.ones(x.shape[-1]).to(x.device))


def constant(trainer: Any) -> None:
    in_the_loss(trainer, lambda x: x * torch.tensor([1.0], device="cuda"))


def double(trainer: Any) -> None:
    in_the_loss(trainer, lambda x: x.double().float())


class Upcast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)


def single(trainer: Any) -> None:
    block = trainer.policy.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.to_q.__class__ = Upcast


def no_record_of_the_stream(trainer: Any) -> None:
    inner = trainer.step_batch

    def unrecorded(step: int) -> Any:
        found, Pairs.tensors = Pairs.tensors, lambda pairs: []  # type: ignore[method-assign]
        try:
            return inner(step)
        finally:
            Pairs.tensors = found  # type: ignore[method-assign]

    trainer.step_batch = unrecorded


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (tensor_read, "copy to the host"),
        (pageable_upload, "copy from the host"),
        (no_record_of_the_stream, "another stream"),
        pytest.param(wrong_device, "both devices", marks=pytest.mark.slow),
        pytest.param(number_read, "reads a number", marks=pytest.mark.slow),
        pytest.param(constant, "copy from the host", marks=pytest.mark.slow),
        pytest.param(double, "in float64", marks=pytest.mark.slow),
        pytest.param(single, "in torch.float32", marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_seen(plant: Plant, message: str) -> None:
    with pytest.raises(Fault, match=message):
        rehearse(SDXL_TOY, plant)
