"""The leaderboard is made of rows as the benchmark writes them: the strongest protection first, no score last."""

from __future__ import annotations

import json
from pathlib import Path

from write_results import leaderboard

FOLDER = Path(__file__).parents[2] / "benchmarks"


def row(protection: str, value: float | None, examples: int = 20, accuracy: float = 0.75) -> dict:
    transfer = {"value": value, "interval": None if value is None else [value - 0.1, value + 0.2], "void": None}
    if value is None:
        transfer["void"] = "a broken model"
    best = {"protected": accuracy, "original": 0.79, "scratch": 0.6}
    return {
        "pair": "letters",
        "protection": protection,
        "budget": "small",
        "examples": examples,
        "seeds": [0, 1],
        "metric": "accuracy",
        "original_accuracy": {"before": 0.994, "after": 0.99},
        "best": {name: {"strategy": "new head", "test": [test - 0.01, test + 0.01]} for name, test in best.items()},
        "recovered_transfer": transfer,
        "recovered_transfer_direct": transfer,
        "date": "2026-01-01",
        "versions": {"sophon_hf": "0.1.0"},
    }


def test_each_table_has_the_strongest_protection_first_and_those_without_a_score_last():
    rows = [row("broken", None), row("nothing", 1.0), row("strong", -0.2), row("other size", 0.5, examples=50)]
    page = "\n".join(leaderboard(rows))
    first, second = page.split("## `letters`, budget `small`, ")[1:]
    assert first.startswith("20 examples") and second.startswith("50 examples")
    assert [line.split(" | ")[0] for line in first.splitlines() if line.startswith("| ")][1:] == [
        "| strong",
        "| nothing",
        "| broken",
    ]
    assert "| strong | -20% [-30%, 0%] | " in first and "| broken | void: a broken model | " in first
    assert "the unprotected model 79.0%; training from scratch 60.0%" in first
    assert "| new head | 75.0% | 99.4% → 99.0% | 2 |" in first and "other size" not in first


def test_the_page_is_made_of_the_rows_that_are_there():
    rows = [json.loads(path.read_text()) for path in sorted((FOLDER / "results" / "leaderboard").glob("*.json"))]
    assert rows and (FOLDER / "leaderboard.md").read_text() == "\n".join(leaderboard(rows))
