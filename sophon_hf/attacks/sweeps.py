"""The sweeps: named lists of fine-tuning strategies, from the paper's own to stronger ones, each a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sophon_hf.utils import hint, read_yaml

if TYPE_CHECKING:
    from sophon_hf.finetuning.strategy import FineTuningStrategy

_FOLDER = Path(__file__).parent / "sweep_files"
# `full` takes the parts in this order, which is also that of its tables.
_PARTS = ("paper", "paper-optimizers", "paper-rates", "paper-batches", "strong", "peft", "adaptive")
SWEEPS = (*_PARTS, "hardest", "informed", "denoiser", "search", "full")


def load_sweep(source: str | Path) -> list[FineTuningStrategy]:
    """Return a sweep by its name, or from a JSON or YAML file that holds a list of strategies.

    Raises:
        ValueError: No such sweep (the closest one is named), a file of another form, or an unknown field in it.
    """
    if str(source) == "full":
        # Each attack once: several parts hold the paper's default.
        return list(dict.fromkeys(strategy for part in _PARTS for strategy in load_sweep(part)))
    path = _FOLDER / f"{source}.yaml" if str(source) in SWEEPS else Path(source)
    if path.suffix not in (".json", ".yaml", ".yml"):
        choices = f" There are {', '.join(SWEEPS)}, or give a .json or .yaml file."
        raise ValueError(f"There is no sweep {str(source)!r}.{hint(source, SWEEPS, choices)}")
    from sophon_hf.finetuning.strategy import FineTuningStrategy  # The command line needs the names alone.

    entries = read_yaml(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} must hold a list of strategies, each a mapping of fields (optimizer: adam, ...).")
    return [FineTuningStrategy.from_dict(entry) for entry in entries]


def scratch(sweep: list[FineTuningStrategy]) -> list[FineTuningStrategy]:
    """Return training from scratch (baseline B1), tuned over the optimizers and rates of a sweep.

    A kernel regression is one on the features of a model that was never trained: they alone may be worth more than
    training on a few examples.
    """
    everything: dict[str, Any] = {"pattern": None, "adapter": None, "rank": 8, "preparation": None}
    everything |= {"original_weight": 0.0, "head_first": 0.0, "layer_decay": 1.0}
    tuned = [
        s.with_changes(
            initialization="scratch",
            reinitialized_blocks=0,
            transfer="kernel" if s.transfer == "kernel" else "all",
            **everything,
        )
        for s in sweep
        if s.labelled
    ]
    return list(dict.fromkeys(tuned))


def of_original_data(sweep: list[FineTuningStrategy]) -> list[FineTuningStrategy]:
    """Return the attacks that learn from original data, which are worth something without any model.

    There is nothing to distill from an untrained model: it warms up in that place.
    """
    warm_up = {"preparation": "warm_up"}
    found = [s.with_changes(**warm_up) if s.preparation == "distill" else s for s in sweep if s.needs_original_data]
    return list(dict.fromkeys(found))
