"""The two baselines of every ratio: a trainer that works as the released script does, and careful eager code.

``ReferenceTrainer`` does what the authors' training script does, in its order and with its costs: VAE and text encoders
run on every pair, the weights are fp32 under fp16 autocast, one pair at a time, gradient checkpointing for SDXL, the
scheduler's tables and timesteps are tensors on the device, the loss is eager, and every micro-batch reduces and reads
four numbers and logs a fifth. In its favour: JPEGs are decoded and prompts tokenized beforehand, and SDPA replaces
xformers (the ladder times both).

``BestEager`` computes the same, written as a careful engineer would without kernels, compilation or graphs:
half-precision weights over fp32 masters, SDPA, cached latents and prompts, schedule numbers on the host, and
one read of the device per optimizer step.

Both run the UNet as diffusers makes it, with its own attention and residual blocks. Both follow the ``release``
fidelity (docs/method.md), and both reproduce the released script's values in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from architectures import SCHEDULER, Architecture, make_text_encoders, make_unet, make_vae
from torch import Tensor, nn

Phase = Callable[[str], AbstractContextManager[Any]]


def no_phase(name: str) -> AbstractContextManager[Any]:
    """A phase that is not timed."""
    return nullcontext()


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of training; the defaults are those of the released SDXL recipe."""

    inversion_steps: int = 10
    beta: float = 5000.0
    gamma: float = 10.0
    optimizer: str = "adafactor"  # or "adamw"
    lr: float = 1.024e-5
    weight_decay: float = 1e-2
    clip: float = 1.0
    checkpointing: bool = True

    @classmethod
    def of(cls, architecture: Architecture, **changes: Any) -> Recipe:
        """The released recipe of a model family."""
        recipe = cls(
            architecture.inversion_steps, architecture.beta, optimizer=architecture.optimizer,
            checkpointing=architecture.kind == "sdxl",
        )  # fmt: skip
        return replace(recipe, **changes)


@dataclass(frozen=True)
class RawPair:
    """A pair as the released script's data loader returns it, on the host."""

    pixels: Tensor  # [2, 3, R, R] in [-1, 1], winner first
    input_ids: tuple[Tensor, ...]  # [1, S] for each text encoder
    time: int
    p: float  # alpha / gamma


@dataclass(frozen=True)
class Condition:
    """The UNet's conditioning for the two images of a pair."""

    prompt: Tensor  # [2, S, D]
    added: dict[str, Tensor] | None  # text_embeds [2, E], time_ids [2, 6]: SDXL


@dataclass(frozen=True)
class CachedPair:
    """A pair that has already been encoded, on the device."""

    mean: Tensor  # [2, C, H, W] float32, scaled
    std: Tensor
    condition: Condition
    time: int
    p: float


@dataclass(frozen=True)
class PairResult:
    """Results of one pair. Errors are [2], winner first."""

    x_t: Tensor
    tau: Tensor
    policy_prediction: Tensor
    reference_prediction: Tensor
    policy_errors: Tensor
    reference_errors: Tensor
    inside: Tensor
    loss: Tensor


