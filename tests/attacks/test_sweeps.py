"""The sweeps by name, and those from files."""

from __future__ import annotations

import pytest

from sophon_hf import AttackSuite, FineTuningStrategy
from sophon_hf.attacks.sweeps import SWEEPS, load_sweep, of_original_data, scratch


def test_paper_sweeps():
    default = {"optimizer": "momentum", "learning_rate": 1e-4, "weight_decay": 1e-4, "batch_size": 200}
    paper = load_sweep("paper")
    assert all(s.to_dict()[name] == value for s in paper for name, value in default.items())
    assert [(s.initialization, s.transfer) for s in paper] == [
        ("direct", "all"),
        ("new_head", "head"),
        ("new_head", "all"),
    ]
    assert [s.optimizer for s in load_sweep("paper-optimizers")] == [
        "momentum",
        "nesterov",
        "adagrad",
        "adadelta",
        "adam",
    ]
    assert [s.learning_rate for s in load_sweep("paper-rates")] == [5e-6, 1e-5, 1e-4, 1e-3, 1e-2]
    assert [s.batch_size for s in load_sweep("paper-batches")] == [50, 100, 150, 200, 250]


def test_strong_sweep():
    strong = load_sweep("strong")
    whole = {(s.optimizer, s.learning_rate, s.initialization, s.reinitialized_blocks) for s in strong[:15]}
    assert whole == {
        (*optimizer, *start)
        for optimizer in (("adam", 3e-4), ("adam", 1e-3), ("adam", 3e-3), ("momentum", 1e-2), ("momentum", 1e-1))
        for start in (("direct", 0), ("new_head", 0), ("new_head", 1))
    }
    starts = {(s.transfer, s.initialization) for s in strong if s.transfer != "all"}
    assert starts == {("head", "new_head"), ("norm", "new_head"), ("head", "direct"), ("kernel", "new_head")}
    assert {s.reinitialized_blocks for s in strong} == {0, 1, 2, 3}
    assert {(s.head_first, s.layer_decay, s.augmentation, s.ema) for s in strong} == {
        (0, 1, None, 0),
        (0.5, 1, None, 0),
        (0, 0.65, None, 0),
        (0, 1, "flips_and_crops", 0),
        (0, 1, None, 0.99),
    }


def test_peft_and_adaptive_sweeps():
    peft = load_sweep("peft")
    assert {s.initialization for s in peft} == {"new_head"}
    assert {s.rank for s in peft if s.adapter == "lora"} == {1, 8, 64}
    assert {"lora", "dora", "adalora", "ia3", "loha", "lokr"} <= {s.adapter for s in peft}
    adaptive = load_sweep("adaptive")
    preparations = {"batch_norm", "rescale", "shrink_and_perturb", "warm_up", "distill"}
    assert {s.preparation for s in adaptive} == {None, *preparations}
    assert {(s.original_weight, s.initialization) for s in adaptive if s.original_weight} == {
        (weight, start) for weight in (0.3, 1) for start in ("direct", "new_head")
    }
    assert {s.initialization for s in adaptive if s.epochs == 200} == {"direct", "new_head"}
    assert [s.name for s in adaptive if not s.labelled] == ["direct, features, adam 0.001, no labels, batch 50"]


def test_every_sweep_is_a_file_in_a_fixed_order():
    counts = {"paper": 3, "paper-optimizers": 5, "paper-rates": 5, "paper-batches": 5, "strong": 28, "peft": 9}
    counts |= {"adaptive": 38, "hardest": 5, "informed": 6, "denoiser": 14, "search": 4, "full": 90}
    assert {name: len(load_sweep(name)) for name in SWEEPS} == counts
    strong, adaptive = load_sweep("strong"), load_sweep("adaptive")
    assert strong[0] == FineTuningStrategy(learning_rate=3e-4)
    assert strong[14] == FineTuningStrategy("new_head", 1, optimizer="momentum", learning_rate=0.1)
    assert adaptive[0] == FineTuningStrategy(preparation="batch_norm")
    assert adaptive[27:29] == [FineTuningStrategy("new_head", epochs=200), FineTuningStrategy(epochs=200)]
    assert load_sweep("full")[:3] == load_sweep("paper")


def test_the_full_sweep_holds_every_attack_once():
    full = load_sweep("full")
    assert len(set(full)) == len(full)
    assert set(full) == {s for name in SWEEPS if name not in ("full", "denoiser") for s in load_sweep(name)}
    assert len({s.name for s in full}) == len(full), "tables and heat maps tell attacks apart by name"


def test_scratch_is_tuned_over_optimizers_and_rates():
    tuned = scratch(load_sweep("strong"))
    assert all((s.initialization, s.reinitialized_blocks) == ("scratch", 0) for s in tuned)
    assert [s.name for s in tuned if s.transfer != "all"] == ["scratch, kernel regression"]
    assert {(s.optimizer, s.learning_rate) for s in tuned} == {
        (s.optimizer, s.learning_rate) for s in load_sweep("strong")
    }
    assert len(tuned) == 9, "moved images and averages are open to those who have no model, too"
    informed = scratch([*load_sweep("peft"), *load_sweep("adaptive")])
    assert all(s.adapter is None and s.preparation is None for s in informed)
    assert not any(s.needs_original_data or s.head_first or s.layer_decay != 1 for s in [*tuned, *informed])


def test_what_original_data_are_worth_alone_is_tried_by_warming_up_where_there_is_nothing_to_distill():
    mixed = FineTuningStrategy("new_head", original_weight=1)
    distilled = FineTuningStrategy("new_head", preparation="distill")
    warm = FineTuningStrategy("new_head", preparation="warm_up")
    assert of_original_data([mixed, FineTuningStrategy(), distilled, warm]) == [mixed, warm]


@pytest.mark.parametrize(
    "name, text",
    [
        ("own.json", '[{"optimizer": "sgd", "learning_rate": 0.1}, {"initialization": "new_head"}]'),
        ("own.yaml", "- {optimizer: sgd, learning_rate: 1e-1}\n- initialization: new_head\n"),
    ],
)
def test_a_sweep_from_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert load_sweep(tmp_path / name) == [
        FineTuningStrategy(optimizer="sgd", learning_rate=0.1),
        FineTuningStrategy("new_head"),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("- optimiser: sgd", "no field 'optimiser'. Did you mean 'optimizer'"),
        ("- optimizer: adamm", "Did you mean 'adam'"),
        ("optimizer: sgd", "must hold a list of strategies"),
        ("- sgd", "must hold a list of strategies"),
    ],
)
def test_a_bad_sweep_file_is_refused(tmp_path, text, message):
    (tmp_path / "own.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sweep(tmp_path / "own.yml")


def test_an_unknown_sweep_names_the_closest():
    with pytest.raises(ValueError, match="no sweep 'storng'. Did you mean 'strong'"):
        load_sweep("storng")
    with pytest.raises(ValueError, match="There are paper, .*json or .yaml"):
        AttackSuite("zzz")
