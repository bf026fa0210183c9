"""A text-to-image pipeline that is protected, saved as a whole, attacked, published and audited."""

from __future__ import annotations

import numpy as np
from audited import verdict_of
from classifiers import same_tensors, settings
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pipelines import captioned, save_pipeline

from sophon_hf import AttackSuite, FineTuningStrategy, SophonTrainer, audit
from sophon_hf.auditing.verdicts import NOT_CHECKABLE, REPRODUCED, TAMPERED
from sophon_hf.models.loading import load_model
from sophon_hf.tasks.latents import encode_captions

SWEEP = [FineTuningStrategy(batch_size=8)]
SPACE = {"batch_sizes": [8], "initializations": ["direct"], "learning_rates": [1e-3]}
GUARDED = {"eval_strategy": "steps", "tolerance": 1.0, "simulated_examples": 1, "strategy_space": SPACE}


def test_a_pipeline_from_protection_to_audit(tmp_path, hub):
    before, after = str(tmp_path / "before"), tmp_path / "after"
    unprotected = save_pipeline(before, "v_prediction")
    encoded = encode_captions(before, captioned(1, 48))
    restricted, test, original, original_test = (encoded.select(range(start, start + 12)) for start in (0, 12, 24, 36))
    evaluation = {"restricted": test, "original": original_test}
    trainer = SophonTrainer(before, restricted, original, settings(after, **GUARDED), eval_dataset=evaluation)
    assert isinstance(trainer.model, UNet2DConditionModel)
    assert trainer.task.noise_scheduler.config.prediction_type == "v_prediction", "the pipeline's own"
    trainer.train()
    assert not same_tensors(unprotected.unet, trainer.model)
    assert same_tensors(trainer.model, load_model(after))
    assert str(tmp_path) not in (after / "model_index.json").read_text()

    data = {"restricted_dataset": restricted, "eval_dataset": test, "original_eval_dataset": original_test}
    suite = AttackSuite(SWEEP, tmp_path / "attacks", seeds=[0], epochs=2, measured_epochs=[0, 2])
    results = suite.run(protected=str(after), original=before, **data)
    assert not any(run.failed for run in results.runs) and results.metric == "mse"

    trainer.push_to_hub("alice/pipeline", report=tmp_path / "attacks")
    published = StableDiffusionPipeline.from_pretrained("alice/pipeline", safety_checker=None)
    assert same_tensors(trainer.model, published.unet)
    assert same_tensors(unprotected.vae, published.vae)
    assert same_tensors(unprotected.text_encoder, published.text_encoder)
    assert type(published.scheduler) is PNDMScheduler, "the sampler stays"
    picture = published("red", num_inference_steps=2, output_type="np", height=16, width=16).images[0]
    assert np.isfinite(picture).all()

    # The attacks are run again, on their own data.
    report = audit("alice/pipeline", tmp_path / "audit", unprotected=before, sweep=SWEEP, seeds=[0], epochs=2, **data)
    assert report.commit and report.exit_code == 0
    for claim in ("files", "sophon.json", "weights", "configuration", "card", "state"):
        assert verdict_of(report, claim) == REPRODUCED, claim
    assert verdict_of(report, "original mse after protection") == REPRODUCED
    assert verdict_of(report, "recovered transfer") == NOT_CHECKABLE, "one seed tells little"

    weights = after / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    forged = audit(after, tmp_path / "forged", sweep=SWEEP)
    assert verdict_of(forged, "weights") == TAMPERED and forged.exit_code == 1
