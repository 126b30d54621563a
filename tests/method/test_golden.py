"""The `release` fidelity reproduces what the authors' script computed, run in float32 with diffusers 0.20.0.

The values ship with the project (tests/golden/README.md); SMPO_GOLDEN names a larger set in their place.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import drawn
from helpers.golden import (
    KINDS,
    SCHEDULER,
    SHIPPED,
    Run,
    as_network,
    assert_golden,
    beta_of,
    chosen_folder,
    conditioning_of,
    find_runs,
    gradients_of,
    load_case,
    load_denoiser,
    name_of,
    outputs_of,
    relative_error,
    settings_for,
    weight_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smpo_fast.config import loading
from smpo_fast.method.inversion import invert
from smpo_fast.method.objective import OBJECTIVES, logit, pair_errors
from smpo_fast.method.schedule import NoiseSchedule


@pytest.mark.parametrize("run", find_runs(), ids=name_of)
def test_golden_release(run: Run) -> None:
    settings, values = settings_for(run), load_case(run)
    policy, reference = (load_denoiser(run.kind, which) for which in ("policy", "reference"))
    cond, weight, beta = conditioning_of(values), weight_of(run, values), beta_of(run.kind)
    path = NoiseSchedule.from_config(SCHEDULER).path(int(values["in.t"]), settings.inversion)

    x_t, tau = invert(as_network(policy, cond), values["in.x0"][None], [path], settings.inversion, chunk=1)
    x_t, tau, time = x_t[0], tau[0], torch.tensor([path.final_level.timestep])
    prediction = policy(x_t, time, cond)
    with torch.no_grad():
        frozen = reference(x_t, time, cond)
    errors, reference_errors = pair_errors(prediction, tau), pair_errors(frozen, tau)
    loss = OBJECTIVES[settings.objective.name].pair_loss(errors, reference_errors, weight, beta).mean()
    policy.unet.zero_grad()
    loss.backward()
    found = {
        "x_t": x_t[0], "tau": tau[0], "policy_pred": prediction[0], "ref_pred": frozen[0],
        "model_mse": errors[0], "ref_mse": reference_errors[0],
        "inside": logit(errors, reference_errors, weight, beta), "loss": loss, **gradients_of(policy.unet),
    }  # fmt: skip
    assert_golden(found, outputs_of(run, values))


def test_golden_values_tell_the_fidelities_apart() -> None:
    """The comparison above can fail: the paper's fidelity gives another x_t for the same pair."""
    run, settings = Run("sdxl", "smpo", "07"), loading.from_dict({"inversion": {"steps": 10}})
    values, policy = load_case(run, SHIPPED), load_denoiser("sdxl", "policy", SHIPPED)
    path = NoiseSchedule.from_config(SCHEDULER).path(int(values["in.t"]), settings.inversion)
    network = as_network(policy, conditioning_of(values))
    x_t, _ = invert(network, values["in.x0"][None], [path], settings.inversion, chunk=1)
    assert relative_error(x_t[0, 0], values["smpo.x_t"]) > 1e-2


def test_golden_set_that_ships_is_whole() -> None:
    """Both kinds and methods, both ends of time, a grid point and its neighbours; about a megabyte."""
    for kind in KINDS:
        for method in ("smpo", "ddiminpo"):
            runs = [run for run in find_runs(SHIPPED) if run[:2] == (kind, method)]
            assert {int(load_case(run, SHIPPED)["in.t"]) for run in runs} >= {0, 1, 100, 101, 102, 433, 801, 999}
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*.safetensors")) < 1.2e6


@pytest.mark.parametrize("damage", ["none", "a correction less", "another seed"])
def test_golden_weights_are_drawn_to_the_bit_or_refused(tmp_path: Path, damage: str) -> None:
    """Whatever the installed torch draws: one wrong bit in a network is an error."""
    base = drawn.read(SHIPPED / "sd15" / "reference" / "drawn.safetensors")
    file = tmp_path / "drawn.safetensors"
    shutil.copyfile(SHIPPED / "sd15" / "policy" / "drawn.safetensors", file)
    if damage == "none":
        assert drawn.read(file, base).keys() == base.keys()
        return
    kept = load_file(file)
    with safe_open(file, "pt") as stored:
        facts = stored.metadata()
    if damage == "another seed":
        facts["draw"] = facts["draw"].replace('"seed":1', '"seed":2')
    else:
        kept["fix.index"], kept["fix.value"] = kept["fix.index"][1:].clone(), kept["fix.value"][1:].clone()
    save_file(kept, file, facts)
    with pytest.raises(RuntimeError, match="not those of the golden values"):
        drawn.read(file, base)


def test_golden_folder_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a skip: whoever names a set wants it used."""
    monkeypatch.setenv("SMPO_GOLDEN", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere: no golden values there"):
        chosen_folder()
    monkeypatch.delenv("SMPO_GOLDEN")
    assert chosen_folder() == SHIPPED
