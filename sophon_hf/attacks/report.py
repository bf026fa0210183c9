"""The report of a sweep: report.json, report.md, plots, and one page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from sophon_hf.attacks.checks import FailedCheck, check, void_reason
from sophon_hf.attacks.plots import plot_best_so_far, plot_heat_map
from sophon_hf.attacks.results import UNTRAINED, AttackResults
from sophon_hf.attacks.score import AttackSummary, describe_interval, mean_of_finite
from sophon_hf.utils import write_atomically

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.2rem; font-weight: 600; margin: 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
.score { font-size: 3rem; font-weight: 700; line-height: 1.2; margin: 0; }
.failed { border-left: 4px solid #D55E00; padding: 0.2rem 0.8rem; margin: 0.6rem 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
:is(th, td):nth-child(-n + 2) { text-align: left; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
pre { overflow-x: auto; }
"""
COLUMNS, ROWS = 12, 200
_MEANING = "100% = the protection does nothing; 0% = pre-training is worth nothing to the adversary."


def write_report(results: AttackResults, folder: str | Path) -> dict[str, Any]:
    """Write report.json, report.md, index.html and the plots into `folder`.

    Returns:
        What report.json holds.
    """
    folder = Path(folder)
    failed = check(results)
    summary = summarize(results, failed)
    plots = write_plots(results, folder)
    pictures = {title: os.path.relpath(path, folder) for title, path in plots.items()}
    write_atomically(folder / "report.json", json.dumps(summary, indent=1))
    write_atomically(folder / "report.md", to_markdown(results, summary, pictures))
    write_atomically(folder / "index.html", to_html(results, summary, plots))
    return summary


def write_plots(results: AttackResults, folder: Path) -> dict[str, Path]:
    """Draw curves.png, heat_map.png and best_so_far.png, beside what diffusion models denoise; title -> path."""
    plots = {
        "Metric while an adversary fine-tunes": results.plot(folder / "curves.png"),
        "Every attack on every model": plot_heat_map(*_heat_map(results), folder / "heat_map.png", results.metric),
        "Best attack against number of attacks tried": plot_best_so_far(
            _best_so_far(results), folder / "best_so_far.png", results.metric
        ),
    }
    return plots | {f"Clean, then noisy and denoised: {title}": path for title, path in results.pictures.items()}


def summarize(results: AttackResults, failed: list[FailedCheck]) -> dict[str, Any]:
    """The figures of a report as plain values; the score is absent where a check voids it."""
    scores, void = results.scores(), void_reason(failed)
    transfer, of_data = scores.recovered_transfer(), scores.recovered_transfer(model=UNTRAINED)
    best = {}
    for model in _models(results):
        attack = scores.best(model)
        if attack is not None:
            best[model] = {
                "attack": attack.name,
                "epoch": attack.epoch,
                "mean": attack.mean,
                "sd": attack.sd,
                "seeds": len(attack.finite),
            }
    return {
        "metric": results.metric,
        "recovered_transfer": None if void else transfer.value,
        "interval": None if void else transfer.interval,
        "void": void,
        "recovered_by_original_data": None if void or of_data.value is None else str(of_data),
        "best": best,
        "original_metric": results.original_metric,
        "cost_to_recover": None if void else results.cost_to_recover(),
        "benign": results.benign,
        "failed_checks": [vars(f) for f in failed],
        "not_applicable": sorted({c.strategy.name for c in results.cells if not c.applicable and c.model != UNTRAINED}),
        "facts": results.facts,
    }


def to_markdown(results: AttackResults, summary: dict[str, Any], pictures: dict[str, str] | None = None) -> str:
    """The report as Markdown: score and failed checks first, then a table like the paper's, and pictures by their path."""
    lines = [f"# {_headline(summary)}", "", _sentence(results, summary), ""]
    lines += [
        f"- **{f['name']}**: {' '.join(f['message'].split())}{' (voids the score)' if f['voids'] else ''}"
        for f in summary["failed_checks"]
    ]
    for header, rows in (_best_table(summary), _table(results)):
        lines += ["", _markdown_row(header), "|---" * len(header) + "|", *map(_markdown_row, rows)]
    for title, path in (pictures or {}).items():
        lines += ["", f"## {title}", "", f"![{title}]({path})"]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: list[str]) -> str:
    # A pattern may hold a bar, which would begin a new cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def to_html(results: AttackResults, summary: dict[str, Any], plots: dict[str, Path]) -> str:
    """The same as one page, with the plots inside it."""
    failed = "".join(
        f'<div class="failed"><b>{html.escape(f["name"])}</b>{" (voids the score)" if f["voids"] else ""}: '
        f"{html.escape(f['message'])}</div>"
        for f in summary["failed_checks"]
    )
    pictures = "".join(
        f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for title, path in plots.items()
    )
    value, remark = _score(summary)
    score = f'<p class="score">{value}</p><p>{html.escape(remark)}</p>'
    facts = html.escape(json.dumps(summary["facts"], indent=1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(_headline(summary))}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Recovered transfer</h1>{score}<p>{html.escape(_sentence(results, summary))}</p>{failed}"
        f"<h2>Strongest attack on each model</h2>{_html_table(*_best_table(summary))}{pictures}"
        f"<h2>All attacks</h2>{_html_table(*_table(results))}"
        f"<h2>What was run</h2><details><summary>Versions, seeds, fingerprints</summary><pre>{facts}</pre></details>"
        "</body></html>"
    )


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _score(summary: dict[str, Any]) -> tuple[str, str]:
    """The score, and what belongs beside it: its interval, or why it is void."""
    if summary["recovered_transfer"] is None:
        return "void", summary["void"]
    return f"{summary['recovered_transfer']:.0%}", describe_interval(summary["interval"])


