"""`notebooks/quickstart.ipynb` runs from its first cell to its last, without a network."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def test_the_notebook_runs_and_shows_a_score(tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [o["text"] for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stdout"]
    assert any("protected" in text and "scratch" in text for text in printed)
    assert (tmp_path / "protected" / "sophon.json").exists() and (tmp_path / "curves.png").exists()
