"""Diffusion: a model of diffusers that predicts noise, or the flow from data to noise, of images or latents."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophon_hf.data.batches import Batch
from sophon_hf.data.preprocessing import ModelInputs
from sophon_hf.models.loading import evaluation_mode, forward_names, height_and_width, unwrap
from sophon_hf.models.structure import ModelStructure, find_structure
from sophon_hf.tasks.losses import at_least_float32, denial_of_service, negated_mse
from sophon_hf.tasks.metrics import MetricSource, load_metric
from sophon_hf.utils import derive_seed

# Shares of the noise schedule, from hardly any noise to nothing else.
BANDS = (0.0, 0.1, 0.25, 0.5, 1.0)
_LABEL_DROPOUT = 0.1
# Of DDIM without noise, or of the scheduler's own sampler of flows.
_SAMPLING_STEPS = 20
# Conditions that diffusers passes in a dictionary of their own.
_ADDED = ("text_embeds", "time_ids")


class DiffusionTask:
    """Learn to predict noise with the mean squared error; suppress it with denial of service (section 4.3.2).

    It serves every denoiser of diffusers that is called with noisy images or latents, a time, and conditions (class
    labels, encoded captions): conditions are columns of the data that the model's `forward` names. Noise and time of an
    example follow from its seed alone, so two models measured on one domain get the same.

    Args:
        noise_scheduler: A scheduler of diffusers with `add_noise`, or one for flow matching; a default `DDPMScheduler`
            where left out.
        head: Name of the model's final layer, where it is not the last one to run.
        metric: "mse" (MSE-k), or a module of `evaluate` whose only input are predictions: it gets each example's mean
            squared error.
        null_label: The class label that stands for none, for training with classifier-free guidance: every tenth
            example is given it, and so are examples without a label.
        pipeline: Hub id or folder of the pipeline that the model is a part of, to be saved with it.

    Attributes:
        metric: The metric's name.
        greater_is_better: Whether a greater value of it is better.

    Raises:
        ValueError: A scheduler that neither adds noise as DDPM does nor matches flows, an unknown prediction type, an
            unknown metric, or one that needs references.
    """

    suppression_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
        "denial_of_service": denial_of_service,
        "negated_mse": negated_mse,
    }

    def __init__(
        self,
        noise_scheduler: Any | None = None,
        head: str | None = None,
        metric: MetricSource = "mse",
        null_label: int | None = None,
        pipeline: str | None = None,
    ):
        from diffusers import DDPMScheduler

        self.noise_scheduler = DDPMScheduler() if noise_scheduler is None else noise_scheduler
        self.head, self._metric = head, load_metric(metric)
        self.null_label, self.pipeline = null_label, pipeline
        if self._metric.needs_references:
            raise ValueError(
                f"The metric {self._metric.name!r} needs references, which are class labels, and a diffusion model has "
                "none: leave the metric out ('mse'), or pass one whose only input are predictions."
            )
        self.metric, self.greater_is_better = self._metric.name, self._metric.greater_is_better
        kind, config = type(self.noise_scheduler).__name__, self.noise_scheduler.config
        self._flow = kind.startswith("FlowMatch")
        if not self._flow and not hasattr(self.noise_scheduler, "alphas_cumprod"):
            raise ValueError(
                f"A {kind} is not supported: noise is added as DDPM does, or by flow matching (FlowMatch...), and a "
                "score-based or EDM model is neither."
            )
        if not self._flow and config.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"Prediction type {config.prediction_type!r} is not known.")

    def inputs(self, model: nn.Module) -> ModelInputs:
        """Return what the model takes."""
        config: Any = unwrap(model).config
        names = [name for name in forward_names(model) if name != "timestep"]
        if "added_cond_kwargs" in names and getattr(config, "addition_embed_type", None) == "text_time":
            names += _ADDED
        main, classes = _main(names), _number_of_classes(config) if "class_labels" in names else None
        size = getattr(config, "sample_size", None)
        return ModelInputs(
            names=tuple(name for name in names if name != "class_labels" or classes is not None),
            main=main,
            labelled=False,
            channels=config.in_channels,
            image_size=None if size is None else height_and_width(size),
            symmetric=True,
            conditioned=classes,
            null_label=self.null_label,
        )

    def structure(self, model: nn.Module, batch: Batch) -> ModelStructure:
        """Return output layer and blocks of the model, found by running it on `batch`."""
        return find_structure(unwrap(model), lambda: self.predict(model, batch), self.head)

    def collate(self, rows: Batch, seeds: list[int]) -> Batch:
        """Add noise to what is clean: noisy examples, `timestep`, `target` and conditions, each from its own seed."""
        main = _main(rows)
        clean = rows[main]
        noise, draws = torch.empty_like(clean), torch.empty(len(clean), dtype=torch.int64)
        dropped = torch.zeros(len(clean), dtype=torch.bool)
        generator = torch.Generator()
        for i, seed in enumerate(seeds):
            generator.manual_seed(derive_seed(seed))
            torch.randn(clean[i].shape, generator=generator, out=noise[i])
            draws[i] = torch.randint(self.noise_scheduler.config.num_train_timesteps, (), generator=generator)
            dropped[i] = torch.rand((), generator=generator) < _LABEL_DROPOUT
        noisy, timesteps, target = self._add_noise(clean, noise, draws)
        conditions = {name: values for name, values in rows.items() if name != main}
        if self.null_label is not None:
            labels = conditions.get("class_labels", torch.full((len(clean),), self.null_label))
            conditions["class_labels"] = labels.masked_fill(dropped, self.null_label)
        return {main: noisy, "timestep": timesteps, "target": target, **conditions}

    def _add_noise(self, clean: Tensor, noise: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return noisy examples, their times, and what the model is to predict of them."""
        scheduler = self.noise_scheduler
        if self._flow:
            share = scheduler.sigmas[draws].to(clean).view(-1, *[1] * (clean.ndim - 1))
            return torch.lerp(clean, noise, share), scheduler.timesteps[draws].to(clean), noise - clean
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: clean,
            "v_prediction": lambda: scheduler.get_velocity(clean, noise, draws),
        }[scheduler.config.prediction_type]()
        return scheduler.add_noise(clean, noise, draws), draws, target

    def predict(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Return predicted noise, the shape of the examples; a learned variance beside it is left out."""
        inputs = {name: values for name, values in batch.items() if name not in ("target", *_ADDED)}
        if added := {name: batch[name] for name in _ADDED if name in batch}:
            inputs["added_cond_kwargs"] = added  # type: ignore[assignment]
        prediction = model(**inputs, return_dict=False)[0]
        noisy = batch[_main(batch)]
        if prediction.shape[1] == 2 * noisy.shape[1]:
            prediction = prediction[:, : noisy.shape[1]]
        _shaped_like(prediction, noisy)
        return prediction

    @torch.no_grad()
    def denoise(self, model: nn.Module, rows: Batch, share: float) -> tuple[Tensor, Tensor]:
        """Add noise to examples, and let the model remove it in one step (Fig. 5 and 6).

        Args:
            model: Run in evaluation mode, and left as it is.
            rows: Clean examples of a domain, images in [-1, 1]. The noise of one follows from its place.
            share: How far along the noise schedule, from 0 to 1.

        Returns:
            Noisy examples, and the model's estimate of the clean ones; both on the CPU.
        """
        scheduler, main = self.noise_scheduler, _main(rows)
        clean, generator = rows[main], torch.Generator().manual_seed(0)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        steps = scheduler.config.num_train_timesteps - 1
        draws = torch.full((len(clean),), int((1 - share if self._flow else share) * steps))
        noisy, timesteps, _ = self._add_noise(clean, noise, draws)
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in {**rows, main: noisy, "timestep": timesteps}.items()}
        with evaluation_mode(model):
            prediction = self.predict(model, batch).float().cpu()
        if self._flow:
            return noisy, noisy - scheduler.sigmas[draws[0]] * prediction
        kept = scheduler.alphas_cumprod[draws[0]]
        estimate = {
            "epsilon": lambda: (noisy - (1 - kept).sqrt() * prediction) / kept.sqrt(),
            "sample": lambda: prediction,
            "v_prediction": lambda: kept.sqrt() * noisy - (1 - kept).sqrt() * prediction,
        }[scheduler.config.prediction_type]()
        largest = scheduler.config.get("clip_sample_range", 1.0)
        return noisy, estimate.clamp(-largest, largest) if scheduler.config.get("clip_sample") else estimate

    @torch.no_grad()
    def generate(self, model: nn.Module, rows: Batch) -> Tensor:
        """Generate one example for each of `rows`, from noise that follows from its place and from its conditions.

        Args:
            model: Run in evaluation mode, and left as it is.
            rows: Examples of a domain, of which conditions and shape are taken.

        Returns:
            Generated examples, on the CPU.
        """
        from diffusers import DDIMScheduler

        kind: Any = type(self.noise_scheduler) if self._flow else DDIMScheduler
        static = {"use_dynamic_shifting": False} if self._flow else {}
        scheduler = kind.from_config(self.noise_scheduler.config, **static)
        scheduler.set_timesteps(_SAMPLING_STEPS)
        main, device = _main(rows), next(model.parameters()).device
        examples = torch.randn(rows[main].shape, generator=torch.Generator().manual_seed(0), dtype=rows[main].dtype)
        with evaluation_mode(model):
            for timestep in scheduler.timesteps:
                batch = {**rows, main: examples, "timestep": timestep.expand(len(examples))}
                prediction = self.predict(model, {name: value.to(device) for name, value in batch.items()})
                examples = scheduler.step(prediction.float().cpu(), timestep, examples).prev_sample
        return examples

    @torch.no_grad()
    def errors_by_band(self, model: nn.Module, rows: Iterable[Batch]) -> list[float]:
        """Return the mean squared error in each of `BANDS` of the noise schedule; NaN where there is no example.

        Args:
            model: Run in evaluation mode, and left as it is.
            rows: Batches that `collate` returned.
        """
        device, shares, errors = next(model.parameters()).device, [], []
        with evaluation_mode(model):
            for batch in rows:
                on_device = {name: value.to(device) for name, value in batch.items()}
                scores = self.scores(self.predict(model, on_device), on_device["target"])
                errors.append(scores["predictions"].cpu())
                shares.append(batch["timestep"] / self.noise_scheduler.config.num_train_timesteps)
        place = torch.bucketize(torch.cat(shares), torch.tensor(BANDS[1:-1]), right=True)
        return [float(torch.cat(errors)[place == band].mean()) for band in range(len(BANDS) - 1)]

    def fits(self, labels: Tensor | None, outputs: int | None) -> bool:
        """Return True: labels are no outputs of a diffusion model."""
        return True

    def target(self, batch: Batch) -> Tensor:
        """Return what the model is to predict, the shape of the images."""
        return batch["target"]

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error: what an adversary minimises, and L_beta of the original domain."""
        return F.mse_loss(at_least_float32(prediction), _shaped_like(prediction, target))

    def distance(self, prediction: Tensor, unprotected: Tensor) -> Tensor:
        """Return the mean squared error to what the unprotected model predicts."""
        return F.mse_loss(at_least_float32(prediction), at_least_float32(unprotected))

    def scores(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what the metric is computed from, one entry for each example."""
        errors = prediction.float() - _shaped_like(prediction, target).float()
        return {"predictions": errors.square().flatten(1).mean(dim=1)}

    def compute_metric(self, scores: dict[str, list]) -> float:
        """Return the metric's value, such as MSE-k."""
        return self._metric.compute(scores)


def _shaped_like(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the target, and raise a ValueError where the prediction is of another shape and would be broadcast."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"The model predicts {tuple(prediction.shape)} of noisy examples of shape {tuple(target.shape)}: they have "
            "to be the same (a learned variance may double the channels)."
        )
    return target


def _main(names: Container[str]) -> str:
    """Return what a denoiser calls its noisy examples."""
    return "sample" if "sample" in names else "hidden_states"


def _number_of_classes(config: Any) -> int | None:
    """Return how many class labels a model is conditioned on, 0 where it does not say, or None where on none."""
    table = getattr(config, "num_class_embeds", None) or getattr(config, "num_embeds_ada_norm", None)
    return table or (0 if getattr(config, "class_embed_type", None) else None)
