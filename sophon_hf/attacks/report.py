"""The report of a sweep: report.json, report.md, plots, and one page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import math
import os
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sophon_hf.attacks.checks import FailedCheck, check, void_reason
from sophon_hf.attacks.plots import plot_best_so_far, plot_heat_map
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.score import UNTRAINED, AttackSummary, Scores, describe_interval, mean_of_finite
from sophon_hf.utils import write_atomically

# A table for readers has a dozen columns, a heat map a few hundred rows; all points are in results.json.
COLUMNS, ROWS = 12, 200

_Table = tuple[list[str], list[list[str]]]
# Only the page is HTML; in Markdown and JSON an escaped name would read wrong.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(results: AttackResults, folder: str | Path) -> dict[str, Any]:
    """Write report.json, report.md, index.html and the plots into `folder`.

    Returns:
        What report.json holds.
    """
    folder = Path(folder)
    summary = _summarize(results, check(results))
    plots = write_plots(results, folder)
    write_atomically(folder / "report.json", json.dumps(summary, indent=1))
    values = _values(results, summary)
    links = {title: os.path.relpath(path, folder) for title, path in plots.items()}
    write_atomically(folder / "report.md", _TEMPLATES.get_template("report.md.jinja").render(values, links=links))
    pictures = {title: base64.b64encode(path.read_bytes()).decode() for title, path in plots.items()}
    facts = json.dumps(summary["facts"], indent=1)
    page = _TEMPLATES.get_template("index.html.jinja").render(values, plots=pictures, facts_text=facts)
    write_atomically(folder / "index.html", page)
    return summary


def write_plots(results: AttackResults, folder: Path) -> dict[str, Path]:
    """Draw curves.png, heat_map.png and best_so_far.png, and add what diffusion models denoise; title -> path."""
    scores = results.scores()
    plots = {
        "Metric while an adversary fine-tunes": results.plot(folder / "curves.png"),
        "Every attack on every model": plot_heat_map(*_heat_map(scores), folder / "heat_map.png", results.metric),
        "Best attack against number of attacks tried": plot_best_so_far(
            _best_so_far(scores), folder / "best_so_far.png", results.metric
        ),
    }
    return plots | {f"Clean, then noisy and denoised: {title}": path for title, path in results.pictures.items()}


def _summarize(results: AttackResults, failed: list[FailedCheck]) -> dict[str, Any]:
    """Return the figures of a report as plain values; the score is absent where a check voids it."""
    scores, void = results.scores(), void_reason(failed)
    transfer, of_data = scores.recovered_transfer(), scores.recovered_transfer(model=UNTRAINED)
    best = {}
    for model in results.models():
        attack = scores.best(model)
        if attack is not None:
            best[model] = {
                "attack": attack.name,
                "epoch": attack.epoch,
                "mean": attack.mean,
                "sd": attack.sd,
                "seeds": len(attack.finite),
            }
            if (highest := scores.highest(model)) is not None:
                best[model] |= {"highest": highest.highest, "highest_attack": highest.name}
    return {
        "metric": results.metric,
        "greater_is_better": results.greater_is_better,
        "recovered_transfer": None if void else transfer.value,
        "interval": None if void else transfer.interval,
        "by_highest": None if void else transfer.highest,
        "void": void,
        "recovered_by_original_data": None if void or of_data.value is None else str(of_data),
        "best": best,
        "original_metric": results.original_metric,
        "cost_to_recover": None if void else results.cost_to_recover(),
        "benign": results.benign,
        "failed_checks": [vars(f) for f in failed],
        "not_applicable": sorted({a.name for a in scores.attacks if not a.applicable and a.model != UNTRAINED}),
        "facts": results.facts,
    }


def to_markdown(results: AttackResults, summary: dict[str, Any]) -> str:
    """Return the report as Markdown, without plots: score and failed checks first, then a table like the paper's."""
    return _TEMPLATES.get_template("report.md.jinja").render(_values(results, summary), links={})


