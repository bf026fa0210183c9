"""Protect an unconditional diffusion model (UNet2DModel) against fine-tuning in a restricted domain.

Without arguments it pre-trains a small UNet on printed letters and protects it against handwritten digits, in minutes
on a CPU and without a network. For real work name a model or a DDPM pipeline, and two image data sets, by Hub id or
folder:

    accelerate launch examples/protect_unet.py
    accelerate launch examples/protect_unet.py --model google/ddpm-cifar10-32 --original uoft-cs/cifar100 \
        --restricted nielsr/CelebA-faces --max_steps 800 --K 50
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from sophon_hf import DiffusionTask, SophonConfig, SophonTrainer, load_domain, split_domain
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.finetuning.loop import pretrain


def small_unet() -> UNet2DModel:
    """A UNet of 0.3 M parameters for 16x16 grey images, not trained yet."""
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a UNet2DModel or a DDPM pipeline")
    parser.add_argument("--original", help="Hub id or folder of the original domain")
    parser.add_argument("--restricted", help="Hub id or folder of the restricted domain")
    parser.add_argument("--output_dir", default="runs/unet")
    parser.add_argument("--max_steps", type=int, default=20, help="Iter of Algorithm 1; the paper's is 800")
    parser.add_argument("--K", type=int, default=10, help="updates of a simulated adversary; the paper's is 50")
    parser.add_argument("--pretraining_steps", type=int, default=300, help="of the small UNet")
    options = parser.parse_args()
    if options.model and not (options.original and options.restricted):
        parser.error("--model needs --original and --restricted")
    if any(Path(options.output_dir).glob("*")):
        sys.exit(f"{options.output_dir} holds an earlier run: delete it, or choose another --output_dir.")

    model, original, restricted, task = options.model, options.original, options.restricted, None
    if model is None:
        torch.manual_seed(0)
        model, task = small_unet(), DiffusionTask(DDPMScheduler())
        original, restricted = printed_letters(1000, size=16)["train"], handwritten_digits(16)["train"]
        pretrain(model, task, build_domain(original, task.inputs(model), name="original"), options.pretraining_steps)

    # The other half is for attacks on the result: an adversary never has the defender's data.
    defender, _ = split_domain(load_domain(restricted))
    config = SophonConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        K=options.K,
        l_NTR=4,
        eval_steps=max(1, options.max_steps // 5),
        logging_steps=max(1, options.max_steps // 5),
        per_device_train_batch_size=64,
        strategy_space={"initializations": ["direct"], "batch_sizes": [32]},
    )
    trainer = SophonTrainer(model, defender, original, config, task=task)
    trainer.train()
    state = trainer.guard.state
    if state.best_step is None:
        sys.exit(f"The model is NOT protected: {trainer.guard.failure}")
    if trainer.is_world_process_zero():
        print(f"Original MSE {state.start:.4f} before, {state.best_original:.4f} after: {options.output_dir}.")


if __name__ == "__main__":
    main()
