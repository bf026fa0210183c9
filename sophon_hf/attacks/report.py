"""The report of a sweep: report.json, report.md, plots, and one page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.style
import numpy as np

from sophon_hf.attacks.checks import ADVICE, FailedCheck, check, void_reason
from sophon_hf.attacks.plots import plot_best_so_far, plot_heat_map
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.score import UNTRAINED, Scores, describe_interval, mean_of_finite
from sophon_hf.tasks.diffusion import BANDS
from sophon_hf.utils import write_atomically

# A table for readers has a dozen columns, a heat map a few hundred rows; all points are in results.json.
_COLUMNS, _ROWS = 12, 200

_DATA = {
    "training": "adversary's training data",
    "validation": "adversary's validation data",
    "test": "restricted test data",
    "original": "adversary's original data",
    "original_test": "original test data",
}
_TERMS = {
    "protected": "the published model, after protection.",
    "original": "the same model before protection.",
    "scratch": "the same architecture, newly initialised: what the adversary reaches without any published weights.",
    "untrained": "a newly initialised model that first learns the adversary's original data.",
    "direct": "the adversary starts from the whole model, with the head that it has.",
    "new head": 'the final layer is newly initialised, all before it is taken over; with "+ n blocks" the last n '
    "blocks are new, too.",
}
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
    """Write report.json, report.md, index.html and the plots into `folder`, the plots for a dark page into `dark`.

    Returns:
        What report.json holds.
    """
    folder = Path(folder)
    summary = _summarize(results, check(results))
    write_atomically(folder / "report.json", json.dumps(summary, indent=1))
    plots = write_plots(results, folder)
    with matplotlib.style.context("dark_background"):
        dark = write_plots(results, folder / "dark")
    values = _values(results, summary)
    links = {title: os.path.relpath(path, folder) for title, path in plots.items()}
    write_atomically(folder / "report.md", _TEMPLATES.get_template("report.md.jinja").render(values, links=links))
    pictures = {title: [_encoded(path), _encoded(dark[title])] for title, path in plots.items()}
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
            {model: scores.best_by_number(model) for model in results.models()},
            folder / "best_so_far.png",
            results.metric,
        ),
    }
    return plots | {f"Clean, noisy and denoised, generated: {title}": path for title, path in results.pictures.items()}


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _summarize(results: AttackResults, failed: list[FailedCheck]) -> dict[str, Any]:
    """Return the figures of a report as plain values; the score is absent where a check voids it."""
    scores, void = results.scores(), void_reason(failed)
    transfer, of_data = scores.recovered_transfer(), scores.recovered_transfer(model=UNTRAINED)
    best: dict[str, dict[str, Any]] = {}
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
            # Names of both pairs, so that they can be read without this file.
            for name, keys, pair in (
                ("last_quarter", ("gain", "error"), scores.last_quarter(model)),
                ("optimism", ("chosen", "highest"), scores.optimism(model)),
            ):
                best[model][name] = None if pair is None else dict(zip(keys, pair, strict=True))
    return {
        "metric": results.metric,
        "greater_is_better": results.greater_is_better,
        "recovered_transfer": None if void else transfer.value,
        "interval": None if void else transfer.interval,
        "by_highest": None if void else transfer.highest,
        "void": void,
        "recovered_by_original_data": None if void or of_data.value is None else str(of_data),
        "best": best,
        "bands": _bands(results, scores),
        "original_metric": results.original_metric,
        "cost_to_recover": None if void else results.cost_to_recover(),
        "benign": results.benign,
        "failed_checks": [vars(f) | {"advice": ADVICE.get(f.name)} for f in failed],
        "not_applicable": sorted({a.name for a in scores.attacks if not a.applicable and a.model != UNTRAINED}),
        "facts": results.facts,
    }


def _bands(results: AttackResults, scores: Scores) -> dict[str, list[float]]:
    """Return a denoiser's error in each band of the noise schedule at the end of the best attack on each model."""
    found = {}
    for model in results.models():
        best = scores.best(model)
        errors = [curve.bands for curve in results.curves(model).get(best.strategy, []) if curve.bands] if best else []
        if errors:
            found[model] = mean_of_finite(errors).tolist()
    return found


def to_markdown(results: AttackResults, summary: dict[str, Any]) -> str:
    """Return the report as Markdown, without plots: score and failed checks first, then a table like the paper's."""
    return _TEMPLATES.get_template("report.md.jinja").render(_values(results, summary), links={})


