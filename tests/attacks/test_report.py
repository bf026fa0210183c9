"""The report of a sweep: files, figures, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import re
import runpy
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from made_results import HOSTILE, A, B, curve, make_results, runs
from PIL import Image

from sophon_hf.attacks.plots import plot_best_so_far, plot_curves, plot_heat_map
from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.attacks.run import AttackRun

PLOTS = ["best_so_far.png", "curves.png", "heat_map.png"]
FILES = [*PLOTS, *(f"dark/{name}" for name in PLOTS), "index.html", "report.json", "report.md"]


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag that opens must close."""

    VOID = ("meta", "link", "img", "br", "source")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def results() -> AttackResults:
    return make_results([0.70, 0.72, 0.74], [0.9] * 3, [0.6] * 3)


def test_everything_is_written(results, tmp_path):
    summary = write_report(results, tmp_path / "report")
    written = (path for path in (tmp_path / "report").rglob("*") if path.is_file())
    assert sorted(path.relative_to(tmp_path / "report").as_posix() for path in written) == sorted(FILES)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == json.loads(json.dumps(summary))
    for name in FILES[:6]:
        pixels = np.asarray(Image.open(tmp_path / "report" / name).convert("L"))
        assert min(pixels.shape) > 100 and pixels.std() > 5
        assert pixels[2, 2] == (0 if name.startswith("dark") else 255)


def test_figures(results, tmp_path):
    summary = write_report(results, tmp_path)
    assert summary["recovered_transfer"] == pytest.approx(0.4)
    assert summary["interval"][0] < 0.4 < summary["interval"][1]
    assert summary["void"] is None and summary["failed_checks"] == []
    assert summary["best"]["protected"] == {
        "attack": A.name,
        "epoch": 1.0,
        "mean": pytest.approx(0.72),
        "sd": pytest.approx(0.02),
        "seeds": 3,
        "highest": pytest.approx(0.72),
        "highest_attack": A.name,
        "last_quarter": None,
        "optimism": None,
    }
    assert set(summary["best"]) == {"protected", "original", "scratch"}
    assert summary["cost_to_recover"]["steps"] == 10
    assert summary["original_metric"] == {"original": 0.9, "protected": 0.89}

    text = (tmp_path / "report.md").read_text()
    low, high = summary["interval"]
    score = f"**Recovered transfer**: 40% (95 % interval {low:.0%} to {high:.0%})"
    assert text.startswith(f"# Attacks on the protected model\n\n{score}\n")
    assert f"| protected | 0.720 ±0.020 | 0.720 | 0.890 | {A.name} | 1 |" in text
    table = text.split("## protected: accuracy in the restricted domain")[1]
    assert f"| {A.name} | 0.100 ±0.000 | 0.720 ±0.020 | 0.720 ±0.020 |" in table.split("##")[0]
    page = Page((tmp_path / "index.html").read_text())
    assert {"40%", "0.720 ±0.020", A.name} <= set(page.texts)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: r.original_metric.update(protected=0.5), "0.900 before, 0.500 after"),
        (lambda r: r.facts["data"].update(validation="c"), "chosen on the split that reports"),
        (lambda r: [r.runs.remove(run) for run in r.of("scratch")], "is missing"),
        (lambda r: [c.curve.test.__setitem__(1, 0.61) for c in r.of("original")], "too close to scratch"),
    ],
)
def test_a_void_score_is_absent_and_said_so(results, tmp_path, change, reason):
    results.facts["data"] = dict(results.facts["data"])
    change(results)
    summary = write_report(results, tmp_path)
    assert summary["recovered_transfer"] is None and summary["interval"] is None
    assert reason in summary["void"]
    assert all(f["advice"] for f in summary["failed_checks"] if f["voids"])
    assert "\n**Recovered transfer**: void (" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert '<p class="score">void</p>' in page and "(voids the score)" in page and "<b>To get a score</b>, " in page
    assert not re.search(r'class="score">[^<]*%', page)
    assert summary["cost_to_recover"] is None and "scratch&#39;s result" not in page


