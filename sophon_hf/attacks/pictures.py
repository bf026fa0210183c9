"""What a diffusion model makes of noisy images, as in Fig. 5 and 6: where the error has a number, this is what it looks like."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sophon_hf.attacks.plots import save_image_grid
from sophon_hf.data.domain import Domain
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.diffusion import DiffusionTask

IMAGES = 4
NOISE_SHARES = (0.05, 0.15, 0.3)


def draw_denoised(task: Task, model: nn.Module, domain: Domain, path: Path) -> None:
    """One row an image of `domain`: clean, then noisy and denoised for three amounts of noise.

    Nothing is drawn for tasks other than diffusion. Images and noise are the same for every model.
    """
    if not isinstance(task, DiffusionTask):
        return
    clean = domain.rows(torch.arange(min(IMAGES, len(domain))))["sample"]
    columns = [clean]
    for share in NOISE_SHARES:
        columns += task.denoise(model, clean, share)
    save_image_grid(torch.stack(columns, dim=1).numpy(), path)