def _values(results: AttackResults, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what the templates show."""
    score, remark = "void", summary["void"]
    if summary["recovered_transfer"] is not None:
        score, remark = f"{summary['recovered_transfer']:.0%}", describe_interval(summary["interval"])
    metric, intact, figure = summary["metric"], summary["original_metric"], results.scores().figure
    # Figures come before the long names, so that a telephone shows them without scrolling sideways.
    best = [
        [
            model,
            f"{figure(found['mean'])} ±{figure(found['sd'])}",
            figure(found["highest"]) if found.get("highest") is not None else "",
            figure(intact[model]) if model in intact else "",
            found["attack"],
            f"{found['epoch']:g}",
        ]
        for model, found in summary["best"].items()
    ]
    highest = "highest" if results.greater_is_better else "lowest"
    sentences = _TEMPLATES.get_template("sentences.jinja").render(summary, figure=figure, highest=highest)
    return summary | {
        "title": f"Attacks on {results.facts.get('models', {}).get('protected', 'the protected model')}",
        "score": score,
        "remark": " ".join(str(remark).split()),
        "about": _about(results),
        # Rendered by itself, as plain text: the page then escapes it as a whole.
        "sentences": [line for line in sentences.splitlines() if line],
        "terms": _terms(results),
        "best_table": (
            ["model", f"restricted {metric}", highest, f"original {metric}", "strongest attack", "epoch"],
            best,
        ),
        "band_table": (
            ["model", *(f"noise {low:.0%} to {high:.0%}" for low, high in pairwise(BANDS))],
            [[model, *map(figure, errors)] for model, errors in summary["bands"].items()],
        ),
        "attack_tables": _attack_tables(results),
    }


def _about(results: AttackResults) -> dict[str, str]:
    """Return what was attacked, with which data and by which sweep, as far as the results tell."""
    facts = results.facts
    about = {f"{role} model": name for role, name in facts.get("models", {}).items()}
    about["metric"] = f"{results.metric} ({'higher' if results.greater_is_better else 'lower'} is better)"
    chance = results.scores().chance
    if chance:
        levels = ", ".join(f"{domain} {results.scores().figure(level)}" for domain, level in chance.items())
        about["chance level"] = f"{levels} (the best answer that looks at no input)"
    for name, data in facts.get("fingerprints", {}).items():
        source = f"{data['name']}, " if data["name"] else ""
        about[_DATA.get(name, name)] = f"{source}{data['examples']} examples"
        if name == "training" and facts.get("folds"):
            about[_DATA["validation"]] = f"the training data, by cross-validation in {facts['folds']} folds"
    if "sweep" in facts:
        about["sweep"] = f"{Path(str(facts['sweep'])).name}, {len({run.strategy for run in results.runs})} strategies"
    if "seeds" in facts:
        about["seeds"] = ", ".join(map(str, facts["seeds"]))
    return about | {name: facts[name] for name in ("precision", "date") if name in facts}


def _terms(results: AttackResults) -> dict[str, str]:
    """Return what the models and starts of this sweep are called in tables and plots, each with one sentence."""
    names = [*results.models(), *(run.strategy.name for run in results.runs)]
    return {term: sentence for term, sentence in _TERMS.items() if any(term in name for name in names)}


def _attack_tables(results: AttackResults) -> dict[str, _Table]:
    """Return each model's attacks: mean ± SD at each measured epoch; of the finite seeds, where not all are."""
    curves, figure = {model: results.curves(model) for model in results.models()}, results.scores().figure
    shown = [found for by_strategy in curves.values() for found in by_strategy.values()]
    epochs = sorted({round(epoch, 2) for found in shown for epoch in found[0].epoch})
    if len(epochs) > _COLUMNS:
        epochs = list(dict.fromkeys([*epochs[:: -(-len(epochs) // _COLUMNS)], epochs[-1]]))
    tables = {}
    for model, by_strategy in curves.items():
        rows = []
        for strategy, found in by_strategy.items():
            row = {}
            for point, epoch in enumerate(found[0].epoch):
                values = [curve.test[point] for curve in found]
                finite = [value for value in values if math.isfinite(value)]
                lost = f" ({len(finite)} of {len(values)})" if len(finite) < len(values) else ""
                mean, sd = float(mean_of_finite(finite)), float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0
                row[round(epoch, 2)] = f"{figure(mean)} ±{figure(sd)}{lost}"
            rows.append([strategy.name, *(row.get(epoch, "") for epoch in epochs)])
        if rows:
            tables[model] = ["attack", *(f"epoch {epoch:g}" for epoch in epochs)], rows
    return tables


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
    kept = np.sort(np.argsort(-scores.sign * values[:, 0])[:_ROWS]) if models else np.array([], dtype=int)
    names = list(row)
    return [names[i] for i in kept], models, values[kept]
