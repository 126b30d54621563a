"""The instrument itself: baselines that are right, a harness that catches what is slow or wrong, honest documents."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import resnet
from diffusers.models.attention_processor import AttnProcessor2_0
from helpers.golden import (
    SMPO_STEPS,
    Run,
    assert_golden,
    beta_of,
    find_runs,
    gradients_of,
    load_case,
    load_unet,
    name_of,
    outputs_of,
)
from helpers.paths import CONFIGS

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

import architectures  # noqa: E402
import counting  # noqa: E402
import gpu_report  # noqa: E402
import harness  # noqa: E402
import kernel_cases  # noqa: E402
import pairs  # noqa: E402
import reference_trainer  # noqa: E402
import report  # noqa: E402

from smpo_fast.config import loading  # noqa: E402

CPU = torch.device("cpu")
# A pytest of its own, with nothing of the one that it runs in (a process of pytest-xdist disables benchmarks).
NOT_INTERPRETED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}


# --- baselines ------------------------------------------------------------------------------------------------


@cache
def golden_trainer(kind: str, which: str) -> Any:
    policy, reference = (load_unet(kind, name) for name in ("policy", "reference"))
    recipe = reference_trainer.Recipe(SMPO_STEPS[kind], beta=beta_of(kind), checkpointing=kind == "sdxl")
    made = {"reference": reference_trainer.ReferenceTrainer, "best_eager": reference_trainer.BestEager}[which]
    return made(policy, reference.requires_grad_(False).eval(), recipe, CPU)


@pytest.mark.parametrize("run", [run for run in find_runs() if run.method == "smpo"], ids=name_of)
@pytest.mark.parametrize("which", ["reference", "best_eager"])
def test_golden_baselines(which: str, run: Run) -> None:
    """Both baselines compute what the released script's own lines computed."""
    trainer, values = golden_trainer(run.kind, which), load_case(run)
    added = None
    if "in.pooled" in values:
        added = {"text_embeds": values["in.pooled"].repeat(2, 1), "time_ids": values["in.time_ids"].repeat(2, 1)}
    condition = reference_trainer.Condition(values["in.prompt_embeds"].repeat(2, 1, 1), added)
    time = values["in.t"].repeat(2) if which == "reference" else int(values["in.t"])
    with torch.no_grad():
        x_t, tau = trainer.invert(values["in.x0"], condition, time)
    result = trainer.losses(x_t, tau, condition, time, values["in.p"])
    trainer.unet.zero_grad()
    result.loss.backward()
    found = {
        "x_t": x_t, "tau": tau, "policy_pred": result.policy_prediction, "ref_pred": result.reference_prediction,
        "model_mse": result.policy_errors, "ref_mse": result.reference_errors, "inside": result.inside,
        "loss": result.loss, **gradients_of(trainer.unet),
    }  # fmt: skip
    assert_golden(found, outputs_of(run, values))


def test_baselines_run_the_networks_of_diffusers() -> None:
    """Without what this project leaves out of attention and residual blocks; else a ratio would count that for both."""
    for trainer in (reference_trainer.ReferenceTrainer, reference_trainer.BestEager):
        made = trainer.build(architectures.TOY_OF["sdxl"], CPU, torch.float32)
        for unet in (made.unet, made.reference):
            assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
            blocks = {type(m) for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"}
            assert blocks == {resnet.ResnetBlock2D}


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_the_two_baselines_take_the_same_step(name: str) -> None:
    """Given the same latents and prompts they end at the same weights (fp32, same optimizer)."""
    toy = architectures.TOY_OF[name]
    recipe = reference_trainer.Recipe.of(toy, lr=1e-3, beta=2.0)  # with 5000 the loss of equal networks is rounding
    slow = reference_trainer.ReferenceTrainer.build(toy, CPU, torch.float32, recipe)
    fast = reference_trainer.BestEager.build(toy, CPU, torch.float32, recipe)
    slow.reference = fast.reference = architectures.make_unet(toy, CPU, torch.float32, seed=9).eval()
    before = [p.detach().clone() for p in fast.unet.parameters()]
    raw = reference_trainer.make_raw_pairs(toy, (433, 120))
    encoded = [slow.encode(pair) for pair in raw]
    drawn = iter(encoded)
    slow.encode = lambda pair: next(drawn)  # type: ignore[method-assign]  # the VAE's sample is drawn once, for both
    cached = [
        reference_trainer.CachedPair(latents, torch.zeros_like(latents), condition, pair.time, pair.p)
        for (latents, condition), pair in zip(encoded, raw, strict=True)
    ]
    slow.step(raw)
    fast.step(cached)
    assert slow.logs["train_loss"] == pytest.approx(fast.logs["train_loss"], rel=1e-5)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(fast.unet.parameters(), before, strict=True)])
    apart = [a.detach() - b.detach() for a, b in zip(slow.parameters, fast.unet.parameters(), strict=True)]
    assert torch.cat([d.flatten() for d in apart]).norm() < 1e-2 * moved.norm()


