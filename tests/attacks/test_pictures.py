"""Grids of denoised images, which show what a diffusion model's error means."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from points import TinyNet, make_points
from torch import nn

from sophon_hf import AttackSuite, DiffusionTask, FineTuningStrategy
from sophon_hf.attacks.plots import save_image_grid
from sophon_hf.attacks.report import write_report
from sophon_hf.attacks.results import AttackResults
from sophon_hf.data.toy import handwritten_digits

SHORT = FineTuningStrategy(epochs=1, batch_size=20)


def make_unet(seed: int) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )


class Oracle(nn.Module):
    """Knows the clean images, and predicts what the scheduler was told to have predicted."""

    def __init__(self, clean: torch.Tensor, scheduler):
        super().__init__()
        self.clean, self.scheduler = nn.Parameter(clean), scheduler

    def forward(self, sample, timestep, return_dict):
        kept = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noise = (sample - kept.sqrt() * self.clean) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * self.clean
        return (
            {"epsilon": noise, "sample": self.clean, "v_prediction": velocity}[self.scheduler.config.prediction_type],
        )


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_model_that_knows_the_noise_gets_the_clean_image_back(scheduler, kind):
    scheduler = scheduler(prediction_type=kind)
    clean = torch.rand(3, 1, 8, 8) * 2 - 1
    random_state = torch.get_rng_state()
    noisy, denoised = DiffusionTask(scheduler).denoise(Oracle(clean, scheduler), {"sample": clean}, 0.3)
    torch.testing.assert_close(denoised, clean, rtol=0, atol=1e-4)
    kept = scheduler.alphas_cumprod[299].item()
    assert (noisy - kept**0.5 * clean).std().item() == pytest.approx((1 - kept) ** 0.5, rel=0.2)
    assert torch.equal(torch.get_rng_state(), random_state)


class Constant(nn.Module):
    """Knows that every image is one constant, and predicts noise, or the flow to it, from that."""

    def __init__(self, scheduler):
        super().__init__()
        self.clean, self.scheduler = nn.Parameter(torch.tensor(0.5)), scheduler

    def forward(self, sample, timestep, return_dict):
        if hasattr(self.scheduler, "alphas_cumprod"):
            kept = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
            return ((sample - kept.sqrt() * self.clean) / (1 - kept).sqrt(),)
        share = (timestep / self.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
        return ((sample - self.clean) / share,)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler(),
        *(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=s) for s in (False, True)),
    ],
)
def test_a_model_that_knows_the_noise_generates_its_images(scheduler):
    random_state = torch.get_rng_state()
    model = Constant(scheduler).train()
    generated = DiffusionTask(scheduler).generate(model, {"sample": torch.zeros(3, 1, 8, 8)})
    torch.testing.assert_close(generated, torch.full((3, 1, 8, 8), 0.5), rtol=0, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), random_state) and model.training


def test_errors_are_told_by_the_amount_of_noise():
    """The error of a prediction of nothing is that of the noise, weighted here by its timestep."""

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, sample, timestep, return_dict):
            return (timestep.float().view(-1, 1, 1, 1).expand_as(sample) / 1000,)

    task, rows = DiffusionTask(), {"sample": torch.zeros(400, 1, 4, 4)}
    batch = task.collate(rows, list(range(400)))
    parts = [{name: values[part] for name, values in batch.items()} for part in (slice(0, 150), slice(150, 400))]
    errors = (batch["target"] - batch["timestep"].view(-1, 1, 1, 1) / 1000).square().mean(dim=(1, 2, 3))
    for (low, high), error in zip(
        [(0, 100), (100, 250), (250, 500), (500, 1000)], task.errors_by_band(Weighted(), parts)
    ):
        inside = (batch["timestep"] >= low) & (batch["timestep"] < high)
        assert error == pytest.approx(float(errors[inside].mean()), rel=1e-5)


def test_a_grid_shows_every_image_in_its_place(tmp_path):
    images = np.linspace(-1, 1, 6).reshape(2, 3, 1, 1, 1) * np.ones((2, 3, 1, 4, 4))
    pixels = np.asarray(Image.open(save_image_grid(images, tmp_path / "grid.png", tile=8)))
    assert pixels.shape == (16, 24)
    np.testing.assert_array_equal(pixels[::8, ::8], [[0, 51, 102], [153, 204, 255]])
    assert all(np.ptp(pixels[i : i + 8, j : j + 8]) == 0 for i in (0, 8) for j in (0, 8, 16))
    broken = save_image_grid(np.full((1, 1, 3, 4, 4), np.nan), tmp_path / "nan.png")
    assert np.asarray(Image.open(broken)).max() == 0


def test_a_diffusion_report_shows_every_model_after_its_best_attack(tmp_path):
    digits = handwritten_digits(8)["train"]
    arguments = {
        "protected": make_unet(1),
        "original": make_unet(0),
        "restricted_dataset": digits.select(range(60)),
        "eval_dataset": digits.select(range(60, 100)),
        "original_eval_dataset": digits.select(range(100, 120)),
    }

    def suite():
        return AttackSuite([SHORT], tmp_path / "attacks", seeds=[0], measured_epochs=[0])

    results = suite().run(**arguments)
    titles = [f"restricted domain, {m} after its best attack" for m in ("protected", "original", "scratch")]
    titles += [f"original domain, {m}" for m in ("protected", "original")]
    assert list(results.pictures) == titles
    pictures = [np.asarray(Image.open(path)) for path in results.pictures.values()]
    assert all(p.shape == (4 * 48, 8 * 48) for p in pictures)
    # Clean and noisy columns are the same for every model, denoised ones are not.
    columns = [p.reshape(192, 8, 48) for p in pictures]
    for column, same in enumerate([True, True, False, True, False, True, False, False]):
        assert np.array_equal(columns[0][:, column], columns[1][:, column]) is same
    assert not np.array_equal(pictures[0], pictures[3])

    # Noise has variance 1, which is what a prediction of nothing misses.
    assert results.facts["chance"] == {name: pytest.approx(1, abs=0.05) for name in ("restricted", "original")}

    # A second run computes nothing and shows the same, and so does what was stored.
    assert suite().run(**arguments).pictures == results.pictures
    loaded = AttackResults.load(tmp_path / "attacks" / "results.json")
    assert {t: p.resolve() for t, p in loaded.pictures.items()} == {t: p.resolve() for t, p in results.pictures.items()}

    report = tmp_path / "attacks" / "report"
    write_report(loaded, report)
    page, text = (report / "index.html").read_text(), (report / "report.md").read_text()
    bands = json.loads((report / "report.json").read_text())["bands"]
    assert list(bands) == ["protected", "original", "scratch"]
    for model, errors in bands.items():
        assert len(errors) == 4 and f"| {model} | {errors[0]:.4f} | {errors[1]:.4f} |" in text
    assert "<th>noise 0% to 10%</th><th>noise 10% to 25%</th>" in page
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(links) == 3 + 5 and all((report / link).exists() for link in links)
    for path in results.pictures.values():
        assert base64.b64encode(path.read_bytes()).decode() in page


def test_a_picture_that_is_gone_is_left_out(tmp_path):
    digits = handwritten_digits(8)["train"]
    suite = AttackSuite([SHORT], tmp_path, seeds=[0], measured_epochs=[0])
    arguments = {
        "protected": make_unet(1),
        "original": make_unet(0),
        "restricted_dataset": digits.select(range(60)),
        "eval_dataset": digits.select(range(60, 100)),
    }
    suite.run(**arguments)
    for picture in (tmp_path / "runs").glob("*.png"):
        picture.unlink()
    assert suite.run(**arguments).pictures == {}


def test_a_classifier_has_none(tmp_path):
    points = make_points(1)
    results = AttackSuite([SHORT], tmp_path, seeds=[0]).run(
        protected=TinyNet(),
        original=TinyNet(),
        restricted_dataset=points.select(range(60)),
        eval_dataset=points.select(range(60, 120)),
        original_eval_dataset=points,
    )
    assert results.pictures == {} and not list(tmp_path.rglob("*.png"))


def test_another_process_finds_the_runs_of_a_diffusion_model(tmp_path):
    digits, files = handwritten_digits(8)["train"], []
    for order in (1, -1):
        scheduler = DDPMScheduler()
        # diffusers makes this list from a set, whose order changes with the process.
        defaults = sorted(scheduler.config["_use_default_values"])[::order]
        scheduler.register_to_config(_use_default_values=defaults)
        assert scheduler.config["_use_default_values"] == defaults
        AttackSuite([SHORT], tmp_path, seeds=[0], measured_epochs=[0], task=DiffusionTask(scheduler)).run(
            protected=make_unet(1),
            original=make_unet(0),
            restricted_dataset=digits.select(range(60)),
            eval_dataset=digits.select(range(60, 100)),
        )
        files.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")})
    assert len(files[0]) == 3 and files[1] == files[0]