def alphas_cumprod() -> Tensor:
    """The schedule of SD1.5 and SDXL, float32."""
    start, end = SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5
    betas = torch.linspace(start, end, SCHEDULER["num_train_timesteps"], dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


class InverseScheduler:
    """What ``DDIMInverseScheduler`` does in diffusers 0.20.0, with tables and timesteps on the device.

    The list of timesteps ``offset, offset + D, ...`` (D = 1000 // steps) is rolled by one and begins at ``offset - D``:
    an entry s is the timestep at which a step *starts*; the step ends at s + D. The first one starts below 0, where the
    noise level is that of timestep 0. Later versions of diffusers neither roll the list nor step this way.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.spacing = SCHEDULER["num_train_timesteps"] // steps
        self.alphas_cumprod = alphas_cumprod().to(device)
        self.first_alpha = self.alphas_cumprod[0]
        grid = np.roll(np.arange(steps) * self.spacing + SCHEDULER["steps_offset"], 1)
        grid[0] = grid[1] - self.spacing if steps > 1 else SCHEDULER["steps_offset"] - self.spacing
        self.timesteps = torch.from_numpy(grid).to(device)

    def step(self, prediction: Tensor, time: Tensor, sample: Tensor) -> Tensor:
        """From the level of ``time`` to that of ``time + D``. The comparison reads the device, as in the original."""
        alpha = self.alphas_cumprod[time] if time >= 0 else self.first_alpha
        alpha_next = self.alphas_cumprod[time + self.spacing]
        clean = (sample - (1 - alpha) ** 0.5 * prediction) / alpha**0.5
        return alpha_next**0.5 * clean + (1 - alpha_next) ** 0.5 * prediction


def make_optimizer(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Adafactor or AdamW as configured in the released recipes."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, clip_threshold=1.0, scale_parameter=False,
        relative_step=False, warmup_init=False,
    )  # fmt: skip


def smpo_loss(policy_errors: Tensor, reference_errors: Tensor, p: Tensor | float, recipe: Recipe) -> Any:
    """The argument of log sigmoid and the loss, from errors [2B] with all winners before all losers."""
    policy_w, policy_l = policy_errors.chunk(2)
    reference_w, reference_l = reference_errors.chunk(2)
    scale = -0.5 * recipe.beta * (2 * p - 1) * recipe.gamma
    inside = scale * ((policy_w - policy_l) - (reference_w - reference_l))
    return inside, -F.logsigmoid(inside).mean()


@dataclass
class ReferenceTrainer:
    """SmPO as released, on one device (or in one of several processes, which synchronize at every micro-batch)."""

    unet: Any  # fp32, trained
    reference: Any  # frozen, in ``compute``
    recipe: Recipe
    device: torch.device
    compute: torch.dtype = torch.float32  # float16: autocast over the fp32 policy, as released
    vae: Any = None
    text: tuple[Any, ...] = ()
    resolution: int = 1024
    phase: Phase = no_phase
    logs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unet.train()
        if self.recipe.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, self.recipe)
        self.scheduler = InverseScheduler(self.recipe.inversion_steps, self.device)
        self.forward_alphas = alphas_cumprod().to(self.device, self.compute)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.compute is torch.float16)

    @classmethod
    def build(
        cls, architecture: Architecture, device: torch.device, compute: torch.dtype, recipe: Recipe | None = None
    ) -> ReferenceTrainer:
        """With random weights."""
        unet = make_unet(architecture, device, torch.float32)
        reference = make_unet(architecture, device, compute).requires_grad_(False).eval()
        return cls(
            unet, reference, recipe or Recipe.of(architecture), device, compute,
            make_vae(architecture, device, compute), make_text_encoders(architecture, device, compute),
            architecture.resolution,
        )  # fmt: skip

    def step(self, pairs: Sequence[RawPair]) -> None:
        """One optimizer step: a micro-batch of each pair, then the update."""
        train_loss = accuracy = 0.0
        for number, pair in enumerate(pairs):
            loss, right = self.micro_step(pair, len(pairs), last=number == len(pairs) - 1)
            train_loss, accuracy = train_loss + loss / len(pairs), accuracy + right / len(pairs)
        self.logs |= {"train_loss": train_loss, "implicit_acc": accuracy}

    def micro_step(self, pair: RawPair, accumulation: int, *, last: bool) -> tuple[float, float]:
        """Encode, invert, predict, log and back-propagate one pair; returns loss and accuracy as numbers."""
        with self.phase("encode"):
            latents, condition = self.encode(pair)
            time = torch.full((2,), pair.time, device=self.device)
        p = torch.tensor(pair.p).to(self.device)
        with self.phase("inversion"), torch.no_grad():
            x_t, tau = self.invert(latents, condition, time)
        result = self.losses(x_t, tau, condition, time, p)
        with self.phase("log"):
            numbers = self._log(result)
        with self.phase("policy"):
            self.scaler.scale(result.loss / accumulation).backward()
        if last:
            with self.phase("optimizer"):
                self._update()
        self.logs["step_loss"] = result.loss.detach().item()
        return numbers

    @torch.no_grad()
    def encode(self, pair: RawPair) -> tuple[Tensor, Condition]:
        """Latents in the compute dtype and the prompt's embeddings, computed by VAE and text encoders."""
        pixels = pair.pixels.to(self.device)
        latents = self.vae.encode(pixels.to(self.compute)).latent_dist.sample() * self.vae.config.scaling_factor
        states, pooled = [], None
        for ids, encoder in zip(pair.input_ids, self.text, strict=True):
            out = encoder(ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2] if len(self.text) > 1 else out[0])
            pooled = out[0]
        prompt = torch.cat(states, dim=-1).repeat(2, 1, 1)
        if len(self.text) == 1:
            return latents, Condition(prompt, None)
        side = float(self.resolution)
        time_ids = torch.tensor([side, side, 0.0, 0.0, side, side], dtype=self.compute, device=self.device)
        assert pooled is not None
        added = {"time_ids": time_ids[None].repeat(2, 1), "text_embeds": pooled.repeat(2, 1)}
        return latents, Condition(prompt, added)

    def invert(self, latents: Tensor, condition: Condition, time: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target tau of a pair. The number of steps is read from the device, as in the script."""
        start, moving, scheduler = latents.clone(), latents.clone(), self.scheduler
        for source in scheduler.timesteps[scheduler.timesteps < time[0]]:
            prediction = self._policy(moving, source.repeat(2), condition)
            ahead = scheduler.step(prediction, source, moving)
            second = self._policy(ahead, source.repeat(2), condition)
            moving = scheduler.step((prediction + second) / 2, source, moving)
        alpha = self.forward_alphas[time[0]]
        tau = (moving - start * alpha**0.5) / (1 - alpha) ** 0.5
        return moving.to(self.compute), tau

    def losses(self, x_t: Tensor, tau: Tensor, condition: Condition, time: Tensor, p: Tensor | float) -> PairResult:
        """Predictions, errors and loss of a pair."""
        with self.phase("policy"):
            prediction = self._policy(x_t, time, condition)
            errors = (prediction - tau).pow(2).mean(dim=(1, 2, 3))
        with self.phase("reference"), torch.no_grad():
            reference = self.reference(
                x_t, time, condition.prompt, added_cond_kwargs=condition.added, return_dict=False
            )[0]
            reference_errors = (reference - tau).pow(2).mean(dim=(1, 2, 3))
        inside, loss = smpo_loss(errors, reference_errors, p, self.recipe)
        return PairResult(x_t, tau, prediction, reference, errors, reference_errors, inside, loss)

    def _policy(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """A call as accelerate wraps it: autocast inside, float32 output."""
        with torch.autocast(self.device.type, self.compute, enabled=self.compute is not torch.float32):
            out = self.unet(x, time, condition.prompt, added_cond_kwargs=condition.added, return_dict=False)[0]
        return out.float()

    def _log(self, result: PairResult) -> tuple[float, float]:
        """Four reductions over the processes, each read immediately."""
        loss = _gathered(result.loss.repeat(1)).mean().item()
        raw = 0.5 * (result.policy_errors[:1].mean() + result.policy_errors[1:].mean())
        self.logs["model_mse"] = _gathered(raw.repeat(1)).mean().item()
        self.logs["ref_mse"] = _gathered(result.reference_errors.mean().repeat(1)).mean().item()
        right = (result.inside > 0).sum().float() / result.inside.size(0)
        return loss, _gathered(right.repeat(1)).mean().item()

    def _update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def _gathered(value: Tensor) -> Tensor:
    """The values of all processes; with a single process, the value itself."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, value.contiguous())
    return torch.cat(parts)


@dataclass
class BestEager:
    """The same mathematics in careful eager code, without kernels, compilation or graphs."""

    unet: Any  # trained; its weights are cast to ``compute``, fp32 masters are kept
    reference: Any  # frozen, in ``compute``
    recipe: Recipe
    device: torch.device
    compute: torch.dtype = torch.float32
    phase: Phase = no_phase
    logs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unet.train()
        if self.recipe.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.masters: list[Tensor] = []
        self.halves: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in self.unet.parameters():
            self._adopt(parameter)
        self.optimizer = make_optimizer(self.masters, self.recipe)
        self.alphas = alphas_cumprod().double().tolist()
        self._losses: list[Tensor] = []

    @classmethod
    def build(
        cls, architecture: Architecture, device: torch.device, compute: torch.dtype, recipe: Recipe | None = None
    ) -> BestEager:
        """With random weights."""
        unet = make_unet(architecture, device, torch.float32)
        reference = make_unet(architecture, device, compute).requires_grad_(False).eval()
        return cls(unet, reference, recipe or Recipe.of(architecture, checkpointing=False), device, compute)

    def _adopt(self, parameter: nn.Parameter) -> None:
        if self.compute is torch.float32:
            self.masters.append(parameter)
            return
        master = parameter.data.float().clone()
        master.grad = torch.zeros_like(master)
        parameter.data = parameter.data.to(self.compute)

        def accumulate(half: Tensor) -> None:
            assert half.grad is not None and master.grad is not None
            master.grad.add_(half.grad)
            half.grad = None

        parameter.register_post_accumulate_grad_hook(accumulate)
        self.masters.append(master)
        self.halves.append((parameter, master))

    def step(self, pairs: Sequence[CachedPair]) -> None:
        """One optimizer step; the device is read once, for the log."""
        for pair in pairs:
            self.micro_step(pair, len(pairs))
        with self.phase("optimizer"):
            self._update()
        self.logs["train_loss"] = torch.stack(self._losses).mean().item()
        self._losses.clear()

    def micro_step(self, pair: CachedPair, accumulation: int) -> None:
        """Sample the latents, invert, predict and back-propagate one pair."""
        latents = pair.mean + pair.std * torch.randn_like(pair.std)
        with self.phase("inversion"), torch.no_grad():
            x_t, tau = self.invert(latents, pair.condition, pair.time)
        result = self.losses(x_t, tau, pair.condition, pair.time, pair.p)
        with self.phase("policy"):
            (result.loss / accumulation).backward()
        self._losses.append(result.loss.detach())

    def invert(self, latents: Tensor, condition: Condition, time: int) -> tuple[Tensor, Tensor]:
        """x_t and tau in float32, with all schedule numbers on the host."""
        spacing = 1000 // self.recipe.inversion_steps
        moving = latents.float()
        # the released grid: 1 - D, 1, 1 + D, ..., 1001 - 2 D, below the pair's timestep
        for source in range(1 - spacing, min(time, 1001 - 2 * spacing + 1), spacing):
            here, ahead = self.alphas[max(source, 0)], self.alphas[source + spacing]
            keep = (ahead / here) ** 0.5
            move = (1 - ahead) ** 0.5 - keep * (1 - here) ** 0.5
            first = self._eps(self.unet, moving, source, condition)
            second = self._eps(self.unet, torch.add(keep * moving, first, alpha=move), source, condition)
            moving = torch.add(keep * moving, first + second, alpha=0.5 * move)
        alpha = self.alphas[time]
        tau = (moving - alpha**0.5 * latents.float()) / (1 - alpha) ** 0.5
        return moving, tau

    def losses(self, x_t: Tensor, tau: Tensor, condition: Condition, time: int, p: float) -> PairResult:
        """Predictions, float32 errors and the loss of a pair."""
        with self.phase("reference"), torch.no_grad():
            reference = self._eps(self.reference, x_t, time, condition)
            reference_errors = (reference - tau).square().mean(dim=(1, 2, 3))
        with self.phase("policy"):
            prediction = self._eps(self.unet, x_t, time, condition)
            errors = (prediction - tau).square().mean(dim=(1, 2, 3))
            inside, loss = smpo_loss(errors, reference_errors, p, self.recipe)
        return PairResult(x_t, tau, prediction, reference, errors, reference_errors, inside, loss)

    def _eps(self, unet: Any, x: Tensor, time: int, condition: Condition) -> Tensor:
        times = torch.full((x.shape[0],), time, device=self.device)
        out = unet(x.to(self.compute), times, condition.prompt, added_cond_kwargs=condition.added, return_dict=False)[0]
        return out.float()

    @torch.no_grad()
    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.masters, self.recipe.clip)
        self.optimizer.step()
        if self.halves:
            for parameter, master in self.halves:
                parameter.copy_(master)
        self.optimizer.zero_grad(set_to_none=not self.halves)


