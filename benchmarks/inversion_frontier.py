"""Program: accuracy of inversion solvers, grids and approximations per network call.

    python benchmarks/inversion_frontier.py [--config FILE] [section.key=value ...]     any pipeline and pairs
    python benchmarks/inversion_frontier.py --train --seeds 0 1                         also the training outcome

For every inversion, on the same pairs and timesteps, it measures: network calls per image; the error of tau against a
fine solution of the flow (Heun, 250 steps); the round trip, that is the error of x_0 after sampling back with DDIM; and
the cosine between the policy's gradient and the one that the fine solution gives. ``--train`` trains the embedded run
with each inversion and evaluates it several times on the way, so that runs can be compared at equal optimizer steps and
at equal calls. Results: inversion_frontier.json in ``--out``, a plot in ``--picture``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from smpo_fast import train
from smpo_fast.common import runtime
from smpo_fast.common.runtime import World
from smpo_fast.config import arguments, loading
from smpo_fast.config.schema import Config, Inversion
from smpo_fast.method import inversion
from smpo_fast.method.batch import Pairs
from smpo_fast.method.objective import OBJECTIVES, pair_errors
from smpo_fast.method.schedule import NoisePath
from smpo_fast.models import load, locate
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.caller import InferenceCaller
from smpo_fast.training.job import Job
from smpo_fast.training.loader import Loader
from smpo_fast.training.run import prepare_cache
from smpo_fast.training.run_log import read_metrics

FINE = {"solver": "heun", "steps": 250}
SAMPLER_STEPS = 25
# name -> settings of [inversion]; each is tried at several numbers of steps
WAYS: dict[str, dict[str, Any]] = {
    "ddim (source time)": {"solver": "ddim"},
    "ddim (destination time)": {"solver": "ddim", "first_time": "destination"},
    "renoise, released": {"fidelity": "release", "landing": "exact", "first_step": "skip", "timesteps": "stratified"},
    "renoise, paper": {"solver": "renoise"},
    "renoise, even grid": {"solver": "renoise", "grid": "even"},
    "heun": {"solver": "heun"},
    "heun, angle": {"solver": "heun", "average": "angle"},
    "ab2": {"solver": "ab2"},
    "pec": {"solver": "pec"},
    "pec, even grid": {"solver": "pec", "grid": "even"},
    "pec, angle": {"solver": "pec", "average": "angle"},
    "pec, sigma spacing": {"solver": "pec", "spacing": "sigma"},
    "ddim, sigma spacing": {"solver": "ddim", "spacing": "sigma"},
    "pec, 4 landings": {"solver": "pec", "per_trajectory": 4},
    "renoise, paper, deep features reused": {"solver": "renoise", "reuse_deep": True},
    "pec, fp8": {"solver": "pec", "fp8": True},
}
STEPS = (2, 4, 5, 10, 20)
TRAINED = (
    ("renoise, paper", 5), ("pec", 5), ("pec", 2), ("pec, 4 landings", 5), ("ddim (source time)", 5),
    ("renoise, released", 5),
)  # fmt: skip


class Study:
    """The pairs, timesteps and network on which every inversion is measured."""

    def __init__(self, settings: Config, pairs: int, cache: Path) -> None:
        values = settings.model_dump()
        values["run"]["dir"], values["data"]["cache"] = str(cache.parent), str(cache)
        values["batch"] |= {"pairs_per_step": pairs, "inversion_pairs": min(pairs, settings.batch.inversion_pairs)}
        values["objective"]["name"], values["data"]["prompt_dropout"] = "smpo", 0.0
        self.config = loading.from_dict({**values, "inversion": {}})
        job = Job(self.config, None)
        prepare_cache(job)
        self.device, self.cache = job.world.device, cache
        (self.pairs,) = (
            p.map(lambda t: t.to(self.device)) for p in Loader(job.open_cache(), self.config, World()).step_batch(0)
        )
        self.precision, self.source = job.precision, job.source
        dtype = runtime.COMPUTE_DTYPES[job.precision]
        self.unet = load.load_unet(job.source, self.config.model, dtype, self.device)
        self._fine: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def measure(self, way: Mapping[str, Any], steps: int) -> dict[str, float]:
        """Calls per image, the three error measures and the seconds of one inversion."""
        settings = loading.from_dict({"inversion": {**way, "steps": steps}}).inversion
        landings = settings.per_trajectory
        pairs = self.pairs.take(slice(0, len(self.pairs) // landings))
        began = time.perf_counter()
        x_t, tau, paths = self.invert(settings, pairs)
        harness.synchronize(self.device)
        seconds = time.perf_counter() - began
        _, fine, gradient = self.fine(landings)
        calls = sum(inversion.network_calls(p.depth, settings) for p in paths)
        return {
            "calls": calls / (len(paths) * landings),
            "tau_error": float((tau - fine).norm() / fine.norm()),
            "round_trip": self.round_trip(x_t, pairs, paths),
            "gradient_cosine": float(torch.cosine_similarity(self.gradient(x_t, tau, pairs, paths), gradient, dim=0)),
            "seconds": seconds,
        }

    def invert(self, settings: Inversion, pairs: Pairs) -> tuple[Tensor, Tensor, list[NoisePath]]:
        """x_t and tau [M, B, 2, C, H, W] and the paths."""
        schedule = locate.schedule_of(self.source, settings)
        # all inversions get the same timesteps, drawn from the plain schedule
        plain = settings.model_copy(update={"landing": "exact"})
        drawn = schedule.paths(len(pairs) * settings.per_trajectory, plain, self.config.run.seed, 0)
        times = sorted((tuple(x.level.timestep for x in p.landings) for p in drawn), reverse=True)
        paths = sorted((schedule.path(t, settings) for t in times), key=lambda p: -p.depth)
        denoiser = Denoiser(self.unet.eval(), self.source, schedule, self.precision, self.device)
        chunk = self.config.batch.inversion_pairs
        caller = InferenceCaller(denoiser, self.config.model, settings, chunk=chunk)
        caller.weights_changed()
        x_t, tau = inversion.invert(
            lambda rows: caller.predictor(pairs.cond.take(rows)), pairs.latents, paths, settings, chunk=chunk,
            dtype=caller.input_dtype,
        )  # fmt: skip
        return x_t, tau, paths

    def fine(self, landings: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, tau and gradient of the fine solution."""
        if landings not in self._fine:
            settings = loading.from_dict({"inversion": {**FINE, "per_trajectory": landings}}).inversion
            pairs = self.pairs.take(slice(0, len(self.pairs) // landings))
            x_t, tau, paths = self.invert(settings, pairs)
            self._fine[landings] = x_t, tau, self.gradient(x_t, tau, pairs, paths)
        return self._fine[landings]

    def examples(
        self, x_t: Tensor, pairs: Pairs, paths: Sequence[NoisePath], size: int
    ) -> Iterator[tuple[int, slice, Tensor, list[int]]]:
        """Batches of pairs: landing number, rows, and their timesteps as a tensor and as a list."""
        for m in range(len(x_t)):
            for first in range(0, len(pairs), size):
                rows = slice(first, first + size)
                times = [p.landings[m].level.timestep for p in paths[rows]]
                yield m, rows, torch.tensor(times, device=self.device), times

    @torch.no_grad()
    def round_trip(self, x_t: Tensor, pairs: Pairs, paths: Sequence[NoisePath]) -> float:
        """Relative error of x_0 after DDIM sampling from x_t down to time 0, in equal steps of t."""
        schedule = locate.schedule_of(self.source, self.config.inversion)
        denoiser = Denoiser(self.unet.eval(), self.source, schedule, self.precision, self.device)
        wrong, whole = 0.0, 0.0
        for m, rows, _, times in self.examples(x_t, pairs, paths, self.config.batch.inversion_pairs):
            x, cond = x_t[m, rows].clone(), pairs.cond.take(rows)
            for k in range(SAMPLER_STEPS, 0, -1):
                here = [round(t * k / SAMPLER_STEPS) for t in times]
                there = [round(t * (k - 1) / SAMPLER_STEPS) for t in times]
                signal, noise = self._levels(schedule, here)
                to_signal, to_noise = self._levels(schedule, there)
                eps = denoiser.eps(x, torch.tensor(here, device=self.device), cond)
                x = to_signal * (x - noise * eps) / signal + to_noise * eps
            signal, _ = self._levels(schedule, [0] * len(times))
            wrong += float((x / signal - pairs.latents[rows]).square().sum())
            whole += float(pairs.latents[rows].square().sum())
        return (wrong / whole) ** 0.5

    def _levels(self, schedule: Any, times: Sequence[int]) -> tuple[Tensor, Tensor]:
        levels = torch.tensor([schedule.level(t)[1:] for t in times], device=self.device)
        return levels[:, 0, None, None, None, None], levels[:, 1, None, None, None, None]

    def gradient(self, x_t: Tensor, tau: Tensor, pairs: Pairs, paths: Sequence[NoisePath]) -> Tensor:
        """The gradient of the mean loss while policy and reference are equal, as one float32 vector."""
        schedule = locate.schedule_of(self.source, self.config.inversion)
        denoiser = Denoiser(self.unet.train(), self.source, schedule, self.precision, self.device)
        objective = OBJECTIVES["smpo"]
        self.unet.zero_grad()
        total = len(pairs) * len(x_t)
        for m, rows, time_, _ in self.examples(x_t, pairs, paths, self.config.batch.micro_pairs):
            target = denoiser.target(pairs.latents[rows], tau[m, rows], time_)
            prediction = denoiser(x_t[m, rows], time_, pairs.cond.take(rows))
            frozen = pair_errors(prediction.detach(), target)
            out = objective.losses(prediction, frozen, target, pairs.weight[rows], self.config.objective.beta)
            (out.loss.sum() / total).backward()
        found = torch.cat([p.grad.float().flatten().cpu() for p in self.unet.parameters() if p.grad is not None])
        self.unet.zero_grad()
        return found


def train_and_score(way: Mapping[str, Any], steps: int, seed: int, folder: Path, cache: Path, looks: int) -> list[Any]:
    """Reward gain on held-out prompts, calls and seconds at ``looks`` evenly spaced points of the embedded run."""
    rows = []
    whole = loading.load().run.steps
    words = [f"inversion.{key}={json.dumps(value)}" for key, value in {**way, "steps": steps}.items()]
    for look in range(1, looks + 1):
        done = whole * look // looks
        run = [f"run.dir={folder}", f"data.cache={cache}", f"run.seed={seed}", f"run.steps={done}", *words]
        assert train.main(run) == 0
        evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        comparisons = {row["name"]: row for row in evaluation["comparisons"]}
        log = read_metrics(folder)
        settings = loading.load(folder / "config.toml")
        schedule = locate.schedule_of(locate.find(settings.model), settings.inversion)
        paths = [
            p
            for step in range(done)
            for p in schedule.paths(settings.batch.pairs_per_step, settings.inversion, seed, step)
        ]
        rows.append(
            {
                "steps": done,
                "calls": 2 * sum(inversion.network_calls(p.depth, settings.inversion) for p in paths),
                "seconds": sum(row["seconds"] for row in log),
                **{f"{name}_gain": comparisons[name]["gain"] for name in ("reward", "shape")},
                "reward_error": (comparisons["reward"]["gain_high"] - comparisons["reward"]["gain_low"]) / 3.92,
                "win_rate": comparisons["reward"]["win_rate"],
            }
        )
    return rows


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Plot each error measure over network calls per image, one line per inversion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (("tau_error", "error of tau against the fine solution"), ("round_trip", "round trip: error of x_0"),
              ("miss", "1 - cosine of the policy's gradient with the fine solution's"))  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 5.2), constrained_layout=True)
    for axis, (key, title) in zip(axes, panels, strict=True):
        for number, name in enumerate(dict.fromkeys(row["way"] for row in found["rows"])):
            rows = [row for row in found["rows"] if row["way"] == name]
            values = [1 - row["gradient_cosine"] if key == "miss" else row[key] for row in rows]
            style = "-" if number < 10 else "--"
            axis.plot([row["calls"] for row in rows], values, style, marker="o", markersize=3, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("network calls per image")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; prints a table and writes the JSON and the PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_settings(parser)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="NAME")
    parser.add_argument("--grid", type=int, nargs="+", default=list(STEPS), metavar="STEPS")
    parser.add_argument("--train", action="store_true", help="train and score the embedded run with each of TRAINED")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--looks", type=int, default=3, help="evaluations during each run")
    parser.add_argument(
        "--out", type=Path, help="folder of inversion_frontier.json; default: benchmarks/results/<device>"
    )
    parser.add_argument("--picture", type=Path, default=harness.ROOT / "docs" / "benchmarks" / "inversion_frontier.png")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(arguments.settings_of(args), args.pairs, Path(scratch) / "cache")
        out = args.out or harness.RESULTS / harness.folder_name(study.device)
        out.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"environment": harness.environment(study.device), "pairs": args.pairs, "rows": []}
        for name, steps in ((name, steps) for name in args.ways for steps in args.grid):
            row = study.measure(WAYS[name], steps)
            found["rows"].append({"way": name, "steps": steps, **row})
            harness.say(f"{name:38} {steps:3}", *(f"{key} {value:.4g} " for key, value in row.items()))
            (out / "inversion_frontier.json").write_text(json.dumps(found, indent=1))
        draw(found, args.picture)
        if args.train:
            found["training"] = []
            for seed in args.seeds:
                for name, steps in TRAINED:
                    folder = Path(scratch) / f"{seed}-{name}-{steps}".replace(" ", "_")
                    looks = train_and_score(WAYS[name], steps, seed, folder, study.cache, args.looks)
                    found["training"].append({"way": name, "steps": steps, "seed": seed, "looks": looks})
                    harness.say(name, steps, f"seed {seed}", looks[-1])
                    (out / "inversion_frontier.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
