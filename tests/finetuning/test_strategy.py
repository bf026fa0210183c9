"""Strategies and their space as data: what is accepted, how it is written down, how it is drawn."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from fractions import Fraction
from math import ceil, inf, nan

import pytest

from sophon_hf import FineTuningStrategy, StrategySpace

FULL = FineTuningStrategy(
    initialization="new_head",
    reinitialized_blocks=2,
    transfer="pattern",
    pattern=r"layer\.1\.",
    optimizer="nesterov",
    learning_rate=3e-4,
    weight_decay=1e-4,
    schedule="cosine",
    warmup_ratio=0.1,
    max_grad_norm=1.0,
    batch_size=32,
    epochs=2.5,
    steps=17,
)


@pytest.mark.parametrize("strategy", (FineTuningStrategy(), FULL))
def test_a_strategy_survives_json(strategy):
    assert FineTuningStrategy.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy


def test_every_field_of_a_strategy_is_written():
    assert FULL.to_dict() == {field.name: getattr(FULL, field.name) for field in dataclasses.fields(FULL)}


@pytest.mark.parametrize(
    ("field", "value", "suggestion"),
    (
        ("initialization", "newhead", "new_head"),
        ("transfer", "heads", "head"),
        ("optimizer", "Adam", "adam"),
        ("schedule", "cosin", "cosine"),
    ),
)
def test_a_wrong_name_suggests_the_closest(field, value, suggestion):
    with pytest.raises(ValueError, match=f"{field} is '{value}'.*Did you mean '{suggestion}'"):
        FineTuningStrategy(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    (
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", nan),
        ("learning_rate", inf),
        ("epochs", 0),
        ("epochs", inf),
        ("steps", 0),
        ("weight_decay", -1e-4),
        ("weight_decay", nan),
        ("weight_decay", inf),
        ("warmup_ratio", 1.5),
        ("warmup_ratio", -0.1),
        ("max_grad_norm", -1),
        ("batch_size", 0),
    ),
)
def test_a_value_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        FineTuningStrategy(**{field: value})


@pytest.mark.parametrize("field", ("batch_size", "steps", "reinitialized_blocks"))
def test_counts_must_be_whole(field):
    with pytest.raises((TypeError, ValueError), match=field):
        FineTuningStrategy(initialization="new_head", **{field: 2.5})


def test_blocks_go_with_a_new_head():
    with pytest.raises(ValueError, match="reinitialized_blocks = 1 goes with initialization 'new_head'"):
        FineTuningStrategy(reinitialized_blocks=1)
    with pytest.raises(ValueError, match="reinitialized_blocks is -1"):
        FineTuningStrategy(initialization="new_head", reinitialized_blocks=-1)


def test_without_labels_no_head_is_trained():
    for fields in ({"initialization": "new_head"}, {"transfer": "head"}):
        with pytest.raises(ValueError, match="Without labels no head can be trained"):
            FineTuningStrategy(labelled=False, **fields)


def test_a_pattern_goes_with_its_transfer_and_must_compile():
    with pytest.raises(ValueError, match="`pattern` goes with transfer 'pattern' or an adapter"):
        FineTuningStrategy(transfer="pattern")
    with pytest.raises(ValueError, match="`pattern` goes with transfer 'pattern' or an adapter"):
        FineTuningStrategy(pattern="head")
    assert FineTuningStrategy(adapter="lora", pattern="to_q").name.startswith("direct, lora 8 on to_q, adam")
    with pytest.raises(ValueError, match="not a regular expression"):
        FineTuningStrategy(transfer="pattern", pattern="(")


@pytest.mark.parametrize("cls", (FineTuningStrategy, StrategySpace))
def test_an_unknown_field_suggests_the_closest(cls):
    misspelt, meant = {
        FineTuningStrategy: ("learning_rat", "learning_rate"),
        StrategySpace: ("optimiser", "optimizers"),
    }[cls]
    with pytest.raises(ValueError, match=f"{cls.__name__} has no field '{misspelt}'. Did you mean '{meant}'"):
        cls.from_dict({misspelt: 1})
    with pytest.raises(ValueError, match="has no field 'xyzzy'. It has"):
        cls.from_dict({"xyzzy": 1})


def test_changes_are_checked_and_leave_the_strategy_as_it_is():
    strategy = FineTuningStrategy()
    changed = strategy.with_changes(optimizer="sgd", batch_size=7)
    assert (changed.optimizer, changed.batch_size) == ("sgd", 7)
    assert strategy == FineTuningStrategy()
    with pytest.raises(ValueError, match="Did you mean 'batch_size'"):
        strategy.with_changes(batchsize=7)
    with pytest.raises(ValueError, match="batch_size is 0"):
        strategy.with_changes(batch_size=0)


def test_only_direct_strategies_need_the_original_head():
    needs = {i: FineTuningStrategy(initialization=i).needs_original_head for i in ("direct", "new_head", "scratch")}
    assert needs == {"direct": True, "new_head": False, "scratch": False}


def test_names_are_readable_and_tell_strategies_apart():
    assert FineTuningStrategy().name == "direct, all, adam 0.001, batch 50"
    assert FULL.name == (
        r"new head + 2 blocks, pattern layer\.1\., nesterov 0.0003, decay 0.0001, cosine, warm-up 0.1, clip 1, batch 32"
    )
    assert FineTuningStrategy(initialization="new_head", reinitialized_blocks=1).name.startswith("new head + 1 block,")
    changes = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.1, "batch_size": 1, "transfer": "norm"}
    names = {FineTuningStrategy(**{field: value}).name for field, value in changes.items()}
    assert len(names | {FineTuningStrategy().name}) == len(changes) + 1


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs"), ((100, 10, 20.0), (101, 10, 3.0), (7, 50, 2.0), (50, 50, 0.5))
)
def test_total_steps_pass_over_all_examples(examples, batch_size, epochs):
    strategy = FineTuningStrategy(batch_size=batch_size, epochs=epochs)
    size = min(batch_size, examples)
    steps = strategy.total_steps(examples)
    assert (steps - 1) * size < epochs * examples <= steps * size
    assert strategy.with_changes(steps=5).total_steps(examples) == 5


@pytest.mark.parametrize("tenths", range(1, 40))
def test_a_share_of_an_epoch_is_not_rounded_up_by_the_last_bit_of_a_float(tenths):
    exact = ceil(Fraction(tenths, 10) * 100 / 10)
    assert FineTuningStrategy(batch_size=10).step_of_epoch(tenths / 10, 100) == exact


def test_the_default_space_is_the_papers_and_all_of_it_is_drawn():
    rates, sizes = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2), (50, 100, 150, 200, 250)
    drawn = Counter(StrategySpace().sample(seed) for seed in range(5000))
    expected = {
        FineTuningStrategy(initialization=i, transfer="all", optimizer="adam", learning_rate=rate, batch_size=size)
        for i, rate, size in itertools.product(("direct", "new_head"), rates, sizes)
    }
    assert set(drawn) == expected
    # 100 draws each on average, with a standard deviation of 10.
    assert min(drawn.values()) > 50 and max(drawn.values()) < 150


def test_a_draw_is_a_function_of_the_seed_alone():
    space = StrategySpace(optimizers=("sgd", "adam", "adamw"), transfers=("all", "head", "norm"))
    random.seed(1)
    first = [space.sample(seed) for seed in range(20)]
    state = random.getstate()
    random.seed(2)
    assert [space.sample(seed) for seed in reversed(range(20))] == first[::-1]
    random.seed(1)
    assert random.getstate() == state
    assert len(set(first)) > 10


def test_blocks_are_drawn_for_new_heads_only():
    space = StrategySpace(reinitialized_blocks=(1, 2))
    drawn = {(s.initialization, s.reinitialized_blocks) for s in map(space.sample, range(200))}
    assert drawn == {("direct", 0), ("new_head", 1), ("new_head", 2)}


def test_every_list_of_a_space_is_drawn_from():
    space = StrategySpace(
        transfers=("all", "head", "norm"),
        optimizers=("momentum", "adadelta"),
        weight_decays=(0.0, 0.1),
        schedules=("constant", "linear", "cosine"),
        preparations=(None, "warm_up"),
    )
    drawn = [space.sample(seed) for seed in range(300)]
    for name in ("transfer", "optimizer", "weight_decay", "schedule", "preparation"):
        values = getattr(space, f"{name}s")
        assert {getattr(strategy, name) for strategy in drawn} == set(values)


def test_a_space_survives_json_as_values_and_as_a_string():
    space = StrategySpace(optimizers=("sgd", "adam"), learning_rates=(1e-3,), preparations=(None, "warm_up"))
    text = json.dumps(space.to_dict())
    assert StrategySpace.from_dict(json.loads(text)) == StrategySpace.from_dict(text) == space


@pytest.mark.parametrize(
    ("field", "values", "message"),
    (
        ("optimizers", (), "optimizers is \\(\\): give a non-empty list"),
        ("optimizers", "adam", "optimizers is 'adam': give a non-empty list"),
        ("learning_rates", 1e-3, "learning_rates is 0.001: give a non-empty list"),
        ("learning_rates", (1e-3, 0), "learning_rate is 0"),
        ("initializations", ("scratch",), "cannot hold 'scratch'"),
        ("transfers", ("pattern",), "cannot draw transfer 'pattern'"),
        ("optimizers", ("adam", "adan"), "Did you mean 'adam'"),
        ("batch_sizes", (50, 0), "batch_size is 0"),
        ("schedules", ("step",), "schedule is 'step'"),
        ("reinitialized_blocks", (0, -1), "reinitialized_blocks is -1"),
        ("preparations", ("rescale",), "preparations has 'rescale', but only 'shrink_and_perturb'"),
    ),
)
def test_a_space_is_checked_when_it_is_made(field, values, message):
    with pytest.raises(ValueError, match=message):
        StrategySpace(**{field: values})


def test_the_strategies_without_the_original_head():
    space = StrategySpace(learning_rates=(1e-3,))
    assert space.without_original_head() == StrategySpace(initializations=("new_head",), learning_rates=(1e-3,))
    with pytest.raises(ValueError, match="add initialization 'new_head'"):
        StrategySpace(initializations=("direct",)).without_original_head()
