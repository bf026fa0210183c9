"""Protect an image classifier against fine-tuning in a restricted domain.

With no argument it pre-trains a small ResNet on printed letters and protects it against handwritten digits, which
takes minutes on a CPU. For real work name a model and two data sets, by Hub id or folder:

    accelerate launch examples/protect_classifier.py
    accelerate launch examples/protect_classifier.py --model user/my-imagenette-classifier --original
    frgfm/imagenette:160px \
        --restricted uoft-cs/cifar10 --max_steps 800 --K 50
"""

import argparse

from transformers import AutoImageProcessor

from sophon_hf import SophonConfig, SophonTrainer, load_domain, split_domain
from sophon_hf.cli.demo import pretrain, small_classifier
from sophon_hf.data.domain import build_domain
from sophon_hf.data.toy import handwritten_digits, printed_letters
from sophon_hf.models.loading import load_model
from sophon_hf.tasks.base import infer_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of an image classifier")
    parser.add_argument("--original", help="Hub id or folder of the original domain")
    parser.add_argument("--restricted", help="Hub id or folder of the restricted domain")
    parser.add_argument("--output_dir", default="runs/classifier")
    parser.add_argument("--max_steps", type=int, default=40, help="Iter of Algorithm 1; the paper's is 800")
    parser.add_argument("--K", type=int, default=20, help="updates of a simulated adversary; the paper's is 50")
    parser.add_argument("--tolerance", type=float, default=0.02, help="lambda of eq. 1, in points of accuracy / 100")
    options = parser.parse_args()
    if options.model and not (options.original and options.restricted):
        parser.error("--model needs --original and --restricted")

    if options.model:
        model, processor = load_model(options.model), AutoImageProcessor.from_pretrained(options.model)
        original, restricted = load_domain(options.original), load_domain(options.restricted)
    else:
        model, processor = small_classifier(), None
        original, restricted = printed_letters()["train"], handwritten_digits()["train"]
        task = infer_task(model)
        pretrain(model, task, build_domain(original, task.inputs(model), name="original"))

    # The other half is for `sophon_hf.attacks`: an adversary never has the defender's data.
    defender, _ = split_domain(restricted)
    trainer = SophonTrainer(
        model,
        defender,
        original,
        SophonConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            K=options.K,
            tolerance=options.tolerance,
            l_NTR=4,
            eval_steps=max(1, options.max_steps // 8),
        ),
        processing_class=processor,
    )
    trainer.train()
    trainer.accelerator.print(trainer.evaluate())
    trainer.accelerator.print(f"The protected model is in {options.output_dir}.")


if __name__ == "__main__":
    main()
