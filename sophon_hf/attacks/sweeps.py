"""The sweeps: named lists of fine-tuning strategies, from the paper's own to stronger ones."""

from __future__ import annotations

from pathlib import Path

import yaml

from sophon_hf.finetuning.strategy import PREPARATIONS, FineTuningStrategy
from sophon_hf.utils import hint

PAPER = FineTuningStrategy(optimizer="momentum", learning_rate=1e-4, weight_decay=1e-4, batch_size=200)

_STARTS = (
    {"initialization": "direct"},
    {"initialization": "new_head"},
    {"initialization": "new_head", "reinitialized_blocks": 1},
)
_STRONG_OPTIMIZERS = (("adam", 3e-4), ("adam", 1e-3), ("adam", 3e-3), ("momentum", 1e-2), ("momentum", 1e-1))


def paper() -> list[FineTuningStrategy]:
    """The three strategies of table 1 (direct+all, initFC+FC, initFC+all) under the paper's default optimizer."""
    return [
        PAPER,
        PAPER.with_changes(initialization="new_head", transfer="head"),
        PAPER.with_changes(initialization="new_head"),
    ]


def paper_optimizers() -> list[FineTuningStrategy]:
    """Table 5: five optimizers at the paper's rate; Adadelta, whose rate only scales its own, at torch's default 1."""
    names = ("momentum", "nesterov", "adagrad", "adadelta", "adam")
    return [PAPER.with_changes(optimizer=n, learning_rate=1.0 if n == "adadelta" else 1e-4) for n in names]


def paper_rates() -> list[FineTuningStrategy]:
    """Table 6: five learning rates."""
    return [PAPER.with_changes(learning_rate=rate) for rate in (5e-6, 1e-5, 1e-4, 1e-3, 1e-2)]


def paper_batches() -> list[FineTuningStrategy]:
    """Table 7: five batch sizes."""
    return [PAPER.with_changes(batch_size=size) for size in (50, 100, 150, 200, 250)]


def strong() -> list[FineTuningStrategy]:
    """Usual rates of good optimizers from every start, and two partial transfers."""
    sweep = [
        FineTuningStrategy(optimizer=optimizer, learning_rate=rate, **start)
        for start in _STARTS
        for optimizer, rate in _STRONG_OPTIMIZERS
    ]
    return [
        *sweep,
        FineTuningStrategy(initialization="new_head", transfer="head", learning_rate=1e-3),
        FineTuningStrategy(initialization="new_head", transfer="norm", learning_rate=1e-3),
    ]


def peft() -> list[FineTuningStrategy]:
    """Adapters on every layer, each with a new head: LoRA of three ranks, and six other kinds."""
    start = FineTuningStrategy("new_head", learning_rate=3e-3)
    return [
        *(start.with_changes(adapter="lora", rank=rank) for rank in (1, 8, 64)),
        *(start.with_changes(adapter=adapter) for adapter in ("rslora", "dora", "adalora", "loha", "lokr")),
        start.with_changes(adapter="ia3", learning_rate=1e-2),
    ]


def adaptive() -> list[FineTuningStrategy]:
    """An informed adversary: four preparations of the model, unusual steps, and a long run of ten times the epochs."""
    prepared = [
        FineTuningStrategy(preparation=preparation, learning_rate=rate, **start)
        for preparation in PREPARATIONS
        for start in _STARTS
        for rate in (1e-3, 3e-3)
    ]
    new_head = FineTuningStrategy("new_head")
    return [
        *prepared,
        new_head.with_changes(learning_rate=1e-2),
        new_head.with_changes(optimizer="momentum", learning_rate=0.3, max_grad_norm=1.0),
        new_head.with_changes(learning_rate=3e-3, schedule="cosine", warmup_ratio=0.1),
        new_head.with_changes(epochs=200),
        FineTuningStrategy(epochs=200),
    ]


def full() -> list[FineTuningStrategy]:
    """All sweeps together, each attack once."""
    parts = (paper(), paper_optimizers(), paper_rates(), paper_batches(), strong(), peft(), adaptive())
    return list(dict.fromkeys(strategy for part in parts for strategy in part))


def scratch(sweep: list[FineTuningStrategy]) -> list[FineTuningStrategy]:
    """Training from scratch (baseline B1), tuned over the optimizers and rates of a sweep."""
    everything = {"transfer": "all", "pattern": None, "adapter": None, "rank": 8, "preparation": None}
    tuned = [s.with_changes(initialization="scratch", reinitialized_blocks=0, **everything) for s in sweep]
    return list(dict.fromkeys(tuned))


def warming_up(sweep: list[FineTuningStrategy]) -> list[FineTuningStrategy]:
    """The attacks that need data of the original domain, which are worth something without any model."""
    return [s for s in sweep if s.preparation == "warm_up"]


SWEEPS = {
    "paper": paper,
    "paper-optimizers": paper_optimizers,
    "paper-rates": paper_rates,
    "paper-batches": paper_batches,
    "strong": strong,
    "peft": peft,
    "adaptive": adaptive,
    "full": full,
}


def load_sweep(source: str | Path) -> list[FineTuningStrategy]:
    """A sweep by name, or from a JSON or YAML file that holds a list of strategies.

    Raises:
        ValueError: No such sweep (the closest one is named), a file of another form, or an unknown field in it.
    """
    if str(source) in SWEEPS:
        return SWEEPS[str(source)]()
    path = Path(source)
    if path.suffix not in (".json", ".yaml", ".yml"):
        choices = f" There are {', '.join(SWEEPS)}, or give a .json or .yaml file."
        raise ValueError(f"There is no sweep {str(source)!r}.{hint(source, SWEEPS, choices)}")
    # JSON is YAML.
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} must hold a list of strategies, each a mapping of fields (optimizer: adam, ...).")
    return [FineTuningStrategy.from_dict(entry) for entry in entries]
