"""`examples/reproduce_paper.py`: its tables are whole, and one runs from folders to a record."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sophon_hf import FineTuningStrategy
from sophon_hf.data.toy import handwritten_digits, printed_letters

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
paper_tables = pytest.importorskip("paper_tables")
import reproduce_paper  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import pairs  # noqa: E402

TABLES, SCALES = paper_tables.TABLES, paper_tables.SCALES


@pytest.mark.parametrize("number", TABLES)
def test_every_attack_of_a_table_has_its_published_row(number):
    table = TABLES[number]
    figures = table.figures()
    rows = [attack for e in table.experiments for attack in e.attacks]
    methods = {"Scratch", "Original", "SOPHON"} | ({"NTL"} if table.with_ntl else set())
    expected = {(attack, method) for attack in rows for method in methods}
    if number == 1:  # One training from scratch serves three attacks.
        expected -= {("initFC+FC", "Scratch"), ("initFC+all", "Scratch")}
    if number == 2:  # FFHQ is drawn, not tabulated.
        expected = {row for row in expected if row[0] != "FFHQ"}
    assert set(figures) == expected
    assert all(len(values) == 7 for values in figures.values())


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_knows_every_model_and_adapts_every_attack(scale):
    for table in TABLES.values():
        for experiment in table.experiments:
            assert experiment.model in SCALES[scale].models and experiment.original in SCALES[scale].domains
            for attack in experiment.attacks.values():
                assert isinstance(SCALES[scale].adapt(attack), FineTuningStrategy)
    everything = {e.restricted for table in TABLES.values() for e in table.experiments}
    assert everything - set(SCALES[scale].domains) == ({"MNIST", "FFHQ"} if scale == "small" else set())


def test_a_table_from_folders_to_a_record(tmp_path, monkeypatch, capsys):
    for name, data in (("cifar10", printed_letters(120)), ("mnist", handwritten_digits())):
        (tmp_path / name).mkdir()
        for split, rows in data.items():
            rows.select(range(100)).to_parquet(tmp_path / name / f"{split}.parquet")
    config = SCALES["small"].config | {"max_steps": 1, "K": 1, "eval_steps": 1, "simulated_examples": 3}
    models = {"CAFormer": SCALES["small"].models["ResNet-18"]}
    tiny = replace(
        SCALES["small"],
        models=models,
        examples=(20, 30),
        validation_share=0.2,
        seeds=[0],
        pretraining=(2, 2, 1e-3),
        ntl_steps=1,
        weights={},
        config=config,
        adapt=lambda attack: attack.with_changes(batch_size=20),
    )
    monkeypatch.setitem(reproduce_paper.SCALES, "small", tiny)
    folders = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--table", "1", *folders])
    reproduce_paper.main()
    record = json.loads((tmp_path / "paper-table-1-small.json").read_text())
    assert [(r["attack"], r["method"]) for r in record["rows"]] == list(TABLES[1].figures())
    assert {len(r["mean"]) for r in record["rows"]} == {6} and record["test_examples"] == 30
    assert record["rows"][1]["paper"][2] == "42.8±4.0" and "42.8±4.0" in capsys.readouterr().out
    # A second run computes nothing and says the same.
    reproduce_paper.main()
    assert json.loads((tmp_path / "paper-table-1-small.json").read_text())["rows"] == record["rows"]


def test_without_data_the_end_is_one_line_that_says_what_to_set(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="There is no folder .*mnist: set --data or SOPHON_DATA"):
        reproduce_paper.domain(SCALES["small"], "CIFAR-10", 32, tmp_path / "data")
    monkeypatch.setattr(pairs, "DATA", tmp_path / "data")
    with pytest.raises(SystemExit, match="There is no .*cifar10: set SOPHON_DATA"):
        pairs.animals(tmp_path)
