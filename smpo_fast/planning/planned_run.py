"""A run as it is planned: settings on a number of equal GPUs, and the variants of them that need less memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from smpo_fast.config.schema import Config
from smpo_fast.engine import ds_config
from smpo_fast.models import footprint
from smpo_fast.models.network_spec import NetworkSpec
from smpo_fast.training.reference import resolve as resolve_reference

PAGED = "paged_adamw8bit"  # the driver places its states, outside torch's allocator
# DeepSpeed's defaults.
_DS_DEFAULTS = {
    "reduce_bucket_size": 5e8, "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class RunVariant:
    """The settings that decide memory and speed, and that may be varied to make a run fit."""

    micro_pairs: int
    inversion_pairs: int
    checkpointing: bool
    reference: str  # as training.reference.resolve returns it
    optimizer: str
    precision: str
    master: str
    accumulate: str
    stage: int | None  # None: no DeepSpeed
    offload: str = "none"  # optim.offload, of one process
    offload_optimizer: bool = False  # of the DeepSpeed file
    offload_weights: bool = False

    @property
    def states_on_host(self) -> bool:
        """Whether master weights and optimizer states are in host memory."""
        return self.offload_optimizer or self.offload != "none" or self.optimizer == PAGED

    @property
    def average_on_host(self) -> bool:
        """Whether the moving average of the weights is in host memory."""
        return self.offload_optimizer or self.offload != "none"

    @property
    def gradients_on_host(self) -> bool:
        """Whether the sums of the gradients are in host memory."""
        return self.offload_optimizer or self.offload == "states+gradients"


@dataclass(frozen=True)
class PlannedRun:
    """A run on ``ranks`` equal GPUs, ``per_node`` of them in each node."""

    config: Config
    network: NetworkSpec
    precision: str
    ranks: int = 1
    per_node: int = 8
    ds: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def pairs_of_rank(self) -> int:
        """Pairs that a rank draws in a step."""
        return math.ceil(self.config.drawn_per_step / self.ranks)

    @property
    def examples_of_rank(self) -> int:
        """Pairs times timesteps that a rank trains in a step."""
        return math.ceil(self.config.batch.pairs_per_step / self.ranks)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Trained and frozen parameters of the policy."""
        found = footprint.parameter_shapes(self.network)
        return footprint.numel(found.trained), footprint.numel(found.frozen)

    def variant(self) -> RunVariant:
        """The variant that the settings describe."""
        settings, ds = self.config, self.ds or {}
        wanted = settings.batch.inversion_pairs or footprint.pairs_within(
            settings.batch.inversion_gb * 1e9, self.network, self.precision
        )
        return RunVariant(
            micro_pairs=settings.batch.micro_pairs,
            inversion_pairs=min(wanted, self.pairs_of_rank),
            checkpointing=settings.model.gradient_checkpointing,
            reference=resolve_reference(settings, self.ds),
            optimizer=settings.optim.name,
            precision=self.precision,
            master=settings.optim.master,
            accumulate=settings.optim.accumulate,
            stage=None if self.ds is None else ds_config.zero_stage(dict(ds)),
            offload=settings.optim.offload,
            offload_optimizer=is_offloaded(ds, "offload_optimizer"),
            offload_weights=is_offloaded(ds, "offload_param"),
        )

    def ds_number(self, key: str) -> float:
        """A number of the DeepSpeed file's zero_optimization, or DeepSpeed's default."""
        value = ds_config.get_key(dict(self.ds or {}), f"zero_optimization.{key}")
        return float(value) if isinstance(value, (int, float)) else _DS_DEFAULTS[key]


def is_offloaded(ds: Mapping[str, Any], key: str) -> bool:
    """Whether a DeepSpeed file moves ``key`` ('offload_optimizer' or 'offload_param') off the GPU."""
    return ds_config.offloads(dict(ds), key.removeprefix("offload_"))
