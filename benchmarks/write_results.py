"""Make pages of the records in benchmarks/results/: worst case first, failures included.

    python benchmarks/write_results.py

README.md there is the overview, attacks/ holds one page a protection with its every attack, paper_tables.md the paper's
tables, and docs/images/trade_off.png the picture; benchmarks/leaderboard.md is made of the rows that `sophon-hf
benchmark` writes, in results/leaderboard/. docs/results.md, which sums them up, is written by hand.
"""

from __future__ import annotations

import json
import math
import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

from trade_off import trade_off

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "trade_off.png"
PROTECTIONS, PARTS = "Protections", "The preset with one thing changed"
INTRODUCTION = """\
# Records

Every record of a protection and the attacks on it, worst case first. `python benchmarks/write_results.py` makes this
page of the JSON files beside it; each holds its command, commit, versions, machine and date.
[docs/results.md](../../docs/results.md) describes the pairs and sums up; [docs/attacks.md](../../docs/attacks.md)
defines recovered transfer (RT) and the sweeps. [The paper's tables](paper_tables.md) have a page of their own.

How to read a row:

- *Worst case* is the strongest attack of the sweep. *Direct only* leaves out every attack with a new head, and flatters
  the paper's algorithm. Where it is void, no direct attack on the unprotected model beats training from scratch by
  enough.
- Each sweep has its own best attack on the original model and from scratch, so percentages of two sweeps do not
  compare.
- `paper` is Algorithm 1, `representation` the preset, `-gentle` the preset with lower rates. `without-...`, `with-...`
  and `alpha-...` change one part of the preset. `...-like` are baselines made like those of the field
  (`benchmarks/baselines.py`); they protect an earlier pre-training of the same model, which by itself can shift a
  figure by 30 %.
- A record in which no state was inside the tolerance measures the unprotected model: 100 % by construction. These are
  `without-mixtures`, `without-distillation`, `cifar100` with `representation-gentle`, and `vehicles` with seed 1.
- Settings and commands are those of the recorded commit; some fields have other names now.
"""
LEADERBOARD = """\
# Leaderboard

Protections, each measured in one call: `sophon-hf benchmark MODEL --pair PAIR`, or `sophon_hf.benchmark`.
`python benchmarks/write_results.py` makes this page of `benchmarks/results/leaderboard/*.json`.
[docs/attacks.md](../docs/attacks.md) says how a benchmark is run, and defines recovered transfer (RT).
[CONTRIBUTING.md](../CONTRIBUTING.md) says how to add a row.

How to read it:

- RT is 100 % where the protection does nothing, and 0 % where pre-training is worth nothing to the adversary. *Worst
  case* is the strongest attack of the budget; *direct only* leaves out every attack with a new head.
- A model that lost the original domain has no score, whatever its attacks reach.
- Rows of one table compare, those of two tables do not: each has its own best attacks on the unprotected model and from
  scratch. One row is one model and one protection seed (the Trainer's 42, where none is given): look at the interval.
- `...-like` are made like defences of the field, not by their authors' code (`benchmarks/baselines.py`), with settings
  that nobody tuned on this pair. `benchmarks/leaderboard.py` makes these rows and those of known models: `unprotected`
  has to be at 100 %, and `re-initialised` at the level of scratch.
"""
NOT_MEASURED = "an attack on protected, original or scratch is missing"


def percent(transfer: dict) -> str:
    """RT with its interval, or why it is void; a dash where the sweep has no such attack."""
    if transfer["void"] == NOT_MEASURED:
        return "—"
    if transfer["value"] is None:
        return f"void: {transfer['void']}"
    low, high = transfer["interval"] or (None, None)
    if low == high:  # An MSE measured once: nothing tells how far off it may be.
        return f"{transfer['value']:.0%} (one attack seed, no interval)"
    return f"{transfer['value']:.0%} [{low:.0%}, {high:.0%}]"


def chapter(record: dict) -> str:
    """Return the heading under which a record stands, by the name of its protection."""
    return PARTS if record["protection"].startswith(("with-", "without-", "alpha-")) else PROTECTIONS


def over_seeds(records: list[dict]) -> list[str]:
    """One row a protection that was made with several seeds: mean and SD of what each seed's record says."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[n] for n in ("pair", "protection", "sweep", "examples")), []).append(record)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    if not groups:
        return []
    lines = [
        "Over protection seeds, mean ± SD:",
        "",
        "| pair | protection | sweep | adversary's images | seeds | RT, worst case | worst seed | original domain: "
        "points of accuracy lost, or rise of the MSE in % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, group in sorted(groups.items()):
        transfers = [r["recovered_transfer"]["value"] for r in group]
        lost = [original_lost(r) for r in group]
        transfer = worst = "void in a seed"
        if None not in transfers:
            transfer = f"{mean(transfers):.0%} ± {100 * stdev(transfers):.0f}"
            worst = f"{max(transfers):.0%}"
        lines.append(
            f"| {' | '.join(map(str, key))} | {len(group)} | {transfer} | {worst} | {mean(lost):.1f} ± "
            f"{stdev(lost):.1f} |"
        )
    return [*lines, ""]


def is_accuracy(record: dict) -> bool:
    """Whether a record's metric is an accuracy, and not the denoising MSE of a diffusion model."""
    return record.get("metric", "accuracy") == "accuracy"


