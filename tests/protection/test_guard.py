"""The guard: it holds the tolerance of eq. 1, and keeps the best state inside it."""

from __future__ import annotations

import logging

import pytest
import safetensors.torch
import torch
from observed import SPACE, Observer, assert_equal, config, guarded, state_of
from points import TinyNet, fitted, make_points
from transformers import TrainerCallback, TrainerControl, TrainerState

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.hub.claim import Claim
from sophon_hf.protection.guard import Guard


def train_guarded(tmp_path, **changes):
    observer = Observer()
    args = guarded(tmp_path, **changes)
    trainer = SophonTrainer(fitted(), make_points(1), make_points(2), args, callbacks=[observer])
    trainer.train()
    return trainer, observer


def test_the_guard_puts_the_last_good_state_back(tmp_path):
    trainer, observer = train_guarded(tmp_path, alpha=0.5, on_violation="continue")
    start, *later = observer.evaluations
    assert later[0]["eval_original_accuracy"] < start["eval_original_accuracy"] - 0.05
    assert [e["rollbacks"] for e in observer.evaluations] == [0, 1, 2, 3]
    for evaluation in later:
        assert_equal(evaluation["model"], start["model"])
        assert evaluation["optimizer"] == 0, "Adam of the abandoned path must not steer the next steps"
    assert_equal(state_of(trainer.model), start["model"])


def test_the_rollbacks_that_are_counted_are_those_that_were_logged(tmp_path):
    trainer, observer = train_guarded(tmp_path, alpha=0.5, on_violation="continue")
    assert trainer.guard.state.rollbacks == observer.evaluations[-1]["rollbacks"] == 3


def test_a_rollback_goes_to_the_last_good_state_and_not_to_the_first(tmp_path):
    _, observer = train_guarded(tmp_path, max_steps=8, alpha=0.03)
    first = next(i for i, evaluation in enumerate(observer.evaluations) if evaluation["rollbacks"] > 0)
    start, good, put_back = (observer.evaluations[i]["model"] for i in (0, first - 1, first))
    assert first > 1, "the set-up needs a good state after the start"
    assert_equal(put_back, good)
    assert not torch.equal(put_back["body.weight"], start["body.weight"])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_after_a_rollback_alpha_is_halved_for_good(tmp_path, schedule):
    trainer, observer = train_guarded(tmp_path, alpha=0.5, max_steps=4, lr_scheduler_type=schedule)
    alphas, betas = ([e[name] for e in observer.steps] for name in ("alpha", "learning_rate"))
    rollbacks = [e["rollbacks"] for e in observer.evaluations][: len(alphas)]
    assert rollbacks[1:3] == [1, 2]
    # The entry of an iteration is written after both schedules have moved on, alpha's being read then.
    left = [1 - step / 4 for step in range(1, 5)] if schedule == "linear" else [1.0] * 4
    assert alphas == pytest.approx([0.5 * share / 2**count for share, count in zip(left, rollbacks, strict=True)])
    assert max(betas) == 5e-4, "beta is not halved"
    # The last rollback follows the last entry, and counts at once.
    assert trainer.suppression_optimizer.param_groups[0]["lr"] == pytest.approx(
        left[-1] * 0.5 / 2**trainer.guard.state.rollbacks
    )


def test_after_a_rollback_it_can_go_on_unchanged(tmp_path):
    _, observer = train_guarded(tmp_path, alpha=0.5, on_violation="continue")
    assert [entry["alpha"] for entry in observer.steps] == [0.5] * 3


