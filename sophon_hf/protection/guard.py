"""The guard: a callback that holds lambda of eq. 1 at every evaluation, and remembers the best state inside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sophon_hf.models.sharding import local

logger = logging.getLogger(__name__)

_ROUNDING = 1e-9  # So that an accuracy exactly at the tolerance is inside it.
_LEAST_RISE = 0.03
# By how many tolerances more the original metric may fall while alpha adapts, and the share of the iterations by which
# this slack is gone: what is left then is there for the original metric to come back.
_SLACK, _SLACK_ENDS = 5.0, 0.6
# How far alpha may rise above its own schedule, where the original metric does not mind.
_MOST = 16.0


@dataclass
class GuardState:
    """What the guard has seen; plain values, for the checkpoint.

    Attributes:
        start: The original metric before protection.
        start_simulated: The simulated metric in the restricted domain before protection.
        scratch: What the same adversaries reach from scratch.
        early: The simulated metric before protection where only the first third of the blocks keeps its weights.
        gap: How far apart the domains lie in the first block's output, in standard deviations (`domain_gap`).
        best_step: Iteration of the best state, or None where no suppressed state was inside the tolerance yet.
        best_score: Its simulated metric in the restricted domain; at the end by adversaries that did not choose it.
        least_score: The least (for an MSE: the greatest) simulated metric inside the tolerance.
        best_original: Its original metric.
        good_step: Iteration of the last state inside the tolerance.
        rollbacks: How often the last good state was put back.
        applied: Suppression gradients that were applied to the model at hand; a roll-back takes back the count, too.
        good_applied: The same at `good_step`.
        dropped: Suppression gradients that were not finite and therefore not applied.
        alpha_scale: What alpha's schedule is multiplied by.
        seen: Iteration of the last evaluation.
        last: Iteration and original metric of the last two evaluations, the later one last.
        latest: The simulated metric of the last one.
    """

    start: float | None = None
    start_simulated: float | None = None
    scratch: float | None = None
    early: float | None = None
    gap: float | None = None
    best_step: int | None = None
    best_score: float | None = None
    least_score: float | None = None
    best_original: float | None = None
    good_step: int = 0
    rollbacks: int = 0
    applied: int = 0
    good_applied: int = 0
    dropped: int = 0
    alpha_scale: float = 1.0
    seen: int | None = None
    last: tuple[tuple[int, float], ...] = ()
    latest: float | None = None


class Guard(TrainerCallback):
    """Watches the original metric; where it falls by more than lambda, does as `on_violation` says.

    Args:
        model: Unwrapped; its parameters and buffers are copied and put back, of a sharded model what this process
            holds.
        tolerance: lambda: absolute for a metric that is better when greater, relative for one that is better when less.
        greater_is_better: Which of the two the original metric is.
        metric: Its name.
        error: What the simulated metric may be off by; smaller differences are ties.
        examples: How many the simulated adversaries have.
        own_loss: Whether the reinforcement loss protects by itself, without a suppression loop.
        on_violation: One of "halve_alpha", "continue", "stop", "adapt_alpha".
        on_change: Called with True after the last good state was put back, and with False where only alpha changed.
    """

    def __init__(
        self,
        model: nn.Module,
        tolerance: float,
        greater_is_better: bool,
        *,
        metric: str = "accuracy",
        error: float = 0.0,
        examples: int = 50,
        own_loss: bool = False,
        on_violation: str = "halve_alpha",
        on_change: Callable[[bool], None] = lambda rolled_back: None,
    ):
        self.model, self.tolerance, self.greater_is_better, self.metric = model, tolerance, greater_is_better, metric
        self.error, self.examples, self.own_loss = error, examples, own_loss
        self.on_violation, self.on_change = on_violation, on_change
        self._sign = 1 if greater_is_better else -1
        self.begin()

    def begin(self) -> None:
        """Take the model as it stands for the state before protection."""
        self.state = GuardState()
        self.good = self._copy()
        self.best: dict[str, Tensor] | None = None

    # ---- What the Trainer calls ----

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Observe an evaluation of the trainer's own domains while protecting; roll back or adapt alpha where asked."""
        metrics = {} if metrics is None else metrics
        original, simulated = (
            metrics.get(f"eval_{name}_{self.metric}") for name in ("original", "restricted_simulated")
        )
        if original is None or simulated is None:
            return
        # Once a state: one that was put back is not another, later one. A resumed run measures its start again, too.
        if state.global_step != self.state.seen:
            self._act(state, control, original, simulated)
            self.state.seen = state.global_step
        metrics["rollbacks"] = float(self.state.rollbacks)

    def _act(self, state, control, original: float, simulated: float) -> None:
        step = state.global_step
        inside = self.observe(step, original, simulated)
        if self.on_violation == "adapt_alpha":
            if self.tolerance:
                self._adapt_alpha(step, state.max_steps, original, inside)
            return
        if inside:
            return
        self.roll_back()
        if self.on_violation == "halve_alpha":
            self._scale_alpha(1 / 2)
        if self.on_violation == "stop":
            control.should_training_stop = True
        logger.warning(
            "Iteration %d: the original %s is %.4f, beyond the tolerance of %g from its start %.4f. The state of "
            "iteration %d is put back; then: %s.",
            *(step, self.metric, original, self.tolerance, self.state.start, self.state.good_step, self.on_violation),
        )

    def _adapt_alpha(self, step: int, max_steps: int, original: float, inside: bool) -> None:
        """Let alpha follow what of lambda and its slack is left.

        Halve it where the original metric stays beyond them and will not be back when the slack ends. Double it inside
        the tolerance while simulated adversaries still recover something: beyond its own schedule only before the slack
        ends, so that one alpha fits models that mind much and little. Where the original domain is lost nothing comes
        back in time: put the last good state back, and quarter alpha.
        """
        end = _SLACK_ENDS * max_steps
        if self.lost(original, _SLACK):
            self.roll_back()
            self._scale_alpha(1 / 4)
        elif self.stays_beyond(_SLACK * max(0.0, 1 - step / end)) and not self.comes_back(end):
            self._scale_alpha(1 / 2)
        elif step > 0 and inside and self.state.alpha_scale < (_MOST if step < end else 1) and not self._settled:
            self._scale_alpha(2)
        else:
            return
        logger.info(
            "Iteration %d: the original %s is %.4f (start %.4f): alpha is now %g of its schedule.",
            *(step, self.metric, original, self.state.start, self.state.alpha_scale),
        )

    def _scale_alpha(self, factor: float) -> None:
        self.state.alpha_scale *= factor
        self.on_change(False)

    # ---- What it knows ----

    def within(self, original: float, slack: float = 0.0) -> bool:
        """Return whether an original metric is inside 1 + slack times the tolerance; NaN is not."""
        if self.state.start is None:
            return original == original
        tolerance = (1 + slack) * self.tolerance + _ROUNDING
        if self.greater_is_better:
            return original >= self.state.start - tolerance
        return original <= self.state.start * (1 + tolerance)

    def lost(self, original: float, slack: float) -> bool:
        """Return whether it is twice as far off as slack ever allows, or below half its start: too far to come back."""
        half_gone = self.greater_is_better and self.state.start is not None and original < self.state.start / 2
        return half_gone or not self.within(original, 1 + 2 * slack)

    def stays_beyond(self, slack: float) -> bool:
        """Return whether the last two evaluations were beyond 1 + slack times the tolerance: one alone may be a dip."""
        return len(self.state.last) == 2 and not any(self.within(original, slack) for _, original in self.state.last)

    def comes_back(self, end: float) -> bool:
        """Return whether the metric is inside the tolerance at iteration `end`, at the pace of two evaluations."""
        (before, original), (now, latest) = self.state.last
        return now < end and self.within(latest + (latest - original) / (now - before) * (end - now))

    def observe(self, step: int, original: float, simulated: float) -> bool:
        """Take note of an evaluation, and keep the state where it is a good or the best one.

        Args:
            step: The iteration, 0 before protection.
            original: The original metric.
            simulated: What fixed simulated adversaries reach in the restricted domain; worse for them is better.

        Returns:
            False where the original metric fell by more than the tolerance.

        Raises:
            ValueError: The metric before protection is not finite, so that nothing can be compared with it.
        """
        if self.state.start is None and not math.isfinite(original):
            raise ValueError(
                f"The original metric is {original} before protection: look at the model's weights and the data."
            )
        if self.state.start is None:
            self.state.start, self.state.start_simulated = original, simulated
        self.state.last, self.state.latest = (*self.state.last[-1:], (step, original)), simulated
        if not self.within(original):
            return False
        if step == 0:
            return True  # The copy that `begin` made counts: norms may have been re-scaled since.
        self.good, self.state.good_step, self.state.good_applied = self._copy(), step, self.state.applied
        if self.suppressed and self._is_as_good(simulated):
            self.best = self.good
            self.state.best_step, self.state.best_score, self.state.best_original = step, simulated, original
        return True

    @property
    def _settled(self) -> bool:
        """Whether the last simulated adversaries recover nothing any more: more suppression gains nothing."""
        transfer = None if self.state.latest is None else self.recovered_transfer(self.state.latest)
        return transfer is not None and transfer <= 0

    @property
    def suppressed(self) -> bool:
        """Whether any suppression gradient was applied: a state without was reinforced, but not protected."""
        return self.state.applied > 0 or self.own_loss

    def _is_as_good(self, simulated: float) -> bool:
        """Return whether no earlier state was better by more than the error: ties go to the longer suppressed one."""
        if not math.isfinite(simulated):
            return False
        sign = self._sign
        least = simulated if self.state.least_score is None else self.state.least_score
        self.state.least_score = sign * min(sign * least, sign * simulated)
        return sign * (simulated - self.state.least_score) <= self.error

    def recovered_transfer(self, simulated: float) -> float | None:
        """Return the simulated recovered transfer: 1 at the start, 0 where the adversary is as good from scratch.

        None where pre-training is worth less than three errors to the simulated adversaries: there is no yardstick.
        """
        start = simulated if self.state.start_simulated is None else self.state.start_simulated
        scratch = math.nan if self.state.scratch is None else self.state.scratch
        if not self._sign * (start - scratch) > 3 * self.error:
            return None
        return (simulated - scratch) / (start - scratch)

    # ---- What it puts back ----

    def roll_back(self) -> None:
        """Put the last good state back, because the original metric fell."""
        self.state.rollbacks += 1
        self.state.applied = self.state.good_applied
        self.state.last = ()  # What is put back is not what was measured.
        self._put_back(self.good)
        self.on_change(True)

    def finish(self, measure: Callable[[], float] | None = None) -> None:
        """Leave the model in the best state inside the tolerance, or in the last good one, and say which.

        Args:
            measure: Returns the best state's simulated metric, by other adversaries than those that chose it: the least
                of many figures flatters.
        """
        state = self.state
        if self.best is not None:
            self._put_back(self.best)
            if measure is not None:
                state.best_score = measure()
            logger.info(
                "The protected model is the state of iteration %s: original %s %.4f (start %.4f). %s",
                *(state.best_step, self.metric, state.best_original, state.start, self.simulated),
            )
            if not self._weakens_adversaries:
                logger.warning(
                    "Hardly anything is suppressed. %s Raise alpha or max_steps, or allow more tolerance, and attack "
                    "the model before you publish it.",
                    self.simulated,
                )
        elif state.start is None:
            logger.warning(
                "eval_strategy is 'no', so the guard has seen nothing: whether the model still works in the original "
                "domain, and is protected, has not been measured. It is the state of the last iteration."
            )
        else:
            self._put_back(self.good)
            logger.warning(
                "The model is put back to iteration %d and is NOT protected: %s", state.good_step, self.failure
            )

    @property
    def _weakens_adversaries(self) -> bool:
        """Whether the best state's simulated metric is worse than at the start, by more than error (an MSE: 3 %)."""
        if self.state.start_simulated is None or self.state.best_score is None:
            return True  # There is nothing to compare.
        least = self.error if self.greater_is_better else _LEAST_RISE * self.state.start_simulated
        return self._sign * (self.state.start_simulated - self.state.best_score) > least

    @property
    def simulated(self) -> str:
        """What the simulated adversaries make of the best state, in words."""
        state = self.state
        if state.best_score is None or state.start_simulated is None or state.scratch is None:
            return "What simulated adversaries recover was not measured."
        transfer = self.recovered_transfer(state.best_score)
        reached = (
            f"Simulated adversaries with {self.examples} examples reach {state.best_score:.4f} in the restricted "
            f"domain (before protection {state.start_simulated:.4f}, from scratch {state.scratch:.4f})"
        )
        if transfer is None:
            return f"{reached}, where pre-training is worth too little to them to tell what they recover."
        error = self.error / abs(state.start_simulated - state.scratch)
        return f"{reached}: they recover {transfer:.0%} of the transfer, give or take {2 * error:.0%}."

    @property
    def outlook(self) -> str:
        """What the pair of domains was like before protection, and what that has meant for other pairs."""
        state, points = self.state, 100 if self.greater_is_better else 1
        if state.start_simulated is None or state.scratch is None or not math.isfinite(state.scratch):
            return "What pre-training is worth to an adversary was not measured."
        transfer = self._sign * (state.start_simulated - state.scratch)
        found = (
            f"Before protection, {self.examples} examples take an adversary to {self.metric} "
            f"{state.start_simulated:.3f}, from scratch to {state.scratch:.3f}: a transfer of {points * transfer:.3g}"
            f"{' points' if self.greater_is_better else ''}"
        )
        if self.recovered_transfer(state.start_simulated) is None:
            return f"{found}. It is too small to tell what a protection takes away: there may be little to protect."
        kept = None if state.early is None else self.recovered_transfer(state.early)
        if state.gap is None or kept is None or not math.isfinite(kept):
            return f"{found}."
        return (
            f"{found}. The domains lie {state.gap:.1f} standard deviations apart, and the first third of the blocks "
            f"holds {kept:.0%} of the transfer: docs/defences.md says what the preset was worth on pairs like it."
        )

    @property
    def failure(self) -> str:
        """Why no state is a protected one, and what to do about it."""
        never = not self.suppressed and not self.state.rollbacks
        if never and not self.state.dropped:
            return (
                "no suppression gradient was applied: let l_FTS be 1 or more, and max_steps such that a state is "
                "evaluated."
            )
        if never:
            return (
                f"all {self.state.dropped} suppression gradients were not finite and were dropped. Lower the learning "
                "rates of the strategy space, or K."
            )
        return (
            f"no evaluated state kept the original domain within the tolerance of {self.tolerance:g}. Lower alpha, "
            "raise beta or l_NTR, or allow more tolerance."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the guard."""
        return {"state": asdict(self.state), "good": self.good, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
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
