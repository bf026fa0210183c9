"""`sophon-hf benchmark`: measure a protection by the fixed protocol of a packaged pair."""

from __future__ import annotations

import argparse

from sophon_hf.benchmarking.benchmark import benchmark
from sophon_hf.utils import process_state


def run(options: argparse.Namespace) -> None:
    """Benchmark as the options say; the row is printed."""
    found = benchmark(
        options.model, options.pair, options.budget, options.output_dir, seeds=options.seeds, name=options.name
    )
    if process_state().is_main_process:
        print(f"The row as JSON: {found.path}")
