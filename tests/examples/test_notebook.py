"""`notebooks/quickstart.ipynb` runs from its first cell to its last, without a network."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
# Shorter than a reader runs it: whether it runs does not depend on these.
SHORTER = {r"steps=100\b": "steps=5", r"max_steps=80\b": "max_steps=2", r"seeds=\(0, 1, 2\)": "seeds=(0,)"}
SHORTER |= {r"eval_steps=40\b": "eval_steps=2", r"epochs=10\b": "epochs=1"}


def test_the_notebook_runs_and_shows_a_score(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in ("IPython", "IPython.display"):  # It only shows a picture.
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(Image=Path, version_info=(9, 0)))
    cells = [c for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for long, short in SHORTER.items():
        assert re.search(long, code), long
        code = re.sub(long, short, code)
    exec(compile(code, str(NOTEBOOK), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert re.search(r"protected +\d\.\d{3}", printed) and re.search(r"scratch +\d\.\d{3}", printed)
    assert Path("protected", "sophon.json").exists() and Path("curves.png").exists()
