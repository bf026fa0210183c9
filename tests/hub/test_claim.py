"""sophon.json: what it holds, and that a stranger's one is read field by field."""

from __future__ import annotations

import copy
import getpass
import hashlib
import json
import math
import os
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from points import TinyNet
from published import classifier, pixels, protect

from sophon_hf.attacks.results import AttackResults
from sophon_hf.data.domain import build_domain
from sophon_hf.data.fingerprint import fingerprint_domain
from sophon_hf.data.loading import remember_source
from sophon_hf.hub.claim import AttackReport, Claim, hash_weights
from sophon_hf.models.loading import hash_state
from sophon_hf.tasks.base import infer_task


@pytest.fixture(scope="module")
def saved(protected_classifier):
    """A protected classifier and its attacks, with its claim."""
    return *protected_classifier, Claim.read(protected_classifier[0] / "model")


@pytest.fixture(scope="module")
def whole(saved):
    """The claim with attacks, as plain values."""
    claim = saved[3]
    return json.loads(Claim(**{**vars(claim), "attacks": AttackReport.from_results(saved[2])}).to_json())


def test_a_trainer_writes_what_it_did(saved):
    home, trainer, _, claim = saved
    assert claim.attacks is None
    assert claim.method.hyper_parameters["K"] == 2 and claim.method.hyper_parameters["alpha"] == 3e-4
    assert claim.method.hyper_parameters["suppression_loss"] == "inverse_cross_entropy"
    assert claim.method.strategy_space.learning_rates == (1e-2,)
    assert claim.model == "ResNetForImageClassification" and claim.metric == "accuracy"
    assert claim.protection.status == "protected"
    assert claim.protection.iteration == trainer.guard.state.best_step
    assert claim.protection.original_before == trainer.guard.state.start
    assert claim.intactness == (trainer.guard.state.start, trainer.guard.state.best_original)
    # Two iterations of one adversary: K updates, and K suppression losses.
    assert claim.compute.iterations == 2 and claim.compute.simulated_passes == 2 * (2 + 2)
    assert claim.compute.seconds > 0
    assert {name: data.examples for name, data in claim.data.items()} == {
        "original": 36,
        "restricted": 36,
        "eval_original": 4,
        "eval_restricted": 4,
    }
    assert claim.versions["torch"] == torch.__version__


def test_the_weights_are_hashed_file_by_file(saved):
    home, _, _, claim = saved
    content = (home / "model" / "model.safetensors").read_bytes()
    assert claim.weights == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert hash_weights(home / "model") == claim.weights


