"""What a sweep of thousands of runs costs beside its attacks: to find what is missing, to read results, and to report.

    python benchmarks/sweep.py --runs 2500 5000

The attacks are replaced by their results, so that only the suite itself runs. Each size starts anew in a folder of its
own: a run with nothing finished, a second one with everything finished, and the score, the checks, the claim's figures
and the report's of what it found. Seconds of computing, and the process's peak memory beyond what it was before. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from loops import growth_mib
from pairs import ResidualNet

from sophon_hf import AttackSuite, FineTuningStrategy
from sophon_hf.attacks import suite
from sophon_hf.attacks.report import to_markdown, write_report
from sophon_hf.attacks.run import Curve
from sophon_hf.hub.claim import AttackReport
from sophon_hf.utils import derive_seed

SEEDS, MODELS = 2, 3
EPOCHS = [0, 1, 5, 10, 15, 20]


def fake_attack(model, task, strategy, data, *, seed, **settings) -> Curve:
    """The result of an attack that was never run: numbers that follow from strategy and seed."""
    generator = torch.Generator().manual_seed(derive_seed(repr(strategy), seed))
    values = torch.rand(4, len(EPOCHS), generator=generator).tolist()
    return Curve(list(EPOCHS), [10 * epoch for epoch in EPOCHS], *values)


def images(examples: int, seed: int):
    """Random images of the `animals` model's size, as a data set."""
    import datasets

    generator = torch.Generator().manual_seed(seed)
    features = datasets.Features(
        {"pixel_values": datasets.Array3D((3, 16, 16), "float32"), "label": datasets.ClassLabel(5)}
    )
    values = {"pixel_values": torch.rand(examples, 3, 16, 16, generator=generator).numpy()}
    return datasets.Dataset.from_dict({**values, "label": [i % 5 for i in range(examples)]}, features=features)


def measure(runs: int, folder: Path) -> dict[str, float]:
    """Seconds and MiB of one size."""
    rates = [1e-4 * (1 + i) for i in range(runs // (SEEDS * MODELS))]
    sweep = [FineTuningStrategy(learning_rate=rate) for rate in rates]
    protected, original = ResidualNet(5), ResidualNet(5)
    data = {"restricted_dataset": images(100, 0), "eval_dataset": images(100, 1)}
    found: dict[str, float] = {}

    def timed(name: str, call: Callable):
        start = time.process_time()
        result = call()
        found[name] = round(time.process_time() - start, 2)
        return result

    def run():
        return AttackSuite(sweep, folder, seeds=range(SEEDS)).run(protected=protected, original=original, **data)

    with mock.patch.object(suite, "run_attack", fake_attack):
        timed("first run", run)
        memory = growth_mib(lambda: timed("second run", run))
        results = run()
    found["runs"] = len(results.runs)
    timed("score", results.recovered_transfer)
    timed("claim's figures", lambda: AttackReport.from_results(results))
    timed("report", lambda: to_markdown(results, write_report(results, folder / "report")))
    return found | {"MiB": round(memory["growth"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[2500, 5000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for runs in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            table.append(measure(runs, Path(folder)))
        print("".join(f"{name} {value:g}   " for name, value in table[-1].items()), flush=True)
    print(json.dumps({"sweeps": table, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
