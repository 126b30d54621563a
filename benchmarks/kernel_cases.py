"""Every fused operation of this project, found by looking, with the inputs that SDXL really gives it.

An operation is a function ``op`` or ``op_`` of a module of ``smpo_fast.kernels`` beside an ``op_reference``. Its
arguments are made by their names, so that an operation is timed as soon as it exists; one with a required argument
that nobody here knows how to make is listed by ``unknown`` and counts as not measured, not as fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import architectures
import counting
import ours
import torch
from torch import Tensor

MODES = ("forward", "backward", "both")
PAIR_COUNTS = (1, 8, 64)
DEFAULT_GROUPS = 32
WEIGHTS = ((320 * 320,), (1280 * 1280,), (10240 * 1280,))
"""Sizes of matrices in attention (SD1.5, SDXL) and of SDXL's largest one, flat, as an optimizer step meets them."""
FORWARD_ONLY = {"geglu_linear"}
"""With a gradient these are their eager reference."""
_NO_GRADIENT = {"target", "reference", "x_t", "x_0", "total", "residual_out"}
# what operations without a result write to, and what of it is compared
_IN_PLACE = (("x", "total"), ("weight", "m_scale", "v_scale", "m8", "v8"))


@dataclass(frozen=True)
class Case:
    """An operation at one shape: what to call, how, and what comes out."""

    op: str
    shape: tuple[int, ...]
    run: Callable[..., Any]
    reference: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))}"

    def arguments(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Fresh random arguments by name; raises LookupError for one that nobody knows how to make."""
        return _arguments(self.op, self.reference, self.shape, dtype, device)


def operations() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Name -> (fused, eager reference) of everything in ``smpo_fast.kernels``."""
    found = {}
    for module in ours.kernel_modules():
        for attribute in dir(module):
            name = attribute.removesuffix("_reference")
            fused = getattr(module, name, None) or getattr(module, f"{name}_", None)
            if name != attribute and callable(fused) and getattr(module, attribute).__module__ == module.__name__:
                found[name] = (fused, getattr(module, attribute))
    return found


def shapes_of(op: str, architecture: architectures.Architecture) -> list[tuple[int, ...]]:
    """The shapes an operation meets in one call for two pictures, most frequent first; latents for pair operations.

    geglu_linear: what it reads; the projection is 8 times as wide, and half of it remains.
    """
    if op.startswith("adamw"):
        return list(WEIGHTS)
    table = counting.op_shapes(architecture, images=2)
    if op == "geglu_linear":
        return [(*shape[:-1], shape[-1] // 8) for shape, _ in table["geglu"].most_common()]
    if op in table:
        return [shape for shape, _ in table[op].most_common()]
    side = architecture.latent
    return [(pairs, 2, 4, side, side) for pairs in PAIR_COUNTS]


def cases(architecture: architectures.Architecture, most: int = 4) -> Iterator[Case]:
    """The operations whose arguments can be made, at their most frequent shapes."""
    for op, (run, reference) in operations().items():
        for shape in shapes_of(op, architecture)[:most]:
            case = Case(op, shape, run, reference)
            try:
                case.arguments(torch.float32, counting.META)
            except LookupError:
                break
            yield case


def unknown(architecture: architectures.Architecture) -> list[str]:
    """Operations that cannot be timed, because an argument of theirs is not known here."""
    known = {case.op for case in cases(architecture, most=1)}
    return sorted(set(operations()) - known)


def _arguments(
    op: str, reference: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    if len(shape) == 1:
        pool = _optimizer_pool(shape, dtype, device)
    else:
        paired = len(shape) == 5
        pool = _pair_pool(shape, dtype, device) if paired else _layer_pool(op, shape, dtype, device)
    made = {}
    for name, parameter in inspect.signature(reference).parameters.items():
        if name in pool:
            made[name] = pool[name]()
        elif parameter.default is inspect.Parameter.empty:
            raise LookupError(f"{op}: no recipe for its argument '{name}'")
    return made


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def _layer_pool(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Arguments of operations inside the UNet. Pictures are channels-last, as the fused path holds them."""
    channels = shape[1] if len(shape) == 4 else shape[-1]

    def x() -> Tensor:
        made = _normal(shape, dtype, device)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    def half() -> Tensor:
        return _normal((*shape[:-1], shape[-1] // 2), dtype, device)

    if op == "geglu_linear":
        wide, size = 8 * channels, channels**-0.5
        return {
            "x": x, "weight": lambda: _normal((wide, channels), dtype, device).mul_(size),
            "bias": lambda: _normal((wide,), dtype, device),
        }  # fmt: skip
    groups = DEFAULT_GROUPS if channels % DEFAULT_GROUPS == 0 else 16
    return {
        "x": x, "input": x, "hidden_states": x, "weight": lambda: _normal((channels,), dtype, device),
        "bias": lambda: _normal((channels,), dtype, device), "groups": lambda: groups, "num_groups": lambda: groups,
        "eps": lambda: 1e-5, "value": half, "gate": half,
    }  # fmt: skip


def _optimizer_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Arguments of an optimizer step over one flat parameter; weights where they may lie in the dtype, else fp32."""
    weight = dtype if dtype == torch.bfloat16 else torch.float32
    blocks = (-(-shape[0] // 256),)

    def codes(kind: torch.dtype) -> Tensor:
        return torch.randint(0, 127, shape, dtype=kind, device=device)

    def scale() -> Tensor:
        return torch.empty(blocks, device=device).uniform_(0.5, 1.0)

    return {
        "weight": lambda: _normal(shape, weight, device), "grad": lambda: _normal(shape, torch.float32, device),
        "m8": lambda: codes(torch.int8), "v8": lambda: codes(torch.uint8), "m_scale": scale, "v_scale": scale,
        "lr": lambda: 1e-5, "beta1": lambda: 0.9, "beta2": lambda: 0.999, "eps": lambda: 1e-8,
        "weight_decay": lambda: 0.01, "step": lambda: 100,
    }  # fmt: skip


def _pair_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Arguments of operations on pairs of latents: the state is fp32, what the network gives and reads is not."""
    pairs = shape[0]

    def numbers() -> Tensor:
        return torch.empty(pairs, device=device).uniform_(0.2, 0.8)

    def state() -> Tensor:
        return _normal(shape, torch.float32, device)

    def seen() -> Tensor:
        return _normal(shape, dtype, device)

    def prediction() -> Tensor:
        """Winners near the target: otherwise the margin is a difference of equals, and any two sums disagree on it."""
        made = seen()
        made[:, 0] *= 0.1
        return made

    return {
        "x": seen, "x_0": state, "total": state, "signal": numbers, "inverse_start": numbers, "estimate": seen,
        "h": numbers, "prediction": prediction, "reference": seen, "target": state, "weight": numbers,
        "beta": lambda: 2.0, "link": lambda: "sigmoid",
    }  # fmt: skip


@dataclass
class Prepared:
    """A case ready to be timed: three calls that share arguments, and the bytes each moves at least."""

    case: Case
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.arguments = self.case.arguments(self.dtype, self.device)
        self.learned = [
            name for name, value in self.arguments.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name not in _NO_GRADIENT
        ]  # fmt: skip
        probe = self._tensors(self.case.reference(**self._fresh()))
        names = (names for names in _IN_PLACE if set(names) <= set(self.arguments))
        self.written = () if probe else next(names)
        smooth = [any(o.requires_grad for o in self._tensors(op(**self._fresh()))) for op in
                  (self.case.reference, self.case.run)]  # fmt: skip
        self.modes = MODES if all(smooth) and self.case.op not in FORWARD_ONLY else ("forward",)
        self.upstream = [torch.randn_like(p) for p in probe if p.requires_grad]

    def _tensors(self, result: Any) -> list[Tensor]:
        if isinstance(result, Tensor):
            return [result]
        return [r for r in result or () if isinstance(r, Tensor)]

    def _fresh(self) -> dict[str, Any]:
        """Copies that may be written to; leaves where a gradient is wanted."""
        made = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        for name in self.learned:
            made[name].requires_grad_(made[name].ndim == 1 or "prediction" not in self.arguments)
        if "prediction" in made:
            made = {k: v.detach() if isinstance(v, Tensor) else v for k, v in made.items()}
            made["prediction"].requires_grad_()
        if "total" in made or "m8" in made:
            made = {k: v.detach() if isinstance(v, Tensor) else v for k, v in made.items()}
        return made

    def call(self, op: Callable[..., Any], mode: str) -> Callable[[], list[Tensor]]:
        """One mode of one implementation: returns outputs, gradients, or for in-place operations what was written."""
        inputs = self._fresh()
        leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]

        def forward() -> list[Tensor]:
            out = self._tensors(op(**inputs))
            return [inputs[name] for name in self.written if inputs[name].is_floating_point()] if self.written else out

        def gradients(out: list[Tensor]) -> list[Tensor]:
            smooth = [o for o in out if o.requires_grad]
            return list(torch.autograd.grad(smooth, leaves, self.upstream, retain_graph=mode == "backward"))

        if mode == "forward":
            return torch.no_grad()(forward)
        if mode == "both":
            return lambda: gradients(forward())
        kept = forward()
        return lambda: gradients(kept)

    def moved(self, mode: str) -> int:
        """The least bytes: every tensor argument read once and every result written once, of each mode."""
        inputs = self._fresh()
        read = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
        with torch.no_grad():
            written = sum(o.nbytes for o in self._tensors(self.case.reference(**inputs)))
        if self.written:
            written = sum(inputs[name].nbytes for name in self.written)
            return read - (inputs["x"].nbytes if "total" in inputs else 0) + written
        back = sum(u.nbytes for u in self.upstream) + read
        back += sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad)
        return {"forward": read + written, "backward": back, "both": read + written + back}[mode]