@pytest.mark.parametrize("clip", [0.01, pytest.param(1e9, marks=pytest.mark.slow)], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("which", ["reference", "best_eager", "best_eager in bf16"])
def test_a_baselines_step_is_the_clipped_mean_of_the_pairs_gradients(
    which: str, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain gradient descent: Adafactor and AdamW hide a wrong scale, so sums would look like means."""
    monkeypatch.setattr(reference_trainer, "make_optimizer", lambda weights, recipe: torch.optim.SGD(weights, lr=1.0))
    toy, dtype = architectures.TOY_OF["sd15"], torch.bfloat16 if "bf16" in which else torch.float32
    recipe = reference_trainer.Recipe.of(toy, beta=2.0, clip=clip)
    cached = reference_trainer.make_cached_pairs(toy, (433, 120), CPU, dtype)
    cached = [replace(pair, std=torch.zeros_like(pair.std)) for pair in cached]
    trainer: Any
    if which == "reference":
        trainer = reference_trainer.ReferenceTrainer.build(toy, CPU, dtype, recipe)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as in half precision
        drawn = iter((pair.mean, pair.condition) for pair in cached)
        trainer.encode = lambda pair: next(drawn)
        given: Any = reference_trainer.make_raw_pairs(toy, (433, 120))
        masters = trainer.parameters
    else:
        given, trainer = cached, reference_trainer.BestEager.build(toy, CPU, dtype, recipe)
        masters = trainer.masters
    weights, wanted = list(trainer.unet.parameters()), [torch.zeros_like(master) for master in masters]
    for pair in cached:
        time = torch.full((2,), pair.time) if which == "reference" else pair.time
        with torch.no_grad():
            x_t, tau = trainer.invert(pair.mean, pair.condition, time)
        loss = trainer.losses(x_t, tau, pair.condition, time, pair.p).loss
        for total, gradient in zip(wanted, torch.autograd.grad(loss, weights), strict=True):
            total += gradient.float() / len(cached)
    norm = torch.nn.utils.get_total_norm(wanted)
    assert clip > norm or clip < 0.9 * norm
    before = [master.detach().clone() for master in masters]
    trainer.step(given)
    for was, now, weight, gradient in zip(before, masters, weights, wanted, strict=True):
        moved = was - now.detach()
        torch.testing.assert_close(moved, gradient * min(1.0, clip / norm), rtol=1e-3, atol=1e-5 * min(1.0, clip))
        assert torch.equal(weight, now.to(weight.dtype))
    if which == "reference":
        assert all(weight.grad is None or not weight.grad.any() for weight in weights)


# --- the harness ----------------------------------------------------------------------------------------------

SUITE = """
import time

import torch

PAUSE, ERROR = {pause}, {error}


def test_baseline(bench):
    bench("group", "case", "plain", lambda: time.sleep(0.004), baseline="plain", seconds=0.1)


def test_kernel(bench):
    def call():
        time.sleep(PAUSE)
        return torch.ones(8) + ERROR

    bench("group", "case", "kernel", call, baseline="plain", reference=lambda: torch.ones(8), seconds=0.1)
"""


def run_suite(folder: Path, *options: str, pause: float, error: float = 0.0) -> subprocess.CompletedProcess[str]:
    """A suite of one kernel under the real conftest and harness."""
    folder.mkdir(exist_ok=True)
    for name in ("conftest.py", "harness.py"):
        shutil.copy(BENCHMARKS / name, folder)
    (folder / "test_suite.py").write_text(SUITE.format(pause=pause, error=error))
    words = [sys.executable, "-m", "pytest", ".", "--benchmark-only", "-p", "no:cacheprovider", *options]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=NOT_INTERPRETED)


@pytest.mark.slow
def test_a_slowed_and_a_wrong_kernel_are_caught(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    good = run_suite(tmp_path, "--benchmark-save=good", "--results", "results", pause=0.002)
    assert good.returncode == 0, good.stdout
    assert "against plain" in good.stdout and "baseline" in good.stdout
    assert len(list(tmp_path.glob("results/*/suite.json"))) == 1

    compare = ("--benchmark-compare", "--benchmark-compare-fail=median:50%")
    slowed = run_suite(tmp_path, *compare, pause=0.008)
    assert slowed.returncode != 0 and "Performance has regressed" in slowed.stdout + slowed.stderr

    wrong = run_suite(tmp_path, pause=0.0, error=1e-3)
    assert wrong.returncode != 0 and "not timed" in wrong.stdout
    assert "test_kernel" not in wrong.stdout.partition("benchmark 'group'")[2].partition("short test summary")[0]


def test_agreement_refuses_what_is_not_the_same() -> None:
    one = torch.ones(4)
    assert harness.agree("x", [one, {"a": one}], [one, {"a": one}], 0.0) == 0.0
    for other in (one * float("nan"), one * 1.01, torch.ones(5)):
        with pytest.raises(harness.WrongResult):
            harness.agree("x", other, one, 1e-4)
    with pytest.raises(harness.WrongResult):
        harness.agree("x", None, None, 1.0)


def test_every_timed_call_follows_a_reset_and_a_warm_up() -> None:
    order: list[str] = []
    timing = harness.measure(lambda: order.append("call"), CPU, seconds=0, least=4, reset=lambda: order.append("reset"))
    assert len(timing.seconds) == 4 and order == ["reset", "call"] * 7
    assert timing.median > 0


def test_a_small_call_is_timed_in_a_graph_without_the_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose flush takes 80 us and whose call takes 3 us."""
    clock = [0.0]

    def spend(seconds: float) -> None:
        clock[0] += seconds

    def replayed(body: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
        began = clock[0]
        for _ in range(harness.GRAPH_CALLS):
            body()
        return [clock[0] - began] * rounds

    flush = SimpleNamespace(zero_=lambda: spend(80e-6))
    zero = dict.fromkeys(("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"), lambda device: 0)
    monkeypatch.setattr(harness, "replayed", replayed)
    monkeypatch.setattr(harness.torch, "empty", lambda *_, **__: flush)
    monkeypatch.setattr(harness.torch, "cuda", SimpleNamespace(**zero))
    timing = harness._measure_graph(lambda: spend(3e-6), CPU, 5)
    assert timing.seconds == pytest.approx([3e-6] * 5)
    with pytest.raises(RuntimeError, match="take no time"):
        harness._measure_graph(lambda: None, CPU, 5)


def test_contenders_invert_alike_and_a_wrong_one_is_refused() -> None:
    toy = architectures.SDXL_TOY
    pair = pairs.check_pair(toy, CPU)
    wanted = pairs.make_reference(toy, CPU, 1).invert(pair)
    ours_ = pairs.make_ours(toy, CPU, 1)
    assert pairs.check_agrees(ours_, toy, CPU, wanted) < 1e-4
    other = pairs.make_ours(toy, CPU, 1, {"inversion": {"fidelity": "paper"}})
    with pytest.raises(harness.WrongResult):
        pairs.check_agrees(other, toy, CPU, wanted)


def test_every_operation_has_inputs_here() -> None:
    """A new kernel must be timed: teach ``kernel_cases`` to make its arguments."""
    assert kernel_cases.unknown(architectures.SDXL_TOY) == []


@pytest.mark.slow
def test_the_gpu_report_runs_end_to_end_on_a_cpu(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARKS / "gpu_report.py"), "--device", "cpu", "--toy", "--out", str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, env=NOT_INTERPRETED)
    assert run.returncode == 0, run.stdout + run.stderr
    for part in gpu_report.PARTS:
        facts = json.loads((tmp_path / f"{part}.json").read_text())
        assert facts["complete"] and facts["rows"] and facts["environment"]["commit"] is not False
        failures = [row for row in facts["rows"] if str(row.get("skipped", "")).startswith("failed")]
        assert not failures


def test_a_part_that_fails_or_hangs_does_not_stop_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(report: gpu_report.Report) -> None:
        """Breaks after its first result."""
        report.add("first", value=1.0)
        raise RuntimeError("broken")

    def hanging(report: gpu_report.Report) -> None:
        """Hangs after its first result."""
        report.add("first", value=os.getpid())
        time.sleep(600)

    def fine(report: gpu_report.Report) -> None:
        """Works."""
        report.add("first", value=os.getpid())

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu_report, "START_METHOD", "fork")  # a fresh process would not know these parts
    monkeypatch.setattr(gpu_report, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu_report, "GRACE_SECONDS", 0.5)
    parts = {"a": (broken, 30.0), "b": (hanging, 0.5), "c": (fine, 30.0), "d": (fine, 30.0)}
    monkeypatch.setattr(gpu_report, "PARTS", parts)
    assert gpu_report.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts}
    assert [facts["complete"] for facts in found.values()] == [False, False, True, True]
    assert all([row["name"] for row in facts["rows"]] == ["first"] for facts in found.values())
    hung, third, fourth = (found[name]["rows"][0]["value"] for name in "bcd")
    assert hung != third == fourth, "a process is replaced after a hang, and only then"
    text = capfd.readouterr().out
    assert "a: failed with exit status 1" in text and "b: killed after its time limit" in text


