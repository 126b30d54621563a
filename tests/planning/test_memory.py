"""The plan's memory against whole training steps at true size, followed tensor by tensor on a fake CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ours
import pytest
import torch
from architectures import SD15, SDXL, Architecture
from helpers.fake_cuda import CUDA, FakeCuda

from smpo_fast.models.network_spec import NetworkSpec
from smpo_fast.planning import memory
from smpo_fast.planning.planned_run import PlannedRun
from smpo_fast.training.examples import Examples

Settings = dict[str, dict[str, Any]]
ALLOWED = 0.05


def settings(micro: int, pairs: int, checkpointing: bool = True, optimizer: str = "adamw8bit", **more: Any) -> Settings:
    """micro: pairs of a backward pass; pairs: of an inversion call, and of the step, which has no influence else."""
    made: Settings = {
        "model": {"precision": "bf16", "gradient_checkpointing": checkpointing},
        "batch": {"pairs_per_step": pairs, "micro_pairs": micro, "inversion_pairs": pairs},
        "inversion": {"fidelity": "paper", "steps": 1},
        "optim": {"name": optimizer},
    }
    for name, value in more.items():
        section, _, key = name.partition("_")
        made.setdefault(section, {})[key] = value
    return made


def without_masters(micro: int, pairs: int, offload: str) -> Settings:
    return settings(micro, pairs, optimizer="adamw8bit_aligned", optim_master="none", optim_offload=offload,
                    model_reference="streamed")  # fmt: skip


def averaged_on_host(micro: int, pairs: int) -> Settings:
    made = without_masters(micro, pairs, "states")
    return {**made, "optim": {**made["optim"], "ema": 0.999, "ema_dtype": "bf16-sr"}}


def lora(pairs: int, checkpointing: bool = True) -> Settings:
    return settings(1, pairs, checkpointing, "adamw", lora_rank=16, model_reference="adapters-off")


# every row of docs/hardware.md for one GPU, and the optimizers
SLOW = pytest.mark.slow
RUNS = {
    "SDXL, all weights, 24 GB": pytest.param(SDXL, without_masters(2, 8, "states"), marks=SLOW),
    "SDXL, all weights, 16 GB": pytest.param(SDXL, without_masters(2, 8, "states+gradients"), marks=SLOW),
    "SDXL, LoRA": pytest.param(SDXL, lora(2), marks=SLOW),
    "SDXL, LoRA, 12 GB": pytest.param(SDXL, lora(8), marks=SLOW),
    "SDXL, LoRA, faster": pytest.param(SDXL, lora(32, checkpointing=False), marks=SLOW),
    "SDXL, all weights, 80 GB": pytest.param(SDXL, settings(4, 16), marks=SLOW),
    "SDXL, all weights, faster": pytest.param(SDXL, settings(2, 8, checkpointing=False), marks=SLOW),
    "SDXL, fp32 AdamW states": pytest.param(SDXL, settings(4, 16, optimizer="adamw"), marks=SLOW),
    "SDXL, aligned states": pytest.param(SDXL, settings(1, 4, optimizer="adamw8bit_aligned"), marks=SLOW),
    "SDXL, Adafactor": pytest.param(SDXL, settings(1, 4, optimizer="adafactor"), marks=SLOW),
    "SD1.5, all weights, 24 GB": pytest.param(SD15, settings(2, 16, False, "adamw"), marks=SLOW),
    "SD1.5, averaged": pytest.param(SD15, settings(2, 16, optim_ema=0.999), marks=SLOW),
    "SD1.5, all weights, 12 GB, averaged on the host": pytest.param(SD15, averaged_on_host(2, 16), marks=SLOW),
}


def planned(architecture: Architecture, given: Settings) -> memory.Memory:
    run = ours.settings(architecture, given)
    latent, prompt = (4, architecture.latent, architecture.latent), (architecture.tokens, architecture.prompt_width)
    network = NetworkSpec.make(architecture.unet, architecture.kind, latent, prompt, lora=run.lora)
    subject = PlannedRun(run, network, "bf16")
    return memory.memory(subject, subject.variant())


def followed(architecture: Architecture, given: Settings) -> dict[str, int]:
    """Peak bytes of the phases of the second step, which trains two micro-batches; the first one makes the states."""
    peaks: dict[str, int] = {}
    with FakeCuda(torch.bfloat16) as fake, fake.waiting():
        trainer: Any = ours.make_trainer(architecture, CUDA, given)
        micro, examples = trainer.config.batch.micro_pairs, []

        def peak_of(phase: str, run: Callable[..., Any], *args: Any) -> Any:
            fake.forget_peak()
            result = run(*args)
            peaks[phase] = fake.peak
            return result

        for pairs in trainer.step_batch(0):
            few, errors = pairs.take(slice(0, micro)), pairs.latents.new_zeros(micro, 2)
            examples = [Examples(few, few.latents, few.latents, few.weight.long(), (0,) * micro)]
            trainer.policy_gradient(examples, [errors])
        trainer.engine.step(1e-6)
        examples = peak_of("inversion", trainer.invert, 1, trainer.step_batch(1), trainer.noise_paths(1))
        examples = [e.take(slice(0, 2 * micro)) for e in examples]
        errors = peak_of("reference", trainer.reference_errors, 1, examples)
        peak_of("policy", trainer.policy_gradient, examples, errors)
        peak_of("optimizer", trainer.engine.step, 1e-6)
    return peaks


@pytest.mark.parametrize(("architecture", "given"), RUNS.values(), ids=RUNS.keys())
def test_the_plan_is_what_a_step_allocates(architecture: Architecture, given: Settings) -> None:
    told, found = planned(architecture, given), followed(architecture, given)
    for phase, peak in found.items():
        assert told.phases[phase] - memory.LIBRARY_BYTES == pytest.approx(peak, rel=ALLOWED), phase
