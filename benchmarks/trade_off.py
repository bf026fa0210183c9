"""The picture of what a protection costs beside what it is worth, of the records in benchmarks/results/."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

SWEEPS = ("hardest", "informed")


def trade_off(records: list[dict], path: Path) -> None:
    """Draw every protection of `animals` that both sweeps attacked: the worse of the two against its costs.

    A dot is a protection seed. Costs are points of accuracy lost in the original domain and in an allowed task. Only
    protections of one pre-training compare, so those of others than the preset's are left out.
    """
    runs: dict[tuple[str, int], dict[str, dict]] = {}
    for record in records:
        if record["pair"] == "animals" and record["sweep"] in SWEEPS and record["examples"] == 500:
            key = record["protection"], record["protection_run"]["asked"]["seed"]
            runs.setdefault(key, {})[record["sweep"]] = record
    runs = {key: run for key, run in runs.items() if len(run) == len(SWEEPS) and run["hardest"]["benign"]}
    model = runs["representation", 0]["hardest"]["original_accuracy"]["before"]
    dots: dict[str, list[tuple[float, float, float]]] = {}
    for (name, _), run in sorted(runs.items()):
        original, benign = (run["hardest"][field] for field in ("original_accuracy", "benign"))
        if original["before"] == model:
            worst = max(record["recovered_transfer"]["value"] for record in run.values())
            costs = original["before"] - original["after"], benign["original"] - benign["protected"]
            dots.setdefault(name, []).append((*(100 * cost for cost in costs), 100 * worst))
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = ("points of accuracy lost in the original domain", "points of accuracy lost in an allowed task")
    for column, (axis, label) in enumerate(zip(axes, names, strict=True)):
        for number, (name, seeds) in enumerate(dots.items()):
            style = {"color": f"C{number % 10}", "marker": "os^D"[number // 10], "s": 44}
            axis.scatter([s[column] for s in seeds], [s[2] for s in seeds], label=name, **style)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.axhline(100, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
    axes[0].set_ylabel(f"recovered transfer, the worse of {' and '.join(SWEEPS)}, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
