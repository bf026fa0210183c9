"""The circle: protect, attack, publish, and let a stranger audit what was published; one file configures all.

With no argument it runs on printed letters and handwritten digits and publishes to a small Hub on this machine, which
takes minutes on a CPU and needs no network. To publish on the real Hub, log in (`hf auth login`) and name a repository:

    python examples/publish_and_audit.py
    python examples/publish_and_audit.py --repo_id user/letters --private
"""

import argparse
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from sophon_hf import split_domain
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import pretrain
from sophon_hf.models.toy import small_classifier
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
    config = prepare(folder, options)

    step("protect", config)
    step("attack", config)
    with hub(options.repo_id) as (repo_id, environment):
        step("publish", config, repo_id, *(["--private"] if options.private else []), environment=environment)
        step("audit", config, repo_id, environment=environment)


def prepare(folder: Path, options: argparse.Namespace) -> Path:
    """Write a pre-trained model, two data sets and a sweep, as a publisher has them; return the file that names all."""
    torch.manual_seed(0)
    letters, digits, model = printed_letters(), handwritten_digits(), small_classifier()
    for name, splits in (("letters", letters), ("digits", digits)):
        for split, dataset in splits.items():
            dataset.to_parquet(folder / name / f"{split}.parquet")
    task = infer_task(model)
    _, training = split_domain(letters["train"], share=0.1)
    pretrain(model, task, build_domain(training, task.inputs(model), name="original"))
    model.save_pretrained(folder / "original")
    sweep = [
        {"initialization": start, "reinitialized_blocks": blocks, "learning_rate": rate, "batch_size": 10}
        for start, blocks in (("direct", 0), ("new_head", 0), ("new_head", 1))
        for rate in (3e-4, 1e-3, 3e-3)
    ]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    fields = {
        "model": str(folder / "original"),
        "original": str(folder / "letters"),
        "restricted": str(folder / "digits"),
        "output_dir": str(folder / "protected"),
        # The protection.
        "max_steps": options.max_steps,
        "K": 25,
        "l_NTR": 6,
        "alpha": 1e-3,
        "beta": 2e-3,
        "tolerance": 0.02,
        "eval_steps": 30,
        "per_device_train_batch_size": 64,
        "use_cpu": True,
        "strategy_space": {"initializations": ["direct"], "learning_rates": [1e-3, 3e-3], "batch_sizes": [20]},
        # The attacks. Six seeds, since with twenty examples much depends on which they are.
        "sweep": str(folder / "sweep.yaml"),
        "examples": 20,
        "epochs": options.epochs,
        "seeds": list(range(6)),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
    return folder / "config.yaml"


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