def _headline(summary: dict[str, Any]) -> str:
    value, remark = _score(summary)
    return f"Recovered transfer: {value} ({' '.join(remark.split())})"


def _sentence(results: AttackResults, summary: dict[str, Any]) -> str:
    """What the score means, and what does not fit into a table."""
    parts = [_MEANING]
    if (of_data := summary["recovered_by_original_data"]) is not None:
        parts.append(
            f"An untrained model that warms up on the adversary's original data recovers {of_data} on the same scale, without any "
            "published weights; attacks on the protected model that need no such data are not explained by it."
        )
    if summary["void"] is None:
        cost = summary["cost_to_recover"]
        parts.append(
            f"Recovering scratch's result from the protected model costs {cost['steps']} steps ({cost['images']:.0f} images)."
            if cost
            else "No attack on the protected model reaches scratch's result within its budget."
        )
    if benign := summary["benign"]:
        scale, unit = (100, " points") if summary["metric"] == "accuracy" else (1, " (below 0: a higher error)")
        parts.append(
            f"Benign fine-tunability, protected minus original: {scale * benign['difference']:+.3g}{unit}; on an allowed task "
            f"the best of the same sweep reaches {summary['metric']} {benign['protected']:.3f} from the protected model, "
            f"{benign['original']:.3f} from the original, {benign['scratch']:.3f} from scratch."
        )
    if summary["not_applicable"]:
        parts.append(f"Not applicable, which is no resistance: {'; '.join(summary['not_applicable'])}.")
    return " ".join(parts)


def _best_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    metric, intact = summary["metric"], summary["original_metric"]
    rows = [
        [
            model, best["attack"], f"{best['epoch']:g}", f"{best['mean']:.3f} ±{best['sd']:.3f}",
            f"{intact[model]:.3f}" if model in intact else "",
        ]
        for model, best in summary["best"].items()
    ]  # fmt: skip
    header = ["model", "strongest attack", "epoch", f"restricted {metric}", f"original {metric}"]
    return header, rows


def _models(results: AttackResults) -> list[str]:
    return list(dict.fromkeys(cell.model for cell in results.cells))


def _table(results: AttackResults) -> tuple[list[str], list[list[str]]]:
    """Mean ± SD at each measured epoch, one row a model and attack; of the seeds that are finite, where not all are."""
    epochs = sorted({round(e, 2) for cell in results.cells if cell.curve is not None for e in cell.curve.epoch})
    # All points are in results.json; a table for readers has a dozen columns.
    epochs = epochs[:: -(-len(epochs) // COLUMNS)] + epochs[-1:] if len(epochs) > COLUMNS else epochs
    epochs = list(dict.fromkeys(epochs))
    rows = []
    for model in _models(results):
        for strategy, cells in results.by_strategy(model):
            row = {}
            for point, epoch in enumerate(cells[0].curve.epoch):
                row[round(epoch, 2)] = _spread([cell.curve.test[point] for cell in cells])
            rows.append([model, strategy.name, *(row.get(epoch, "") for epoch in epochs)])
    return ["model", "attack", *(f"epoch {epoch:g}" for epoch in epochs)], rows


def _spread(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    lost = f" ({len(finite)} of {len(values)})" if len(finite) < len(values) else ""
    return f"{mean_of_finite(finite):.3f} ±{np.std(finite, ddof=1) if len(finite) > 1 else 0:.3f}{lost}"


def _heat_map(results: AttackResults) -> tuple[list[str], list[str], np.ndarray]:
    """What each attack reached at its end on each model; of more than fit into a picture, the strongest on the first."""
    # Training from scratch shares no strategy with the models.
    models = [model for model in _models(results) if model != "scratch"]
    row = {name: i for i, name in enumerate(dict.fromkeys(c.strategy.name for c in results.cells if c.model in models))}
    values = np.full((len(row), len(models)), math.nan)
    for column, model in enumerate(models):
        for strategy, cells in results.by_strategy(model):
            values[row[strategy.name], column] = mean_of_finite([cell.curve.test[-1] for cell in cells])
    # NaN comes last.
    order = np.argsort(-values[:, 0] if results.greater_is_better else values[:, 0])
    kept = np.sort(order[:ROWS])
    attacks = list(row)
    return [attacks[i] for i in kept], models, values[kept]


def _best_so_far(results: AttackResults) -> dict[str, list[float]]:
    """Return the test metric of the best attack among the first 1, 2, ... on each model."""
    scores = results.scores()
    lines: dict[str, list[float]] = {}
    best: dict[str, AttackSummary] = {}
    for attack in (a for a in scores.attacks if a.seeds):
        model, strongest = attack.model, best.get(attack.model)
        if attack.validation is not None and (
            strongest is None or scores.sign * (attack.validation - strongest.validation) > 0
        ):
            best[model] = attack
        lines.setdefault(model, []).append(best[model].mean if model in best else math.nan)
    return lines
