"""Write docs/configuration.md from the help texts of `SophonConfig`'s fields, or check that the page is up to date.

    python docs/make_configuration.py [--check]

The source is parsed, not imported: importing torch and transformers would take `make lint` ten seconds.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

This page lists every field of `SophonConfig` that SOPHON adds to the Trainer's arguments or sets differently. All
fields of [`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) work too, unless an error
says why not. `SophonConfig.preset("representation", ...)` sets the values named beside the defaults. Italics say when
to change a field. The same names work in the YAML file and as flags of `sophon-hf protect`.

*This page is made by `python docs/make_configuration.py`.*
"""
# Which fields stand together, and when to change each: advice that a one-line help has no room for.
SECTIONS = {
    "Algorithm 1": {
        "max_steps": "Raise it while `eval_restricted_simulated_recovered_transfer` still falls.",
        "alpha": "Lower it where the original domain suffers; raise it where little is suppressed.",
        "beta": "Raise it where the original metric does not recover between suppression steps.",
        "K": "Lower it to save time: cost is linear in K.",
        "N": "Raise it for a smoother suppression gradient; prefer more processes.",
        "l_FTS": "Rarely.",
        "l_NTR": "Raise it where the original domain suffers; each loop costs one pass.",
        "gamma": "Set early weights to 0 to save evaluation passes with a long K.",
        "mu": "Rarely: set `alpha` and `beta`.",
        "suppression_loss": "Rarely: `kl_from_uniform` was no stronger in our records.",
        "strategy_space": "Set it where you know what the adversary does, for example tokens, rates or batch sizes.",
        "second_order": "For tests of the first-order gradient on small models.",
        "per_device_train_batch_size": "Lower it where memory is short.",
    },
    "Tolerance": {
        "tolerance": "Set it to what users of the original domain accept.",
        "on_violation": "Use adapt_alpha with a falling schedule, stop for a trial of a new alpha.",
        "validation_share": "Pass an `eval_dataset` instead where the model has seen the original data.",
        "eval_strategy": "Leave it: `no` switches the guard off.",
        "eval_steps": "Raise it where evaluation takes much of the time.",
        "eval_on_start": "Leave it.",
        "per_device_eval_batch_size": "Lower it where memory is short.",
    },
    "Beyond the paper": {
        "probe_depths": "Use 2 for classifiers with blocks, 1 for models without.",
        "num_persistent": "Set it (with a small K) to simulate long fine-tuning at the cost of few updates.",
        "preconditioning": "Raise it where the original domain suffers; an adversary may then have less far to go.",
        "recovery_ratio": "Raise it where the original metric has not come back at the end.",
        "simulated_examples": "Set it to what a real adversary would have.",
        "horizon": "Raise it against adversaries who train longer; checkpoints must lie further apart.",
        "distillation": "Set it where the original domain must stay close to the unprotected model.",
        "mixup": "Leave it off for tokens.",
        "keep_norms": "Set it with any strong suppression; otherwise a re-scaled model recovers.",
    },
    "Trainer": {
        "output_dir": "Always.",
        "learning_rate": "Never.",
        "lr_scheduler_type": "Use cosine with adapt_alpha.",
        "max_grad_norm": "Set it where losses jump.",
        "logging_steps": "Raise it for long runs.",
        "logging_nan_inf_filter": "Never.",
        "save_steps": "Raise it where checkpoints are large.",
        "save_total_limit": "Lower it where disk space is short.",
    },
}


def make_page() -> str:
    """Return the page's text.

    Raises:
        SystemExit: `SECTIONS` and the fields of `SophonConfig` differ.
    """
    protection = ROOT / "sophon_hf" / "protection"
    config = _parse(protection / "config.py")
    described = {
        node.target.id: {keyword.arg: keyword.value for keyword in node.value.keywords}
        for node in next(c for c in config.body if isinstance(c, ast.ClassDef) and c.name == "SophonConfig").body
        if isinstance(node, ast.AnnAssign)
    }
    advised = {name for section in SECTIONS.values() for name in section}
    if described.keys() != advised:
        raise SystemExit(f"SECTIONS in {Path(__file__).name} must name every field: {described.keys() ^ advised}.")
    assigned = (node for node in _parse(protection / "presets.py").body if isinstance(node, ast.AnnAssign))
    presets = next(ast.literal_eval(node.value) for node in assigned if node.target.id == "PRESETS")
    entries = []
    for title, section in SECTIONS.items():
        entries.append(f"## {title}")
        for name, advice in section.items():
            value = presets["representation"].get(name)
            preset = "" if value is None else f"; preset: {'its own' if isinstance(value, dict) else f'`{value}`'}"
            default = ast.literal_eval(described[name]["default"])
            help_text = ast.literal_eval(described[name]["metadata"])["help"].rstrip(".")
            entry = f"**`{name}`** (default: `{default}`{preset}). {help_text}. *{advice}*"
            entries.append(textwrap.fill(entry, 120, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join([INTRODUCTION.rstrip(), *entries]) + "\n"


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def main() -> None:
    """Write the page, or with `--check` end with an error where it is out of date."""
    page = make_page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit("docs/configuration.md is out of date: run `python docs/make_configuration.py`.")


if __name__ == "__main__":
    main()
