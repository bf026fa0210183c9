"""Protect an image classifier against fine-tuning in a restricted domain.

Without arguments it pre-trains a small ResNet on printed letters and protects it against handwritten digits, in
minutes on a CPU and without a network. For real work name a model and two data sets, by Hub id or folder:

    accelerate launch examples/protect_classifier.py
    accelerate launch examples/protect_classifier.py --model user/my-imagenette-classifier \
        --original frgfm/imagenette:160px --restricted uoft-cs/cifar10 --max_steps 800 --K 50 --alpha 3e-4 --beta 5e-4
"""

import argparse
import sys
from pathlib import Path

import torch

from sophon_hf import SophonConfig, SophonTrainer, load_domain, split_domain
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import pretrain
from sophon_hf.models.toy import small_classifier
from sophon_hf.tasks.base import infer_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of an image classifier")
    parser.add_argument("--original", help="Hub id or folder of the original domain")
    parser.add_argument("--restricted", help="Hub id or folder of the restricted domain")
    parser.add_argument("--output_dir", default="runs/classifier")
    parser.add_argument("--max_steps", type=int, default=40, help="Iter of Algorithm 1; the paper's is 800")
    parser.add_argument("--K", type=int, default=20, help="updates of a simulated adversary; the paper's is 50")
    parser.add_argument("--alpha", type=float, default=1e-3, help="rate of the suppression loop; the paper's is 3e-4")
    parser.add_argument("--beta", type=float, default=1e-3, help="rate of the reinforcement loop; the paper's is 5e-4")
    parser.add_argument("--tolerance", type=float, default=0.02, help="original accuracy that may be lost")
    options = parser.parse_args()
    if options.model and not (options.original and options.restricted):
        parser.error("--model needs --original and --restricted")
    if any(Path(options.output_dir).glob("*")):
        sys.exit(f"{options.output_dir} holds an earlier run: delete it, or choose another --output_dir.")

    model, original, restricted = options.model, options.original, options.restricted
    if model is None:
        torch.manual_seed(0)
        model, original, restricted = small_classifier(), printed_letters()["train"], handwritten_digits()["train"]
        task = infer_task(model)
        pretrain(model, task, build_domain(original, task.inputs(model), name="original"))

    # The other half is for attacks on the result: an adversary never has the defender's data.
    defender, _ = split_domain(load_domain(restricted))
    config = SophonConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        K=options.K,
        l_NTR=4,
        alpha=options.alpha,
        beta=options.beta,
        tolerance=options.tolerance,
        eval_steps=max(1, options.max_steps // 8),
        logging_steps=max(1, options.max_steps // 8),
    )
    trainer = SophonTrainer(model, defender, original, config)
    trainer.train()
    state = trainer.guard.state
    if state.best_step is None:
        sys.exit(f"The model is NOT protected: {trainer.guard.failure}")
    if trainer.is_world_process_zero():
        print(f"Original accuracy {state.start:.1%} before, {state.best_original:.1%} after: {options.output_dir}.")


if __name__ == "__main__":
    main()
