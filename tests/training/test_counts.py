"""What does not depend on the machine: network calls, FLOPs, bytes, launches, host syncs, memory. None may get worse.

Everything is counted on the meta device, which plays the accelerator (benchmarks/counting.py). A count that fell is
good news: lower the frozen figure here with the change that earned it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import architectures  # noqa: E402
import counting  # noqa: E402
import ours  # noqa: E402
import pytest
import torch
from architectures import SD15, SDXL, SDXL_TOY  # noqa: E402

from smpo_fast.config import loading  # noqa: E402
from smpo_fast.config.schema import Lora  # noqa: E402
from smpo_fast.method.batch import Conditioning  # noqa: E402
from smpo_fast.method.inversion import EAGER_OPS, SolverOps, invert  # noqa: E402
from smpo_fast.method.objective import Losses  # noqa: E402
from smpo_fast.method.schedule import NoiseSchedule  # noqa: E402
from smpo_fast.models import lora  # noqa: E402
from smpo_fast.models.denoiser import Denoiser  # noqa: E402
from smpo_fast.models.inference import compilation  # noqa: E402
from smpo_fast.models.inference.caller import InferenceCaller  # noqa: E402
from smpo_fast.models.inference.weight_copies import WeightCopies  # noqa: E402
from smpo_fast.models.locate import ModelSource  # noqa: E402
from smpo_fast.training.examples import Examples  # noqa: E402

META = counting.META


def check(what: str, frozen: float, found: float, *, within: float = 0.0) -> None:
    """Fail when a count is worse than the frozen one, naming both."""
    assert found <= frozen * (1 + within), f"{what}: was {frozen:,}, is {found:,}: {found / frozen - 1:+.2%}"


# --- network calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fidelity", "steps", "frozen"),
    [("release", 10, 12.764), ("release", 5, 7.584), ("paper", 10, 10.982), ("paper", 5, 5.992)],
)
def test_no_gradient_calls_per_image(fidelity: str, steps: int, frozen: float) -> None:
    """The mean over all timesteps, from the paths that the inversion really walks."""
    run = loading.from_dict({"inversion": {"fidelity": fidelity, "steps": steps}}).inversion
    schedule = NoiseSchedule.from_config(architectures.SCHEDULER)
    depth = sum(schedule.path(t, run).depth for t in range(1000)) / 1000
    check(f"calls per image, {fidelity}, {steps} steps", frozen, round(depth * (1 + run.renoise_steps), 3))


def test_a_step_calls_the_networks_no_more_than_the_method_asks() -> None:
    """Pictures put through each network in one step: what the paths ask for, and one policy and reference call each."""
    trainer = ours.make_trainer(SDXL_TOY, META, WINDOW)
    images = {"policy": 0, "reference": 0}
    calls = {"policy": 0, "reference": 0}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            images[name] += args[0].shape[0]
            calls[name] += 1

        return hook

    trainer.policy.unet.register_forward_pre_hook(note("policy"))
    with trainer.reference() as reference:
        reference.unet.register_forward_pre_hook(note("reference"))
    with counting.fused_attention(), counting.DeviceSpy():
        trainer.step(0)
    step_paths = trainer.noise_paths(0)
    paths, active = step_paths.of(range(3)), step_paths.pairs_per_round(range(3))
    pairs, renoise = len(paths), 1 + trainer.config.inversion.renoise_steps
    assert images["policy"] == 2 * renoise * sum(p.depth for p in paths) + 2 * pairs
    assert images["reference"] == 2 * pairs
    assert calls["policy"] == renoise * len(active) + pairs, "one call a round: the window fits one chunk"


# --- FLOPs and bytes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl_pair() -> dict[str, float]:
    return counting.pair_flops(SDXL, 12.764)


def test_flops_of_a_pair(sdxl_pair: dict[str, float]) -> None:
    """SDXL at 1024 px, nothing recomputed, encoders cached: the arithmetic that the exact method cannot avoid."""
    tera = {name: value / 1e12 for name, value in sdxl_pair.items()}
    check("TFLOP of a forward pass of one image", 6.7613, round(tera["reference"] / 2, 4))
    check("TFLOP of a backward pass of one image", 13.8616, round(tera["policy backward"] / 2, 4))
    check("TFLOP of a pair", 227.37, round(tera["total"], 2))
    assert tera["inversion"] / tera["total"] == pytest.approx(0.759, abs=1e-3)


def test_flops_of_sd15() -> None:
    with torch.no_grad():
        found = counting.flops(counting.unet_call(SD15, 1)) / 1e12
    check("TFLOP of a forward pass of one image, SD1.5 at 512 px", 0.8035, round(found, 4))


def test_parameters() -> None:
    unets = {a.name: architectures.make_unet(a, META, torch.float32) for a in (SDXL, SD15)}
    found = {name: sum(p.numel() for p in unet.parameters()) for name, unet in unets.items()}
    assert found == {"sdxl": 2_567_463_684, "sd15": 859_520_964}


OPS = {  # calls of an SDXL forward pass; least GB they move for two images in half precision
    "group_norm_silu": (46, 1.237),
    "layer_norm": (210, 2.517),
    "geglu": (70, 5.033),
}


def test_bytes_that_the_fusible_operations_must_move() -> None:
    table = counting.op_shapes(SDXL, images=2)
    for op, (calls, gigabytes) in OPS.items():
        assert sum(table[op].values()) == calls, op
        moved = sum(counting.least_bytes(op, shape, 2) * n for shape, n in table[op].items()) / 1e9
        check(f"least GB moved by {op} in a call", gigabytes, round(moved, 3))


@pytest.mark.parametrize(("op", "frozen"), [("pair_loss", 1_572_864), ("renoise_step", 2_097_152)])
def test_bytes_that_the_pair_operations_must_move(op: str, frozen: int) -> None:
    check(f"bytes of {op} for one pair in fp32", frozen, counting.least_bytes(op, (1, 2, 4, 128, 128), 4))


# --- launches and host syncs ----------------------------------------------------------------------------------


def test_launches_of_a_no_gradient_call() -> None:
    """The bare UNet in half precision; the released script's autocast adds about 1,800 casts to it."""
    unet = counting.unet_of_a_run(SDXL)
    args, kwargs = architectures.make_inputs(SDXL, 2, META, torch.bfloat16)
    copies = WeightCopies(unet, torch.bfloat16, channels_last=False, merge_qkv=True)
    with torch.no_grad(), counting.fused_attention():
        with counting.DeviceSpy() as spy:
            unet(*args, **kwargs)
        copies.refresh()
        with counting.DeviceSpy() as refreshed:
            copies.refresh()
        with copies.active(), counting.DeviceSpy() as merged:
            unet(*args, **kwargs)
    check("launches of an SDXL no-gradient call", 1709, sum(spy.launches.values()))
    check("launches with merged projections", 1569, sum(merged.launches.values()))
    check("launches that copy merged projections", 70, sum(refreshed.launches.values()))
    check("host syncs of an SDXL no-gradient call", 0, spy.reads + spy.uploads)


