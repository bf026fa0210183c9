"""The smallest model and data: six numbers an example, labelled by a linear rule."""

from __future__ import annotations

import datasets
import torch
from torch import nn
from torch.nn import functional as F


class TinyNet(nn.Module):
    """Two layers over six numbers, smooth, with batch norm where asked."""

    def __init__(self, num_classes: int = 3, batch_norm: bool = True):
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


def make_points(seed: int, examples: int = 120, num_classes: int = 3) -> datasets.Dataset:
    """Six random numbers an example, labelled by a random linear rule."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=generator)
    labels = (x @ torch.randn(6, num_classes, generator=generator)).argmax(dim=1)
    features = datasets.Features(
        {
            "x": datasets.List(datasets.Value("float32")),
            "label": datasets.ClassLabel(names=[f"c{i}" for i in range(num_classes)]),
        }
    )
    return datasets.Dataset.from_dict({"x": x.numpy(), "label": labels.tolist()}, features=features)


def fitted(seed: int = 2, **kwargs) -> TinyNet:
    """A model that has learned the original domain, so that there is an accuracy to lose."""
    torch.manual_seed(0)
    model, points = TinyNet(**kwargs), make_points(seed)
    x, y = torch.tensor(points["x"]), torch.tensor(points["label"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model
