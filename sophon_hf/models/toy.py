"""A model of the size of the toy data, for the demo, the benchmark and the examples."""

from __future__ import annotations

from transformers import ResNetConfig, ResNetForImageClassification


def small_classifier(num_labels: int = 10, num_channels: int = 1, depth: int = 1) -> ResNetForImageClassification:
    """Return a small ResNet of transformers for 32x32 images, of three stages with `depth` blocks, not trained yet."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [depth] * 3}
    return ResNetForImageClassification(
        ResNetConfig(num_channels=num_channels, layer_type="basic", num_labels=num_labels, **sizes)
    )