def _values(results: AttackResults, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what the templates show."""
    score, remark = "void", summary["void"]
    if summary["recovered_transfer"] is not None:
        score, remark = f"{summary['recovered_transfer']:.0%}", describe_interval(summary["interval"])
    metric, intact = summary["metric"], summary["original_metric"]
    # Figures come before the long names, so that a telephone shows them without scrolling sideways.
    best = [
        [
            model,
            f"{found['mean']:.3f} ±{found['sd']:.3f}",
            f"{found['highest']:.3f}" if found.get("highest") is not None else "",
            f"{intact[model]:.3f}" if model in intact else "",
            found["attack"],
            f"{found['epoch']:g}",
        ]
        for model, found in summary["best"].items()
    ]
    return summary | {
        "score": score,
        "remark": " ".join(str(remark).split()),
        "about": _about(results),
        # Rendered by itself, as plain text: the page then escapes it as a whole.
        "sentences": _TEMPLATES.get_template("sentences.jinja").render(summary),
        "best_table": (
            ["model", f"restricted {metric}", "highest", f"original {metric}", "strongest attack", "epoch"],
            best,
        ),
        "attack_table": _attack_table(results),
    }


def _about(results: AttackResults) -> dict[str, str]:
    """Return what was attacked, with which data and by which sweep, as far as the results tell."""
    facts = results.facts
    about = dict(facts.get("models", {}))
    for name, data in facts.get("fingerprints", {}).items():
        source = f"{data['name']}, " if data["name"] else ""
        about[f"{name.replace('_', ' ')} data"] = f"{source}{data['examples']} examples"
    if "sweep" in facts:
        sweep = Path(str(facts["sweep"])).name
        about["sweep"] = f"{sweep}, {len({run.strategy for run in results.runs})} strategies, seeds {facts['seeds']}"
    if "date" in facts:
        about["date"] = facts["date"]
    return about


def _attack_table(results: AttackResults) -> _Table:
    """Return mean ± SD at each measured epoch, one row a model and attack; of the finite seeds, where not all are."""
    curves = {model: results.curves(model) for model in results.models()}
    shown = [found for by_strategy in curves.values() for found in by_strategy.values()]
    epochs = sorted({round(epoch, 2) for found in shown for epoch in found[0].epoch})
    if len(epochs) > COLUMNS:
        epochs = list(dict.fromkeys([*epochs[:: -(-len(epochs) // COLUMNS)], epochs[-1]]))
    rows = []
    for model, by_strategy in curves.items():
        for strategy, found in by_strategy.items():
            row = {}
            for point, epoch in enumerate(found[0].epoch):
                values = [curve.test[point] for curve in found]
                finite = [value for value in values if math.isfinite(value)]
                lost = f" ({len(finite)} of {len(values)})" if len(finite) < len(values) else ""
                sd = np.std(finite, ddof=1) if len(finite) > 1 else 0
                row[round(epoch, 2)] = f"{mean_of_finite(finite):.3f} ±{sd:.3f}{lost}"
            rows.append([model, strategy.name, *(row.get(epoch, "") for epoch in epochs)])
    return ["model", "attack", *(f"epoch {epoch:g}" for epoch in epochs)], rows


def _heat_map(scores: Scores) -> tuple[list[str], list[str], np.ndarray]:
    """Return what each attack reached at its end on each model; of more than a picture has room for, the strongest."""
    # Training from scratch shares no strategy with the models.
    attacks = [attack for attack in scores.attacks if attack.model != "scratch"]
    models = list(dict.fromkeys(attack.model for attack in attacks))
    row = {name: i for i, name in enumerate(dict.fromkeys(attack.name for attack in attacks))}
    values = np.full((len(row), len(models)), math.nan)
    for attack in attacks:
        final = mean_of_finite([v for v in attack.final if v is not None])
        values[row[attack.name], models.index(attack.model)] = final
    # Strongest on the first model first, NaN last.
    kept = np.sort(np.argsort(-scores.sign * values[:, 0])[:ROWS]) if models else np.array([], dtype=int)
    names = list(row)
    return [names[i] for i in kept], models, values[kept]


def _best_so_far(scores: Scores) -> dict[str, list[float]]:
    """Return the test metric of the best attack among the first 1, 2, ... on each model."""
    lines: dict[str, list[float]] = {}
    best: dict[str, AttackSummary] = {}
    for attack in scores.attacks:
        if not attack.seeds:
            continue
        strongest, validation = best.get(attack.model), attack.validation
        if validation is not None and (
            strongest is None or strongest.validation is None or scores.sign * (validation - strongest.validation) > 0
        ):
            best[attack.model] = attack
        found = best.get(attack.model)
        lines.setdefault(attack.model, []).append(math.nan if found is None else found.mean)
    return lines