def test_the_device_of_the_report_has_an_index() -> None:
    """``torch.cuda.set_per_process_memory_fraction``, which plays a smaller card, takes no device without one."""
    assert torch.cuda._utils._get_device_index(gpu_report.open_device("cuda")) == 0


def test_the_report_runs_the_tests_of_the_installed_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, and not those of a folder of the same name where the program happens to be started."""
    asked: dict[str, Any] = {}

    def run(words: list[str], **options: Any) -> Any:
        asked.update(options, words=words)
        return subprocess.CompletedProcess(words, 0, "9 passed", "")

    monkeypatch.setattr(subprocess, "run", run)
    done = gpu_report.Report("correctness", CPU, tmp_path / "correctness.json", time.monotonic() + 60, toy=True)
    done.facts["rows"] = []
    gpu_report._pytest(done, tmp_path)
    assert asked["words"][1:4] == ["-P", "-m", "pytest"] and asked["env"]["TRITON_INTERPRET"] == "0"


def test_the_whole_pair_is_timed_with_the_settings_that_the_search_found(tmp_path: Path) -> None:
    gpu_results(tmp_path)
    pair = gpu_report.Report("pair", CPU, tmp_path / "a-gpu" / "pair.json", time.monotonic() + 60, toy=True)
    assert gpu_report._tuned(pair) == {"batch": {"micro_pairs": 4}}
    (tmp_path / "a-gpu" / "tune.json").unlink()
    assert gpu_report._tuned(pair) == {}


@pytest.mark.slow
def test_the_report_plans_a_recipe_with_its_adapters() -> None:
    lora = gpu_report.RECIPES["SDXL, LoRA, within 12 GB"][2]
    full = {**lora, "lora": {"rank": 0}, "model": {"gradient_checkpointing": True}}
    adapted, whole = (gpu_report._predicted_peak(architectures.SDXL_TOY, r, "bf16") for r in (lora, full))
    assert whole - adapted > 5e6, "two copies of the weights, masters, sums and states of the whole network"


@pytest.mark.slow
def test_recipes_fit_the_cards_that_they_are_for() -> None:
    for name, (kind, card, overrides) in gpu_report.RECIPES.items():
        planned = gpu_report._predicted_peak(architectures.ALL[kind], overrides, "bf16")
        assert 0.25 * card < planned < 0.95 * card, name


def test_the_parts_of_the_report_leave_at_most_eight_files() -> None:
    """More do not come back from a lent card; and all of them together have their time."""
    assert len(gpu_report.PARTS) <= 8
    assert sum(seconds for _, seconds in gpu_report.PARTS.values()) <= gpu_report.TOTAL_SECONDS


# --- documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [report.PERFORMANCE, report.README], ids=lambda d: d.name)
def test_every_published_number_has_a_file_behind_it(document: Path) -> None:
    """Between the markers stands what report.py makes of the JSON files: run ``python benchmarks/report.py``."""
    shown = report.between(document.read_text())
    if shown is None:
        pytest.skip(f"{document.name} has no markers")
    assert shown == report.documents()[document]
    for name in report.charts_of(report.load(report.RESULTS), json.loads(report.COUNTED.read_text())):
        assert (report.CHARTS / name).is_file()


@pytest.mark.parametrize("name", ["sdxl_smpo_fast", "sd15_smpo_fast"])
def test_the_recipes_state_the_measured_errors_of_their_approximations(name: str) -> None:
    studies = [json.loads(file.read_text()) for file in report.RESULTS.glob("*/inversion_frontier.json")]
    text, rows = (CONFIGS / f"{name}.toml").read_text(), [row for study in studies for row in study["rows"]]
    steps = loading.load(CONFIGS / f"{name}.toml").inversion.steps
    measured = {row["way"]: row["tau_error"] for row in rows if row["steps"] == steps}
    assert f"error {measured['pec']:.3f} in {steps} steps; the paper's ReNoise {measured['renoise, paper']:.3f}" in text
    assert f"lowers it to {measured['pec, angle']:.3f}" in text
    assert f"error {measured['pec, 4 landings']:.3f} by its own fine solution" in text
    assert re.search(rf"fp8 = true .*{measured['pec, fp8']:.3f}", text)


def test_no_time_is_published_outside_the_markers() -> None:
    """Only the limit's derivation may name a time by hand, and it must be the counted one."""
    text = report.PERFORMANCE.read_text()
    outside = text.replace(report.between(text) or "", "")
    times = set(re.findall(r"\b\d+(?:\.\d+)? (?:us|ms|s|GB/s|TFLOP/s)\b", outside))
    counted = json.loads(report.COUNTED.read_text())
    rate = counted["assumed_flops_per_second"]
    limit = harness.clock(counted["models"]["sdxl"]["pair_flops"]["total"] / rate)
    assert times == {limit, f"{rate / 1e12:.0f} TFLOP/s"}