def test_checkpoints_and_hidden_folders_are_not_hashed(tmp_path):
    for name in ("unet/a.safetensors", "b.safetensors", "checkpoint-3/c.safetensors", ".cache/d.safetensors", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert hash_weights(tmp_path) == {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("b.safetensors", "unet/a.safetensors")
    }


def test_a_claim_is_read_as_it_was_written(tmp_path, whole):
    claim = Claim.from_json(json.dumps(whole))
    claim.write(tmp_path)
    assert Claim.read(tmp_path) == Claim.read(tmp_path / "sophon.json") == claim
    assert json.loads((tmp_path / "sophon.json").read_text()) == whole
    assert os.listdir(tmp_path) == ["sophon.json"]


def test_attack_figures_are_those_of_the_results(saved):
    results, claim = saved[2], saved[3]
    report = AttackReport.from_results(results)
    scores = replace(claim, attacks=report).scores
    assert report.attacks == results.summaries()
    assert [scores.best(m) for m in ("protected", "original", "scratch")] == [
        results.best(m) for m in ("protected", "original", "scratch")
    ]
    assert report.original_metric == results.original_metric
    assert set(report.data) == {"training", "test", "original", "original_test"}
    # Of 40 examples in turn of three classes, 14 are of the commonest.
    assert report.precision == "float32" and report.chance == {"restricted": 0.35, "original": 0.35}
    transfer, scored = results.recovered_transfer(), report.recovered_transfer
    assert scored == transfer or scored.void


def test_nothing_names_the_machine(saved, whole, tmp_path):
    home, trainer, results, _ = saved
    broken = copy.deepcopy(results)
    broken.facts["sweep"] = str(home / "my-sweep.json")
    broken.runs[0].curve, broken.runs[0].error = None, f"OSError: {home}/x cannot be read"
    text = json.dumps(whole) + str(AttackReport.from_results(broken))
    assert "my-sweep.json" in text
    for secret in (str(home), "secret-home", str(tmp_path.parent), f"/{getpass.getuser()}/"):
        assert secret not in text


def test_a_failed_attack_is_counted_and_an_infinite_one_is_no_number(saved):
    results = copy.deepcopy(saved[2])
    first = results.runs[0]
    first.curve, first.error = None, "ValueError: boom"
    results.runs[-1].curve.test[-1] = math.inf
    report = AttackReport.from_results(results)
    broken = next(a for a in report.attacks if a.model == first.model and a.strategy == first.strategy)
    assert broken.failed == 1 and len(broken.seeds) == len(broken.test) == 2
    assert any(check.name == "runs failed" for check in report.failed_checks)
    last = next(
        a for a in report.attacks if a.model == results.runs[-1].model and a.strategy == results.runs[-1].strategy
    )
    assert last.final[-1] is None


def changed(values: dict, place: str, value) -> dict:
    values = copy.deepcopy(values)
    *path, last = place.split(".")
    inner = values
    for name in path:
        inner = inner[int(name)] if name.isdigit() else inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[int(last) if last.isdigit() and isinstance(inner, list) else last] = value
    return values


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schema", 2, "schema 2.*pip install -U"),
        ("schema", 0, "schema 0.*publish the model again"),
        ("schema", "1", "schema"),
        ("schema", KeyError, "schema: Field required"),
        ("metric", "", "metric: .*at least 1 character"),
        ("greater_is_better", False, "greater_is_better is False, which does not go with accuracy"),
        ("model", "os.system('x')", "model"),
        ("weights", {}, "weights: .*at least 1 item"),
        ("weights", {"../model.safetensors": "0" * 64}, "weights.*inside the folder"),
        ("weights", {"/etc/x.safetensors": "0" * 64}, "weights"),
        ("weights", {"model.bin": "0" * 64}, "weights"),
        ("weights", {"model.safetensors": "xyz"}, r"weights\.model\.safetensors: .*\[0-9a-f\]\{64\}"),
        ("data.original.name", "/home/someone/data", "data.original.*name"),
        ("data.original.name", "..", "data.original.*name"),
        ("data.original.examples", -1, "data.original.*examples"),
        ("data.original.hash", 7, "data.original.hash"),
        ("data.original.size", 7, "data.original.size: Unexpected keyword argument"),
        ("protection.status", "perfect", "protection.*status"),
        ("protection.iteration", True, "protection.iteration: .*integer"),
        ("compute.seconds", "long", "compute.seconds"),
        ("method.strategy_space", {"initializations": ["magic"]}, "method.*magic"),
        ("method.strategy_space", {"initializations": [[1]]}, "method.strategy_space.initializations"),
        ("method.hyper_parameters", {"K": ["a", {"b": "c\u202e"}]}, r"hyper_parameters\.K\[1\]\.b holds"),
        ("versions", {"to\nrch": "1"}, "a name in versions holds characters"),
        ("attacks.seeds", [], "attacks.*seeds"),
        ("attacks.precision", "fp8", "attacks.precision: .*float32"),
        ("attacks.precision", KeyError, "attacks.precision: Field required"),
        ("attacks.chance", {"benign": 0.1}, r"attacks\.chance"),
        ("attacks.chance.restricted", None, r"attacks\.chance\.restricted"),
        ("attacks.attacks.0.strategy", {"learning_rate": -1}, r"attacks\.attacks\[0\].*learning_rate"),
        ("attacks.attacks.0.strategy", {"optimizer": {}}, r"attacks\.attacks\[0\].*optimizer"),
        ("attacks.attacks.0.strategy", {"magic": 1}, r"attacks\.attacks\[0\]\.strategy\.magic: Unexpected"),
        ("attacks.attacks.0.strategy.learning_rate", "1", r"strategy\.learning_rate: .*number"),
        ("attacks.attacks.0.test", [0.5], r"attacks\.attacks\[0\].*test"),
        ("attacks.attacks.0.model", "a\u001b[2J", r"attacks\.attacks\[0\]\.model.*cannot be shown"),
        ("attacks.recovered_transfer", {"value": None, "interval": [0.0, 0.1], "void": "x"}, "recovered_transfer"),
        ("attacks.recovered_transfer", {"value": 0.1, "interval": [0.3, 0.0], "void": None}, "recovered_transfer"),
        ("attacks.failed_checks", [{"name": "x"}], r"attacks\.failed_checks\[0\]\.message: Field required"),
        ("attacks", [], "attacks"),
        ("surprise", 1, "surprise: Unexpected keyword argument"),
    ],
)
def test_a_wrong_field_is_named(whole, place, value, message):
    with pytest.raises(ValueError, match=message):
        Claim.from_json(json.dumps(changed(whole, place, value)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "1",
        '"text"',
        "[" * 100_000,
        '{"schema": NaN}',
        '{"schema": 1e999}',
        "\ufffe",
        '{"schema": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_claim_is_refused(tmp_path, text):
    (tmp_path / "sophon.json").write_text(text)
    with pytest.raises(ValueError, match=r"sophon\.json"):
        Claim.read(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400])
def test_numbers_that_are_none_are_neither_read_nor_written(whole, value):
    with pytest.raises(ValueError, match="sophon.json"):
        Claim.from_json(json.dumps(changed(whole, "compute.seconds", value)))
    claim = Claim.from_json(json.dumps(whole))
    with pytest.raises(ValueError):
        replace(claim, compute=replace(claim.compute, seconds=value)).to_json()


def test_any_metric_can_be_claimed(whole):
    claim = replace(Claim.from_json(json.dumps(whole)), metric="f1_macro")
    assert Claim.from_json(claim.to_json()) == claim


def test_deep_nesting_is_refused(whole):
    deep = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(ValueError, match="sophon.json"):
        Claim.from_json(json.dumps(changed(whole, "method.hyper_parameters.alpha", deep)))


def test_a_file_that_is_too_large_is_not_parsed(tmp_path):
    with open(tmp_path / "sophon.json", "wb") as file:
        file.truncate(2**40)  # A hole: it takes no space on the disk.
    with pytest.raises(ValueError, match="larger than"):
        Claim.read(tmp_path)


def test_no_claim_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sophon\.json does not exist"):
        Claim.read(tmp_path)


# Fingerprints of data.


def domain(dataset):
    model = classifier()
    return build_domain(dataset, infer_task(model).inputs(model))


def test_a_fingerprint_is_that_of_the_content():
    one, same, other = pixels(1), pixels(1), pixels(2)
    relabelled = one.remove_columns("label").add_column("label", [0] * len(one))
    hashes = [fingerprint_domain(domain(d)).hash for d in (one, same, other, relabelled, one.select(range(10)))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_a_fingerprint_does_not_depend_on_what_fits_in_memory():
    model = classifier()
    needs = infer_task(model).inputs(model)
    dataset = pixels(1, examples=300)
    assert fingerprint_domain(build_domain(dataset, needs)) == fingerprint_domain(
        build_domain(dataset, needs, memory_limit=0)
    )


def test_a_folder_is_known_by_its_base_name(tmp_path):
    folder = tmp_path / "secret" / "pictures"
    folder.mkdir(parents=True)
    pixels(1).to_parquet(folder / "train.parquet")
    found = fingerprint_domain(domain(datasets.load_dataset(str(folder))["train"].select(range(30))))
    assert (found.name, found.revision, found.split, found.examples) == ("pictures", None, "train", 30)


@pytest.mark.parametrize(("revision", "known"), [("a" * 40, "a" * 40), ("main", None), (None, None)])
def test_a_hub_id_and_its_commit_are_remembered(revision, known):
    dataset = pixels(1)
    remember_source(dataset, "owner/name:small", revision)
    found = fingerprint_domain(domain(dataset.select(range(12)).shuffle(seed=0)))
    assert (found.name, found.revision, found.examples) == ("owner/name:small", known, 12)


def test_code_from_a_repository_is_told(tmp_path):
    """transformers puts the classes that it takes from a repository into a package of this name."""
    remote = type("RemoteNet", (TinyNet,), {"__module__": "transformers_modules.owner.repo.modeling"})
    protect("module", tmp_path / "out", model=remote())
    claim = Claim.read(tmp_path / "out")
    assert claim.remote_code and claim.model == "RemoteNet"
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()


def test_results_without_fingerprints_are_still_a_report(saved):
    results = copy.deepcopy(saved[2])
    del results.facts["fingerprints"]
    assert AttackReport.from_results(results).data == {}


def test_what_the_suite_saves_can_be_claimed(saved):
    home, _, results, _ = saved
    loaded = AttackResults.load(home / "attacks" / "results.json")
    assert AttackReport.from_results(loaded) == AttackReport.from_results(results)
    assert np.isfinite([v for v in loaded.original_metric.values()]).all()


def test_a_state_hashes_alike_in_any_memory_format():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1), torch.nn.BatchNorm2d(4))
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert hash_state(channels_last) == hash_state(model)
    with torch.no_grad():
        channels_last[1].weight[0, 0] += 1e-6
    assert hash_state(channels_last) != hash_state(model)
