"""How the pairs of an optimizer step are divided among ranks and micro-batches."""

from __future__ import annotations

import math

from smpo_fast.common.errors import ConfigError
from smpo_fast.config.schema import Config


def pairs_per_rank(config: Config, world_size: int) -> int:
    """Pairs of one rank in one step; raises ConfigError when they do not divide evenly."""
    pairs, rest = divmod(config.batch.pairs_per_step, world_size)
    if rest:
        raise ConfigError(
            f"batch.pairs_per_step = {config.batch.pairs_per_step} does not divide among {world_size} ranks: "
            f"take a multiple of {world_size}"
        )
    return pairs


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Micro-batches of one rank in one step; the last one may be smaller.

    Raises ConfigError when the pairs of a step do not divide evenly among the ranks.
    """
    return math.ceil(pairs_per_rank(config, world_size) / config.batch.micro_pairs)
