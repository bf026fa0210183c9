"""The guard: holds lambda of eq. 1 while protecting, and remembers the best state inside it."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophon_hf.models.sharding import local

logger = logging.getLogger(__name__)

ROUNDING = 1e-9  # So that an accuracy exactly at the tolerance is inside it.
LEAST_RISE = 0.03


@dataclass
class GuardState:
    """What the guard has seen; plain values, for the checkpoint.

    Attributes:
        start: The original metric before protection.
        start_simulated: The simulated metric in the restricted domain before protection.
        best_step: Iteration of the best state, or None where no suppressed state was inside the tolerance yet.
        best_score: Its simulated metric in the restricted domain.
        least_score: The least (for an MSE: the greatest) simulated metric inside the tolerance.
        best_original: Its original metric.
        good_step: Iteration of the last state inside the tolerance.
        rollbacks: How often the last good state was put back.
        applied: Suppression gradients that were applied to the model at hand; those of a state that was given up do not count.
        good_applied: The same at `good_step`.
        dropped: Suppression gradients that were not finite and therefore not applied.
        last: Iteration and original metric of the last two evaluations, the later one last.
    """

    start: float | None = None
    start_simulated: float | None = None
    best_step: int | None = None
    best_score: float | None = None
    least_score: float | None = None
    best_original: float | None = None
    good_step: int = 0
    rollbacks: int = 0
    applied: int = 0
    good_applied: int = 0
    dropped: int = 0
    last: tuple[tuple[int, float], ...] = ()


class Guard:
    """Watches the original metric at every evaluation.

    Args:
        model: Unwrapped; its parameters and buffers are copied and put back, of a sharded model what this process holds.
        tolerance: lambda: absolute for a metric that is better when greater, relative for one that is better when less.
        greater_is_better: Which of the two the original metric is.
        error: What the simulated metric may be off by; smaller differences are ties.
        own_loss: Whether the reinforcement loss protects by itself, without a suppression loop.
    """

    def __init__(
        self, model: nn.Module, tolerance: float, greater_is_better: bool, error: float = 0.0, own_loss: bool = False
    ):
        self.model, self.tolerance, self.greater_is_better, self.error = model, tolerance, greater_is_better, error
        self.own_loss = own_loss
        self.state = GuardState()
        self.good = self._copy()
        self.best: dict[str, Tensor] | None = None

    def within(self, original: float, slack: float = 0.0) -> bool:
        """Whether an original metric is inside 1 + slack times the tolerance; NaN is not."""
        if self.state.start is None:
            return original == original
        tolerance = (1 + slack) * self.tolerance + ROUNDING
        if self.greater_is_better:
            return original >= self.state.start - tolerance
        return original <= self.state.start * (1 + tolerance)

    def lost(self, original: float, slack: float) -> bool:
        """Whether it is twice as far off as slack ever allows, or an accuracy below half its start: from there nothing comes back."""
        half_gone = self.greater_is_better and original < self.state.start / 2
        return half_gone or not self.within(original, 1 + 2 * slack)

    def stays_beyond(self, slack: float) -> bool:
        """Whether the last two evaluations were beyond 1 + slack times the tolerance: one alone may be a dip."""
        return len(self.state.last) == 2 and not any(self.within(original, slack) for _, original in self.state.last)

    def comes_back(self, end: float) -> bool:
        """Whether the original metric is inside the tolerance at iteration `end`, at the pace of the last two evaluations."""
        (before, original), (now, latest) = self.state.last
        return now < end and self.within(latest + (latest - original) / (now - before) * (end - now))

    def observe(self, step: int, original: float, simulated: float) -> bool:
        """Take note of an evaluation.

        Args:
            step: The iteration, 0 before protection.
            original: The original metric.
            simulated: What fixed simulated adversaries reach in the restricted domain; worse for them is better.

        Returns:
            False where the original metric fell by more than the tolerance: the caller then calls `roll_back`, or asks
            `lost`, `stays_beyond` and `comes_back`.

        Raises:
            ValueError: There is no metric to begin with: it is not finite.
        """
        if self.state.start is None and not math.isfinite(original):
            raise ValueError(
                f"The original metric is {original} before protection: look at the model's weights and the data."
            )
        if self.state.start is None:
            self.state.start, self.state.start_simulated = original, simulated
        self.state.last = (*self.state.last[-1:], (step, original))
        if not self.within(original):
            return False
        if step == 0:
            return True  # The copy that was made first counts: norms may have been re-scaled since.
        self.good, self.state.good_step, self.state.good_applied = self._copy(), step, self.state.applied
        if self.suppressed and self._is_as_good(simulated):
            self.best = self.good
            self.state.best_step, self.state.best_score, self.state.best_original = step, simulated, original
        return True

    @property
    def suppressed(self) -> bool:
        """False where no suppression gradient was applied: such a state was reinforced, but not protected."""
        return self.state.applied > 0 or self.own_loss

    def _is_as_good(self, simulated: float) -> bool:
        """Whether no earlier state was better by more than the error: ties go to the later, longer suppressed one."""
        if not math.isfinite(simulated):
            return False
        sign = 1 if self.greater_is_better else -1
        least = simulated if self.state.least_score is None else self.state.least_score
        self.state.least_score = sign * min(sign * least, sign * simulated)
        return sign * (simulated - self.state.least_score) <= self.error

    def roll_back(self, *optimizers: torch.optim.Optimizer) -> None:
        """Put the last good state back, because the original metric fell; the optimizers' states start anew."""
        self.state.rollbacks += 1
        self.state.applied = self.state.good_applied
        self.state.last = ()  # What is put back is not what was measured.
        for optimizer in optimizers:
            getattr(optimizer, "optimizer", optimizer).state.clear()
        self.restore_good()

    def restore_good(self) -> None:
        """The same, without counting it."""
        self._put_back(self.good)

    def restore_best(self) -> bool:
        """Put the best state back; False where there is none, and the model is left as it is."""
        if self.best is None:
            return False
        self._put_back(self.best)
        return True

    def finish(self, metric: str) -> None:
        """Leave the model in the best state inside the tolerance, or in the last good one, and say which.

        Args:
            metric: Its name, for the message.
        """
        state = self.state
        if self.restore_best():
            logger.info(
                "The protected model is the state of iteration %d: original %s %.4f (start %.4f), simulated %.4f (start %s).",
                state.best_step, metric, state.best_original, state.start, state.best_score, state.start_simulated,
            )  # fmt: skip
            if not self.weakens_adversaries:
                logger.warning(
                    "Hardly anything is suppressed: simulated adversaries reach %.4f in the restricted domain, and %.4f before "
                    "protection. Raise alpha or max_steps, or allow more tolerance, and attack the model before you publish it.",
                    state.best_score, state.start_simulated,
                )  # fmt: skip
        elif state.start is None:
            logger.warning(
                "eval_strategy is 'no', so the guard has seen nothing: whether the model still works in the original "
                "domain, and is protected, has not been measured. It is the state of the last iteration."
            )
        else:
            self.restore_good()
            logger.warning(
                "The model is put back to iteration %d and is NOT protected: %s", state.good_step, self.failure
            )

    @property
    def weakens_adversaries(self) -> bool:
        """Whether the simulated metric of the best state is worse than at the start, by more than its error, or for an MSE by 3 %."""
        if self.state.start_simulated is None:
            return True  # Resumed from a checkpoint that does not know the start's.
        sign = 1 if self.greater_is_better else -1
        least = self.error if self.greater_is_better else LEAST_RISE * self.state.start_simulated
        return sign * (self.state.start_simulated - self.state.best_score) > least

    @property
    def failure(self) -> str:
        """Why no state is a protected one, and what to do about it."""
        never = not self.suppressed and not self.state.rollbacks
        if never and not self.state.dropped:
            return "no suppression gradient was applied: let l_FTS be 1 or more, and max_steps such that a state is evaluated."
        if never:
            return (
                f"all {self.state.dropped} suppression gradients were not finite and were dropped. Lower the learning rates of "
                "the strategy space, or K."
            )
        return (
            f"no evaluated state kept the original domain within the tolerance of {self.tolerance:g}. Lower alpha, raise beta "
            "or l_NTR, or allow more tolerance."
        )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"state": asdict(self.state), "good": self.good, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.state = GuardState(**state["state"])
        self.good, self.best = state["good"], state["best"]

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def _put_back(self, copies: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(copies[name])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: local(tensor) for name, tensor in tensors.items()}
