"""Diffusion: an unconditional `UNet2DModel` that predicts noise under a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from evaluate import EvaluationModule
from torch import Tensor, nn
from torch.nn import functional as F

from sophon_hf.data.batches import Batch
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.models.loading import as_integers, evaluation_mode, forward_names, unwrap
from sophon_hf.models.structure import ModelStructure, find_structure
from sophon_hf.tasks.losses import at_least_float32, denial_of_service, negated_mse
from sophon_hf.tasks.metrics import Metric, load_metric
from sophon_hf.utils import derive_seed


class DiffusionTask:
    """Learn to predict noise with the mean squared error; suppress it with denial of service (section 4.3.2).

    Noise and timestep of an example follow from its seed alone, so two models measured on one domain get the same.

    Args:
        noise_scheduler: A scheduler of diffusers with `add_noise`; a default `DDPMScheduler` where left out.
        head: Name of the model's final layer, where it cannot be found by running the model.
        metric: "mse" (MSE-k), or a module of `evaluate` whose only input are predictions: it gets each example's mean
            squared error.

    Attributes:
        metric: The metric's name.
        greater_is_better: Whether a greater value of it is better.

    Raises:
        ValueError: The scheduler's prediction type or the metric is unknown, or the metric needs references.
    """

    suppression_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "denial_of_service": denial_of_service,
        "negated_mse": negated_mse,
    }

    def __init__(
        self,
        noise_scheduler: Any | None = None,
        head: str | None = None,
        metric: str | EvaluationModule | Metric = "mse",
    ):
        from diffusers import DDPMScheduler

        self.noise_scheduler = DDPMScheduler() if noise_scheduler is None else noise_scheduler
        self.head, self._metric = head, load_metric(metric)
        if self._metric.needs_references:
            raise ValueError(
                f"The metric {self._metric.name!r} needs references, which are class labels, and a diffusion model has "
                "none: leave the metric out ('mse'), or pass one whose only input are predictions."
            )
        self.metric, self.greater_is_better = self._metric.name, self._metric.greater_is_better
        if self.noise_scheduler.config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"Prediction type {self.noise_scheduler.config.prediction_type!r} is not known.")

    def inputs(self, model: nn.Module) -> ModelInputs:
        """Return what the model takes."""
        config: Any = unwrap(model).config
        size = as_integers(config.sample_size) if config.sample_size is not None else ()
        return ModelInputs(
            names=tuple(n for n in forward_names(model) if n not in ("timestep", "class_labels")),
            main="sample",
            labelled=False,
            channels=config.in_channels,
            image_size=None if not size else (size[0], size[-1]),
            symmetric=True,
        )

    def structure(self, model: nn.Module, batch: Batch) -> ModelStructure:
        """Return output convolution and blocks of the model, found by running it on `batch`."""
        return find_structure(unwrap(model), lambda: self.predict(model, batch), self.head)

    def collate(self, rows: Batch, seeds: list[int]) -> Batch:
        """Add noise to clean images: `sample` (noisy), `timestep` and `target`, each example's from its own seed."""
        clean = rows["sample"]
        noise, timesteps = torch.empty_like(clean), torch.empty(len(clean), dtype=torch.int64)
        generator = torch.Generator()
        for i, seed in enumerate(seeds):
            generator.manual_seed(derive_seed(seed))
            torch.randn(clean[i].shape, generator=generator, out=noise[i])
            timesteps[i] = torch.randint(self.noise_scheduler.config.num_train_timesteps, (), generator=generator)
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: clean,
            "v_prediction": lambda: self.noise_scheduler.get_velocity(clean, noise, timesteps),
        }[self.noise_scheduler.config.prediction_type]()
        return {
            "sample": self.noise_scheduler.add_noise(clean, noise, timesteps),
            "timestep": timesteps,
            "target": target,
        }

    def predict(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return predicted noise, the shape of the images."""
        return model(sample=batch["sample"], timestep=batch["timestep"], return_dict=False)[0]

    @torch.no_grad()
    def denoise(self, model: nn.Module, clean: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Add noise to images, and let the model remove it in one step (Fig. 5 and 6).

        Args:
            model: Run in evaluation mode, and left as it is.
            clean: Shape (n, channels, height, width), in [-1, 1]. The noise of an image follows from its place.
            share: How far along the noise schedule, from 0 to 1.

        Returns:
            Noisy images, and the model's estimate of the clean ones; both the shape of `clean`, on the CPU.
        """
        from diffusers import DDPMScheduler

        # Of all schedulers this one steps without a list of inference steps; noise and prediction type are the same.
        scheduler = DDPMScheduler.from_config(self.noise_scheduler.config)
        timestep = int(share * (scheduler.config.num_train_timesteps - 1))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        timesteps = torch.full((len(clean),), timestep)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        device = next(model.parameters()).device
        with evaluation_mode(model):
            prediction = self.predict(model, {"sample": noisy.to(device), "timestep": timesteps.to(device)})
        step = scheduler.step(prediction.float().cpu(), timestep, noisy, generator=generator)
        return noisy, step.pred_original_sample

    def target(self, batch: Batch) -> Tensor:
        """Return what the model is to predict, the shape of the images."""
        return batch["target"]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error: what an adversary minimises, and L_beta of the original domain."""
        return F.mse_loss(at_least_float32(prediction), target)

    def distance(self, prediction: Tensor, unprotected: Tensor) -> Tensor:
        """Return the mean squared error to what the unprotected model predicts."""
        return F.mse_loss(at_least_float32(prediction), at_least_float32(unprotected))

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what the metric is computed from, one entry for each example."""
        return {"predictions": (prediction.float() - target.float()).square().flatten(1).mean(dim=1)}

    def compute_metric(self, scores: dict[str, list]) -> float:
        """Return the metric's value, such as MSE-k."""
        return self._metric.compute(scores)
