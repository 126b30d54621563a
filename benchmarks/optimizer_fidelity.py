"""Program: how closely 8-bit AdamW follows AdamW in float64: this project's, bitsandbytes' and torchao's, on the CPU.

For gradients drawn from known distributions it prints, as Markdown, the distance between the weights of an optimizer
and those of AdamW in float64, relative to the distance that the latter moved, after each number of steps; and the bytes
of state per element. Optimizers that are not installed are skipped with a notice.

    python benchmarks/optimizer_fidelity.py --steps 100,1000
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smpo_fast.kernels import adamw8bit

ELEMENTS = 16384
LR, EPS = 1e-3, 1e-8
# name: (standard deviation of the log of the elements' sizes, factor by which half of them shrink after a tenth of
# the steps)
DISTRIBUTIONS = {
    "equal sizes": (0.0, 1.0),
    "sizes e^(1 z)": (1.0, 1.0),
    "sizes e^(1.5 z)": (1.5, 1.0),
    "half shrink to 1/10": (0.5, 0.1),
}


def gradients(steps: int, spread: float, shrunk: float) -> Iterator[Tensor]:
    """Normal noise with a mean of about a fifth of its deviation; each element has its own size."""
    generator = torch.Generator().manual_seed(0)
    size = (torch.randn(ELEMENTS, generator=generator) * spread).exp() * 1e-4
    mean = torch.randn(ELEMENTS, generator=generator) * 0.2
    later = torch.where(torch.rand(ELEMENTS, generator=generator) < 0.5, shrunk, 1.0)
    for t in range(steps):
        grad = size * (mean + torch.randn(ELEMENTS, generator=generator))
        yield grad * later if t > steps // 10 else grad


class Ours(torch.optim.Optimizer):
    """The step of smpo_fast.kernels.adamw8bit on one flat parameter."""

    def __init__(self, parameters: list[nn.Parameter], **_: Any) -> None:
        super().__init__(parameters, {})
        self.count, self.held = 0, adamw8bit.adamw8bit_state(ELEMENTS)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        weight = self.param_groups[0]["params"][0]
        adamw8bit.adamw8bit_step(
            weight.data, weight.grad, *self.held, lr=LR, beta1=0.9, beta2=0.999, eps=EPS, weight_decay=0.0,
            step=self.count, seed=1,
        )  # fmt: skip


def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """The installed optimizers, by name and version."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {"ours": Ours}
    try:
        import bitsandbytes

        found[f"bitsandbytes {bitsandbytes.__version__}"] = bitsandbytes.optim.AdamW8bit
    except ImportError:
        print("bitsandbytes is not installed: skipped")
    try:
        import torchao
        from torchao.optim import AdamW8bit

        found[f"torchao {torchao.__version__}"] = lambda p, **options: AdamW8bit(p, block_size=256, **options)
    except ImportError:
        print("torchao is not installed: skipped")
    return found


def trajectory(
    make: Any, dtype: torch.dtype, steps: list[int], distribution: tuple[float, float]
) -> tuple[list[Tensor], float]:
    """The weight after each number of steps, and the bytes of optimizer state per element."""
    weight = nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype))
    optimizer = make([weight], lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
    found = []
    for t, grad in enumerate(gradients(max(steps), *distribution), 1):
        weight.grad = grad.to(dtype)
        optimizer.step()
        if t in steps:
            found.append(weight.detach().double().clone())
    if isinstance(optimizer, Ours):
        held = sum(x.nbytes for x in optimizer.held)
    else:
        held = sum(size(x) for x in optimizer.state[weight].values())
    return found, held / ELEMENTS


def size(x: Any) -> int:
    """Bytes of a tensor, also of one made of others; shared code tables and single numbers do not count."""
    if not isinstance(x, Tensor) or x.numel() == 256 or x.numel() == 1:
        return 0
    if hasattr(x, "__tensor_flatten__") and type(x) is not Tensor:
        return sum(size(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", default="100,1000", help="numbers of steps after which to compare")
    steps = [int(s) for s in parser.parse_args(words).steps.split(",")]
    torch.set_num_threads(1)
    contenders = optimizers()
    print(f"| gradients | steps | {' | '.join(contenders)} |\n|{'---|' * (len(contenders) + 2)}")
    held = {}
    for distribution, numbers in DISTRIBUTIONS.items():
        truth, _ = trajectory(torch.optim.AdamW, torch.float64, steps, numbers)
        rows: dict[str, list[Tensor]] = {}
        for name, make in contenders.items():
            rows[name], held[name] = trajectory(make, torch.float32, steps, numbers)
        for i, count in enumerate(steps):
            apart = [((w[i] - truth[i]).norm() / truth[i].norm()).item() for w in rows.values()]
            assert all(map(math.isfinite, apart))
            print(f"| {distribution} | {count} | {' | '.join(f'{a:.3f}' for a in apart)} |")
    print(f"| bytes of state an element | | {' | '.join(f'{b:.3f}' for b in held.values())} |")


if __name__ == "__main__":
    main()
