"""Presets: what the name of an objective, fidelity, solver or protocol implies for ``[inversion]`` and ``[eval]``."""

from __future__ import annotations

from typing import Any

_SECOND_ORDER = {"renoise_steps": 1, "first_time": "source", "renoise_time": "destination", "average": "mean"}
SOLVER_PRESETS: dict[str, dict[str, Any]] = {
    "renoise": {},
    "ddim": {"renoise_steps": 0},
    "heun": _SECOND_ORDER,
    "ab2": {"renoise_steps": 0, "first_time": "source"},
    "pec": _SECOND_ORDER,
}


# The presets apply to keys that neither the file nor the command line gives: fidelity first, then objective, then
# solver, each of which overrides the one before.
FIDELITY_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "release": {
        "grid": "release",
        "landing": "mismatch",
        "first_step": "keep",
        "renoise_time": "source",
        "average": "mean",
        "timesteps": "independent",
    },
}
OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "smpo": {},
    "dpo": {"source": "noise"},
    "inpo": {"renoise_steps": 0, "noise": 0.1},
    "sft": {"source": "noise"},
}

# Protocols of other evaluations, as far as their code says; docs/evaluation.md has the sources.
PROTOCOL_PRESETS: dict[str, dict[str, Any]] = {
    "ours": {},
    "sdpo": {"sampler": "euler", "steps": 50, "guidance": 7.5, "noise": "same", "seed": 0},
    "linear-dpo": {"steps": 50, "guidance": 5.0, "noise": "running", "seed": 0},
    "dro": {"steps": 50, "guidance": 7.5, "noise": "index", "seed": 0},
    "lpo": {"guidance": 5.0, "seed": 42},
}


def apply_presets(given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings by section, with the keys of ``[inversion]`` and ``[eval]`` that presets imply, unless given."""
    inversion = given.get("inversion", {})
    objective = _preset(OBJECTIVE_PRESETS, given.get("objective", {}).get("name", "smpo"))
    fidelity = _preset(FIDELITY_PRESETS, inversion.get("fidelity", "paper"))
    solver = _preset(SOLVER_PRESETS, inversion.get("solver", "renoise"))
    evaluation = given.get("eval", {})
    protocol = _preset(PROTOCOL_PRESETS, evaluation.get("protocol", "ours"))
    return {
        **given,
        "inversion": {**fidelity, **objective, **solver, **inversion},
        "eval": {**protocol, **evaluation},
    }


def _preset(presets: dict[str, dict[str, Any]], name: Any) -> dict[str, Any]:
    """The preset of a name; nothing for what is no name, which validation refuses afterwards."""
    return presets.get(name, {}) if isinstance(name, str) else {}
