"""Plots of a run and its data: metrics over the steps, images of two models side by side, weights of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first

from smpo_fast.common.storage import atomic_write  # noqa: E402

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
    """Plot metrics over the steps, in six panels. rows: of metrics.jsonl."""
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
    _save(figure, file)


def draw_grid(
    images: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    scores: Mapping[str, np.ndarray] | None,
    file: Path,
    *,
    rows: int,
) -> None:
    """Draw the images of two or three models side by side, for the first ``rows`` of n prompts.

    images: by the model's name, one per prompt.  scores: by the same names, float [n] each, or None.
    """
    count, per_line, width = min(rows, len(prompts)), 3, len(images) * CELL
    lines = -(-count // per_line)
    height = CELL + 2 * TEXT_HEIGHT
    sheet = Image.new("RGB", (per_line * (width + 16), lines * (height + 8)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i in range(count):
        left, top = (i % per_line) * (width + 16), (i // per_line) * (height + 8)
        pen.text((left + 2, top), _shorten(prompts[i], pen, font, width), "black", font=font)
        for j, (name, image) in enumerate((name, column[i]) for name, column in images.items()):
            resample = Image.Resampling.NEAREST if image.width < CELL else Image.Resampling.LANCZOS
            sheet.paste(image.resize((CELL, CELL), resample), (left + j * CELL, top + TEXT_HEIGHT))
            label = name if scores is None else f"{name} {scores[name][i]:.2f}"
            pen.text((left + j * CELL + 2, top + TEXT_HEIGHT + CELL), label, "black", font=font)
    with atomic_write(file) as draft:
        sheet.save(draft, "PNG")


def draw_labels(weights: np.ndarray, bins: Sequence[tuple[float, float, float]], file: Path) -> None:
    """Plot a histogram of the pairs' weights [n], and the calibration of the predicted preference if there are bins.

    bins: each the mean predicted preference for image 0, the share of human labels that agree, and its error.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    axes[0].hist(weights, bins=50, color="tab:blue")
    axes[0].set_title("weights of the pairs", fontsize=10)
    axes[0].set_xlabel("2 alpha - gamma", fontsize=8)
    axes[0].set_ylabel("pairs", fontsize=8)
    axes[1].set_title("calibration" if bins else "calibration: no pair has rewards and a human label", fontsize=10)
    axes[1].plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    if bins:
        predicted, human, error = np.array(bins).T
        axes[1].errorbar(predicted, human, error, fmt="o-", linewidth=1.2, markersize=4, capsize=3)
    axes[1].set_xlabel("predicted preference for image 0, alpha/gamma", fontsize=8)
    axes[1].set_ylabel("share of humans who prefer it", fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    with atomic_write(file) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)


def _shorten(text: str, pen: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    while pen.textlength(text, font=font) > width:
        text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-3].rstrip() + "…"
    return text
