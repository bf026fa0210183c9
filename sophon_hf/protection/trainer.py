"""`SophonTrainer`: Algorithm 1 as a Hugging Face Trainer. One step of the Trainer is one iteration."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import HubStrategy

from sophon_hf.data.domain import Source
from sophon_hf.data.fingerprint import DataFingerprint, fingerprint_domain
from sophon_hf.hub.card import update_card
from sophon_hf.hub.claim import FILE_NAME, Claim
from sophon_hf.hub.publish import create_repository, publish, publish_checkpoint
from sophon_hf.hub.saving import load_weights, save_protected
from sophon_hf.models.loading import hash_state, load_model, load_processor, refuse_half_precision, restore_precision
from sophon_hf.models.sharding import is_sharded, shard, skeleton, with_state
from sophon_hf.protection.callbacks import EvaluateLastStep, KeepNorms, ProtectionProgress
from sophon_hf.protection.checkpoints import checkpoint_to_resume, restore_state, save_state
from sophon_hf.protection.checks import (
    build_domains,
    choose_loss,
    fit_strategies,
    make_distillation,
    make_probes,
    refuse_arguments,
    refuse_launcher_settings,
)
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.guard import Guard
from sophon_hf.protection.measuring import measure_domains, simulated_error, simulated_metric
from sophon_hf.protection.reinforcement import ReinforcementBatches
from sophon_hf.protection.simulation import Adversaries
from sophon_hf.protection.step_log import StepLog
from sophon_hf.protection.suppression import Suppression
from sophon_hf.protection.updates import (
    consult_guard,
    make_suppression_optimizer,
    make_suppression_scheduler,
    reinforcement_loop,
    suppression_loop,
)
from sophon_hf.tasks.base import Task, infer_task, load_task
from sophon_hf.tasks.evaluation import first_rows


class SophonTrainer(Trainer):
    """Protects a pre-trained model against fine-tuning in a restricted domain (Algorithm 1).

    Args:
        model: A classifier of transformers, a `TimmWrapperForImageClassification`, a `UNet2DModel`, any `nn.Module`
            that returns logits, or a Hub id or folder of one.
        restricted_dataset: The restricted domain A: a Hub id, a folder, or an object of `datasets`. Everything in it is
            used: call `split_domain` first to keep an adversary's half apart.
        original_dataset: The original domain S, in the same forms.
        args: Hyper-parameters; the paper's by default.
        eval_dataset: {"original": ..., "restricted": ...} to evaluate on. Left out, a seeded, stratified share of each
            domain is held out. The guard chooses by it, so a test set does not belong here.
        processing_class: Image processor, tokenizer or feature extractor, for raw columns; saved with the model. Left out,
            it is what is saved with a model that is given by its id or folder.
        task: What is learned, where it cannot be inferred, or to name the head or the noise scheduler.
        input_columns: {"original": ..., "restricted": ...}: the raw input column, where it is not found by itself.
        label_columns: The same for the label column.
        reinforcement_loss: L_beta, called with (model, batch) and returning a scalar; the task's loss by default. It does
            not go with `distillation`.
        callbacks: Further callbacks of the Trainer.

    Raises:
        ValueError: Data that does not fit the model (labels outside the head, wrong image size, NaN, no labels),
            a frozen model, weights in half precision, a head that cannot be found, a strategy space that leaves no strategy, a `reinforcement_loss`
            beside distillation, or a model or settings that FSDP2 cannot shard here (docs/scaling.md).
    """

    # The task returns the mean loss of a batch, so the Trainer has to divide it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module | str,
        restricted_dataset: Source,
        original_dataset: Source,
        args: SophonConfig | None = None,
        *,
        eval_dataset: dict[str, Source] | None = None,
        processing_class: Any | None = None,
        task: Task | None = None,
        input_columns: dict[str, str] | None = None,
        label_columns: dict[str, str] | None = None,
        reinforcement_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = SophonConfig() if args is None else args
        refuse_arguments(model, args, reinforcement_loss)
        if isinstance(model, (str, os.PathLike)):
            source, model = model, load_model(model)
            task = load_task(source, model) if task is None else task
            processing_class = load_processor(source, model) if processing_class is None else processing_class
        refuse_half_precision(model, "given")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("Every parameter of the model is frozen: nothing can be protected. Set requires_grad.")
        self.task = infer_task(model) if task is None else task
        self.reinforcement_loss = reinforcement_loss
        self.input_columns = input_columns or {}
        self.domains = build_domains(
            model, self.task, args, {"original": original_dataset, "restricted": restricted_dataset}, eval_dataset,
            processing_class, self.input_columns, label_columns or {},
        )  # fmt: skip
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.domains["original"],
            eval_dataset={name: self.domains[f"eval_{name}"] for name in ("original", "restricted")},
            processing_class=processing_class,
            callbacks=callbacks,
        )
        refuse_launcher_settings(self.accelerator, args)
        unprotected = copy.deepcopy(self.model) if args.distillation else None
        self.base_state = hash_state(self.model) if args.distillation else None
        if self.accelerator.is_fsdp2:
            self._skeleton = skeleton(self.model)
            self.model = self.model_wrapped = shard(self.model, self.accelerator)
            unprotected = None if unprotected is None else shard(unprotected, self.accelerator)
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(ProtectionProgress(self.task.metric, visible=not args.disable_tqdm))
        self.add_callback(EvaluateLastStep())
        self.label_names = ["labels"]
        fit = fit_strategies(self.task, self.model, self.domains, args)
        self.structure, self.space, self.outputs = fit.structure, fit.space, fit.outputs
        self.suppression = Suppression(
            self.model, self.task, self.structure, choose_loss(self.task, args.suppression_loss),
            num_classes=self.domains["restricted"].num_classes or None, autocast=self.accelerator.autocast,
            probes=make_probes(self.model, self.task, self.structure, self.domains["restricted"], args),
            second_order=args.second_order,
        )  # fmt: skip
        shared = is_sharded(self.model)
        restricted, original = self.domains["restricted"], self.domains["original"]
        self.adversaries = Adversaries(restricted, original, self.task, self.space, args, shared)
        self.distillation = make_distillation(unprotected, self.task, self.domains["original"], args)
        self.keep_norms: KeepNorms | None = None
        if args.keep_norms:
            sample = first_rows(self.task, self.domains["original"], args.device)
            self.keep_norms = KeepNorms(self.model, lambda: self.task.predict(self.model, sample))
            self.add_callback(self.keep_norms)
        self.reinforcement_batches = ReinforcementBatches(self.domains["original"], self.task, args)
        self.guard = self._new_guard()
        self.suppression_optimizer: torch.optim.Optimizer | None = None
        self.suppression_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.step_log = StepLog(self.task)
        self._micro_step = 0
        self._consulted_at: int | None = None
        self._started: float | None = None
        self._seconds = 0.0

    # ---- The two loops of Algorithm 1 ----

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        """One iteration: all suppression loops, then the reinforcement loops; the Trainer applies the last of these."""
        if is_sharded(self.model):
            # Also before the last micro-batch of an accumulation: gradients that wait for it would be whole ones.
            model.set_requires_gradient_sync(True)
        if self._micro_step == 0:
            for loop in range(self.args.l_FTS):
                suppression_loop(self, loop)
            for loop in range(self.args.l_NTR - 1):
                reinforcement_loop(self, model, loop, super().training_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_log.add_reinforcement(loss, first_micro_batch=self._micro_step == 0)
        self._micro_step = (self._micro_step + 1) % self.args.gradient_accumulation_steps
        return loss

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """mu * L_beta (eq. 6), the mean over the batch."""
        if self.reinforcement_loss is not None:
            loss, prediction = self.reinforcement_loss(model, inputs), None
        elif self.distillation is not None:
            loss, prediction = self.distillation(model, inputs)
        else:
            prediction = self.task.predict(model, inputs)
            loss = self.task.loss(prediction, self.task.target(inputs))
        loss = self.args.mu * loss
        return (loss, {"prediction": prediction}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """Batches of O for the last reinforcement loop of each iteration: a function of seed, step and rank."""
        return DataLoader(
            self.reinforcement_batches, batch_size=1, collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
        )  # fmt: skip

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Two Adams over one model: beta's is the Trainer's own, alpha's stands beside it."""
        optimizer = super().create_optimizer(model)
        self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
        if self.suppression_optimizer is None:
            self.suppression_optimizer = make_suppression_optimizer(self.model, self.args)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: SophonConfig, model: nn.Module | None = None) -> tuple[Any, Any]:
        """The Trainer's optimizer, at the rate beta."""
        optimizer, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer, {**arguments, "lr": args.beta}

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """One schedule for both rates."""
        if is_sharded(self.model):
            # accelerate, by now, has looked the parameters up by their addresses, but all empty shards have the same one.
            for group, parameters in zip(self.optimizer.param_groups, self._parameter_groups, strict=True):
                group["params"] = parameters
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.suppression_scheduler is None:
            self.suppression_scheduler = make_suppression_scheduler(
                self.suppression_optimizer, self.args, num_training_steps
            )
        return scheduler

    # ---- Measuring, and the guard ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure both domains: `eval_original_*` and `eval_restricted_*`.

        While training, the guard acts on the result: the model may then be put back to the last good state.

        Args:
            eval_dataset: {name: `Domain` or anything that a domain can be built from} in place of the trainer's own.
            ignore_keys: Not used.
            metric_key_prefix: First part of every name.

        Returns:
            Metric and loss of each domain (a label that the head has no output for counts as wrong, and the loss is
            then NaN); while training also `*_restricted_simulated_*`, what fixed simulated
            adversaries (Adam 1e-3, own head and new head; K steps, or the horizon of persistent ones) reach.
        """
        metrics = measure_domains(self, self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
        if self.is_in_train and eval_dataset is None:
            domains = (self.domains["restricted"], self.domains["eval_restricted"])
            steps = self.args.horizon if self.args.num_persistent else self.args.K
            simulated = simulated_metric(
                self.suppression, self.space, *domains, steps, self.args.seed, self.args.per_device_eval_batch_size
            )
            metrics[f"{metric_key_prefix}_restricted_simulated_{self.task.metric}"] = simulated
            # Once a state: one that was put back is not another, later one. A resumed run measures its start again, too.
            if self.state.global_step != self._consulted_at:
                self._consulted_at = self.state.global_step
                consult_guard(self, metrics[f"{metric_key_prefix}_original_{self.task.metric}"], simulated)
            metrics["rollbacks"] = float(self.guard.state.rollbacks)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _new_guard(self) -> Guard:
        error = simulated_error(self.task, self.domains["eval_restricted"], self.space)
        own_loss = self.reinforcement_loss is not None
        return Guard(self.model, self.args.tolerance, self.task.greater_is_better, error, own_loss)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add what the loops since the last entry showed."""
        if "loss" in logs and self.step_log:
            logs = {**logs, **self.step_log.collect()}
            logs["alpha"] = self.suppression_optimizer.param_groups[0]["lr"]
            logs["dropped_suppression_gradients"] = self.guard.state.dropped
        super().log(logs, start_time)

    # ---- Running, saving and resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Protect the model; at the end it holds the best state inside the tolerance, which is saved to `output_dir`.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last complete one in `output_dir`.
            kwargs: As `Trainer.train` takes them.

        Raises:
            ValueError: `output_dir` holds another run, there is no complete checkpoint to go on from, or this trainer has
                protected its model already.
        """
        checkpoint = checkpoint_to_resume(self, resume_from_checkpoint)
        self.accelerator.wait_for_everyone()
        self._micro_step, self.step_log, self._consulted_at = 0, StepLog(self.task), None
        self.suppression_optimizer = self.suppression_scheduler = None
        self.guard = self._new_guard()
        self.adversaries.start_anew()
        self._started, self._seconds = time.monotonic(), 0.0
        try:
            output = super().train(checkpoint, **kwargs)
        finally:
            self.is_in_train = False  # The Trainer leaves it so where it is interrupted.
        restore_precision(self.model)
        self._started, self._seconds = None, self.seconds()
        self.guard.finish(self.task.metric)
        if self.args.save_strategy != "no":
            self.save_model()
        return output

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(self, output_dir)
        self.adversaries.start_anew()  # So that nothing of those that live on has to be in a checkpoint.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._seconds = restore_state(self, checkpoint)
            self._consulted_at = self.state.global_step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if hasattr(self.model, "save_pretrained") and not is_sharded(self.model):
            load_weights(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save what may be published, and no pickle beside it."""
        if self.args.should_save:
            model = with_state(self._skeleton, state_dict) if is_sharded(self.model) else self.model
            save_protected(self, model, output_dir or self.args.output_dir)

    @cached_property
    def data_fingerprints(self) -> dict[str, DataFingerprint]:
        """Of the four domains, for the claim."""
        return {name: fingerprint_domain(domain) for name, domain in self.domains.items()}

    def seconds(self) -> float:
        """Wall-clock time spent on protection, in the runs before a resumption too."""
        return self._seconds + (time.monotonic() - self._started if self._started is not None else 0.0)

    # ---- Publishing ----

    @property
    def repository_name(self) -> str:
        """What the card says to load: the repository, where it is known already."""
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def init_hf_repo(self, token: None = None, private: bool | None = None) -> None:
        """Make the repository that `push_to_hub=True` pushes to, or raise the PermissionError of `create_repository`."""
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = create_repository(self.repository_name, private)

    def create_model_card(self, model_name: str | None = None) -> None:
        """Bring README.md in `output_dir` up to date with what is saved there, unless it was edited; it names `model_name`."""
        if self.is_world_process_zero():
            update_card(self.args.output_dir, Claim.read(self.args.output_dir), model_name or self.repository_name)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        commit_message: str = "Publish the protected model",
        revision: str | None = None,
        private: bool | None = None,
        report: str | os.PathLike | None = None,
    ) -> CommitInfo | None:
        """Save the model to `output_dir`, and publish what is needed to load and to audit it, in one commit.

        A trainer that was made anew, after an attack of hours say, holds the model as it was before protection: where
        `output_dir` holds a saved one, that is published as it is.

        Args:
            repo_id: `user/name`; `hub_model_id`, or the name of `output_dir` in the own account, where left out.
            commit_message: Of the commit.
            revision: Branch to commit to.
            private: Whether a new repository is private; the account's own setting where None.
            report: `output_dir` of an attack on this model: what it found goes into claim and card.

        Returns:
            The commit, on the main process.

        Raises:
            PermissionError, ConnectionError, ValueError: As `sophon_hf.hub.publish.publish`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.state.global_step > 0 or not os.path.exists(os.path.join(self.args.output_dir, FILE_NAME)):
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return publish(
            self.args.output_dir, repo_id or self.repository_name, report=report, commit_message=commit_message,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision if revision is None else revision,
        )  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's model, without its states."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            iteration, revision = self.state.global_step, self.args.hub_revision
            publish_checkpoint(checkpoint_folder, self.repository_name, iteration, revision)
