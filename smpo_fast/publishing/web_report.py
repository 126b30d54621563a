"""``report.html``: a run and its evaluation on one page that needs nothing else, for people who would rather look."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from smpo_fast.common import storage
from smpo_fast.common.errors import DataError
from smpo_fast.common.storage import json_hash
from smpo_fast.config import loading
from smpo_fast.evaluation.image_store import IMAGES, ImageStore
from smpo_fast.evaluation.report import SCORES, read_scores
from smpo_fast.method.label_report import LabelReport
from smpo_fast.publishing import charts
from smpo_fast.publishing.facts import RunFacts, read_facts
from smpo_fast.training.run_folder import FINISHED

REPORT = "report.html"
MOST_PROMPTS = 64  # whose images are in the page
SIDE = 512  # px; larger images are reduced
_WEB = "smpo_fast.publishing"
_CHARTS = (
    ("loss", ["train_loss"], "starts at 0.693 (log 2) and falls slowly; a flat one is normal"),
    ("implicit accuracy", ["implicit_acc"], "share of pairs ranked as labelled; rises above 0.5"),
    (
        "drift of winners, losers", ["avg_win_diff_loss", "avg_lose_diff_loss"],
        "against the reference; a winner drift that keeps growing means worse images",
    ),
    ("gradient norm", ["grad_norm"], "before clipping; steady, without growing peaks"),
    ("pairs per second", ["pairs_per_second"], "steady after the first steps"),
    ("memory, GB", ["memory_gb"], "peak of rank 0; flat"),
)  # fmt: skip


def write_web_report(run_dir: Path) -> Path:
    """Write report.html into the folder of a finished run; returns its path.

    Raises DataError for a folder that is not that of a finished run, and for an image of its evaluation that has
    changed.
    """
    page = compose(read_facts(run_dir))
    storage.write_text(run_dir / REPORT, page)
    return run_dir / REPORT


def renew(run_dir: Path) -> Path | None:
    """Write report.html again after an evaluation; nothing for a folder with an export that no run has finished."""
    return write_web_report(run_dir) if (run_dir / FINISHED).is_file() else None


def compose(facts: RunFacts) -> str:
    """The page, as HTML."""
    comparisons = facts.evaluation.get("comparisons", []) if "protocol" in facts.evaluation else []
    viewer = _Viewer(facts) if comparisons or facts.evaluation.get("images") else None
    found = viewer.data() if viewer else {}
    sections = {"results": bool(comparisons), "images": bool(found), "data": "labels" in facts.environment}
    names = {
        "results": "Is it preferred?",
        "images": "Look",
        "training": "The run",
        "data": "Data",
        "settings": "Settings",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_asset("report.html")).render(
        title=facts.title,
        summary=_summary(facts),
        sections=[(key, name) for key, name in names.items() if sections.get(key, True)],
        comparisons=comparisons,
        drifts=[c for c in facts.evaluation.get("drifts", []) if c["gain"] or c["base"]],
        protocol=_sentence(facts.evaluation.get("protocol", "")),
        histogram=viewer.histogram() if viewer and comparisons else None,
        shown=viewer.shown if viewer else "",
        charts=list(_run_charts(facts.rows)),
        alarms=list(_alarms(facts.rows)),
        speed=_speed(facts.rows),
        labels=str(_labels(facts)).splitlines() if sections["data"] else [],
        versions=", ".join(f"{name} {version}" for name, version in facts.environment.get("versions", {}).items()),
        settings=loading.dump(facts.config),
        images=Markup(json.dumps(found).replace("<", "\\u003c")) if found else "",
        css=Markup(_asset("report.css")),
        js=Markup(_asset("report.js")),
    )


class _Viewer:
    """The images of an evaluation: which are in the page, and their scores."""

    def __init__(self, facts: RunFacts) -> None:
        self._folder = facts.folder / "evaluation"
        elsewhere = facts.evaluation.get("eval", {}).get("images", "")
        self._store = ImageStore(Path(elsewhere) if elsewhere else self._folder / IMAGES)
        self._evaluation = facts.evaluation
        self._each = facts.evaluation.get("eval", {}).get("per_prompt", 1)
        self._columns = read_scores(self._folder / SCORES)
        comparisons = facts.evaluation.get("comparisons", [])
        self._score = comparisons[0]["name"] if comparisons else ""
        self.models: list[str] = list(facts.evaluation.get("images", {}))
        self.shown = ""

    def data(self) -> dict[str, Any]:
        """What the page's script reads; empty where no model is compared with the base."""
        prompts = self._evaluation.get("prompts", [])
        if len(self.models) < 2 or not prompts:
            return {}
        chosen = self._chosen(len(prompts))
        self.shown = f"{len(chosen)} of {len(prompts)} prompts" + (
            ": the worst losses, the best wins, and the first ones." if len(chosen) < len(prompts) else "."
        )
        rows = [self._row(i, prompts[i]) for i in chosen]
        first = self._store.image(self._evaluation["images"][self.models[0]][0])
        return {
            "id": json_hash(self._evaluation["images"])[:16],
            "models": self.models,
            "score": self._score,
            "small": max(first.size) < SIDE // 2,
            "rows": rows,
        }

    def histogram(self) -> dict[str, Any] | None:
        """The gains by prompt of the first model."""
        gains = self._gains(self.models[1]) if self._score and len(self.models) > 1 else np.zeros(0)
        if not gains.any():
            return None
        name = f"{self._score}, {self.models[1]} minus {self.models[0]}"
        return {"name": name, "svg": Markup(charts.histogram(gains, name))}

    def _gains(self, model: str) -> np.ndarray:
        return self._values(model) - self._values(self.models[0])

    def _values(self, model: str) -> np.ndarray:
        return self._columns[f"{self._score}_{model}"]

    def _chosen(self, count: int) -> list[int]:
        """The prompts in the page, ascending: for each model its worst and best, then the first ones."""
        if count <= MOST_PROMPTS or not self._score:
            return list(range(min(count, MOST_PROMPTS)))
        found: dict[int, None] = {}
        each = max(1, MOST_PROMPTS // 3 // (len(self.models) - 1))
        for model in self.models[1:]:
            order = np.argsort(self._gains(model), kind="stable").tolist()
            found |= dict.fromkeys([*order[:each], *order[len(order) - each :]])
        found |= dict.fromkeys(range(count))
        return sorted(list(found)[:MOST_PROMPTS])

    def _row(self, prompt: int, text: str) -> dict[str, Any]:
        keys = {model: of[prompt * self._each] for model, of in self._evaluation["images"].items()}
        scores = {model: float(self._values(model)[prompt]) for model in keys} if self._score else {}
        return {
            "number": prompt,
            "prompt": text,
            "scores": scores,
            "files": {model: f"{key[:2]}/{key}.png" for model, key in keys.items()},
            "images": {model: self._store.data_url(key, SIDE) for model, key in keys.items()},
        }


def _summary(facts: RunFacts) -> str:
    c, base = facts.config, facts.environment.get("base", {})
    what = f"LoRA of rank {c.lora.rank}" if facts.adapters else "all weights"
    return (
        f"{c.objective.name}, {what}, {len(facts.rows)} steps of {c.batch.pairs_per_step} pairs, from "
        f"{' with '.join(base.get('names', [])) or c.model.path}, on {facts.environment.get('ranks', 1)} x "
        f"{facts.environment.get('device', 'unknown device')}."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _run_charts(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    steps = [row["step"] for row in rows]
    for title, names, note in _CHARTS:
        svg = charts.lines(steps, {name: [row.get(name) for row in rows] for name in names}) if rows else ""
        if svg:
            yield {"title": title, "svg": Markup(svg), "note": note}


def _alarms(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    skipped = rows[-1].get("skipped_steps", 0) if rows else 0
    if skipped:
        yield f"{skipped} steps had a loss or gradient that was not finite, and were skipped."
    if rows and rows[-1].get("saturated", 0) > 0.5:
        yield "In the last step more than half of the pairs had a saturated loss: lower objective.beta."


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "No step was trained."
    seconds = sum(row["seconds"] for row in rows)
    names = sorted({name for row in rows for name in row if name.startswith("seconds/")})
    shares = {name.partition("/")[2]: sum(row.get(name, 0.0) for row in rows) / seconds for name in names}
    parts = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    memory = max(row["memory_gb"] for row in rows)
    return f"{len(rows)} steps in {seconds:.0f} s: {parts}. Peak memory {memory:.2f} GB (rank 0)."


def _labels(facts: RunFacts) -> LabelReport:
    recorded = facts.environment["labels"]
    try:
        known: dict[str, Any] = {name: float("nan") if value is None else value for name, value in recorded.items()}
        return LabelReport(**known)
    except (TypeError, KeyError) as error:
        raise DataError(f"{facts.folder}/environment.json: its labels cannot be read ({error})") from error


def _asset(name: str) -> str:
    return (resources.files(_WEB) / "web" / name).read_text()