def intactness(record: dict) -> str:
    """The original domain's test metric before and after protection; an MSE also as a ratio."""
    original = record["original_accuracy" if is_accuracy(record) else "original_mse"]
    before, after = original["before"], original["after"]
    if is_accuracy(record):
        return f"{before:.1%} → {after:.1%}"
    return f"MSE {before:.4f} → {after:.4f} ({after / before:.3f} times)"


def original_lost(record: dict) -> float:
    """Points of accuracy, or the rise of the MSE in percent."""
    original = record["original_accuracy" if is_accuracy(record) else "original_mse"]
    before, after = original["before"], original["after"]
    return 100 * (before - after if is_accuracy(record) else after / before - 1)


def overview(records: list[dict]) -> list[str]:
    """One row a record: the worst first, those that are void last."""
    lines = [
        "Each of them:",
        "",
        "| pair | protection | seed | sweep | adversary's images | RT, worst case | RT, direct only | original domain "
        "|",
        "|---|---|---|---|---|---|---|---|",
    ]
    transfers = [-math.inf if (value := r["recovered_transfer"]["value"]) is None else value for r in records]
    for _, r in sorted(zip(transfers, records, strict=True), key=lambda pair: -pair[0]):
        lines.append(
            f"| {r['pair']} | [{r['protection']}](attacks/{page_name(r)}) | {seed(r)} | {r['sweep']} | "
            f"{r['examples']} | {percent(r['recovered_transfer'])} "
            f"| {percent(r['recovered_transfer_direct'])} | {intactness(r)} |"
        )
    return lines


def seed(record: dict) -> int:
    """The protection's."""
    return record["protection_run"].get("asked", {}).get("seed", 0)


