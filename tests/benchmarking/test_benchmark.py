"""The benchmark in one call, on models whose recovered transfer is known beforehand, and on mistakes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import datasets
import pytest
import torch
from torch import nn

from sophon_hf import AttackSuite, FineTuningStrategy, benchmark, split_domain
from sophon_hf.attacks.sweeps import load_sweep
from sophon_hf.benchmarking.pairs import Pair
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits
from sophon_hf.models.scale_invariance import scale_invariant_layers, set_norm
from sophon_hf.models.toy import small_classifier
from sophon_hf.protection.ntl import train_ntl
from sophon_hf.tasks.base import infer_task

SIZE = 16
SWEEP = [FineTuningStrategy(start, learning_rate=3e-3, batch_size=10) for start in ("direct", "new_head")]


def in_parts(dataset: datasets.Dataset) -> datasets.DatasetDict:
    validation, train = split_domain(dataset, share=0.1)
    return datasets.DatasetDict(train=train, validation=validation)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Handwritten digits; the restricted domain are others, turned by 35 degrees."""
    digits = handwritten_digits(SIZE)
    test, original = split_domain(digits["train"], share=0.1)
    turned = digits["test"].map(lambda row: {"image": row["image"].rotate(35)})
    restricted_test, restricted = split_domain(turned, share=0.25)
    defender, adversary = split_domain(restricted)
    return Pair(
        "turned",
        small_classifier,
        datasets.DatasetDict(**in_parts(original), test=test),
        in_parts(defender),
        adversary,
        restricted_test,
        SWEEP,
        examples=(30,),
        seeds=(0, 1),
        epochs=10,
        pretraining_steps=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Attacks that several tests need are run once."""
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def original(pair) -> nn.Module:
    return pair.pretrained()


def predict(model: nn.Module, pair: Pair) -> torch.Tensor:
    task = infer_task(model)
    domain = build_domain(pair.original["test"], task.inputs(model), name="original")
    return task.predict(model, task.collate(domain.rows(torch.arange(32)), list(range(32))))


def test_an_unprotected_model_is_recovered_in_full_and_the_row_is_a_file(pair, folder, original, capsys):
    found = benchmark(original, pair, SWEEP, folder, name="unprotected")
    assert found.recovered_transfer.value == 1.0
    row = json.loads((folder / "turned-unprotected-custom.json").read_text())
    assert row == json.loads(json.dumps(found.record)) and found.path.name == "turned-unprotected-custom.json"
    assert str(found) in capsys.readouterr().out and "recovered transfer 100% [" in str(found)
    assert (row["pair"], row["protection"], row["budget"]) == ("turned", "unprotected", "custom")
    assert (row["examples"], row["seeds"], row["metric"]) == (30, [0, 1], "accuracy")
    assert row["original_accuracy"]["before"] == row["original_accuracy"]["after"] > 0.9
    assert row["recovered_transfer"]["value"] == 1.0 and row["recovered_transfer"]["void"] is None
    assert row["best"]["protected"] == row["best"]["original"]
    assert row["best"]["scratch"]["strategy"].startswith("scratch")
    attacks = {strategy.with_changes(epochs=10).name for strategy in SWEEP}
    assert {entry["attack"] for entry in row["table"] if "protected" in entry} == attacks


def test_the_same_call_again_computes_no_attack(pair, folder, original):
    benchmark(original, pair, SWEEP, folder, name="unprotected")
    runs = {path: path.stat().st_mtime_ns for path in (folder / "attacks" / "runs").glob("*.json")}
    benchmark(original, pair, SWEEP, folder, name="again")
    assert runs == {path: path.stat().st_mtime_ns for path in (folder / "attacks" / "runs").glob("*.json")}


def test_fewer_seeds_are_told_in_the_row(pair, folder, original):
    found = benchmark(original, pair, SWEEP, folder, seeds=[1], name="one-seed")
    assert found.record["seeds"] == [1] and len(found.record["best"]["protected"]["test"]) == 1


def test_the_row_is_about_the_number_of_examples_at_which_the_protection_is_worst(pair, folder, original):
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.005 * torch.randn(parameter.shape, generator=generator))
    found = benchmark(model, replace(pair, examples=(30, 40)), SWEEP[1:], folder, seeds=[0], name="moved")
    values = {examples: score["value"] for examples, score in found.record["by_examples"].items()}
    assert sorted(values) == [30, 40] and values[30] != values[40]
    assert found.record["examples"] == max(values, key=values.get)
    assert found.recovered_transfer.value == max(values.values())


def test_a_re_initialised_model_is_worth_nothing_and_is_called_broken(pair, folder):
    torch.manual_seed(5)
    found = benchmark(small_classifier(), pair, SWEEP, folder, name="re-initialised")
    assert found.recovered_transfer.value is None and "a broken model is no protected model" in str(found)
    # Its attacks alone are at the level of training from scratch.
    transfer = replace(found.results.scores(), original_metric={}).recovered_transfer()
    assert abs(transfer.value) < 0.4 and transfer.interval[0] <= 0 <= transfer.interval[1]


class Ntl:
    """Non-transferable learning; it keeps what it is given."""

    def protect(self, model, restricted, original):
        self.given = {"restricted": restricted, "original": original}
        task = infer_task(model)
        needs = task.inputs(model)
        domains = [build_domain(parts["train"], needs, name=name) for name, parts in self.given.items()][::-1]
        return train_ntl(model, task, *domains, steps=60, batch_size=32, learning_rate=1e-4)


def test_a_defence_sees_neither_the_adversarys_half_nor_a_test_split_and_ntl_is_recovered(pair, folder, original):
    defence = Ntl()
    found = benchmark(defence, pair, SWEEP, folder)
    assert found.record["protection"] == "Ntl" and found.record["original_accuracy"]["after"] > 0.8
    assert found.recovered_transfer.value > 0.8
    assert all(sorted(parts) == ["train", "validation"] for parts in defence.given.values())

    def pictures(*parts):
        return {picture.tobytes() for part in parts for picture in part["image"]}

    seen = pictures(*(part for parts in defence.given.values() for part in parts.values()))
    assert len(seen) > 1000 and not seen & pictures(pair.adversary, pair.test, pair.original["test"])
    # What it gave back is what was attacked, and is kept.
    again = benchmark(folder / "protected" / "turned-Ntl", pair, SWEEP, folder)
    assert again.recovered_transfer == found.recovered_transfer and again.record["protection"] == "turned-Ntl"


def test_a_model_protected_against_direct_attacks_only_deceives_paper_and_not_strong(pair, tmp_path):
    """Algorithm 1 with a single strategy in Phi: direct, at the paper's rate."""
    space = {"initializations": ["direct"], "optimizers": ["momentum"], "learning_rates": [1e-4], "batch_sizes": [30]}
    fields = {
        "max_steps": 40,
        "K": 10,
        "l_NTR": 2,
        "alpha": 1e-3,
        "beta": 1e-3,
        "per_device_train_batch_size": 64,
        "eval_steps": 20,
        "simulated_examples": 30,
        "strategy_space": space,
    }
    given = replace(pair, presets={"paper": fields}, seeds=(0,))
    paper = benchmark("paper", given, "paper", tmp_path, name="direct-only")
    assert paper.record["budget"] == "paper" and paper.path == tmp_path / "turned-direct-only-paper.json"
    assert paper.record["protection_run"]["config"] == {"preset": "paper", **fields}
    assert paper.record["protection_run"]["failure"] is None
    assert paper.record["original_accuracy"]["after"] > 0.9
    assert paper.recovered_transfer.value < 0.3 and paper.direct.value < 0.1

    strong = [
        s.with_changes(batch_size=10)
        for s in load_sweep("strong")
        if s.learning_rate == 3e-3 and s.reinitialized_blocks < 2 and s.layer_decay == 1 and not s.ema
    ]
    weights = tmp_path / "protected" / "turned-direct-only" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    found = benchmark("paper", given, strong, tmp_path, name="direct-only")  # It is protected already.
    assert weights.stat().st_mtime_ns == written
    assert found.recovered_transfer.value > 0.8 > 0.3 > paper.recovered_transfer.value
    with pytest.raises(ValueError, match="was protected with .* choose another `name`"):
        benchmark("paper", pair, "paper", tmp_path, name="direct-only")


def test_inflated_weights_are_undone_by_adaptive(pair, folder, original):
    """Weights before a normalisation, 30 times as large, hardly move at usual rates; `rescale` puts them back."""
    protected = copy.deepcopy(original)
    layers = scale_invariant_layers(protected, lambda: predict(protected, pair))
    assert len(layers) > 3
    for layer, norms in layers.items():
        set_norm(layer, norms, 30 * layer.weight.detach().norm())
    plain = benchmark(protected, pair, SWEEP, folder, name="inflated")
    assert plain.recovered_transfer.value < 0.6
    adaptive = [
        s.with_changes(batch_size=10)
        for s in load_sweep("adaptive")
        if s.preparation == "rescale" and not s.reinitialized_blocks and s.learning_rate == 3e-3
    ]
    undone = benchmark(protected, pair, [*SWEEP, *adaptive], folder, name="inflated")
    assert undone.recovered_transfer.value > 0.9
    assert undone.record["original_accuracy"]["before"] == pytest.approx(
        undone.record["original_accuracy"]["after"], abs=0.01
    )


class Forgetful:
    def protect(self, model, restricted, original):
        """Forget to return the model."""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pair": "lettres"}, ValueError, "There is no pair 'lettres'. Did you mean 'letters'?"),
        ({"model": "represntation"}, ValueError, "Did you mean 'representation'?"),
        ({"model": "no/such/folder"}, ValueError, "is no preset, no folder, and no Hub id"),
        ({"model": object()}, TypeError, "object is neither a model nor a defence"),
        ({"model": Forgetful()}, TypeError, "Forgetful.protect returned NoneType"),
        ({"budget": "strnog"}, ValueError, "Did you mean 'strong'?"),
        ({"name": "a/b"}, ValueError, "leave out slashes"),
        ({"model": small_classifier(3)}, ValueError, "differs in architecture or head"),
        ({"seeds": []}, ValueError, "seeds"),
    ],
)
def test_mistakes_are_told(arguments, error, message, pair, folder, original):
    given = {"model": original, "pair": pair, "budget": SWEEP, "output_dir": folder, **arguments}
    with pytest.raises(error) as raised:
        benchmark(**given)
    assert message in str(raised.value)


def test_the_suite_itself_finds_the_same(pair, folder, original, tmp_path):
    found = benchmark(original, pair, SWEEP, folder, seeds=[1], name="one-seed")
    suite = AttackSuite(SWEEP, tmp_path, seeds=[1], epochs=10, measured_epochs=(0, 5, 10), examples=30)
    results = suite.run(
        protected=original, original=original, restricted_dataset=pair.adversary, eval_dataset=pair.test
    )
    assert results.recovered_transfer().value == found.recovered_transfer.value
    assert results.best("scratch").test == found.results.best("scratch").test
