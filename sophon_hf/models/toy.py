"""A model of the size of the toy data, for the demo and the examples."""

from __future__ import annotations

from transformers import ResNetConfig, ResNetForImageClassification


def small_classifier(num_labels: int = 10) -> ResNetForImageClassification:
    """Return a small ResNet of transformers for 32x32 grey images, not trained yet."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, layer_type="basic", num_labels=num_labels, **sizes)
    )
