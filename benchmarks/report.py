"""Program: renders tables and charts for docs/performance.md and README.md from the JSON files in benchmarks/results.

    python benchmarks/report.py              # render the results there are
    python benchmarks/report.py --check      # only compare documents and files; exit status 1 if they differ
    python benchmarks/report.py --recount    # first count FLOPs, bytes, launches and memory again (two minutes)

Everything between a document's markers is generated, so that no number is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, clock, say

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
COUNTED = RESULTS / "counted.json"
CHARTS = ROOT / "docs" / "benchmarks"
FRONTIER = CHARTS / "inversion_frontier.png"
PERFORMANCE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
ASSUMED_RATE = 790e12  # FLOP/s of a large bf16 matrix product on an H200; the limits are computed for this rate
# inversions whose network calls are counted: the two fidelities, and `paper` with a solver of one call per step
INVERSIONS: dict[str, dict[str, Any]] = {
    "release": {"fidelity": "release"}, "paper": {}, "paper, pec": {"solver": "pec"},
    "paper, pec, 4 timesteps a trajectory": {"solver": "pec", "per_trajectory": 4},
}  # fmt: skip
REFERENCE, BEST_EAGER = "reference", "best_eager"
NOT_YET = "not measured yet"
Files = Mapping[str, Mapping[str, Any]]  # part -> its JSON


def load(results: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Device folder -> part -> JSON, sorted. Toy runs on a GPU are left out: they only check that everything runs."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(results.glob("*/*.json")):
        facts = json.loads(file.read_text())
        if facts["rows"] and not (facts.get("toy") and facts["environment"]["cuda"]):
            found.setdefault(file.parent.name, {})[file.stem] = facts
    return found


def is_gpu(files: Files) -> bool:
    """Whether the results of a device were measured on a GPU."""
    return any(facts["environment"]["cuda"] for facts in files.values())


# --- counting -------------------------------------------------------------------------------------------------


def recount() -> None:
    """Count what is the same on every machine and write it to ``counted.json``."""
    from architectures import SD15, SDXL

    models = {architecture.name: _counted(architecture) for architecture in (SDXL, SD15)}
    facts = {"assumed_flops_per_second": ASSUMED_RATE, "models": models}
    COUNTED.parent.mkdir(parents=True, exist_ok=True)
    COUNTED.write_text(json.dumps(facts, indent=1) + "\n")


def _counted(architecture: Any) -> dict[str, Any]:
    import counting
    import ours
    import torch
    from architectures import make_unet

    calls = {fidelity: _calls(fidelity, architecture.inversion_steps) for fidelity in INVERSIONS}
    flops = counting.pair_flops(architecture, calls["release"])
    call = counting.unet_call(architecture, 2)
    with torch.no_grad(), counting.fused_attention(), counting.DeviceSpy() as spy:
        call()
    unet = make_unet(architecture, counting.META, torch.float32)
    return {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "resolution": architecture.resolution,
        "calls_per_picture": calls,
        "pair_flops": flops,
        "paper_pair_flops": flops["total"] + (calls["paper"] - calls["release"]) * flops["reference"],
        "launches_per_call": sum(spy.launches.values()),
        "saved_bytes_per_pair": {
            name: counting.saved_bytes_of_a_pair(architecture, checkpointing)
            for name, checkpointing in (("none", False), ("checkpointing", True))
        },
        "planned_peak_bytes": {
            name: ours.planned_peak(architecture, checkpointing)
            for name, checkpointing in (("none", False), ("checkpointing", True))
        },
    }


def _calls(fidelity: str, steps: int) -> float:
    """No-gradient calls per image, averaged over all timesteps."""
    from architectures import SCHEDULER

    from smpo_fast.config import loading
    from smpo_fast.method import inversion
    from smpo_fast.method.schedule import NoiseSchedule

    schedule = NoiseSchedule.from_config(SCHEDULER)
    run = loading.from_dict(
        {"inversion": {**INVERSIONS[fidelity], "steps": steps, "timesteps": "stratified"}}
    ).inversion
    paths = schedule.paths(len(schedule), run, 0, 0)  # this many stratified draws give every timestep once
    return sum(inversion.network_calls(p.depth, run) for p in paths) / len(schedule)


# --- rendering ------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column aligned left, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def limits(counted: Mapping[str, Any]) -> str:
    """Table of the FLOPs of a pair, and the time they take at the assumed rate."""
    rate = counted["assumed_flops_per_second"]
    rows = []
    for name, model in counted["models"].items():
        flops, paper = model["pair_flops"], model["paper_pair_flops"]
        for part in ("inversion", "reference", "policy forward", "policy backward", "total"):
            share = f"{flops[part] / flops['total']:.1%}"
            what = f"{name} {model['resolution']} px: {part}"
            rows.append([what, f"{flops[part] / 1e12:.1f}", share, clock(flops[part] / rate)])
        what = f"{name} {model['resolution']} px: total, `paper` fidelity"
        rows.append([what, f"{paper / 1e12:.1f}", "", clock(paper / rate)])
    head = ("one pair (two images), `release` fidelity", "TFLOP", "share", f"at {rate / 1e12:.0f} TFLOP/s")
    return markdown(head, rows)


def counts(counted: Mapping[str, Any]) -> str:
    """Table of calls, launches, saved activations and the simulated peak of memory."""
    models = counted["models"].values()
    rows = [
        ["parameters, 10^9", *(f"{m['parameters'] / 1e9:.3f}" for m in models)],
        *(
            [f"no-gradient calls per image, `{name}`", *(f"{m['calls_per_picture'][name]:.2f}" for m in models)]
            for name in INVERSIONS
        ),
        ["kernel launches of a half-precision call", *(f"{m['launches_per_call']:,}" for m in models)],
    ]
    for key, words in (("saved_bytes_per_pair", "GB of activations saved for the backward pass of a pair"),
                       ("planned_peak_bytes", "peak GB of full fine-tuning, simulated")):  # fmt: skip
        for how, name in (("none", "no checkpointing"), ("checkpointing", "with checkpointing")):
            rows.append([f"{words}, {name}", *(f"{m[key][how] / 1e9:.2f}" for m in models)])
    heads = [f"{name} {model['resolution']} px" for name, model in counted["models"].items()]
    return markdown(("counted", *heads), rows)


def provenance(files: Files) -> str:
    """One line: device, library versions, commits and dates of the results."""
    facts = next(iter(files.values()))["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    where = [facts["device"], *([f"driver {facts['driver']}"] if facts["driver"] else []), f"Python {facts['python']}"]
    commits = sorted({f"{f['environment']['commit']}{'+changes' if f['environment']['dirty'] else ''}"
                      for f in files.values()})  # fmt: skip
    dates = sorted({f["environment"]["date"] for f in files.values()})
    return f"*{', '.join(where)}; {versions}; commit {', '.join(commits)}; {', '.join(dates)}.*"


def ratio(seconds: float, others: Mapping[str, float], baseline: str) -> str:
    """``x1.23``, or a dash if the baseline was not measured."""
    return f"x{others[baseline] / seconds:.2f}" if baseline in others else "-"


def suite_section(files: Files, groups: Sequence[str]) -> str:
    """Table of groups of the pytest-benchmark suite: medians, and ratios to the baseline that each row names."""
    rows = [row for row in files["suite"]["rows"] if any(row["group"].startswith(g) for g in groups)]
    lines = []
    for row in rows:
        same = {r["implementation"]: r["seconds"] for r in rows
                if (r["group"], r["case"]) == (row["group"], row["case"])}  # fmt: skip
        against = [f"{ratio(row['seconds'], same, b)} against {b}" for b in (row["baseline"], row.get("also"))
                   if b and b != row["implementation"]]  # fmt: skip
        lines.append([f"{row['group']}, {row['case']}", row["implementation"], clock(row["seconds"]),
                      "; ".join(against) or "baseline"])  # fmt: skip
    return markdown(("what", "implementation", "median", "ratio (above 1 is faster)"), lines)


def _rows(files: Files, part: str, key: str = "seconds") -> list[dict[str, Any]]:
    return [row for row in files.get(part, {}).get("rows", ()) if row.get(key) is not None]


def ladder_section(files: Files, part: str) -> str:
    """Table of the no-gradient call, one row per rung of the ladder."""
    rows = [row for row in _rows(files, part) if "rung" in row]
    if not rows:
        return NOT_YET
    lines = []
    for row in rows:
        same = {r["rung"]: r["seconds"] for r in rows if r["images"] == row["images"]}
        share = f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else "-"
        lines.append([row["rung"], str(row["images"]), clock(row["seconds"]), f"{row['TFLOPs']:.3g}", share,
                      ratio(row["seconds"], same, row["baseline"])])  # fmt: skip
    baseline = rows[0]["baseline"]
    return markdown(("rung", "images", "per call", "TFLOP/s", "of the matmul ceiling", f"against {baseline}"), lines)


def tune_section(files: Files) -> str:
    """The settings that ``smpo tune`` chose, and its candidates with their seconds or why they were rejected."""
    rows = files.get("tune", {}).get("rows", ())
    chosen = next((row for row in rows if "chosen" in row), None)
    if chosen is None:
        return NOT_YET
    tried = [[f"`{row['settings']}`", clock(row["pair_seconds"]) if row.get("pair_seconds") else row["skipped"]]
             for row in rows if "chosen" not in row]  # fmt: skip
    return f"Chosen: `{chosen['settings']}`\n\n" + markdown(("candidate", "a pair in a step"), tried)


def pair_section(files: Files, part: str, counted: Mapping[str, Any]) -> str:
    """Table of the whole pair by phase, with both baselines and the physical limit."""
    rows = [row for row in _rows(files, part) if "contender" in row]
    if not rows:
        return NOT_YET
    whole = {row["contender"]: row["seconds"] for row in rows}
    lines = []
    for row in rows:
        phases = [clock(row[f"{p}_seconds"]) if row.get(f"{p}_seconds") else "-" for p in
                  ("inversion", "reference", "policy", "optimizer")]  # fmt: skip
        lines.append([row["contender"], clock(row["seconds"]), *phases, ratio(row["seconds"], whole, REFERENCE),
                      ratio(row["seconds"], whole, BEST_EAGER)])  # fmt: skip
    model = counted["models"].get(rows[0]["architecture"])
    if model:
        limit = model["pair_flops"]["total"] / counted["assumed_flops_per_second"]
        lines.append([f"*arithmetic limit at {counted['assumed_flops_per_second'] / 1e12:.0f} TFLOP/s*", clock(limit),
                      "", "", "", "", ratio(limit, whole, REFERENCE), ratio(limit, whole, BEST_EAGER)])  # fmt: skip
    head = ("per pair", "all", "inversion", "reference", "policy", "optimizer", f"against {REFERENCE}",
            f"against {BEST_EAGER}")  # fmt: skip
    return markdown(head, lines)


def memory_section(files: Files) -> str:
    """Table of peak memory by component."""
    rows = _rows(files, "memory", "peak_bytes")
    if not rows:
        return NOT_YET
    lines = [[row["name"], *[f"{row.get(f'{p}_bytes', 0) / 1e9:.1f}" for p in ("peak", *COMPONENTS)]] for row in rows]
    return markdown(("GB (1e9 bytes)", "peak", *COMPONENTS), lines)


def frontier_section(files: Files) -> list[str]:
    """Tables of the inversions: their error measures, and the reward after training at several numbers of calls."""
    facts = files["inversion_frontier"]
    rows = [
        [r["way"], str(r["steps"]), f"{r['calls']:.1f}", f"{r['tau_error']:.3f}", f"{r['round_trip']:.3f}",
         f"{r['gradient_cosine']:.3f}"] for r in facts["rows"]
    ]  # fmt: skip
    head = ("inversion", "steps", "calls per image", "error of tau", "round trip", "gradient cosine")
    charts = [f"![inversions](benchmarks/{FRONTIER.name})"] if FRONTIER.exists() else []
    blocks = [provenance({"frontier": facts}), *([markdown(head, rows), *charts] if rows else [])]
    if facts.get("training"):
        rows = []
        for way, steps in dict.fromkeys((t["way"], t["steps"]) for t in facts["training"]):
            runs = [t["looks"] for t in facts["training"] if (t["way"], t["steps"]) == (way, steps)]
            for looks in zip(*runs, strict=True):
                gains = [look["reward_gain"] for look in looks]
                mean = sum(gains) / len(gains)
                rows.append([
                    way, str(steps), str(looks[0]["steps"]), f"{looks[0]['calls'] / 1e3:.0f}",
                    f"{min(look['seconds'] for look in looks):.0f}", f"+{mean:.3f}",
                    " ".join(f"{g:.3f}" for g in gains),
                    f"{sum(look['shape_gain'] for look in looks) / len(looks):+.3f}",
                ])  # fmt: skip
        head = ("trained with", "steps", "optimizer steps", "10^3 calls", "seconds", "reward gain", "by seed", "shape")
        blocks.append(markdown(head, rows))
    return blocks


def kernels_section(files: Files) -> str:
    """Table of the fused operations, with the share of the copy bandwidth they reach."""
    rows = _rows(files, "kernels")
    if not rows:
        return NOT_YET
    lines = []
    for row in rows:
        same = {r["implementation"]: r["seconds"] for r in rows
                if (r["op"], r["shape"], r["mode"]) == (row["op"], row["shape"], row["mode"])}  # fmt: skip
        lines.append([f"{row['op']} {'x'.join(map(str, row['shape']))} {row['mode']}", row["implementation"],
                      clock(row["seconds"]), f"{row['GBps']:.0f}", f"{row['share_of_copy']:.0%}",
                      ratio(row["seconds"], same, row["baseline"])])  # fmt: skip
    return markdown(("operation", "implementation", "median", "GB/s", "of the copy ceiling", "against eager"), lines)


def device_section(files: Files, counted: Mapping[str, Any]) -> list[str]:
    """All results of one GPU."""
    ceilings = ", ".join(f"{row['name']} {row['value']:.4g}" for row in _rows(files, "ladder", "value"))
    blocks = [provenance(files), f"Ceilings measured in the same run: {ceilings or NOT_YET}."]
    for title, body in (
        ("The whole pair, SDXL at 1024 px", pair_section(files, "pair", counted)),
        ("What smpo tune finds, SDXL at 1024 px", tune_section(files)),
        ("The no-gradient call, SDXL at 1024 px", ladder_section(files, "ladder")),
        ("Peak memory, SDXL at 1024 px", memory_section(files)),
        ("The whole pair, SD1.5 at 512 px", pair_section(files, "sd15", counted)),
        ("The no-gradient call, SD1.5 at 512 px", ladder_section(files, "sd15")),
        ("Fused operations", kernels_section(files)),
    ):
        blocks += [f"#### {title}", body]
    return blocks


CPU_GROUPS = (
    "whole step", "phase", "no-gradient call", "inversion arithmetic", "optimizer", "data loading", "cold start",
)  # fmt: skip


def render_performance(found: Mapping[str, Files], counted: Mapping[str, Any], charts: Sequence[str] = ()) -> str:
    """The generated part of docs/performance.md."""
    blocks = ["### Counted: the same on every machine", limits(counted), counts(counted)]
    gpus = {name: files for name, files in found.items() if is_gpu(files)}
    blocks.append("### Measured on GPUs")
    if not gpus:
        blocks.append(f"The whole pair, the ladder, peak memory and the fused operations on a GPU: **{NOT_YET}**.")
    for name, files in gpus.items():
        blocks += [f"### {name}", *device_section(files, counted)]
    for name, files in found.items():
        if not is_gpu(files) and "suite" in files:
            blocks += [f"### Measured on a CPU: {name}",
                       "Miniature networks (about 2 million weights) in fp32, or in bf16 where autocast is named. "
                       "These results show that the benchmarks work and where host time goes; they say nothing about a "
                       "GPU.",
                       provenance({"suite": files["suite"]}), suite_section(files, CPU_GROUPS)]  # fmt: skip
    for name, files in found.items():
        if "inversion_frontier" in files:
            blocks += [f"### Inversions: error by network calls, {name}", *frontier_section(files)]
    blocks += [f"![{name}](benchmarks/{name})" for name in charts]
    return "\n\n".join(blocks)


def render_readme(found: Mapping[str, Files], counted: Mapping[str, Any]) -> str:
    """The generated part of README.md."""
    total, rate = counted["models"]["sdxl"]["pair_flops"]["total"], counted["assumed_flops_per_second"]
    blocks = [
        f"One SDXL pair at 1024 px is at least {total / 1e12:.1f} TFLOP (`release` fidelity, nothing recomputed): "
        f"{clock(total / rate)} at {rate / 1e12:.0f} TFLOP/s."
    ]
    gpus = {name: files for name, files in found.items() if is_gpu(files)}
    if not gpus:
        blocks.append(f"On a GPU: **{NOT_YET}**. On a CPU, with miniature networks (no indication of a GPU's speed):")
    for files in gpus.values():
        blocks += [provenance(files), pair_section(files, "pair", counted), memory_section(files)]
    for files in found.values() if not gpus else ():
        if "suite" in files:
            blocks += [provenance({"suite": files["suite"]}), suite_section(files, ("whole step",))]
    return "\n\n".join(blocks)


def between(text: str) -> str | None:
    """The text between a document's markers; None without markers."""
    if BEGIN not in text or END not in text:
        return None
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def replaced(text: str, body: str) -> str:
    """The document with ``body`` between its markers."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{body}\n\n{END}{rest.partition(END)[2]}"


def documents(results: Path = RESULTS) -> dict[Path, str]:
    """Document -> the text that belongs between its markers."""
    found, counted = load(results), json.loads((results / "counted.json").read_text())
    return {
        PERFORMANCE: render_performance(found, counted, list(charts_of(found, counted))),
        README: render_readme(found, counted),
    }


# --- charts ---------------------------------------------------------------------------------------------------


PHASES = ("load", "encode", "inversion", "reference", "policy", "log", "optimizer")
COMPONENTS = ("policy", "reference", "masters", "gradients", "optimizer", "rest")


@dataclass(frozen=True)
class Chart:
    """Stacked bars: name of a bar -> part -> length. ``limit`` is drawn as a line."""

    title: str
    bars: Mapping[str, Mapping[str, float]]
    limit: float | None = None


def charts_of(found: Mapping[str, Files], counted: Mapping[str, Any]) -> dict[str, Chart]:
    """File name -> chart, for every chart that there are results for."""
    charts: dict[str, Chart] = {}
    for device, files in found.items():
        made = _gpu_charts(device, files, counted) if is_gpu(files) else _cpu_charts(device, files)
        charts |= {f"{device}-{name}.png": chart for name, chart in made.items() if chart.bars}
    return charts


def _gpu_charts(device: str, files: Files, counted: Mapping[str, Any]) -> dict[str, Chart]:
    rate, flops = counted["assumed_flops_per_second"], counted["models"]["sdxl"]["pair_flops"]
    ladder = {f"{r['rung']}, {r['images']}": {"": 1e3 * r["seconds"] / r["images"]}
              for r in _rows(files, "ladder") if "rung" in r}  # fmt: skip
    pair = {r["contender"]: {p: 1e3 * r.get(f"{p}_seconds", 0.0) for p in PHASES}
            for r in _rows(files, "pair") if "contender" in r}  # fmt: skip
    memory = {r["name"]: {c: r.get(f"{c}_bytes", 0) / 1e9 for c in COMPONENTS}
              for r in _rows(files, "memory", "peak_bytes")}  # fmt: skip
    return {
        "ladder": Chart(f"No-gradient call, ms per image ({device})", ladder, 1e3 * flops["reference"] / 2 / rate),
        "pair": Chart(f"One SDXL pair by phase, ms ({device})", pair, 1e3 * flops["total"] / rate),
        "memory": Chart(f"Peak memory by component, GB ({device})", memory),
    }


def _cpu_charts(device: str, files: Files) -> dict[str, Chart]:
    bars: dict[str, dict[str, float]] = {}
    for row in files.get("suite", {}).get("rows", ()):
        if row["group"].startswith("phase sdxl"):
            bars.setdefault(row["implementation"], {})[row["case"]] = 1e3 * row["seconds"]
    return {"phases": Chart(f"One pair by phase, miniature SDXL, ms ({device})", bars)}


def draw(file: Path, chart: Chart) -> None:
    """Draw a chart as stacked horizontal bars into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.35 * len(chart.bars)))
    left = [0.0] * len(chart.bars)
    for part in dict.fromkeys(part for bar in chart.bars.values() for part in bar):
        widths = [bar.get(part, 0.0) for bar in chart.bars.values()]
        axes.barh(list(chart.bars), widths, left=left, label=part or "measured")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    if chart.limit is not None:
        axes.axvline(chart.limit, color="black", linestyle="--", label=f"arithmetic limit: {chart.limit:.3g}")
    axes.invert_yaxis()
    axes.set_title(chart.title, fontsize=10)
    axes.legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if ``--check`` finds a document that differs from the files."""
    parser = argparse.ArgumentParser(description="Render benchmark results into the documents.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document is out of date")
    parser.add_argument("--recount", action="store_true", help="repeat the machine-independent counts")
    args = parser.parse_args(argv)
    if args.recount:
        recount()
    stale = 0
    for document, body in documents().items():
        text = document.read_text() if document.is_file() else ""
        if (shown := between(text)) is None:
            say(f"{document.name}: has no markers, nothing to render")
        elif args.check:
            stale += shown != body
            say(f"{document.name}: {'up to date' if shown == body else 'differs from the result files'}")
        else:
            document.write_text(replaced(text, body))
            say(f"{document.name}: rendered")
    if not args.check:
        for name, chart in charts_of(load(RESULTS), json.loads(COUNTED.read_text())).items():
            draw(CHARTS / name, chart)
            say(f"docs/benchmarks/{name}: drawn")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
