"""Compare the suppression losses' stability, as in section 5.8 of the paper (Fig. 13).

The same small classifier is protected with ICE, KLU and the negated cross-entropy, and L_FTS is drawn over the
iterations.

    python examples/training_stability.py --output runs/stability.png
"""

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import pretrain
from sophon_hf.models.toy import small_classifier
from sophon_hf.tasks.base import infer_task

LOSSES = ("inverse_cross_entropy", "kl_from_uniform", "negated_cross_entropy")


def plot_stability(lines: dict[str, list[float]], path: Path) -> None:
    """Draw L_FTS over the iterations, one line a run; gaps where it is not finite."""
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    for label, values in lines.items():
        axis.plot(np.where(np.isfinite(values), values, np.nan), label=label, linewidth=1)
    axis.set_xlabel("iteration")
    axis.set_ylabel("L_FTS")
    axis.set_yscale("symlog")
    axis.set_title("Fig. 13: suppression losses while protecting")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/stability.png"))
    parser.add_argument("--max_steps", type=int, default=150, help="Iter of Algorithm 1")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    letters, digits = printed_letters()["train"], handwritten_digits()["train"]
    model = small_classifier()
    task = infer_task(model)
    pretrain(model, task, build_domain(letters, task.inputs(model), name="original"))
    lines = {}
    for loss in LOSSES:
        with tempfile.TemporaryDirectory() as folder:
            config = SophonConfig(
                output_dir=folder,
                max_steps=options.max_steps,
                K=10,
                alpha=1e-3,
                suppression_loss=loss,
                eval_strategy="no",
                save_strategy="no",
                strategy_space={"batch_sizes": [20]},
                use_cpu=True,
            )
            trainer = SophonTrainer(copy.deepcopy(model), digits, letters, config)
            trainer.train()
        lines[loss.replace("_", " ")] = [entry["L_FTS"] for entry in trainer.state.log_history if "L_FTS" in entry]
        print(
            f"{loss}: L_FTS {lines[loss.replace('_', ' ')][0]:.3g} at first, {lines[loss.replace('_', ' ')][-1]:.3g} "
            "at last"
        )
    plot_stability(lines, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
