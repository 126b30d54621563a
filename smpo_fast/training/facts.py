"""What must be the same for a run to resume from a checkpoint, or to use stored trajectories.

Earlier versions recorded fewer facts. One that they did not record is taken to have had its ``fact_defaults`` value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smpo_fast.config.schema import Config
from smpo_fast.data.cache.format import CacheInfo

SECTIONS = ("objective", "inversion", "labels", "optim", "lora")
AVERAGE_SETTINGS = ("ema", "ema_warmup", "ema_dtype")


def checkpoint_facts(
    config: Config, precision: str, model: Mapping[str, Any] | str, cache: CacheInfo
) -> dict[str, Any]:
    """The facts that a checkpoint must agree on with the run that resumes from it.

    model: the identity of the policy's initial weights; cache: the prepared cache.
    """
    pairs = {name: cache.identity[name] for name in ("source", "max_pairs", "encoders", "resolution", "buckets")}
    pairs["scores"] = cache.identity.get("scores", "")
    scored = cache.counts.get("unrewarded", 0) > 0
    pairs["scorer"] = cache.identity.get("scorer", "") if scored else ""
    falls = config.optim.schedule != "constant"  # to 0 at the last step, so the rates of all steps depend on it
    return {
        **_sections({name: getattr(config, name) for name in SECTIONS}),
        **({"run": {"steps": config.run.steps}} if falls else {}),
        "seed": config.run.seed,
        "pairs_per_step": config.batch.pairs_per_step,
        "model": model,
        "pairs": pairs,
        "precision": precision,
        "prompt_dropout": config.data.prompt_dropout,
        "flip": config.data.flip,
        "conditioning": config.data.conditioning,
    }


def fact_defaults(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The values of facts that were not recorded.

    An earlier version had a setting's default, any scores of the pairs, and any last step. A run without an average of
    the weights trained as this one does, so this one may begin one.
    """
    unknown = {"pairs": {name: facts["pairs"][name] for name in ("scores", "scorer")}, "run": facts.get("run", {})}
    defaults = _sections({name: Config.model_fields[name].annotation() for name in SECTIONS})  # type: ignore[misc]
    defaults["optim"] |= {name: facts["optim"][name] for name in AVERAGE_SETTINGS if name in facts["optim"]}
    return {**defaults, **unknown}


def average_begins(recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether a run with these ``facts`` averages its weights, and its checkpoint, with those ``recorded``, did not."""
    return "ema" in facts["optim"] and "ema" not in recorded["optim"]


def unrecorded_scores(recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The identity of a run's scores, if a checkpoint with these ``recorded`` facts does not say its own; else ''."""
    pairs = facts["pairs"]
    return next((pairs[name] for name in ("scores", "scorer") if pairs[name] and name not in recorded["pairs"]), "")


def _sections(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    sections = {name: section.model_dump() for name, section in settings.items()}
    # where numbers are stored and what is written at the end do not change the numbers
    del sections["inversion"]["store"], sections["lora"]["merge"], sections["optim"]["offload"]
    if not sections["optim"]["ema"]:
        for name in AVERAGE_SETTINGS:
            del sections["optim"][name]
    return sections


def trajectory_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint's facts that stored trajectories depend on."""
    kept = {name: value for name, value in facts.items() if name not in ("objective", "optim", "run", "lora")}
    kept["labels"] = {name: facts["labels"][name] for name in ("source", "drop_ties")}  # which pairs, and who wins
    return kept
