"""A suite on two processes."""

from __future__ import annotations

import json
import runpy

from two_processes import launch

# The test reads `run` from it too.
SCRIPT = """
import sys

import datasets
import torch
from torch import nn

from sophon_hf import AttackSuite, FineTuningStrategy

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def points(first, last):
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    labels = x[:, :3].argmax(dim=1)
    features = datasets.Features(
        {"x": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    values = {"x": x[first:last].numpy(), "label": labels[first:last].tolist()}
    return datasets.Dataset.from_dict(values, features=features)


def run(folder):
    torch.manual_seed(0)
    original, protected = Net(), Net()
    strategies = [FineTuningStrategy(start, epochs=2, batch_size=20) for start in ("direct", "new_head")]
    suite = AttackSuite(strategies, folder, seeds=[0, 1], measured_epochs=[0, 1, 2])
    data = dict(restricted_dataset=points(0, 60), eval_dataset=points(60, 120))
    return suite.run(protected=protected, original=original, **data)


if __name__ == "__main__":
    from accelerate import PartialState

    results, state = run(f"{sys.argv[1]}/two"), PartialState()
    assert state.num_processes == 2
    with open(f"{sys.argv[1]}/two/rank-{state.process_index}.txt", "w") as file:
        file.write(repr(results.runs))
"""


def test_two_processes_share_the_runs_and_find_what_one_finds(tmp_path):
    launch(tmp_path, SCRIPT, timeout=400)
    one = runpy.run_path(str(tmp_path / "run.py"))["run"](tmp_path / "one")
    seen = [(tmp_path / "two" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert seen == [repr(one.runs)] * 2
    names = [sorted(path.name for path in (tmp_path / folder / "runs").iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 10
    saved = json.loads((tmp_path / "two" / "results.json").read_text())
    assert all(run["curve"] for run in saved["runs"])
