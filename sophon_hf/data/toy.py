"""Make data from what dependencies ship, for the demo and the examples: handwritten digits and printed letters."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LETTERS = "ABCDEFGHJK"
_SIZE = 32
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSerif-Italic")


def handwritten_digits(size: int = _SIZE) -> datasets.DatasetDict:
    """Return the 1,797 handwritten digits of scikit-learn, white on black.

    Args:
        size: Height and width in pixels; the originals have 8.

    Returns:
        Splits "train" (997) and "test" (800), with columns `image` (grey) and `label`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [
        Image.fromarray((pixels * 15.9375).astype(np.uint8), "L").resize((size, size), Image.Resampling.BILINEAR)
        for pixels in digits.images
    ]
    order = np.random.default_rng(0).permutation(len(images))
    return _as_splits(images, digits.target.tolist(), [str(i) for i in range(10)], order, 800, "handwritten-digits")


def printed_letters(examples: int = 3000, size: int = _SIZE) -> datasets.DatasetDict:
    """Draw ten letters in six fonts of matplotlib, moved, turned, scaled and with noise; white on black.

    Args:
        examples: Training images; the test split has 500 more.
        size: Height and width in pixels.

    Returns:
        Splits "train" and "test", with columns `image` (grey) and `label`.
    """
    generator = np.random.default_rng(0)
    labels = np.arange(examples + 500) % len(_LETTERS)
    images = [_draw(_LETTERS[label], size, generator) for label in labels]
    return _as_splits(
        images, labels.tolist(), list(_LETTERS), generator.permutation(len(images)), 500, "printed-letters"
    )


def _draw(letter: str, size: int, generator: np.random.Generator) -> Image.Image:
    import matplotlib

    path = f"{matplotlib.get_data_path()}/fonts/ttf/{generator.choice(_FONTS)}.ttf"
    font = ImageFont.truetype(path, int(size * generator.uniform(0.5, 0.85)))
    canvas = Image.new("L", (size, size))
    where = tuple(size / 2 + generator.uniform(-0.12, 0.12, 2) * size)
    ImageDraw.Draw(canvas).text(where, letter, fill=int(generator.integers(150, 256)), font=font, anchor="mm")
    canvas = canvas.rotate(generator.uniform(-25, 25), resample=Image.Resampling.BILINEAR)
    noisy = np.asarray(canvas, dtype=np.float32) + generator.normal(0, 20, (size, size))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), "L")


def _as_splits(
    images: list[Image.Image], labels: list[int], names: list[str], order: np.ndarray, test: int, title: str
) -> datasets.DatasetDict:
    features = datasets.Features({"image": datasets.Image(mode="L"), "label": datasets.ClassLabel(names=names)})
    splits = {"train": order[test:], "test": order[:test]}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [images[i] for i in chosen], "label": [labels[i] for i in chosen]},
                info=datasets.DatasetInfo(features=features, dataset_name=title),
                split=datasets.Split(split),
            )
            for split, chosen in splits.items()
        }
    )
