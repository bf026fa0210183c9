"""The circle: protect, attack, publish, and let a stranger audit what was published.

With no argument it runs on printed letters and handwritten digits and publishes to a small Hub on this machine, which
takes minutes on a CPU and needs no network. To publish on the real Hub, log in (`hf auth login`) and name a repository:

    python examples/publish_and_audit.py
    python examples/publish_and_audit.py --repo_id user/letters --private
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from sophon_hf import split_domain
from sophon_hf.cli.demo import SWEEP, pretrain, small_classifier
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.tasks.base import infer_task

LOCAL_HUB = Path(__file__).parents[1] / "tests" / "helpers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo_id", help="repository on the Hub; a Hub on this machine where left out")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/circle"))
    parser.add_argument("--max_steps", type=int, default=90, help="Iter of Algorithm 1")
    parser.add_argument("--epochs", type=float, default=20, help="of an attack")
    options = parser.parse_args()
    folder = options.output_dir
    prepare(folder)

    step(
        "protect",
        "--model",
        folder / "original",
        "--original",
        folder / "letters",
        "--restricted",
        folder / "digits",
        "--output_dir",
        folder / "protected",
        "--max_steps",
        options.max_steps,
        "--K",
        25,
        "--l_NTR",
        6,
        "--alpha",
        1e-3,
        "--beta",
        2e-3,
        "--tolerance",
        0.02,
        "--eval_steps",
        30,
        "--per_device_train_batch_size",
        64,
        "--use_cpu",
        True,
        "--strategy_space",
        json.dumps({"initializations": ["direct"], "learning_rates": [1e-3, 3e-3], "batch_sizes": [20]}),
    )
    # Six seeds, since with twenty examples much depends on which they are.
    budget = ("--sweep", folder / "sweep.json", "--examples", 20, "--epochs", options.epochs, "--seeds", *range(6))
    step(
        "attack",
        "--protected",
        folder / "protected",
        "--original",
        folder / "original",
        "--restricted",
        folder / "digits",
        "--original_data",
        folder / "letters",
        "--output_dir",
        folder / "attacks",
        *budget,
    )
    with hub(options.repo_id) as (repo_id, environment):
        step(
            "publish",
            folder / "protected",
            repo_id,
            "--report",
            folder / "attacks",
            *(["--private"] if options.private else []),
            environment=environment,
        )
        step(
            "audit",
            repo_id,
            "--unprotected",
            folder / "original",
            "--restricted",
            folder / "digits",
            "--original",
            folder / "letters",
            "--output_dir",
            folder / "audit",
            *budget,
            environment=environment,
        )


def prepare(folder: Path) -> None:
    """A pre-trained model, two data sets and a sweep, in folders, as a publisher has them."""
    torch.manual_seed(0)
    letters, digits, model = printed_letters(), handwritten_digits(), small_classifier()
    for name, splits in (("letters", letters), ("digits", digits)):
        for split, dataset in splits.items():
            dataset.to_parquet(folder / name / f"{split}.parquet")
    task = infer_task(model)
    _, training = split_domain(letters["train"], share=0.1)
    pretrain(model, task, build_domain(training, task.inputs(model), name="original"))
    model.save_pretrained(folder / "original")
    (folder / "sweep.json").write_text(json.dumps([strategy.to_dict() for strategy in SWEEP]))


def step(*arguments, environment: dict[str, str] | None = None) -> None:
    """Run one command of `sophon-hf`; what an audit finds wrong is an exit status, and no reason to stop."""
    arguments = [str(argument) for argument in arguments]
    print("\n$ sophon-hf " + " ".join(arguments), flush=True)
    command = [sys.executable, "-m", "sophon_hf.cli", *arguments]
    status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}).returncode
    if status and arguments[0] != "audit":
        sys.exit(status)


@contextmanager
def hub(repo_id: str | None):
    """The real Hub where a repository is named, else the small one of the tests, on this machine."""
    if repo_id is not None:
        yield repo_id, {}
        return
    sys.path.insert(0, str(LOCAL_HUB))
    from hub_server import running_hub

    with running_hub() as server:
        yield (
            "alice/letters",
            {
                "HF_ENDPOINT": server.endpoint,
                "HF_TOKEN": server.add_user("alice"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
            },
        )


if __name__ == "__main__":
    main()
