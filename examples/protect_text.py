"""Protect a text classifier: it keeps telling good film reviews from bad, but is hard to fine-tune for news topics.

Use it before publishing a sequence classifier that must not become the start of another one. The restricted domain is
halved first: the defender protects with one half, the other stays unseen, for attacks on the result.

    accelerate launch examples/protect_text.py
    accelerate launch examples/protect_text.py --model my-model --original my-data --restricted other-data

Each is a Hub id or a folder: a model with its tokenizer, as `save_pretrained` writes them; data as parquet, CSV or JSON
files with one column of text and one named `label`.
"""

import argparse

from transformers import AutoTokenizer

from sophon_hf import SophonConfig, SophonTrainer, load_domain, split_domain
from sophon_hf.models.loading import load_model


def parse_options() -> argparse.Namespace:
    """Defaults are rates at which a pre-trained transformer is usually fine-tuned; the paper's suit small networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="distilbert/distilbert-base-uncased-finetuned-sst-2-english")
    parser.add_argument("--original", default="stanfordnlp/sst2", help="the domain to keep")
    parser.add_argument("--restricted", default="fancyzhx/ag_news", help="the domain to protect against")
    parser.add_argument("--output_dir", default="sophon-output-text")
    parser.add_argument("--max_steps", type=int, default=400, help="Iter: iterations of Algorithm 1")
    parser.add_argument("--K", type=int, default=50, help="updates of each simulated adversary")
    parser.add_argument("--alpha", type=float, default=3e-5, help="rate of the suppression loop")
    parser.add_argument("--beta", type=float, default=5e-5, help="rate of the reinforcement loop")
    parser.add_argument("--tolerance", type=float, default=0.05, help="original accuracy that may be lost")
    return parser.parse_args()


def main() -> None:
    """Halve the restricted domain, protect, and say what came of it."""
    options = parse_options()
    defender, adversary = split_domain(load_domain(options.restricted), seed=0)
    args = SophonConfig(
        options.output_dir,
        max_steps=options.max_steps,
        K=options.K,
        alpha=options.alpha,
        beta=options.beta,
        tolerance=options.tolerance,
    )
    trainer = SophonTrainer(
        load_model(options.model),
        defender,
        load_domain(options.original),
        args,
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_original_accuracy"]
    if trainer.is_world_process_zero():
        print(f"Accuracy in the original domain: {accuracy:.3f}, before protection {trainer.guard.state.start:.3f}.")
        print(f"Saved in {options.output_dir}; {len(adversary)} restricted examples were kept apart for attacks.")


if __name__ == "__main__":
    main()