def test_counted_numbers_are_those_of_the_tests() -> None:
    model = json.loads(report.COUNTED.read_text())["models"]["sdxl"]
    with torch.no_grad():
        assert model["pair_flops"]["reference"] == counting.flops(counting.unet_call(architectures.SDXL, 2))


def gpu_results(folder: Path) -> None:
    """What a GPU report leaves behind, with made-up numbers."""
    environment = {**harness.environment(CPU), "cuda": "13.0", "device": "A GPU", "driver": "1"}

    def write(part: str, *rows: dict[str, Any]) -> None:
        facts = {"part": part, "toy": False, "complete": True, "environment": environment, "rows": rows}
        (folder / "a-gpu").mkdir(exist_ok=True, parents=True)
        (folder / "a-gpu" / f"{part}.json").write_text(json.dumps(facts))

    baseline = gpu_report.ladder.AUTOCAST
    rung = {"images": 2, "baseline": baseline, "TFLOPs": 200.0, "share_of_matmul": 0.25}
    times = {baseline: 0.06, "compiled": 0.03}
    write(
        "tune",
        {"name": "sdxl: eager", "settings": "eager", "pair_seconds": 0.5},
        {"name": "sdxl: model.compile", "settings": 'model.compile="all"', "skipped": "out of memory"},
        {"name": "tuned", "settings": "batch.micro_pairs=4", "chosen": {"batch.micro_pairs": 4}},
    )
    write(
        "ladder",
        {"name": "copy_GBps", "value": 4000.0},
        *({"name": n, "rung": n, "seconds": s, **rung} for n, s in times.items()),
        {"name": "c", "skipped": ""},
    )
    phases = {"inversion_seconds": 0.3, "reference_seconds": 0.1, "policy_seconds": 0.1, "optimizer_seconds": 0.01}
    write("pair", *({"name": n, "contender": n, "architecture": "sdxl", "seconds": s, **phases}
                    for n, s in (("reference", 1.0), ("best_eager", 0.8), ("ours", 0.5))))  # fmt: skip
    write("memory", {"name": "full", "peak_bytes": 40_000_000_000, "policy_bytes": 5_000_000_000})
    shutil.copy(report.COUNTED, folder / "counted.json")


