"""What is measured before protecting: the gap between the domains, and where the transfer lies."""

import datasets
import numpy as np
import pytest
import torch

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.models.toy import small_classifier
from sophon_hf.protection.guard import Guard


def pictures(shift: float, size: int = 60, seed: int = 0) -> datasets.Dataset:
    pixels = np.random.default_rng(seed).normal(shift, 1, size=(size, 1, 32, 32)).astype("float32")
    columns = {"pixel_values": datasets.Array3D((1, 32, 32), "float32"), "label": datasets.Value("int64")}
    rows = {"pixel_values": pixels, "label": np.arange(size) % 5}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(columns))


def protect(tmp_path, restricted: datasets.Dataset, original: datasets.Dataset) -> SophonTrainer:
    """Protect with other pictures than the given ones, which are held out."""
    torch.manual_seed(0)
    args = SophonConfig(
        str(tmp_path), max_steps=1, K=1, simulated_examples=10, save_strategy="no", report_to="none", use_cpu=True
    )
    held_out = {"original": original, "restricted": restricted}
    trainer = SophonTrainer(small_classifier(), pictures(1, seed=8), pictures(0, seed=9), args, eval_dataset=held_out)
    trainer.train()
    return trainer


NEAR, FAR = pictures(0), pictures(3, seed=1)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> SophonTrainer:
    return protect(tmp_path_factory.mktemp("far"), FAR, NEAR)


def test_the_gap_is_the_difference_of_means_in_standard_deviations(trainer, tmp_path):
    torch.manual_seed(0)
    model, seen = small_classifier().eval(), []
    first = model.get_submodule(trainer.structure.blocks[0])
    first.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().numpy()))
    found = []
    for domain in (NEAR, FAR):
        model(torch.tensor(np.array(domain["pixel_values"])).float())
        maps = seen[-1]
        half = maps.shape[-1] // 2
        cells = [maps[..., a : a + half, b : b + half].mean((2, 3)) for a in (0, half) for b in (0, half)]
        found.append(np.concatenate(cells, axis=1))
    difference = found[0].mean(0) - found[1].mean(0)
    variance = (found[0].var(0, ddof=1) + found[1].var(0, ddof=1)) / 2
    assert trainer.guard.state.gap == pytest.approx(np.sqrt((difference**2 / variance).mean()), rel=1e-3)
    assert trainer.guard.state.gap > 5 * protect(tmp_path, pictures(0, seed=1), NEAR).guard.state.gap


def test_a_protection_measures_the_pair_before_its_first_iteration(trainer):
    state = trainer.guard.state
    assert 0 <= state.early <= 1 and 0 <= state.scratch <= 1 and state.gap > 0
    assert "Before protection, 10 examples take an adversary to accuracy " in trainer.guard.outlook


def outlook(start: float, scratch: float, early: float, gap: float | None, **guard) -> str:
    seen = Guard(torch.nn.Linear(1, 1), 0.02, **{"greater_is_better": True, "error": 0.01, **guard})
    seen.state.start_simulated, seen.state.scratch, seen.state.early, seen.state.gap = start, scratch, early, gap
    return seen.outlook


def test_the_outlook_says_what_was_measured_and_nothing_where_nothing_is_known():
    known = outlook(0.8, 0.4, 0.7, 2.6)
    assert "a transfer of 40 points" in known and "lie 2.6 standard deviations apart" in known
    assert "holds 75% of the transfer" in known and "defences.md" in known
    assert "little to protect" in outlook(0.42, 0.4, 0.41, 2.6)
    assert "defences.md" not in outlook(0.42, 0.4, 0.41, 2.6) + outlook(0.8, 0.4, float("nan"), None)
    assert "not measured" in outlook(0.8, float("nan"), 0.5, 1.0)
    mse = outlook(0.2, 0.5, 0.5, 2.0, greater_is_better=False, metric="mse", error=0.0)
    assert "mse 0.200, from scratch to 0.500: a transfer of 0.3" in mse and "points" not in mse
