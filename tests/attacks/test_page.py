"""The report's page in a real browser: light, dark, and as narrow as a phone. Collected only where there is one."""

from __future__ import annotations

import html
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_results import HOSTILE, make_results, runs
from PIL import Image

from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.sweeps import load_sweep

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess:
    """What a browser says of a page: its document on stdout, its console on stderr."""
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}",
        *flags,
        page.as_uri(),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    return process


def console(process: subprocess.CompletedProcess) -> list[str]:
    return [line for line in process.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A sweep of many attacks, one with a hostile name."""
    folder = tmp_path_factory.mktemp("page")
    results = make_results([0.7, 0.72, 0.74], [0.9] * 3, [0.6] * 3)
    for strategy in [*load_sweep("strong"), HOSTILE]:
        results.runs += runs("protected", [0.65] * 3, strategy)
    write_report(results, folder)
    return folder / "index.html"


def look(page: Path, scheme: int, width: int) -> np.ndarray:
    picture = page.parent / f"{scheme}-{width}.png"
    # Blink numbers colour schemes: 0 is dark, 1 is light.
    flags = (
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},1200",
        f"--screenshot={picture}",
    )
    assert not console(browse(page, *flags))
    return np.asarray(Image.open(picture).convert("L"), dtype=float)


@pytest.mark.parametrize("width", [1000, 500])
def test_the_page_follows_the_colour_scheme(page, width):
    dark, light = look(page, 0, width), look(page, 1, width)
    assert dark.shape == light.shape == (1200, width)
    for pixels, ground in ((dark, range(0, 50)), (light, range(230, 256))):
        assert np.median(pixels[:100]) in ground and pixels[5, 5] in ground
        # Text stands out from its ground, in the score and in what is below it.
        assert np.ptp(pixels[:120]) > 150 and np.ptp(pixels[120:300]) > 150


@pytest.mark.parametrize("width", [1000, 390, 360])
def test_nothing_but_tables_and_plots_scrolls_sideways_and_figures_are_in_sight(page, width):
    """A browser's window has a least width, a frame in it has none."""
    script = (
        "const frame = document.querySelector('iframe'); frame.onload = () => {"
        "const root = frame.contentDocument.documentElement;"
        "const cells = [...root.querySelectorAll('.best td:nth-child(-n + 4), .attacks td')];"
        "const hidden = cells.filter(cell => cell.getBoundingClientRect().right > root.clientWidth).length;"
        "document.title = `${root.scrollWidth} of ${root.clientWidth}, ${hidden} of ${cells.length > 50} hidden`}"
    )
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{html.escape(page.read_text())}"></iframe>'
    outer = page.with_name(f"frame-{width}.html")
    outer.write_text(f"<!doctype html><body>{frame}<script>{script}</script>")
    document = browse(outer, "--dump-dom").stdout
    assert f"<title>{width} of {width}, 0 of true hidden</title>" in document


def test_names_stay_text_and_no_error_is_logged(page):
    process = browse(page, "--dump-dom")
    assert not console(process)
    assert "<script" not in process.stdout and "&lt;script&gt;alert(1)" in process.stdout

    broken = page.with_name("broken.html")
    broken.write_text("<!doctype html><script>console.error('seen')</script>")
    assert "seen" in console(browse(broken, "--dump-dom"))[0], "the console is really heard"
