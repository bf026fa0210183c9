"""What fails at the first step of an attack is told before the sweep, which it neither stops nor changes."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from attacked import DIRECT, NEW_HEAD, make_data, make_model, make_suite
from points import TinyNet, make_points

from sophon_hf import FineTuningStrategy
from sophon_hf.attacks.adversary import AdversaryData
from sophon_hf.attacks.run import AttackRun
from sophon_hf.attacks.trial import try_kinds
from sophon_hf.models.loading import hash_state
from sophon_hf.tasks.base import infer_task

# No parameter has such a name.
HOPELESS = NEW_HEAD.with_changes(initialization="direct", transfer="pattern", pattern="nowhere")


class Counting(TinyNet):
    """Counts the passes of itself and its copies in training mode."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.passes += self.training
        return super().forward(x)


@pytest.fixture
def adversary():
    """A task, and an adversary's data with original ones."""
    model, points = make_model(), make_points(1)
    task = infer_task(model)
    data = AdversaryData(points.select(range(60)), points.select(range(60, 120)), original=make_points(3))
    return task, data.build(task.inputs(model), None)


def runs(*strategies: FineTuningStrategy, model: str = "protected") -> list[AttackRun]:
    return [AttackRun(model, strategy, seed) for seed in (0, 1) for strategy in strategies]


def test_what_fails_is_told_before_the_first_attack_and_the_others_go_on(tmp_path):
    told: list[tuple[str, bool]] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append((record.getMessage(), (tmp_path / "runs").exists()))
    logging.getLogger("sophon_hf.attacks.trial").addHandler(handler)
    results = make_suite(tmp_path, [DIRECT, HOPELESS], seeds=[0]).run(**make_data())
    assert [(HOPELESS.name in message, begun) for message, begun in told] == [(True, False)] * 2
    assert "on protected: ValueError: The strategy" in told[0][0] and "on original: " in told[1][0]
    assert {run.strategy for run in results.runs if run.failed} == {HOPELESS}
    assert results.best("protected").strategy == DIRECT
    told.clear()
    make_suite(tmp_path, [DIRECT], seeds=[0]).run(**make_data())
    assert not told, "nothing was left to do"


def test_where_all_fail_there_is_an_error_at_once(tmp_path):
    warm_up = DIRECT.with_changes(preparation="warm_up")  # Not applicable without original data.
    sweep = [HOPELESS, HOPELESS.with_changes(learning_rate=0.1), warm_up]
    data = make_data()
    data |= {"protected": Broken(), "original": Broken()}
    with pytest.raises(ValueError, match="No attack gets through its first step.*pattern nowhere, .* on protected"):
        make_suite(tmp_path, sweep).run(**data)
    assert not (tmp_path / "runs").exists()


class Broken(TinyNet):
    """Cannot be trained."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("no training")
        return super().forward(x)


def test_each_kind_takes_one_step_and_changes_nothing(adversary):
    task, data = adversary
    model = Counting()
    before, state = hash_state(model), (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    long = NEW_HEAD.with_changes(epochs=1000, batch_size=50)
    kinds = {
        # Passes in training mode: of the preparation, then of the step.
        long: 1,
        long.with_changes(preparation="shrink_and_perturb"): 1,
        long.with_changes(preparation="warm_up"): 2,
        long.with_changes(preparation="distill"): 2,
        long.with_changes(original_weight=1.0): 2,
        long.with_changes(adapter="lora", optimizer="adamw"): 1,
        long.with_changes(adapter="adalora"): 1,
        FineTuningStrategy("new_head", transfer="kernel"): 0,
    }
    for strategy, passes in kinds.items():
        Counting.passes = 0
        alike = strategy.with_changes(learning_rate=0.1, batch_size=60)
        try_kinds(runs(alike, strategy), {"protected": model}, task, data)
        assert Counting.passes == passes, strategy.name
    assert hash_state(model) == before
    assert random.getstate() == state[0] and np.array_equal(np.random.get_state()[1], state[1])
    assert torch.equal(torch.get_rng_state(), state[2])


def test_a_kind_is_tried_with_its_smallest_batches_and_a_batch_of_one_is_another(adversary):
    task, data = adversary

    class Batches(TinyNet):
        seen: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                Batches.seen.append(len(x))
            return super().forward(x)

    sweep = [DIRECT.with_changes(batch_size=size) for size in (50, 30, 1, 40)]
    try_kinds(runs(*sweep), {"protected": Batches()}, task, data)
    assert Batches.seen == [1, 30]


def test_the_smallest_fold_is_tried(tmp_path):
    """Two examples leave one in each fold, of which batch norm takes no mean."""
    data = make_data()
    data["restricted_dataset"] = data["restricted_dataset"].select([0, 1])
    with pytest.raises(ValueError, match="No attack gets through its first step.*more than 1 value per channel"):
        make_suite(tmp_path).run(**data)


def test_where_some_have_ended_before_the_rest_may_fail(adversary, caplog):
    task, data = adversary
    try_kinds(runs(HOPELESS), {"protected": make_model()}, task, data, required=False)
    assert HOPELESS.name in caplog.text