def test_after_a_rollback_it_can_stop(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, observer = train_guarded(tmp_path, alpha=0.5, on_violation="stop")
    assert trainer.state.global_step == 1
    assert_equal(state_of(trainer.model), observer.evaluations[0]["model"])
    assert "NOT protected" in caplog.text


def test_the_guard_catches_weights_that_are_no_numbers(tmp_path):
    model = fitted()
    start = state_of(model)

    def broken(model, batch):
        return model(batch["x"]).sum() * float("inf")

    args = guarded(tmp_path, l_FTS=0)
    SophonTrainer(model, make_points(1), make_points(2), args, reinforcement_loss=broken).train()
    assert_equal(state_of(model), start)


def test_the_best_state_inside_the_tolerance_is_kept_and_saved(tmp_path):
    args, observer = (
        guarded(tmp_path, max_steps=12, alpha=0.05, on_violation="continue", save_strategy="steps"),
        Observer(),
    )
    trainer = SophonTrainer(fitted(), make_points(1), make_points(2), args, callbacks=[observer])
    trainer.guard.error = 0.0  # On so few examples every difference is a tie.
    trainer.train()
    start = observer.evaluations[0]["eval_original_accuracy"]
    inside = [e for e in observer.evaluations[1:] if e["eval_original_accuracy"] >= start - 0.05]
    best = min(reversed(inside), key=lambda e: e["eval_restricted_simulated_accuracy"])
    assert len({e["eval_restricted_simulated_accuracy"] for e in inside}) > 1
    assert best["step"] < 12, "the set-up needs a best state that is not the last one"
    assert_equal(state_of(trainer.model), best["model"])
    saved = TinyNet()
    safetensors.torch.load_model(saved, tmp_path / "output" / "model.safetensors")
    assert_equal(saved.state_dict(), best["model"])
    assert trainer.evaluate()["eval_original_accuracy"] == best["eval_original_accuracy"]


def test_its_adversaries_are_measured_in_batches_of_the_evaluation(tmp_path):
    """Else an evaluation of large images needs memory for all of them at once."""
    model, sizes = fitted(), []
    model.body.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    args = guarded(tmp_path, max_steps=1, tolerance=1.0, per_device_eval_batch_size=20, simulated_examples=50)
    held_out = {"original": make_points(3), "restricted": make_points(4)}
    trainer = SophonTrainer(model, make_points(1), make_points(2), args, eval_dataset=held_out)
    trainer.train()
    assert max(sizes) == 25, "two batches of an adversary's own 50 examples are the largest"


def stays_beyond(guard, originals, slack):
    seen = []
    for step, original in enumerate(originals):
        guard.observe(step, original, simulated=0.5)
        seen.append(guard.stays_beyond(slack))
    return seen


def test_one_dip_beyond_the_slack_is_none_that_lasts(model):
    guard = Guard(model, tolerance=0.02, greater_is_better=True)
    seen = stays_beyond(guard, (0.9, 0.78, 0.8, 0.83, 0.83, 0.84, float("nan"), float("nan")), slack=3)
    # Beyond 4 tolerances is below 0.82.
    assert seen == [False, False, True, False, False, False, False, True]
    assert stays_beyond(Guard(model, 0.02, True), (0.9,), slack=-1) == [False], "there are no two yet"
    assert guard.state.best_step is None, "a state that needs slack is no protected one"


def test_the_slack_of_an_error_is_relative(model):
    guard = Guard(model, tolerance=0.1, greater_is_better=False)
    assert stays_beyond(guard, (2.0, 2.7, 2.7, 2.5), slack=2) == [False, False, True, False]


@pytest.mark.parametrize("greater, sign", [(True, 1), (False, -1)])
def test_a_metric_comes_back_at_the_pace_of_the_last_two_evaluations_or_not(model, greater, sign):
    """From 0.5 beyond at iteration 10 to 0.4 beyond at 20, it is 0.1 beyond, the tolerance, at 50."""
    guard = Guard(model, tolerance=0.1, greater_is_better=greater)
    for step, beyond in ((0, 0.0), (10, 0.5), (20, 0.4)):
        guard.observe(step, 1.0 - sign * beyond, simulated=0.5)
    assert [guard.comes_back(end) for end in (15, 20, 49, 51, 100)] == [False, False, False, True, True]
    guard.observe(30, 1.0 - sign * 0.45, simulated=0.5)
    assert not guard.comes_back(1000)
    guard.observe(40, float("nan"), simulated=0.5)
    assert not guard.comes_back(1000)


class Acts:
    """A guard that is shown evaluations of a run of so many iterations, and what it does to alpha and the model."""

    def __init__(self, model, max_steps, tolerance):
        self.rolled_back, self.scales = [], []
        self.guard = Guard(
            model,
            tolerance,
            True,
            on_violation="adapt_alpha",
            on_change=lambda back: back and self.rolled_back.append(1),
        )
        self.state, self.control = TrainerState(max_steps=max_steps), TrainerControl()

    def show(self, step, original):
        self.state.global_step = step
        metrics = {"eval_original_accuracy": original, "eval_restricted_simulated_accuracy": 0.5}
        self.guard.on_evaluate(None, self.state, self.control, metrics)
        self.scales.append(self.guard.state.alpha_scale)
        return metrics["rollbacks"]


@pytest.mark.parametrize("resumed", [False, True])
def test_alpha_is_halved_where_the_metric_stays_beyond_the_slack_and_doubled_back_inside_the_tolerance(model, resumed):
    # 10 iterations, slack 5: the tolerance is 0.01 times 1 + (5, 4.2, 3.3, 2.5, 1.7, 0.8, 0, ...).
    # In iteration 4 it comes back in time.
    falls = (0.0, 0.055, 0.055, 0.056, 0.040, 0.016, 0.016, 0.005, 0.009, 0.012, 0.011)
    expected = [1, 1, 2, 4, 4, 4, 8, 4, 2, 2, 4]
    acts = Acts(model, 10, 0.01)
    for step, fall in enumerate(falls):
        if resumed and step == 9:
            seen, acts = acts, Acts(model, 10, 0.01)
            acts.guard.load_state_dict(seen.guard.state_dict())
            acts.scales = seen.scales
        assert acts.show(step, 0.9 - fall) == 0
    assert [1 / scale for scale in acts.scales] == expected
    assert not acts.rolled_back


def test_a_scale_of_alpha_takes_effect_at_once_and_stays(tmp_path):
    """The schedule goes on under it."""

    class Halve(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.guard.state.alpha_scale = 0.5
                trainer.guard.on_change(False)

    observer = Observer()
    args = guarded(tmp_path, max_steps=4, lr_scheduler_type="linear", tolerance=1.0, alpha=0.01)
    trainer = SophonTrainer(fitted(), make_points(1), make_points(2), args, callbacks=[observer, Halve()])
    trainer.train()
    assert [e["alpha"] for e in observer.steps] == pytest.approx([0.0075, 0.0025, 0.00125, 0.0])


def test_from_twice_as_far_as_slack_allows_the_last_good_state_is_put_back_and_alpha_quartered(model):
    # 2 (1 + slack) tolerances are 0.12. The state of iteration 2 is inside the tolerance, that of 1 is not.
    acts, weights = Acts(model, 5, 0.01), []
    for step, fall in enumerate((0.0, 0.115, 0.005, 0.125, 0.115, 0.115)):
        with torch.no_grad():
            model.body.weight.add_(0.1)
        before = model.body.weight.detach().clone()
        assert acts.show(step, 0.9 - fall) == (0 if step < 3 else 1)
        weights.append((before, model.body.weight.detach().clone()))
    assert [not torch.equal(before, after) for before, after in weights] == [False, False, False, True, False, False]
    assert torch.equal(weights[3][1], weights[2][0])
    # No slack is left at the end, but what was measured before a roll-back does not count.
    assert [1 / scale for scale in acts.scales][:5] == [1, 1, 1 / 2, 2, 2]


def test_ties_within_the_error_go_to_the_later_state(model):
    guard = Guard(model, tolerance=1.0, greater_is_better=True, error=0.1)
    chosen, guard.state.applied = [], 1
    for step, simulated in enumerate((0.9, 0.5, 0.58, 0.45, 0.54, 0.56, float("nan"), 0.6)):
        guard.observe(step, original=1.0, simulated=simulated)
        chosen.append(guard.state.best_step)
    # 0.56 is no tie with 0.45, though it is one with 0.54: ties do not add up.
    assert chosen == [None, 1, 2, 3, 4, 4, 4, 4]


def test_the_chosen_state_is_told_by_a_figure_that_it_was_not_chosen_by(model, caplog):
    guard = Guard(model, tolerance=1.0, greater_is_better=True)
    guard.state.applied, guard.state.scratch, weights = 1, 0.1, []
    for step, simulated in enumerate((0.6, 0.2, 0.4)):
        with torch.no_grad():
            model.body.weight.fill_(step)
        guard.observe(step, original=1.0, simulated=simulated)

    def measure() -> float:
        weights.append(model.body.weight.mean().item())
        return 0.3

    caplog.set_level("INFO")
    guard.finish(measure)
    assert weights == [1.0], "it is measured where it is left"
    assert guard.state.best_score == 0.3
    assert "reach 0.3000 in the restricted domain" in caplog.text


@pytest.mark.parametrize(
    "greater, simulated, warned",  # By 0.03, and an MSE by 3 %.
    [(True, (0.6, 0.58), True), (True, (0.6, 0.56), False), (False, (0.6, 0.61), True), (False, (0.6, 0.62), False)],
)
def test_a_model_that_hardly_stops_the_simulated_adversaries_is_called_so(model, caplog, greater, simulated, warned):
    guard = Guard(model, tolerance=1.0, greater_is_better=greater, error=0.03 if greater else 0.0)
    guard.state.applied, guard.state.scratch = 1, 0.1 if greater else 2.0
    for step, value in enumerate(simulated):
        guard.observe(step, original=1.0, simulated=value)
    guard.finish()
    assert ("Hardly anything is suppressed" in caplog.text) is warned
    assert not warned or f"{simulated[1]:.4f} in the restricted domain (before protection 0.6000" in caplog.text


def test_alpha_rises_above_its_schedule_where_the_original_metric_does_not_mind(model):
    acts = Acts(model, 10, 0.01)
    acts.guard.state.scratch = 0.1
    for step in range(11):
        acts.show(step, 0.9)
    # Not before the first iteration, at most 16 times, and not again after the slack has ended.
    assert acts.scales == [1, 2, 4, 8, 16, 16, 16, 16, 16, 16, 16]


def test_alpha_rises_no_further_where_nothing_is_recovered(model):
    acts = Acts(model, 10, 0.01)
    acts.guard.state.scratch, acts.guard.state.start, acts.guard.state.start_simulated = 0.5, 0.9, 0.8
    acts.show(1, 0.9)
    assert acts.scales == [1], "the simulated adversaries are at 0.5, as from scratch"


@pytest.mark.parametrize(
    "greater, scratch, start, simulated, expected",
    [
        (True, 0.4, 0.8, 0.5, 0.25),
        (True, 0.4, 0.8, 0.3, -0.25),
        (False, 2.0, 1.0, 1.5, 0.5),
        (True, 0.75, 0.8, 0.5, None),
        (False, 1.0, 1.5, 1.5, None),
        (True, None, 0.8, 0.5, None),
    ],
)
def test_what_simulated_adversaries_recover_lies_between_scratch_and_start(
    model, greater, scratch, start, simulated, expected
):
    guard = Guard(model, 0.02, greater, error=0.02)
    guard.state.scratch, guard.state.start_simulated = scratch, start
    assert guard.recovered_transfer(simulated) == (expected if expected is None else pytest.approx(expected))


def test_without_evaluation_the_last_state_is_kept(tmp_path, caplog):
    """There is no guard then, so nothing may be put back to the start."""
    model = fitted()
    start, args = (
        state_of(model),
        SophonConfig(
            output_dir=str(tmp_path / "output"),
            max_steps=2,
            K=2,
            strategy_space=SPACE,
            eval_strategy="no",
            per_device_train_batch_size=16,
            use_cpu=True,
            disable_tqdm=True,
        ),
    )
    SophonTrainer(model, make_points(1), make_points(2), args).train()
    assert any(not torch.equal(start[name], value) for name, value in state_of(model).items())
    assert "has not been measured" in caplog.text


def test_a_suppression_gradient_that_is_not_finite_is_dropped_and_counted(tmp_path):
    """Adversaries that overflow teach nothing, so the run must equal one without suppression."""
    states, counts = [], []
    for changes in ({"strategy_space": {"learning_rates": [1e38], "batch_sizes": [8]}}, {"l_FTS": 0}):
        model, observer = fitted(), Observer()
        args = config(tmp_path, **changes)
        SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[observer]).train()
        states.append(state_of(model))
        counts.append([entry["dropped_suppression_gradients"] for entry in observer.steps])
    assert counts == [[1, 2, 3], [0, 0, 0]]
    assert_equal(*states)


def test_a_model_of_which_every_suppression_gradient_was_dropped_is_not_protected(tmp_path, caplog):
    space = {"learning_rates": [1e38], "batch_sizes": [8]}
    with caplog.at_level(logging.WARNING):
        trainer, observer = train_guarded(tmp_path, tolerance=1.0, strategy_space=space, save_strategy="steps")
    assert trainer.guard.state.best_step is None
    assert "NOT protected: all 3 suppression gradients were not finite" in caplog.text
    protection = Claim.read(tmp_path / "output").protection
    assert (protection.status, protection.iteration, protection.dropped) == ("not protected", 3, 3)
    card = " ".join((tmp_path / "output" / "README.md").read_text().split())
    assert "NOT protected" in card and "not finite and were therefore left out: 3." in card
    assert_equal(state_of(trainer.model), observer.evaluations[-1]["model"])


def test_a_state_that_was_put_back_is_no_protected_one(model):
    """What was suppressed before it does not count: only what the state at hand has seen."""
    guard = Guard(model, tolerance=0.05, greater_is_better=True)
    guard.observe(0, 0.9, 0.8)
    guard.state.applied = 20
    assert not guard.observe(20, 0.5, 0.3)
    guard.roll_back()
    guard.state.dropped = 20
    assert guard.observe(40, 0.9, 0.79)
    assert (guard.state.best_step, guard.suppressed) == (None, False)
    guard.state.applied += 1
    guard.observe(60, 0.9, 0.7)
    assert not guard.observe(80, 0.5, 0.3)
    guard.roll_back()
    assert (guard.state.best_step, guard.state.applied) == (60, 1)


def test_what_is_half_gone_is_lost_whatever_the_slack_allows(model):
    guard = Guard(model, tolerance=0.05, greater_is_better=True)
    guard.observe(0, 0.8, 0.7)
    assert [guard.lost(original, slack=6) for original in (0.41, 0.39, 0.1)] == [False, True, True]
    assert [guard.lost(original, slack=1) for original in (0.66, 0.59)] == [False, True]
    errors = Guard(model, tolerance=0.05, greater_is_better=False)
    errors.observe(0, 1.0, 0.7)
    assert [errors.lost(original, slack=1) for original in (1.19, 1.21, float("nan"))] == [False, True, True]


@pytest.mark.parametrize("examples", [50, 90, 100, 350, 1000])
def test_a_metric_exactly_at_the_tolerance_is_inside_it(model, examples):
    for right in range(examples // 2, examples + 1):
        guard = Guard(model, tolerance=0.02, greater_is_better=True)
        guard.observe(0, right / examples, 0.5)
        assert guard.within((right - 0.02 * examples) / examples)
        assert not guard.within((right - 0.02 * examples - 1) / examples)


def test_a_simulated_metric_that_is_not_finite_rules_no_later_state_out(model):
    guard = Guard(model, tolerance=1.0, greater_is_better=False)
    guard.state.applied = 1
    for step, simulated in enumerate((0.1, float("inf"), 0.2)):
        guard.observe(step, 1.0, simulated)
    assert (guard.state.best_step, guard.state.best_score) == (2, 0.2)


def test_a_start_that_is_no_number_is_refused(model):
    with pytest.raises(ValueError, match="original metric is nan before protection"):
        Guard(model, 0.05, greater_is_better=False).observe(0, float("nan"), 0.5)


class Again(TrainerCallback):
    """Asks for one more evaluation of the same iteration."""

    def __init__(self):
        self.trainer, self.asked = None, set()

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step not in self.asked:
            self.asked.add(state.global_step)
            self.trainer.evaluate()


@pytest.mark.parametrize(
    "changes",
    [{"eval_strategy": "epoch"}, {"on_violation": "adapt_alpha"}, {"on_violation": "continue"}],
)
def test_an_iteration_is_shown_to_the_guard_once(tmp_path, changes):
    model, again = fitted(), Again()
    start = state_of(model)
    args = guarded(tmp_path, alpha=0.5, max_steps=4, save_strategy="steps", save_steps=4, **changes)
    trainer = again.trainer = SophonTrainer(model, make_points(1), make_points(2), args, callbacks=[again])
    trainer.train()
    assert_equal(state_of(model), start)
    assert trainer.guard.state.best_step is None
    assert Claim.read(args.output_dir).protection.status == "not protected"
    assert trainer.guard.state.rollbacks <= (1 if "eval_strategy" in changes else 4)


@pytest.mark.parametrize("own_loss", [None, lambda model, batch: model(batch["x"]).square().mean()])
def test_without_a_suppression_loop_only_a_loss_of_its_own_protects(tmp_path, own_loss):
    args = guarded(tmp_path, l_FTS=0, tolerance=1.0, save_strategy="steps", save_steps=3)
    trainer = SophonTrainer(fitted(), make_points(1), make_points(2), args, reinforcement_loss=own_loss)
    trainer.train()
    status = Claim.read(args.output_dir).protection.status
    assert status == ("not protected" if own_loss is None else "protected")
    if own_loss is None:
        assert "no suppression gradient was applied" in trainer.guard.failure


def test_an_evaluation_after_an_interrupted_run_only_measures(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    args = guarded(tmp_path, alpha=0.5, on_violation="continue")
    trainer = SophonTrainer(fitted(), make_points(1), make_points(2), args, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    held = state_of(trainer.model)
    trainer.evaluate()
    assert_equal(state_of(trainer.model), held)
    assert not trainer.is_in_train


def test_a_trainer_protects_once(tmp_path):
    trainer, _ = train_guarded(tmp_path)
    with pytest.raises(ValueError, match="has begun to train already.*Make a new trainer"):
        trainer.train()
