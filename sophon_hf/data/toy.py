"""Make data from what dependencies ship, for the demo and the examples: handwritten digits and printed letters."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_SIZE = 32
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSerif-Italic")


def handwritten_digits(size: int = _SIZE, moved: bool = False) -> datasets.DatasetDict:
    """Return the 1,797 handwritten digits of scikit-learn, white on black.

    Args:
        size: Height and width in pixels; the originals have 8.
        moved: Whether each is moved, turned, scaled and dimmed at random, as the letters are. As they stand they are so
            alike that a few of them teach a model without pre-training.

    Returns:
        Splits "train" (997) and "test" (800), with columns `image` (grey) and `label`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    originals = [Image.fromarray((pixels * 15.9375).astype(np.uint8), "L") for pixels in digits.images]
    generator = np.random.default_rng(0)
    images = [
        _moved(image, size, generator) if moved else image.resize((size, size), Image.Resampling.BILINEAR)
        for image in originals
    ]
    order = np.random.default_rng(0).permutation(len(images))
    return _as_splits(images, digits.target.tolist(), [str(i) for i in range(10)], order, 800, "handwritten-digits")


def printed_letters(examples: int = 3000, size: int = _SIZE, classes: int = 10) -> datasets.DatasetDict:
    """Draw letters in six fonts of matplotlib, moved, turned, scaled and with noise; white on black.

    Args:
        examples: Training images; the test split has 500 more.
        size: Height and width in pixels.
        classes: How many letters, at most the 23 that look like no digit and like no other letter.

    Returns:
        Splits "train" and "test", with columns `image` (grey) and `label`.
    """
    generator = np.random.default_rng(0)
    letters = _LETTERS[:classes]
    labels = np.arange(examples + 500) % len(letters)
    images = [_draw(letters[label], size, generator) for label in labels]
    return _as_splits(
        images, labels.tolist(), list(letters), generator.permutation(len(images)), 500, "printed-letters"
    )


def _moved(digit: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    side = int(size * generator.uniform(0.575, 0.975))
    corner = (size - side) / 2 + generator.uniform(-0.12, 0.12, 2) * size
    canvas = Image.new("L", (size, size))
    canvas.paste(digit.resize((side, side), Image.Resampling.BICUBIC), (round(corner[0]), round(corner[1])))
    canvas = canvas.rotate(generator.uniform(-25, 25), resample=Image.Resampling.BILINEAR)
    brightest = generator.uniform(150, 256) / 256
    return canvas.point(lambda value: value * brightest)


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