def test_gpu_results_are_rendered_with_their_ratios(tmp_path: Path) -> None:
    gpu_results(tmp_path)
    texts = report.documents(tmp_path)
    page = texts[report.PERFORMANCE]
    assert "not measured yet" in page, "SD1.5 and the kernels are missing here"
    assert "| compiled | 2 | 30 ms | 200 | 25% | x2.00 |" in page
    assert "| ours | 500 ms | 300 ms | 100 ms | 100 ms | 10 ms | x2.00 | x1.60 |" in page
    assert "x3.47" in page, "the physical limit against the reference"
    assert "copy_GBps 4000" in page
    assert "Chosen: `batch.micro_pairs=4`" in page
    assert "| `eager` | 500 ms |" in page
    assert '| `model.compile="all"` | out of memory |' in page
    assert "| full | 40.0 | 5.0 |" in page and "A GPU, driver 1" in texts[report.README]
    charts = report.charts_of(report.load(tmp_path), json.loads(report.COUNTED.read_text()))
    assert sorted(charts) == ["a-gpu-ladder.png", "a-gpu-memory.png", "a-gpu-pair.png"]
    for name, chart in charts.items():
        report.draw(tmp_path / name, chart)
        assert (tmp_path / name).stat().st_size > 1000


def test_a_document_keeps_what_stands_around_the_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.replaced(text, "new")
    assert report.between(new) == "new" and new.startswith("before\n") and new.endswith("\nafter\n")
    assert report.between("nothing") is None
