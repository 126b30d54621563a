"""Pictures of a run: its curves, and base beside aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first

PANELS = {
    "loss": ("train_loss",),
    "implicit accuracy": ("implicit_acc",),
    "drift from the reference (error)": ("avg_win_diff_loss", "avg_lose_diff_loss"),
    "implicit reward": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "gradient norm": ("grad_norm",),
    "pairs per second": ("pairs_per_second",),
}
CELL = 192
TEXT_HEIGHT = 18


def draw_curves(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Six panels over the steps of metrics.jsonl."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
    steps = [row["step"] for row in rows]
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            axis.plot(steps, [row.get(name, np.nan) for row in rows], label=name, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_grid(
    base: Sequence[Image.Image],
    aligned: Sequence[Image.Image],
    prompts: Sequence[str],
    scores: Mapping[str, np.ndarray] | None,
    file: Path,
    *,
    rows: int,
) -> None:
    """Base beside aligned for the first prompts, three prompts a line, with scores [n] where there are any."""
    count, per_line = min(rows, len(prompts)), 3
    lines = -(-count // per_line)
    height = CELL + 2 * TEXT_HEIGHT
    sheet = Image.new("RGB", (per_line * (2 * CELL + 16), lines * (height + 8)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i in range(count):
        left, top = (i % per_line) * (2 * CELL + 16), (i // per_line) * (height + 8)
        pen.text((left + 2, top), _fit(prompts[i], pen, font, 2 * CELL), "black", font=font)
        for j, (name, picture) in enumerate((("base", base[i]), ("aligned", aligned[i]))):
            resample = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((CELL, CELL), resample), (left + j * CELL, top + TEXT_HEIGHT))
            label = name if scores is None else f"{name} {scores[name][i]:.2f}"
            pen.text((left + j * CELL + 2, top + TEXT_HEIGHT + CELL), label, "black", font=font)
    sheet.save(file)


def _fit(text: str, pen: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    while pen.textlength(text, font=font) > width:
        text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-3].rstrip() + "…"
    return text