def test_the_page_is_self_contained(results, tmp_path):
    write_report(results, tmp_path)
    text = (tmp_path / "index.html").read_text()
    page = Page(text)
    assert "http" not in text and "script" not in page.tags and "url(" not in text
    links = [value for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 7 and all(link.startswith("data:") for link in links)
    pictures = [base64.b64decode(link.split(",")[1]) for link in links if link.startswith("data:image/png")]
    names = ("curves.png", "heat_map.png", "best_so_far.png")
    assert pictures == [(tmp_path / file).read_bytes() for name in names for file in (f"dark/{name}", name)]
    assert all(value for name, value in page.attributes if name == "alt")


def test_hostile_names_are_escaped(results, tmp_path):
    results.runs += runs("protected", [0.8] * 3, HOSTILE)
    results.runs.append(AttackRun("<img src=x onerror=alert(1)>", A, 0, curve([0.1, 0.2, 0.2])))
    results.runs.append(AttackRun("protected", B, 0, error='RuntimeError: "><script>alert(2)</script>\n| a | b |'))
    results.facts["note"] = "</pre><script>alert(3)</script>"
    write_report(results, tmp_path)
    text = (tmp_path / "index.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and page.tags.count("img") == 3
    assert HOSTILE.name in page.texts, "it reads as it was written"

    lines = (tmp_path / "report.md").read_text().splitlines()
    names = ("| protected |", "| direct", "| new head")
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in lines if line.startswith(names)}
    assert widths == {6, 8}, "a bar in a name begins no cell"


def test_attacks_that_are_not_applicable_are_told_apart_from_resistance(results, tmp_path):
    results.runs.append(AttackRun("protected", B, 0, error="the head has fewer outputs", applicable=False))
    summary = write_report(results, tmp_path)
    assert summary["not_applicable"] == [B.name]
    for name in ("report.md", "index.html"):
        assert f"Not applicable, which does not show resistance: {B.name}." in (tmp_path / name).read_text()


def test_a_sweep_without_a_single_result_is_reported(tmp_path):
    results = make_results([0.7] * 3, [0.9] * 3, [0.6] * 3)
    for run in results.runs:
        run.curve, run.error = None, "RuntimeError: out of memory"
    summary = write_report(results, tmp_path)
    assert summary["recovered_transfer"] is None and summary["best"] == {}
    page = (tmp_path / "index.html").read_text()
    assert "9 of 9; the first" in page
    assert "scratch&#39;s result" not in page, "nothing can be said about what an attack reaches"


def test_the_report_of_an_error(tmp_path):
    results = make_results([0.05] * 3, [0.02] * 3, [0.08] * 3, metric="mse", greater_is_better=False, start=1.0)
    summary = write_report(results, tmp_path)
    assert summary["recovered_transfer"] == pytest.approx(0.5)
    text = (tmp_path / "report.md").read_text()
    assert "- metric: mse (lower is better)" in text and "the lowest figure of any attack" in text
    assert "| model | restricted mse | lowest | original mse |" in text
    assert "| protected | 0.0500 ±0.0000 | 0.0500 |" in text


def test_the_page_begins_with_what_was_attacked(results, tmp_path):
    def data(name: str, examples: int) -> dict:
        return {"name": name, "revision": None, "split": None, "hash": "0" * 64, "examples": examples}

    results.facts |= {
        "models": {"protected": "alice/kept", "original": "alice/open"},
        "fingerprints": {"training": data("digits", 20), "test": data("digits", 800), "original_test": data(None, 30)},
        "folds": 5,
        "date": "2026-01-02",
    }
    write_report(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Attacks on alice/kept\n")
    for line in (
        "original model: alice/open",
        "metric: accuracy (higher is better)",
        "adversary's training data: digits, 20 examples",
        "adversary's validation data: the training data, by cross-validation in 5 folds",
        "restricted test data: digits, 800 examples",
        "original test data: 30 examples",
        "seeds: 0, 1, 2",
        "date: 2026-01-02",
    ):
        assert f"\n- {line}\n" in text
    page = (tmp_path / "index.html").read_text()
    assert "<title>Attacks on alice/kept: recovered transfer 40% (" in page
    assert page.index("<dt>date</dt>") < page.index('class="score"')


def test_terms_are_explained_where_they_occur(results, tmp_path):
    write_report(results, tmp_path)
    page = (tmp_path / "index.html").read_text()
    for term, shown in (("direct", True), ("scratch", True), ("new head", False), ("untrained", False)):
        assert (f"<dt>{term}</dt>" in page) == shown
    results.runs += runs("untrained", [0.5] * 3, B)
    write_report(results, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<dt>new head</dt>" in page and "<dt>untrained</dt>" in page


# Plots.


@pytest.mark.parametrize("panels", [0, 1, 2, 4, 5])
def test_curves_of_any_number_of_panels(tmp_path, panels):
    lines = {"protected": ([0, 1], [[0.1, 0.2], [0.1, 0.3]]), "ntl": ([0, 1], [[0.1, 0.2]]), "scratch": ([0], [[0.3]])}
    path = plot_curves({f"panel {i}": lines for i in range(panels)}, tmp_path / "new" / "curves.png")
    width, height = Image.open(path).size
    assert width < 1600 and (height > 700) == (panels > 3)


def test_what_trains_nothing_has_a_panel_by_itself_and_crosses_it(tmp_path):
    lines = {"protected": ([0], [[0.5], [0.5]])}
    level = np.asarray(Image.open(plot_curves({"kernel": lines}, tmp_path / "curves.png")).convert("RGB"))
    marked = (np.abs(level.astype(int) - (0xD5, 0x5E, 0x00)).sum(axis=2) < 60).sum(axis=1)
    assert marked.max() > 0.4 * level.shape[1]  # Dashes all over the panel's width, where a point would be a dot.


def test_other_plots_take_what_is_not_finite(tmp_path):
    nan = float("nan")
    values, tried = np.array([[0.1, nan], [nan, nan]]), {"protected": np.full((3, 2), 0.2), "ntl": np.empty((3, 0))}
    for path in (
        plot_heat_map(["a", "b"], ["protected", "original"], values, tmp_path / "heat.png", "accuracy"),
        plot_heat_map(["a"], ["protected"], np.array([[nan]]), tmp_path / "empty.png", "accuracy"),
        plot_best_so_far(tried, tmp_path / "best.png", "accuracy"),
    ):
        assert Image.open(path).size[0] > 100


def test_plotting_leaves_the_backend_of_a_notebook_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    plots = runpy.run_module("sophon_hf.attacks.plots")  # What it does when it is imported, too.
    plots["plot_best_so_far"]({"protected": np.full((3, 2), 0.2)}, tmp_path / "best.png", "accuracy")
    assert matplotlib.get_backend() == "svg"


@pytest.mark.parametrize(
    "metric, benign, sentence",
    [
        (
            "accuracy",
            {"protected": 0.70, "original": 0.75, "scratch": 0.6, "difference": -0.05},
            "original: -5 points; on",
        ),
        (
            "mse",
            {"protected": 0.04, "original": 0.05, "scratch": 0.06, "difference": 0.01},
            "original: +0.01 (below 0:",
        ),
    ],
)
def test_benign_fine_tunability_is_told(tmp_path, metric, benign, sentence):
    better = metric == "accuracy"
    results = make_results([0.7] * 3, [0.9] * 3, [0.6] * 3, metric=metric, greater_is_better=better)
    results.benign = benign
    assert write_report(results, tmp_path)["benign"] == benign
    for name in ("report.md", "index.html"):
        text = " ".join((tmp_path / name).read_text().split())
        assert f"Benign fine-tunability, protected minus {sentence}" in text
        assert f"{benign['protected']:.{3 if better else 4}f} from the protected model" in text


def test_a_long_curve_is_thinned_in_the_table_only(results, tmp_path):
    epochs = [i / 10 for i in range(101)]
    for run in results.runs:
        run.curve = curve([0.1] * 100 + [0.77], epoch=epochs, step=list(range(101)))
    write_report(results, tmp_path)
    header = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "| epoch 0 |" in line)
    columns = [cell.strip() for cell in header.split("|")[2:-1]]
    assert len(columns) <= 13 and columns[0] == "epoch 0" and columns[-1] == "epoch 10"
    assert "0.770 ±0.000" in (tmp_path / "report.md").read_text()
