"""Plots. Every function writes one PNG and returns its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Colours that colour-blind readers can tell apart (Okabe and Ito), fixed by model so that plots compare.
COLOURS = {"protected": "#D55E00", "original": "#0072B2", "scratch": "#555555", "ntl": "#009E73"}

Line = tuple[Sequence[float], Sequence[Sequence[float]]]


def plot_curves(
    panels: Mapping[str, Mapping[str, Line]], path: Path, metric: str = "accuracy", title: str = ""
) -> Path:
    """The metric in the restricted domain while an adversary fine-tunes, as in Fig. 3: one panel a strategy.

    Args:
        panels: Panel title -> model name -> epochs, and the metric there for each seed; the line is the mean over
            seeds, the band one standard deviation.
        path: Where the PNG goes.
        metric: Label of the y axis.
        title: Above the panels.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, (name, models) in zip(axes[0], panels.items(), strict=True):
        for model, (epochs, seeds) in models.items():
            values = np.array(seeds)
            mean, spread = values.mean(axis=0), values.std(axis=0)
            colour = COLOURS.get(model)
            axis.plot(epochs, mean, marker="o", markersize=3, label=model, color=colour)
            axis.fill_between(epochs, mean - spread, mean + spread, alpha=0.2, color=colour, linewidth=0)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("adversary's epochs")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"{metric} in the restricted domain")
    axes[0][0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
