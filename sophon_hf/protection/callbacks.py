"""Callbacks of the trainer: a progress bar with the figures that matter, and what follows an iteration."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import TrainerCallback

from sophon_hf.models.scale_invariance import fresh_norms, scale_invariant_layers, set_norm


class ProtectionProgress(TrainerCallback):
    """One bar over the iterations: L_FTS, the simulated adversary before and after, and the last evaluation.

    Args:
        metric: The task's metric.
        visible: Whether to draw it.
    """

    def __init__(self, metric: str, visible: bool = True):
        self.metric, self.visible = metric, visible
        self.bar = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if self.visible and state.is_world_process_zero:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="protecting", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        shown = {
            "L_FTS": "L_FTS",
            f"{self.metric}_before": "before",
            f"{self.metric}_after": "after",
            f"eval_original_{self.metric}": "original",
            f"eval_restricted_simulated_{self.metric}": "simulated",
        }
        self.figures |= {short: f"{logs[name]:.3f}" for name, short in shown.items() if name in logs}
        self.bar.set_postfix(self.figures)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EvaluateLastStep(TrainerCallback):
    """Evaluate after the last iteration, before it is saved, so that the guard has seen every state that is gone on from."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class KeepNorms(TrainerCallback):
    """Hold layers whose scale the function does not depend on at the norm of a fresh initialisation.

    There a step moves them as far as it moves a new model's: an adversary who re-scales them gains nothing, and every
    simulated adversary has done so already.

    Args:
        model: Unwrapped.
        predict: Runs it on one batch and returns its prediction.
    """

    def __init__(self, model: nn.Module, predict: Callable[[], Tensor]):
        self.layers = scale_invariant_layers(model, predict)
        self.norms = fresh_norms(self.layers)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # A checkpoint has them already, and resumes bit for bit.
            self.set_norms()

    def on_step_end(self, args, state, control, **kwargs):
        self.set_norms()

    def set_norms(self) -> None:
        """Do so now."""
        for layer, normalisations in self.layers.items():
            set_norm(layer, normalisations, self.norms[layer])
