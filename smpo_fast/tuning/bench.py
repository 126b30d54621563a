"""The networks of a run with random inputs: checked, and then timed, under different settings.

Compared with eager code in fp32, at equal weights of policy and reference:

* the predictions of a no-gradient call and the gradients of the loss: their relative distance may be ``ALLOWED`` times
  that of eager code in the run's own precision (``FLOAT32_TOLERANCE`` for a run in fp32);
* the logits of the loss, which must be exactly 0.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from smpo_fast.common.console import printable
from smpo_fast.common.runtime import rng
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.method.batch import Conditioning, Pairs
from smpo_fast.method.objective import OBJECTIVES, pair_errors
from smpo_fast.models import kernel_patch, step_ops
from smpo_fast.models.attention import set_attention
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference import compilation
from smpo_fast.models.inference.caller import InferenceCaller, batch_sizes, drop_copies
from smpo_fast.models.locate import ModelSource, schedule_of
from smpo_fast.models.network_spec import IMAGES_PER_PAIR, NetworkSpec
from smpo_fast.training.examples import Examples
from smpo_fast.training.policy import load_policy
from smpo_fast.training.step import Trainer
from smpo_fast.tuning.synthetic import synthetic_loader, synthetic_trainer
from smpo_fast.tuning.timing import peak_bytes, reset_peak, seconds_of, seconds_once

FLOAT32_TOLERANCE = 1e-4  # other attention kernels and orders of summation differ by about 1e-6
ALLOWED = 2.0
PROBES, PROBE_ELEMENTS = 8, 1 << 22  # parameters whose gradients are compared, and the size of the largest
TIMESTEPS = (301, 701)  # of the two pairs that are compared
# The plain PyTorch that candidates are compared with.
EAGER: dict[str, Any] = {
    "model.attention": "sdpa",
    "model.channels_last": False,
    "model.compile": "off",
    "model.cuda_graphs": False,
    "model.merge_qkv": False,
    "kernels.enabled": [],
    "inversion.fp8": False,
    "inversion.reuse_deep": False,
}


class Rejected(Exception):
    """A candidate that this device cannot run, or whose results are wrong; the message says why."""


@dataclass(frozen=True)
class CallTimes:
    """Of a no-gradient call. seconds: per pair; setup: seconds once in a run; error: relative distance from fp32."""

    seconds: float
    setup: float
    peak_bytes: int
    error: float


@dataclass(frozen=True)
class PolicyTimes:
    """Seconds per pair of the reference, and of the policy forward and backward; of an optimizer step; as above."""

    reference: float
    policy: float
    optimizer: float
    setup: float
    peak_bytes: int
    error: float


class _Truth(NamedTuple):
    """Results of eager fp32 code for the two base pairs."""

    prediction: Tensor  # [2, 2, C, H, W], on the host
    gradients: dict[str, Tensor]  # of some parameters, on the host


class Bench:
    """The policy of a run with its engine, without DeepSpeed. Raises UserError where a run would.

    deepspeed: whether the run itself uses DeepSpeed, whose weights are never channels-last: copies of them serve the
    inversion alone.
    """

    def __init__(
        self,
        settings: Config,
        source: ModelSource,
        network: NetworkSpec,
        precision: str,
        device: torch.device,
        *,
        deepspeed: bool = False,
    ) -> None:
        self.network, self.device, self._deepspeed = network, device, deepspeed
        plain = loading.replaced(settings, EAGER)
        self._base = base_examples(network, source, settings, device)
        self._truth = _eager_fp32(plain, source, self._base, device)
        release(device)
        where = "adapters-off" if settings.lora.rank else "none"
        trainer = synthetic_trainer(plain, source, network, precision, device, where)
        if not settings.lora.rank:  # nothing is trained here, so the policy is its own reference: that saves memory
            trainer = replace(trainer, reference=lambda: nullcontext(trainer.policy))
        self._trainer: Trainer = trainer
        self._unet: Any = trainer.engine.unet
        self._own: dict[str, float] = {}  # the distance of eager code in the run's precision
        if precision == "fp32":
            self._own = dict.fromkeys(("prediction", "gradient"), FLOAT32_TOLERANCE / ALLOWED)

    def call(self, c: Config) -> CallTimes:
        """Check and time a no-gradient call of ``batch.inversion_pairs`` pairs; the first one is of eager code.

        Raises Rejected.
        """
        pairs, found = c.batch.inversion_pairs, list[Tensor]()
        with self.calling(c) as predict:
            first = seconds_once(lambda: found.append(predict()), self.device)
            compared = min(pairs, len(self._base))
            error = self._distance("prediction", found[0][:compared].cpu(), self._truth.prediction[:compared])
            seconds = seconds_of(predict, self.device)
            peak = peak_bytes(self.device)
        sizes = len(batch_sizes(pairs)) if c.model.cuda_graphs else 1
        return CallTimes(seconds / pairs, max(0.0, first - seconds) * sizes, peak, error)

    @contextmanager
    def calling(self, c: Config) -> Iterator[Callable[[], Tensor]]:
        """Inside, the network has these settings; yields its no-gradient call of ``batch.inversion_pairs`` pairs.

        The call predicts the noise in ``inputs`` of as many pairs, [B, 2, C, H, W]. Raises Rejected.
        """
        examples = self.inputs(c.batch.inversion_pairs)
        with self._configured(c):
            self._unet.eval()
            caller = InferenceCaller(self._trainer.policy, c.model, c.inversion, chunk=len(examples))
            caller.weights_changed()
            predict, x = caller.predictor(examples.pairs.cond), examples.x_t.to(caller.input_dtype)
            times = examples.time[:, None].expand(-1, IMAGES_PER_PAIR).contiguous()
            yield lambda: predict(x, times)

    def inputs(self, pairs: int) -> Examples:
        """The examples that calls of this many pairs are timed with."""
        return tiled(self._base, pairs)

    def policy(self, c: Config) -> PolicyTimes:
        """Check and time reference, policy and optimizer, in micro-batches; the first time with eager code.

        Raises Rejected.
        """
        if self._deepspeed:
            c = loading.replaced(c, {"model.channels_last": False})
        trainer = replace(self._trainer, config=c, ops=step_ops.select_ops(c, c.kernels.listed))
        # whole repetitions of the base pairs have the gradient of those
        examples = tiled(self._base, len(self._base) * math.ceil(c.batch.micro_pairs / len(self._base)))
        errors: list[Any] = []

        def compare() -> None:
            errors[:] = trainer.reference_errors(0, [examples])

        def train() -> None:
            trainer.policy_gradient([examples], errors)

        with self._configured(c), _compiled_training(self._unet, c):
            with _watched_gradients(self._unet, list(self._truth.gradients)) as gradients:
                first = seconds_once(compare, self.device) + seconds_once(train, self.device)
            error = self._check_policy(trainer, gradients)
            reference, policy = seconds_of(compare, self.device), seconds_of(train, self.device)
            trainer.meter.flush()
            optimizer = seconds_once(lambda: trainer.engine.step(0.0), self.device)
            peak = peak_bytes(self.device)
        count, setup = len(examples), max(0.0, first - reference - policy)
        reference *= trainer.objective.needs_reference
        return PolicyTimes(reference / count, policy / count, optimizer, setup, peak, error)

    def _check_policy(self, trainer: Trainer, gradients: dict[str, Tensor]) -> float:
        table, _ = trainer.meter.flush()
        trainer.engine.step(0.0)  # drops the gradients; at learning rate 0 the weights stay as they are
        if table.nonfinite_ids():
            raise Rejected("the loss is not finite")
        logit = np.abs(table.columns["logit"]).max()
        if trainer.objective.needs_reference and logit:
            raise Rejected(f"equal weights give a logit of {logit:.2g} instead of 0")
        return self._distance("gradient", _flat(gradients), _flat(self._truth.gradients))

    def _distance(self, what: str, found: Tensor, wanted: Tensor) -> float:
        """The relative distance of tensors of equal shape. Raises Rejected where it is too large, or not finite."""
        error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
        own = self._own.setdefault(what, error)
        if not np.isfinite(error):
            raise Rejected(f"the {what} is not finite")
        if error > ALLOWED * own:
            raise Rejected(f"the {what} is {error:.2g} from that of fp32, and {ALLOWED * own:.2g} is allowed")
        return error

    def inversion(self, c: Config) -> tuple[float, Tensor]:
        """Seconds per pair of a whole inversion of ``batch.inversion_pairs`` pairs, and tau. Raises Rejected."""
        trainer = self._step_trainer(c, c.batch.inversion_pairs)
        with self._configured(c):
            step_batch, paths = trainer.step_batch(0), trainer.noise_paths(0)
            found = trainer.invert(0, step_batch, paths)
            seconds = seconds_once(lambda: trainer.invert(0, step_batch, paths), self.device)
            tau = torch.cat([examples.tau.float().cpu() for examples in found])
        if not tau.isfinite().all():
            raise Rejected("tau is not finite")
        return seconds / sum(map(len, found)), tau

    def step(self, c: Config, pairs: int) -> float:
        """Seconds of a whole optimizer step of ``pairs`` pairs, at a learning rate of 0. Raises Rejected."""
        trainer = self._step_trainer(loading.replaced(c, {"optim.lr": 0.0}), pairs)
        with self._configured(c), _compiled_training(self._unet, c):
            trainer.step(0)
            return seconds_once(lambda: trainer.step(0), self.device)

    def _step_trainer(self, c: Config, pairs: int) -> Trainer:
        each = c.inversion.per_trajectory
        small = loading.replaced(c, {"batch.pairs_per_step": -(-pairs // each) * each, "run.steps": 1})
        ops = step_ops.select_ops(c, c.kernels.listed)
        return replace(self._trainer, config=small, loader=synthetic_loader(small, self.network), ops=ops)

    @contextmanager
    def _configured(self, c: Config) -> Iterator[None]:
        """Inside, the network has these settings; whatever goes wrong is a reason to reject them."""
        release(self.device)
        reset_peak(self.device)
        try:
            self._configure(c)
            yield
        except Rejected:
            raise
        except torch.OutOfMemoryError as error:
            raise Rejected("out of memory") from error
        except Exception as error:  # compilers, libraries and drivers raise anything
            raise Rejected(printable(f"{type(error).__name__}: {error}".splitlines()[0][:200])) from error
        finally:
            kernel_patch.unpatch(self._unet)
            drop_copies(self._unet)

    def _configure(self, c: Config) -> None:
        unet = self._unet
        kernel_patch.patch(unet, c.kernels.listed)
        if set_attention([unet], c.model.attention, self.device) != c.model.attention:
            raise Rejected("this device, or an installed package, does not support it")
        unet.to(memory_format=torch.channels_last if c.model.channels_last else torch.contiguous_format)
        (
            unet.enable_gradient_checkpointing
            if c.model.gradient_checkpointing
            else unet.disable_gradient_checkpointing
        )()


def base_examples(network: NetworkSpec, source: ModelSource, settings: Config, device: torch.device) -> Examples:
    """Two random pairs at ``TIMESTEPS``, the same at every call."""
    draw = rng(0, "tune")

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32)).to(device)

    count, sdxl = len(TIMESTEPS), network.kind == "sdxl"
    x_0, tau = (normal(count, IMAGES_PER_PAIR, *network.latent) for _ in range(2))
    sizes = torch.full((count, 6), float(settings.data.resolution), device=device) if sdxl else None
    cond = Conditioning(normal(count, *network.prompt), normal(count, network.pooled) if sdxl else None, sizes)
    alphas = torch.from_numpy(
        schedule_of(source, settings.inversion).alphas_cumprod[list(TIMESTEPS)].astype(np.float32)
    )
    signal, noise = (t.sqrt().to(device)[:, None, None, None, None] for t in (alphas, 1 - alphas))
    pairs = Pairs(tuple(range(count)), x_0, cond, torch.ones(count, device=device), tuple(range(count)))
    return Examples(pairs, signal * x_0 + noise * tau, tau, torch.tensor(TIMESTEPS, device=device), TIMESTEPS)


def tiled(base: Examples, count: int) -> Examples:
    """``count`` examples that repeat those of ``base``."""
    times = -(-count // len(base))

    def repeat(t: Tensor) -> Tensor:
        return t.repeat(times, *[1] * (t.ndim - 1))[:count]

    cond, ids = base.pairs.cond.map(repeat), tuple(range(count))
    pairs = Pairs(ids, repeat(base.pairs.latents), cond, repeat(base.pairs.weight), ids)
    return Examples(pairs, repeat(base.x_t), repeat(base.tau), repeat(base.time), (base.times * times)[:count])


def _eager_fp32(plain: Config, source: ModelSource, base: Examples, device: torch.device) -> _Truth:
    """What eager fp32 code makes of the base pairs, one at a time and with checkpointing, to need little memory."""
    settings = loading.replaced(plain, {"model.gradient_checkpointing": True})
    unet = load_policy(settings, source, "fp32", device)
    probes = _probes(unet)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in probes)
    denoiser = Denoiser(unet, source, schedule_of(source, settings.inversion), "fp32", device)
    objective, predictions = OBJECTIVES[settings.objective.name], []
    for one in base.split(1):
        prediction = denoiser(one.x_t, one.time, one.pairs.cond)
        target = denoiser.target(one.pairs.latents, one.tau, one.time)
        equal = pair_errors(prediction, target).detach() if objective.needs_reference else None
        weight = objective.weigh(one.pairs.weight)
        out = objective.losses(prediction, equal, target, weight, settings.objective.beta)
        (out.loss.sum() / len(base)).backward()
        predictions.append(denoiser.as_eps(prediction, one.x_t, one.time).detach().cpu())
    return _Truth(torch.cat(predictions), {n: p.grad.cpu() for n, p in unet.named_parameters() if p.grad is not None})


def _probes(unet: nn.Module) -> list[str]:
    """The names of some trained matrices, evenly from the whole depth of the network."""
    named = [
        name for name, p in unet.named_parameters() if p.requires_grad and p.ndim > 1 and p.numel() <= PROBE_ELEMENTS
    ]
    return [named[round(i * (len(named) - 1) / (PROBES - 1))] for i in range(PROBES)]


@contextmanager
def _watched_gradients(unet: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Yields the sums of the gradients of some parameters, in float32 on the host, while they are computed."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + gradient.detach().float().cpu()

        return add

    parameters = dict(unet.named_parameters())
    handles = [parameters[name].register_hook(watch(name)) for name in names]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    """Tensors of any shape as one row, in the order of their names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@contextmanager
def _compiled_training(unet: nn.Module, c: Config) -> Iterator[None]:
    """Inside, the policy's blocks are compiled if the settings say so."""
    try:
        if c.model.compile == "all":
            compilation.compile_training(unet)
        yield
    finally:
        for block in compilation.compiled_blocks(unet):
            block._compiled_call_impl = None


def release(device: torch.device) -> None:
    """Free the memory of networks, graphs and activations that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
