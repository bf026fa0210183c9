"""Protect an audio classifier: it keeps hearing spoken commands, but is hard to fine-tune for environmental sounds.

Use it before publishing an audio classifier that must not become the start of another one. The restricted domain is
halved first: the defender protects with one half, the other stays unseen, for attacks on the result.

    pip install -e ".[audio]"    # in a clone
    accelerate launch examples/protect_audio.py
    accelerate launch examples/protect_audio.py --model my-model --original my-sounds --restricted other-sounds

Each is a Hub id or a folder: a model with its feature extractor, as `save_pretrained` writes them; data as an audio
folder (`train/CLASS/name.wav`) or as parquet files. Sounds are resampled to the model's rate.
"""

import argparse

import datasets
from transformers import AutoFeatureExtractor

from sophon_hf import SophonConfig, SophonTrainer, load_domain, select_classes, split_domain
from sophon_hf.models.loading import load_model


def parse_options() -> argparse.Namespace:
    """Defaults are rates at which a pre-trained transformer is usually fine-tuned; the paper's suit small networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MIT/ast-finetuned-speech-commands-v2")
    parser.add_argument("--original", default="google/speech_commands:v0.02", help="the domain to keep, as ID[:CONFIG]")
    parser.add_argument("--restricted", default="ashraq/esc50", help="the domain to protect against")
    parser.add_argument("--output_dir", default="sophon-output-audio")
    parser.add_argument("--max_steps", type=int, default=400, help="Iter: iterations of Algorithm 1")
    parser.add_argument("--K", type=int, default=50, help="updates of each simulated adversary")
    parser.add_argument("--alpha", type=float, default=3e-5, help="rate of the suppression loop")
    parser.add_argument("--beta", type=float, default=5e-5, help="rate of the reinforcement loop")
    parser.add_argument("--tolerance", type=float, default=0.05, help="original accuracy that may be lost")
    return parser.parse_args()


def load(source: str) -> datasets.Dataset:
    """A folder, or a Hub id with the name of one of its configurations after a colon."""
    dataset = load_domain(source)
    # ESC-50 calls its labels so.
    return dataset.rename_column("target", "label") if "target" in dataset.column_names else dataset


def main() -> None:
    """Halve the restricted domain, protect, and say what came of it."""
    options = parse_options()
    model = load_model(options.model)
    original = load(options.original)
    # A data set may number its classes in another order than the model does.
    names = list(model.config.id2label.values())
    if set(names) <= set(original.features["label"].names):
        original = select_classes(original, names)
    defender, adversary = split_domain(load(options.restricted), seed=0)
    args = SophonConfig(
        options.output_dir,
        max_steps=options.max_steps,
        K=options.K,
        alpha=options.alpha,
        beta=options.beta,
        tolerance=options.tolerance,
    )
    extractor = AutoFeatureExtractor.from_pretrained(options.model)
    trainer = SophonTrainer(model, defender, original, args, processing_class=extractor)
    trainer.train()
    accuracy = trainer.evaluate()["eval_original_accuracy"]
    if trainer.is_world_process_zero():
        print(f"Accuracy in the original domain: {accuracy:.3f}, before protection {trainer.guard.state.start:.3f}.")
        print(f"Saved in {options.output_dir}; {len(adversary)} restricted examples were kept apart for attacks.")


if __name__ == "__main__":
    main()
