"""The exponential moving average of the trained weights: kept in slices of parameters, as the optimizer's states are.

After the n-th applied step (the first is n = 1) every average moves towards what the optimizer has just updated, the
fp32 master weights where there are any::

    average = average + (1 - d_n) (weight - average),      d_n = min(optim.ema, n / (9 + n)) with optim.ema_warmup

It begins with the weights that the run began with. The warm-up is that of TensorFlow's ``ExponentialMovingAverage``
and diffusers' ``EMAModel`` (with n - 1 updates made before): as long as it lasts, the average is the one of Karras et
al. (EDM2, arXiv 2312.02696) with gamma = 8, which weights step i by about i^8 and whose standard deviation is 9 % of
the steps made. Of the first weights a share of 1e-5 is left after ten steps, and optim.ema^n without the warm-up.

The average changes nothing of the training, and a step that is skipped leaves it as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from smpo_fast.common.runtime import World, rng
from smpo_fast.config.schema import Config
from smpo_fast.engine.optimizers import LocalSlice
from smpo_fast.engine.shards import ParameterSlice, ShardReader
from smpo_fast.kernels.ema import ema_update

AVERAGE, UPDATES = "ema", "ema_updates"  # the kinds of tensors in a checkpoint
DTYPES = {"fp32": torch.float32, "bf16-sr": torch.bfloat16}  # by optim.ema_dtype


def effective_decay(decay: float, updates: int, *, warmup: bool) -> float:
    """``d_n`` of the update that follows ``updates`` others."""
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


class WeightAverage:
    """The averages of this process's slices. Without ``optim.ema`` there are none, and nothing here does anything.

    They are where the weights are, which under DeepSpeed's offloading is the host; with ``optim.offload`` they are in
    (pinned) host memory, and on the device while they are updated.
    """

    def __init__(self, slices: Sequence[LocalSlice], config: Config) -> None:
        self._optim = config.optim
        self._on_host = config.optim.offload != "none"
        self._slices = {local.param_slice: local for local in slices} if config.optim.ema else {}
        names = {param_slice.name for param_slice in self._slices}
        self._seeds = {name: int(rng(config.run.seed, f"ema/{name}").integers(2**63)) for name in names}
        self._averages = {param_slice: self._beginning(local) for param_slice, local in self._slices.items()}
        self._updates = 0

    @torch.no_grad()
    def _beginning(self, local: LocalSlice) -> Tensor:
        weights = local.values()
        average = weights.reshape(-1).to("cpu" if self._on_host else weights.device)
        average = average.to(DTYPES[self._optim.ema_dtype], copy=True)
        return average.pin_memory() if self._on_host and weights.device.type == "cuda" else average

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after a step that was applied."""
        together: list[LocalSlice] = []
        one_by_one: list[LocalSlice] = []  # they need memory for copies
        for local in self._slices.values():
            (one_by_one if self._on_host or not local.values().is_contiguous() else together).append(local)
        for slices in (together, *([local] for local in one_by_one)):
            self._follow(slices)
        self._updates += 1
        devices = {local.owner.device for local in one_by_one}
        for device in devices if self._on_host else ():
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # once: the averages are then in the host's memory

    def _follow(self, slices: Sequence[LocalSlice]) -> None:
        weights = [local.values().reshape(-1) for local in slices]
        kept = [self._averages[local.param_slice] for local in slices]
        moved = [average.to(w.device, non_blocking=True) for average, w in zip(kept, weights, strict=True)]
        ema_update(
            moved, weights, decay=effective_decay(self._optim.ema, self._updates, warmup=self._optim.ema_warmup),
            step=self._updates, seeds=[self._seeds[local.param_slice.name] for local in slices],
            offsets=[local.param_slice.offset for local in slices],
        )  # fmt: skip
        for average, updated in zip(kept, moved, strict=True):
            if updated is not average:
                average.copy_(updated, non_blocking=True)

    def states(self, param_slice: ParameterSlice) -> Iterator[tuple[str, Tensor]]:
        """What is saved of a slice, as (kind, tensor)."""
        if param_slice in self._averages:
            yield AVERAGE, self._averages[param_slice]
            yield UPDATES, torch.tensor([self._updates])

    def restore(self, param_slice: ParameterSlice, saved: ShardReader) -> None:
        """Load what ``states`` returned for this slice, however the parameter was cut then.

        Where nothing was saved the average begins with the slice's present weights. Raises CheckpointError where a part
        is missing.
        """
        if param_slice not in self._slices:
            return
        average = self._averages[param_slice]
        if saved.slices(param_slice.name, AVERAGE):
            average.copy_(saved.elements(param_slice, AVERAGE))
            self._updates = saved.number(param_slice.name, UPDATES)
        else:
            average.copy_(self._slices[param_slice].values().reshape(-1))

    @torch.no_grad()
    def gathered(self, shapes: Mapping[str, torch.Size], world: World, *, cut: bool) -> dict[str, Tensor]:
        """The averages of the parameters of these shapes, by name, in fp32 on the host; empty on ranks other than 0.

        cut: ranks hold different slices of them; the method is then collective.
        """
        mine = defaultdict(list)
        for param_slice, average in self._averages.items():
            mine[param_slice.name].append((param_slice, average))
        found = {}
        for name, shape in shapes.items() if self._optim.ema else ():
            whole = torch.zeros(shape.numel(), device=world.device)
            for param_slice, average in mine[name]:
                whole[param_slice.offset : param_slice.end] = average
            if cut and world.size > 1:
                torch.distributed.reduce(whole, 0)  # every element is on one rank, and 0 on the others
            if world.rank == 0:
                found[name] = whole.cpu().view(shape)
        return found
