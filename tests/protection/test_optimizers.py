"""The suppression optimizer against the formula that its docstring gives."""

import math

import pytest
import torch
from points import TinyNet

from sophon_hf import SophonConfig
from sophon_hf.protection.guard import Guard
from sophon_hf.protection.optimizers import SuppressionOptimizer


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_parameters_that_the_original_domain_minds_move_less(tmp_path, weight):
    torch.manual_seed(0)
    model, alpha, epsilon = TinyNet().double(), 0.1, 1e-8
    args = SophonConfig(
        output_dir=str(tmp_path), alpha=alpha, preconditioning=weight, max_steps=9, use_cpu=True, report_to="none"
    )
    optimizer = SuppressionOptimizer(model, args, Guard(model, 0.1, True))
    reinforcement = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    name, parameter = next(iter(model.named_parameters()))
    m = v = w = torch.zeros_like(parameter)
    for t in range(1, 4):
        suppressed = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 2
        w = 0.999 * w + 0.001 * parameter.grad**2
        reinforcement.step()
        before = parameter.detach().clone()
        optimizer.apply(suppressed, reinforcement)
        m, v = 0.9 * m + 0.1 * suppressed[name], 0.999 * v + 0.001 * suppressed[name] ** 2
        known = 1 - 0.999**t
        share = (v / (v + weight * w)).sqrt()
        expected = before - share * alpha * (m / (1 - 0.9**t)) / ((v / known).sqrt() + epsilon)
        torch.testing.assert_close(parameter.detach(), expected)
        assert parameter.grad is None


def test_a_parameter_that_neither_domain_moves_stays(tmp_path):
    model = TinyNet()
    args = SophonConfig(output_dir=str(tmp_path), preconditioning=1.0, use_cpu=True, report_to="none")
    optimizer = SuppressionOptimizer(model, args, Guard(model, 0.1, True))
    reinforcement = torch.optim.AdamW(model.parameters(), lr=0.0)
    nothing = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    reinforcement.step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.apply(nothing, reinforcement)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new) and math.isfinite(float(new.sum()))
