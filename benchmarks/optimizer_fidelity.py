"""Program: how closely 8-bit AdamW follows AdamW in float64; ours, bitsandbytes' and torchao's, on the CPU.

For gradients of a known law, the distance between where an optimizer and AdamW in float64 end, relative to the way
that the latter went, after each number of steps; and the bytes of state an element takes. An optimizer that is not
installed is left out with a line that says so. Prints Markdown.

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
# name: spread of the elements' sizes (of the logarithm), what half of them shrink to after a tenth of the way
LAWS = {
    "equal sizes": (0.0, 1.0),
    "sizes e^(1 z)": (1.0, 1.0),
    "sizes e^(1.5 z)": (1.5, 1.0),
    "half shrink to 1/10": (0.5, 0.1),
}


def gradients(steps: int, spread: float, shrunk: float) -> Iterator[Tensor]:
    """Normal noise around a fifth of its size, each element at a size of its own."""
    chance = torch.Generator().manual_seed(0)
    size = (torch.randn(ELEMENTS, generator=chance) * spread).exp() * 1e-4
    mean = torch.randn(ELEMENTS, generator=chance) * 0.2
    later = torch.where(torch.rand(ELEMENTS, generator=chance) < 0.5, shrunk, 1.0)
    for t in range(steps):
        grad = size * (mean + torch.randn(ELEMENTS, generator=chance))
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
    """Those that are installed, by name and version."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {"ours": Ours}
    try:
        import bitsandbytes

        found[f"bitsandbytes {bitsandbytes.__version__}"] = bitsandbytes.optim.AdamW8bit
    except ImportError:
        print("bitsandbytes is not installed: left out")
    try:
        import torchao
        from torchao.optim import AdamW8bit

        found[f"torchao {torchao.__version__}"] = lambda p, **options: AdamW8bit(p, block_size=256, **options)
    except ImportError:
        print("torchao is not installed: left out")
    return found


def places(make: Any, dtype: torch.dtype, steps: list[int], law: tuple[float, float]) -> tuple[list[Tensor], float]:
    """Where the weight is after each number of steps, and the bytes of state an element takes."""
    weight = nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype))
    optimizer = make([weight], lr=LR, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0)
    found = []
    for t, grad in enumerate(gradients(max(steps), *law), 1):
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
    """Bytes of a tensor, also of one that is made of others; a shared table of codes belongs to nobody."""
    if not isinstance(x, Tensor) or x.numel() == 256 or x.numel() == 1:
        return 0
    if hasattr(x, "__tensor_flatten__") and type(x) is not Tensor:
        return sum(size(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", default="100,1000", help="numbers of steps, the last one is the whole way")
    steps = [int(s) for s in parser.parse_args(words).steps.split(",")]
    torch.set_num_threads(1)
    rivals = optimizers()
    print(f"| gradients | steps | {' | '.join(rivals)} |\n|{'---|' * (len(rivals) + 2)}")
    held = {}
    for law, numbers in LAWS.items():
        truth, _ = places(torch.optim.AdamW, torch.float64, steps, numbers)
        rows: dict[str, list[Tensor]] = {}
        for name, make in rivals.items():
            rows[name], held[name] = places(make, torch.float32, steps, numbers)
        for i, count in enumerate(steps):
            apart = [((w[i] - truth[i]).norm() / truth[i].norm()).item() for w in rows.values()]
            assert all(map(math.isfinite, apart))
            print(f"| {law} | {count} | {' | '.join(f'{a:.3f}' for a in apart)} |")
    print(f"| bytes of state an element | | {' | '.join(f'{b:.3f}' for b in held.values())} |")


if __name__ == "__main__":
    main()
