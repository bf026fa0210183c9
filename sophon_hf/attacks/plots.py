"""Plots: every function writes one PNG. pyplot, and with it a notebook's backend, is left alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from sophon_hf.data.domain import Domain
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.diffusion import DiffusionTask

logger = logging.getLogger(__name__)

# Colours that colour-blind readers can tell apart (Okabe and Ito), on white and on black, fixed by model so that plots
# compare.
_COLOURS = {
    "protected": "#D55E00",
    "original": "#0072B2",
    "scratch": "#808080",
    "ntl": "#009E73",
    "untrained": "#CC79A7",
    "Algorithm 1": "#E69F00",
}

_PANELS_IN_A_ROW = 3
_IMAGES = 4
_NOISE_SHARES = (0.05, 0.15, 0.3)

_Line = tuple[Sequence[float], Sequence[Sequence[float]]]


def plot_curves(
    panels: Mapping[str, Mapping[str, _Line]],
    path: Path,
    metric: str = "accuracy",
    unit: str = "epochs",
) -> Path:
    """Draw the metric in the restricted domain while an adversary fine-tunes, as in Fig. 3: one panel a strategy.

    Args:
        panels: Panel title -> model name -> where on the x axis, and the metric there for each seed. The line is the
            mean over seeds, the band one standard deviation. A single value is a dashed line across the panel.
        path: Where the PNG goes.
        metric: Label of the y axis.
        unit: Of the x axis.
    """
    columns = 2 if len(panels) == 4 else max(1, min(_PANELS_IN_A_ROW, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4 * columns, 3.4 * rows))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, models) in zip(axes.flat, panels.items(), strict=False):
        for model, (epochs, seeds) in models.items():
            values = np.ma.masked_invalid(seeds)  # A seed that diverged hides none of the others.
            mean, spread = values.mean(axis=0), values.std(axis=0)
            colour = _COLOURS.get(model)
            if len(epochs) == 1:  # Solved in closed form: there is nothing to wait for.
                axis.axhline(mean[0], linestyle="--", label=model, color=colour)
                axis.axhspan(mean[0] - spread[0], mean[0] + spread[0], alpha=0.2, color=colour, linewidth=0)
                continue
            axis.plot(epochs, mean, marker="o", markersize=3, label=model, color=colour)
            axis.fill_between(epochs, mean - spread, mean + spread, alpha=0.2, color=colour, linewidth=0)
        axis.set_title(name, fontsize=10, parse_math=False)
        axis.set_xlabel(f"adversary's {unit}")
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel(f"{metric} in the restricted domain")
    if panels:
        axes[0][0].legend(frameon=False)
    figure.tight_layout()
    return _save(figure, path)


def plot_heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, path: Path, metric: str) -> Path:
    """Draw what each attack reached on each model, in the colours of one scale.

    Args:
        rows: Attacks.
        columns: Models.
        values: Shape (rows, columns); NaN where an attack has no result.
        path: Where the PNG goes.
        metric: Its name.
    """
    figure = Figure(figsize=(4.5 + 1.2 * len(columns), 1.2 + 0.26 * len(rows)))
    axis = figure.subplots()
    image = axis.imshow(values, aspect="auto", cmap="cividis")
    figure.colorbar(image, label=metric, location="left", shrink=min(1, 12 / max(1, len(rows))))
    axis.set_xticks(range(len(columns)), columns)
    # Figures come first, where a narrow page shows them. A name may hold a regular expression, whose dollar signs are
    # no mathematics.
    axis.yaxis.tick_right()
    axis.set_yticks(range(len(rows)), rows, fontsize=7, parse_math=False)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2 if np.isfinite(values).any() else 0
    for i, j in np.ndindex(*values.shape):
        text = f"{values[i, j]:.3g}" if np.isfinite(values[i, j]) else "n/a"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if values[i, j] < middle else "black")
    axis.set_title(f"final {metric}", fontsize=10)
    return _save(figure, path)


def plot_best_so_far(lines: Mapping[str, np.ndarray], path: Path, metric: str) -> Path:
    """Draw the best attack against the number of attacks tried, for each model: the mean over orders, and 5 to 95 %.

    Args:
        lines: Model -> test metric of the best attack among the first 1, 2, ...; shape (orders, attacks).
        path: Where the PNG goes.
        metric: Its name.
    """
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    for model, reached in lines.items():
        tried, colour = range(1, reached.shape[1] + 1), _COLOURS.get(model)
        low, high = np.percentile(reached, (5, 95), axis=0)
        axis.plot(tried, reached.mean(axis=0), marker="o", markersize=3, label=model, color=colour)
        axis.fill_between(tried, low, high, alpha=0.2, color=colour, linewidth=0)
    axis.set_xlabel("attacks tried, in any order")
    axis.set_ylabel(f"best {metric} so far")
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(frameon=False)
    return _save(figure, path)


def save_image_grid(images: np.ndarray, path: Path, tile: int = 48) -> Path:
    """Write images side by side.

    Args:
        images: Shape (rows, columns, channels, height, width), in [-1, 1]; 1 or 3 channels.
        path: Where the PNG goes.
        tile: Pixels a side that an image gets at least; small ones are enlarged by a whole number.
    """
    rows, columns, channels, height, width = images.shape
    pixels = (np.nan_to_num(images, nan=-1).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)
    pixels = pixels.transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    factor = max(1, -(-tile // height))
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels[..., :3]).save(path)
    return path


def draw_denoised(task: Task, domain: Domain, path: Path, model: nn.Module) -> None:
    """Draw what a diffusion model makes of noisy images, as in Fig. 5 and 6; other tasks have nothing to draw.

    One row an image of `domain`: clean, then noisy and denoised for three amounts of noise, then what is generated from
    noise alone. Images and noise are the same for every model. A picture that fails is told, and costs no attack.
    """
    if not isinstance(task, DiffusionTask):
        return
    try:
        rows = domain.rows(torch.arange(min(_IMAGES, len(domain))))
        clean = rows[task.inputs(model).main]
        if clean.shape[1] not in (1, 3):
            return  # Latents are no pictures.
        columns = [clean]
        for share in _NOISE_SHARES:
            columns += task.denoise(model, rows, share)
        columns.append(task.generate(model, rows))
        save_image_grid(torch.stack(columns, dim=1).numpy(), path)
    except Exception as error:
        logger.warning("%s could not be drawn: %s: %s", path, type(error).__name__, error)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path