WINDOW = {"batch": {"pairs_per_step": 3, "micro_pairs": 1}, "inversion": {"steps": 5}}
# A window of 3 pairs in 3 micro-steps on the miniature SDXL; uploads are copies from pageable memory, and the host
# waits for the device at each of them as it does at a read. (launches, uploads, reads)
PHASES = {
    "inversion round": (852, 0.4, 0),
    "reference, a micro-step": (434.67, 0, 0),
    "policy, a micro-step": (1526.33, 0, 0),
    "optimizer": (4086, 0, 2),
    "flush": (2, 1, 1),
}


@pytest.fixture(scope="module")
def phases() -> dict[str, tuple[float, float, float]]:
    """Launches, uploads and reads of each part of the second step, per round and per micro-step."""
    trainer = ours.make_trainer(SDXL_TOY, META, {**WINDOW, "model": {"precision": "bf16"}, "optim": {"name": "adamw"}})
    totals: dict[str, list[int]] = {}
    spy = counting.DeviceSpy()

    def watch(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = (sum(spy.launches.values()), spy.uploads, spy.reads)
            out = inner(*args, **kwargs)
            after = (sum(spy.launches.values()), spy.uploads, spy.reads)
            sums = totals.setdefault(name, [0, 0, 0])
            totals[name] = [s + a - b for s, a, b in zip(sums, after, before, strict=True)]
            return out

        setattr(owner, method, watched)

    with counting.fused_attention(), spy:
        trainer.step(0)
        watch(trainer, "invert", "inversion round")
        watch(trainer, "reference_errors", "reference, a micro-step")
        watch(trainer, "policy_gradient", "policy, a micro-step")
        watch(trainer.engine, "step", "optimizer")
        watch(trainer.meter, "flush", "flush")
        trainer.step(1)
    rounds = len(trainer.noise_paths(1).pairs_per_round(range(3)))
    micro = 3
    times = {"inversion round": rounds, "reference, a micro-step": micro, "policy, a micro-step": micro}
    return {name: tuple(n / times.get(name, 1) for n in sums) for name, sums in totals.items()}  # type: ignore[misc]


@pytest.mark.parametrize("phase", PHASES)
def test_launches_and_host_syncs(phase: str, phases: dict[str, tuple[float, float, float]]) -> None:
    for what, frozen, found in zip(("launches", "uploads", "reads"), PHASES[phase], phases[phase], strict=True):
        check(f"{what} per {phase}", frozen, round(found, 2))


def test_nothing_is_read_back_inside_a_step() -> None:
    """Up to the optimizer the host never asks the device for a number, however many micro-steps there are."""
    assert all(PHASES[name][2] == 0 for name in ("inversion round", "reference, a micro-step", "policy, a micro-step"))


@pytest.mark.slow
def test_launches_of_a_call_with_adapters() -> None:
    """Rank 16 on SDXL's attention layers, two images, with the copies that the inversion makes of the adapters."""
    unet = counting.unet_of_a_run(SDXL)
    lora.add_adapters(unet, Lora(rank=16), 0)
    args, kwargs = architectures.make_inputs(SDXL, 2, META, torch.bfloat16)
    copies = WeightCopies(unet, torch.bfloat16, channels_last=False, merge_qkv=False)
    with torch.no_grad(), counting.fused_attention():
        copies.refresh()
        with counting.DeviceSpy() as spy:
            unet(*args, **kwargs)
        with copies.active(), counting.DeviceSpy() as halved:
            unet(*args, **kwargs)
    check("launches with adapters in float32", 5058, sum(spy.launches.values()))
    check("launches with adapters in half precision", 3938, sum(halved.launches.values()))


@pytest.mark.slow
def test_one_compiled_code_serves_all_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL at true size, without a graph break; images that are not square get code of their own once."""
    graphs: list[Any] = []

    def compiler(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler, fullgraph=True))
    unet = counting.unet_of_a_run(SDXL).eval()
    config = loading.from_dict({"model": {"compile": "inversion"}})
    source = ModelSource(Path(), Path(), Path(), "sdxl", "epsilon", {}, None)
    denoiser = Denoiser(unet, source, NoiseSchedule.from_config(architectures.SCHEDULER), "bf16", META)
    caller = InferenceCaller(denoiser, config.model, config.inversion, chunk=16)
    found = []
    with torch.no_grad(), counting.fused_attention():
        for pairs, height, width in ((16, 128, 128), (5, 128, 128), (12, 128, 128), (12, 96, 168), (7, 168, 96)):
            prompt, pooled, sizes = (torch.empty(pairs, *n, device=META) for n in ((77, 2048), (1280,), (6,)))
            eps = caller.predictor(Conditioning(prompt, pooled, sizes))
            x = torch.empty(pairs, 2, 4, height, width, device=META, dtype=torch.bfloat16)
            for moving in (pairs, pairs - 2):
                eps(x[:moving], torch.zeros(moving, 2, device=META, dtype=torch.long))
            found.append(len(graphs))
    assert len(compilation.compiled_blocks(unet)) == 87
    check("compilations for square images", 16, found[0])
    assert found[:3] == found[:1] * 3, "no further ones for other batch sizes"
    check("compilations with images that are not square", 17, found[-1])


# --- launches outside the networks ------------------------------------------------------------------------------

# by (kernels, v-prediction); with kernels each function of the solver is one launch
SOLVER_STEP = {(False, False): 15, (True, False): 2, (False, True): 23, (True, True): 10}


@pytest.mark.parametrize(("kernels", "velocity"), SOLVER_STEP)
def test_launches_of_a_solver_step_outside_the_network(kernels: bool, velocity: bool) -> None:
    """Of a ReNoise step: two calls. What a chunk costs once, at its beginning and end, is left out."""
    shape = (4, 2, 4, 8, 8)
    schedule = NoiseSchedule.from_config(architectures.SCHEDULER)
    config = loading.from_dict({"inversion": {"fidelity": "paper", "solver": "renoise", "steps": 10}})
    source = ModelSource(Path(), Path(), Path(), "sd15", "v_prediction" if velocity else "epsilon", {}, None)
    denoiser = Denoiser(_Echo(), source, schedule, "bf16", META)
    caller = InferenceCaller(denoiser, config.model, config.inversion, chunk=4)
    fused = SolverOps(*(lambda x, *rest: x.zero_() for _ in range(2)))  # one launch each
    launches = []
    for time in (900, 800):
        with counting.DeviceSpy() as spy:
            cond = Conditioning(torch.empty(4, 77, 768, device=META))
            invert(
                lambda rows, cond=cond: caller.predictor(cond), torch.empty(shape, device=META),
                [schedule.path(time, config.inversion)] * 4, config.inversion, chunk=4,
                solver=fused if kernels else EAGER_OPS, dtype=caller.input_dtype,
            )  # fmt: skip
        launches.append(sum(spy.launches.values()))
    assert launches[0] - launches[1] == SOLVER_STEP[kernels, velocity]


# of the reference's and the policy's phase, by kernels
MICRO_BATCH = {False: (3, 34), True: (1, 10)}


@pytest.mark.parametrize("kernels", MICRO_BATCH)
def test_launches_of_a_micro_batch_outside_the_network(kernels: bool) -> None:
    """Inputs and targets are prepared for many micro-batches at once: neither a cast nor a copy is left."""
    trainer = ours.make_trainer(SDXL_TOY, META, {**WINDOW, "model": {"precision": "bf16"}})
    with trainer.reference() as reference:
        reference.unet = trainer.policy.unet = _Echo()
    if kernels:
        trainer.ops = trainer.ops._replace(pair_errors=lambda x, target: _launched(len(x), 2), pair_loss=_fused_losses)
    (pairs,) = trainer.step_batch(0)
    every = Examples(pairs, pairs.latents, pairs.latents, torch.zeros(3, dtype=torch.long, device=META), (0,) * 3)
    launches = []
    for count in (2, 3):
        with counting.DeviceSpy() as compared:
            errors = trainer.reference_errors(0, [every.take(slice(0, count))])
        with counting.DeviceSpy() as trained:
            trainer.policy_gradient([every.take(slice(0, count))], errors)
        launches.append([sum(spy.launches.values()) for spy in (compared, trained)])
    for phase, frozen, fewer, more in zip(("reference", "policy"), MICRO_BATCH[kernels], *launches, strict=True):
        check(f"launches of a micro-batch outside the network, {phase}", frozen, more - fewer)


class _Echo(torch.nn.Module):
    """Launches nothing, and predicts in float32 as every UNet here does."""

    conv_out = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (torch.empty_like(x, dtype=torch.float32).requires_grad_(torch.is_grad_enabled()),)


def _launched(*shape: int) -> torch.Tensor:
    """The result of one launch."""
    return torch.empty(*shape, device=META).zero_()


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: torch.Tensor) -> torch.Tensor:
        ctx.shape = prediction.shape
        return _launched(len(prediction))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _launched(*ctx.shape)


def _fused_losses(prediction: torch.Tensor, *rest: Any) -> Losses:
    """As kernels make them: a launch forward and one backward."""
    loss, errors = _FusedLoss.apply(prediction), torch.empty(len(prediction), 2, device=META)
    return Losses(loss, loss.detach(), errors, errors)


@pytest.mark.parametrize("network", [pytest.param(n, marks=pytest.mark.slow) for n in ("policy", "reference")])
def test_weights_are_copied_once_a_step(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many image shapes it has; and again in the next step."""
    words = {**WINDOW, "model": {"merge_qkv": True}, "inversion": {"steps": 5, "network": network}}
    trainer = ours.make_trainer(SDXL_TOY, META, words)
    copied, refresh = [], WeightCopies.refresh
    monkeypatch.setattr(WeightCopies, "refresh", lambda self: (copied.append(self), refresh(self)))
    (pairs,) = trainer.step_batch(0)
    batch = [pairs.take(slice(0, 2)), pairs.take(slice(2, 3))]
    with counting.fused_attention(), counting.DeviceSpy():
        for step in range(2):
            assert sum(map(len, trainer.invert(step, batch, trainer.noise_paths(step)))) == 3
            assert len(copied) == step + 1


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checkpointing", "frozen"), [(False, 13.78), (True, 1.176)])
def test_saved_activations_of_a_pair(checkpointing: bool, frozen: float) -> None:
    """GB that autograd keeps for one SDXL pair at 1024 px in half precision."""
    found = counting.saved_bytes_of_a_pair(SDXL, checkpointing) / 1e9
    check(f"GB saved for the backward pass, checkpointing {checkpointing}", frozen, round(found, 3))


@pytest.mark.parametrize(
    ("checkpointing", "frozen"), [pytest.param(False, 0.0291, marks=pytest.mark.slow), (True, 0.028)]
)
def test_planned_peak_of_a_miniature(checkpointing: bool, frozen: float) -> None:
    found = ours.planned_peak(SDXL_TOY, checkpointing) / 1e9
    check("GB at the peak of a toy step", frozen, round(found, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "frozen"), [(False, 44.66), (True, 32.27)])
def test_planned_peak_of_sdxl(checkpointing: bool, frozen: float) -> None:
    """Full fine-tuning with Adafactor: fp32 masters and gradients, half-precision policy and reference, one pair."""
    check("GB at the peak of an SDXL step", frozen, round(ours.planned_peak(SDXL, checkpointing) / 1e9, 2))
