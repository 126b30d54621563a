"""What must be the same for a run to resume from a checkpoint, or to use stored trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smpo_fast.config.schema import Config


def checkpoint_facts(
    config: Config, precision: str, model: Mapping[str, Any] | str, cache_identity: Mapping[str, Any]
) -> dict[str, Any]:
    """The facts that a checkpoint must agree on with the run that resumes from it.

    model: the identity of the policy's initial weights; cache_identity: of the prepared cache.
    """
    sections = {
        name: getattr(config, name).model_dump() for name in ("objective", "inversion", "labels", "optim", "lora")
    }
    # where numbers are stored and what is written at the end do not change the numbers
    del sections["inversion"]["store"], sections["lora"]["merge"], sections["optim"]["offload"]
    return {
        **sections,
        "seed": config.run.seed,
        "pairs_per_step": config.batch.pairs_per_step,
        "model": model,
        "pairs": {name: cache_identity[name] for name in ("source", "max_pairs", "encoders", "resolution", "buckets")},
        "precision": precision,
        "prompt_dropout": config.data.prompt_dropout,
        "flip": config.data.flip,
        "conditioning": config.data.conditioning,
    }


def trajectory_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint's facts that stored trajectories depend on."""
    kept = {name: value for name, value in facts.items() if name not in ("objective", "optim", "lora")}
    kept["labels"] = {name: facts["labels"][name] for name in ("source", "drop_ties")}  # which pairs, and who wins
    return kept