def make_raw_pairs(architecture: Architecture, times: Sequence[int], seed: int = 4) -> list[RawPair]:
    """Pairs of random images and prompts at given timesteps."""
    generator = torch.Generator().manual_seed(seed)
    side = architecture.resolution
    vocabulary = min(int(t["vocab_size"]) for t in architecture.text)
    pairs = []
    for time in times:
        pixels = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
        ids = torch.randint(0, vocabulary, (1, architecture.tokens), generator=generator)
        pairs.append(RawPair(pixels, (ids,) * len(architecture.text), time, p=0.56))
    return pairs


def make_cached_pairs(
    architecture: Architecture, times: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 5
) -> list[CachedPair]:
    """Pairs of random latents and prompts at given timesteps, in the form that a cache holds."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, architecture.latent, architecture.latent)
    pairs = []
    for time in times:
        mean = torch.randn(shape, generator=generator).to(device)
        prompt = torch.randn(1, architecture.tokens, architecture.prompt_width, generator=generator)
        added = None
        if architecture.pooled_width is not None:
            size = float(architecture.resolution)
            added = {
                "text_embeds": torch.randn(1, architecture.pooled_width, generator=generator).to(device, dtype),
                "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]]).to(device, dtype),
            }
            added = {name: value.repeat(2, 1) for name, value in added.items()}
        condition = Condition(prompt.to(device, dtype).repeat(2, 1, 1), added)
        pairs.append(CachedPair(mean, torch.full_like(mean, 0.05), condition, time, p=0.56))
    return pairs