def details(record: dict) -> list[str]:
    """Every attack of a record, the strongest first: mean ± SD of the final test metric."""
    sign = -1 if is_accuracy(record) else 1
    cell, digits = (percent_cell, ".3f") if is_accuracy(record) else (number_cell, ".4f")
    models = [
        m for m in ("protected", "original", "ntl", "scratch", "untrained") if any(m in row for row in record["table"])
    ]
    lines = [
        f"## Seed {seed(record)}, `{record['sweep']}`, {record['examples']} images",
        "",
        f"    {record['command']}",
        "",
        f"{record['date']}, commit {record['commit']}, {record['machine']}, torch {record['versions']['torch']}; "
        "protected in "
        f"{record['protection_run']['seconds']} s, attacked in {record['attack_seconds']} s (what was there already "
        "left out); "
        f"attack seeds {record['seeds']}; settings "
        f"`{json.dumps(record['protection_run']['config'])}`.",
        "",
        "| " + " | ".join(["attack", *models]) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    rows = sorted(record["table"], key=lambda r: ("protected" not in r, sign * r.get("protected", r.get("scratch"))[0]))
    for row in rows:
        lines.append("| " + " | ".join([row["attack"], *(cell(row[m]) if m in row else "" for m in models)]) + " |")
    best = record["best"]
    lines += [
        "",
        "Chosen on validation data: "
        + "; ".join(
            f"{m}: {b['strategy']} at epoch {b['epoch']:g}, test {sum(b['test']) / len(b['test']):{digits}}"
            for m, b in best.items()
        )
        + ".",
        "",
    ]
    if (of_data := record.get("recovered_by_original_data", {"value": None}))["value"] is not None:
        lines += [
            "On the scale of the recovered transfer, an untrained model that warms up on the adversary's original "
            f"data is at {percent(of_data)}.",
            "",
        ]
    if benign := record.get("benign"):
        models = ", ".join(f"{m} {benign[m]:{digits}}" for m in ("protected", "original", "scratch"))
        lines += [
            "Fine-tuned to the pair's allowed domain by the same sweep, the attack chosen on validation data: "
            f"{models}.",
            "",
        ]
    return lines


def percent_cell(value: list[float]) -> str:
    """Mean ± SD in percent."""
    return f"{value[0]:.1%} ± {value[1] * 100:.1f}"


def number_cell(value: list[float]) -> str:
    """Mean ± SD."""
    return f"{value[0]:.4f} ± {value[1]:.4f}"


def paper_table(record: dict) -> list[str]:
    """One of the paper's tables: each row of ours above the published one."""
    percent = record["metric"] == "accuracy"
    number = (lambda v: f"{100 * v:.1f}") if percent else (lambda v: f"{v:.3f}")
    domains = ", ".join(f"{name}: `{source}`" for name, source in record["domains"].items())
    guards = "; ".join(
        f"{name}: "
        + (
            "no state kept the original domain, so the SOPHON rows are the unprotected model"
            if g["best"] is None
            else f"iteration {g['best']}"
        )
        for name, g in record["guard"].items()
    )
    lines = [
        f"## Table {record['table']}, `{record['scale']}`: {record['title']}",
        "",
        f"    {record['command']}",
        "",
        f"{record['date']}, commit {record['commit']}, {record['machine']}, torch {record['versions']['torch']}; "
        f"{record['seconds']} s; {record['adversary_examples']} images for the adversary, {record['test_examples']} to "
        "measure "
        f"on; attack seeds {record['seeds']}; data {domains}; protected model: {guards}; settings "
        f"`{json.dumps(record['config'])}`.",
        "",
        "| attack | method | | original domain | epoch 0 | 1 | 5 | 10 | 15 | 20 |",
        "|" + "---|" * 10,
    ]
    for row in record["rows"]:
        original = "-" if row["original"] is None else number(row["original"])
        ours = [original, *(f"{number(m)} ± {number(s)}" for m, s in zip(row["mean"], row["sd"], strict=True))]
        lines.append(f"| {row['attack']} | {row['method']} | ours | " + " | ".join(ours) + " |")
        lines.append("| | | paper | " + " | ".join(v.replace("±", " ± ") for v in row["paper"]) + " |")
    return [*lines, ""]


def page_name(record: dict) -> str:
    """What the page of a record's protection is called."""
    return re.sub(r"[^\w.-]+", "-", f"{record['pair']}-{record['protection']}") + ".md"


def attack_pages(records: list[dict], folder: Path) -> None:
    """A page a protection: every attack of its every record."""
    folder.mkdir(exist_ok=True)
    for page in folder.glob("*.md"):
        page.unlink()
    for name, group in groupby(sorted(records, key=page_name), page_name):
        of_page = list(group)
        lines = [
            f"# {of_page[0]['pair']}, {of_page[0]['protection']}: attack by attack",
            "",
            "Test metric at the end of each attack, mean ± SD over the attack seeds, the strongest attack first. "
            "[The overview](../README.md) explains the words.",
            "",
        ]
        lines += [line for record in of_page for line in details(record)]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")


def leaderboard(records: list[dict]) -> list[str]:
    """A table for each pair, budget and number of examples, the strongest protection first, without a score last."""

    def place(record: dict) -> float:
        value = record["recovered_transfer"]["value"]
        return math.inf if value is None else value

    lines = [LEADERBOARD]
    key = itemgetter("pair", "budget", "examples")
    for (pair, budget, examples), group in groupby(sorted(records, key=lambda r: (*key(r), place(r))), key):
        rows = list(group)
        cell = "{:.1%}" if is_accuracy(rows[0]) else "{:.4f}"
        reached = [{m: cell.format(mean(b["test"])) for m, b in r["best"].items()} for r in rows]
        # Rows of other machines may differ in the last digit.
        others = "; ".join(
            f"{title} {', '.join(sorted({r[m] for r in reached}))}"
            for m, title in (("original", "the unprotected model"), ("scratch", "training from scratch"))
        )
        lines += [
            f"## `{pair}`, budget `{budget}`, {examples} examples",
            "",
            f"Best attack, mean {rows[0]['metric']}: {others}.",
            "",
            "| protection | RT, worst case | RT, direct only | best attack | result | original domain | seeds | date |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r, best in zip(rows, reached, strict=True):
            lines.append(
                f"| {r['protection']} | {percent(r['recovered_transfer'])} | {percent(r['recovered_transfer_direct'])} "
                f"| {r['best']['protected']['strategy']} | {best['protected']} | {intactness(r)} | {len(r['seeds'])} "
                f"| {r['date']}, sophon_hf {r['versions']['sophon_hf']} |"
            )
        lines.append("")
    return lines


def main() -> None:
    rows = [json.loads(path.read_text()) for path in sorted((RESULTS / "leaderboard").glob("*.json"))]
    (RESULTS.parent / "leaderboard.md").write_text("\n".join(leaderboard(rows)), encoding="utf-8")
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    papers = [record for record in records if "scale" in record]
    records = [record for record in records if "scale" not in record]
    lines = [INTRODUCTION]
    for title in (PROTECTIONS, PARTS):
        of_chapter = [record for record in records if chapter(record) == title]
        lines += [f"## {title}", "", *over_seeds(of_chapter), *overview(of_chapter), ""]
    (RESULTS / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    attack_pages(records, RESULTS / "attacks")
    introduction = (RESULTS / "paper_introduction.md").read_text()
    tables = [introduction, *(line for record in papers for line in paper_table(record))]
    (RESULTS / "paper_tables.md").write_text("\n".join(tables), encoding="utf-8")
    trade_off(records, PICTURE)
    print(json.dumps({"records": len(records) + len(papers) + len(rows), "page": str(RESULTS / "README.md")}))


if __name__ == "__main__":
    main()
