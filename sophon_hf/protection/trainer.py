"""`SophonTrainer`: Algorithm 1 as a Hugging Face Trainer. One step of the Trainer is one iteration."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from sophon_hf.data.loading import Source
from sophon_hf.data.preprocessing import InputColumn
from sophon_hf.hub.card import update_card
from sophon_hf.hub.claim import FILE_NAME, Claim
from sophon_hf.hub.publish import create_repository, publish, publish_checkpoint
from sophon_hf.hub.saving import load_weights, save_protected
from sophon_hf.models.loading import agree_on_padding, hash_state, load_model, load_processor, restore_precision
from sophon_hf.models.sharding import is_sharded, shard, skeleton, with_state
from sophon_hf.protection import checks
from sophon_hf.protection.callbacks import EvaluateLastStep, KeepNorms, ProtectionProgress, StepLog
from sophon_hf.protection.checkpoints import Run
from sophon_hf.protection.config import SophonConfig
from sophon_hf.protection.domains import as_domains, build_domains, domain_gap, evaluate_domains
from sophon_hf.protection.guard import Guard
from sophon_hf.protection.optimizers import SuppressionOptimizer, average_and_clip
from sophon_hf.protection.probes import Probes
from sophon_hf.protection.reinforcement import ReinforcementBatches, ReinforcementLoss
from sophon_hf.protection.second_order import SecondOrderSuppression
from sophon_hf.protection.simulation import Adversaries
from sophon_hf.protection.suppression import Suppression, simulated_error
from sophon_hf.tasks.base import Task, infer_task, load_task
from sophon_hf.tasks.evaluation import first_rows
from sophon_hf.tasks.metrics import MetricSource

logger = logging.getLogger(__name__)


class SophonTrainer(Trainer):
    """Protects a pre-trained model against fine-tuning in a restricted domain (Algorithm 1).

    Args:
        model: A classifier, backbone or denoiser, any `nn.Module` that returns logits, or a Hub id or folder of one.
        restricted_dataset: The restricted domain A: a Hub id, a folder, or an object of `datasets`. Everything in it is
            used: call `split_domain` first to keep an adversary's half apart.
        original_dataset: The original domain S, in the same forms.
        args: Hyper-parameters; the paper's by default.
        eval_dataset: {"original": ..., "restricted": ...} for the guard to choose by, so no test sets. Left out, a
            seeded, stratified share of each domain is held out.
        processing_class: Image processor, tokenizer or feature extractor, for raw columns; saved with the model. Left
            out, it is what is saved with a model that is given by its id or folder.
        task: What is learned, where it cannot be inferred, or to name the head or the noise scheduler.
        metric: The name of one of ours, or an `evaluate.EvaluationModule`, in place of the task's.
        input_columns: {"original": ..., "restricted": ...}: the raw input column, where it is not found by itself, or
            two columns of text.
        label_columns: The same for the label column.
        reinforcement_loss: L_beta of (model, batch), a scalar, in place of the task's loss and of `distillation`.
        callbacks: Further callbacks of the Trainer.

    Raises:
        ValueError: Model, data and settings do not fit one another, or cannot be protected here.
    """

    # The task returns the mean loss of a batch, so the Trainer has to divide it by the accumulation steps.
    loss_is_scaled_for_ga = False
    model: nn.Module
    optimizer: Any
    control: Any
    _micro_step: int

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
        metric: MetricSource | None = None,
        input_columns: Mapping[str, InputColumn] | None = None,
        label_columns: Mapping[str, str | None] | None = None,
        reinforcement_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = SophonConfig() if args is None else args
        checks.refuse_arguments(args, reinforcement_loss, task, metric)
        source, model = model, load_model(model)
        if not isinstance(source, nn.Module):
            task = load_task(source, model, metric) if task is None else task
            processing_class = load_processor(source, model) if processing_class is None else processing_class
        checks.refuse_model(model, args)
        agree_on_padding(model, processing_class)
        self.task = infer_task(model, metric) if task is None else task
        self._input_columns = input_columns or {}
        sources = {"original": original_dataset, "restricted": restricted_dataset}
        columns, needs = {"input": self._input_columns, "label": label_columns or {}}, self.task.inputs(model)
        self.domains = build_domains(needs, args, sources, eval_dataset, processing_class, columns)
        checks.check_domains(self.domains, model)
        self.guard = Guard(
            model,
            args.tolerance,
            self.task.greater_is_better,
            metric=self.task.metric,
            examples=args.simulated_examples,
            own_loss=reinforcement_loss is not None,
            on_violation=args.on_violation,
            on_change=self._follow_guard,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.domains["original"],
            eval_dataset={name: self.domains[f"eval_{name}"] for name in ("original", "restricted")},
            processing_class=processing_class,
            # The guard acts before anyone else looks at an evaluation.
            callbacks=[self.guard, *(callbacks or [])],
        )
        self.label_names = ["labels"]
        checks.refuse_launcher_settings(self.accelerator, args)
        self._build(args, reinforcement_loss)

    def _build(self, args: SophonConfig, own_loss: Callable | None) -> None:
        """Build what the two loops need, on the device and in the shards where the model is now."""
        unprotected = copy.deepcopy(self.model) if args.distillation else None
        base_state = hash_state(self.model) if args.distillation else None
        if self.accelerator.is_fsdp2:
            self._skeleton = skeleton(self.model)
            self.model = self.model_wrapped = shard(self.model, self.accelerator)
            unprotected = None if unprotected is None else shard(unprotected, self.accelerator)
        self.guard.model = self.model
        restricted, held_out, original = (self.domains[n] for n in ("restricted", "eval_restricted", "original"))
        with self.accelerator.autocast():
            self.structure, self.space, self.outputs = checks.fit_strategies(self.task, self.model, self.domains, args)
        self.guard.error = simulated_error(self.task, held_out)
        loss, depths = checks.choose_loss(self.task, args.suppression_loss), args.probe_depths
        probes = Probes(self.model, self.structure, depths, restricted.num_classes, loss) if depths else None
        kind, classes = SecondOrderSuppression if args.second_order else Suppression, restricted.num_classes or None
        parts, autocast = (self.model, self.task, self.structure), self.accelerator.autocast
        self.suppression = kind(*parts, loss, num_classes=classes, autocast=autocast, probes=probes)
        measure = self.suppression.simulated_metric
        self._simulated_metric = partial(measure, restricted=restricted, held_out=held_out, args=args)
        process = 0 if is_sharded(self.model) else args.process_index
        self.adversaries = Adversaries(restricted, original, self.task, self.space, args, process)
        # Claim and checkpoints tell what was done, not what was asked for.
        args.mixup = args.mixup and checks.can_mix(self.task, self.model, original, args.device)
        self.reinforcement_loss = ReinforcementLoss(self.task, args, unprotected, own_loss)
        self.reinforcement_batches = ReinforcementBatches(original, self.task, args)
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(ProtectionProgress(self.task.metric, self.guard, visible=not args.disable_tqdm))
        self.add_callback(EvaluateLastStep())
        self.keep_norms: KeepNorms | None = None
        if args.keep_norms:
            sample = first_rows(self.task, original, args.device)
            self.keep_norms = KeepNorms(self.model, lambda: self.task.predict(self.model, sample))
            self.add_callback(self.keep_norms)
        names = (self.accelerator.mixed_precision, getattr(own_loss, "__qualname__", None))
        self.run = Run(args, self.task, self.space, self.domains, self.guard, base_state, *names)

    # ---- Algorithm 1 ----

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        """Carry out one iteration of Algorithm 1; the Trainer applies the last reinforcement loop's gradient."""
        args, step, clip = self.args, self.state.global_step, (self.model, self.accelerator, self.args.max_grad_norm)
        suppression_loops = args.l_FTS if step < args.suppressed_steps else 0
        if is_sharded(self.model):
            # Also before the last micro-batch of an accumulation: gradients that wait for it would be whole ones.
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
        if self._micro_step == 0:
            # Fine-tuning suppression (lines 3 to 15): theta <- Adam(theta, alpha, gradient of L_FTS).
            for loop in range(suppression_loops):
                adversaries = self.adversaries.draw(step, loop)  # phi_i from Phi, R_i and T_i from A; i = 1..N
                suppressed = self.suppression(adversaries, args.step_weights)  # sum over i, and over k = 1..K
                norm, suppressed.loss = average_and_clip(suppressed.gradient, suppressed.loss, *clip)
                if torch.isfinite(norm):
                    self.suppression_optimizer.apply(suppressed.gradient, self.optimizer)
                    self.guard.state.applied += 1
                else:
                    self.guard.state.dropped += 1
                    logger.warning("Iteration %d: the suppression gradient is not finite and is dropped.", step)
                self.step_log.add_suppression(suppressed, norm)
            if suppression_loops:
                self.suppression_optimizer.scheduler.step()
            # Normal training reinforcement (lines 16 to 21): theta <- Adam(theta, beta, gradient of mu L_beta on O).
            for loop in range(args.l_NTR - 1):
                self._reinforcement_loop(model, step, loop)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_log.add_reinforcement(loss, first_micro_batch=self._micro_step == 0)
        self._micro_step = (self._micro_step + 1) % args.gradient_accumulation_steps
        return loss

    def _reinforcement_loop(self, model: nn.Module, step: int, loop: int) -> None:
        """Carry out a reinforcement loop other than the last one, which the Trainer itself closes."""
        losses = []
        for micro_step in range(self.args.gradient_accumulation_steps):
            batch = self.reinforcement_batches.batch(step, loop, micro_step)
            with nullcontext() if is_sharded(self.model) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch))
        # The Trainer's first micro-batch may run without gradient averaging, so average by hand as for suppression.
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        average_and_clip(gradients, torch.stack(losses).sum(), self.model, self.accelerator, self.args.max_grad_norm)
        # The optimizer that accelerate wraps, since accelerate's own would wait for the Trainer's last micro-batch.
        getattr(self.optimizer, "optimizer", self.optimizer).step()
        model.zero_grad()

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Return mu * L_beta (eq. 6), the mean over the batch."""
        loss, prediction = self.reinforcement_loss(model, inputs)
        return (self.args.mu * loss, {"prediction": prediction}) if return_outputs else self.args.mu * loss

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of O for the last reinforcement loop of each iteration, by seed, step and rank."""
        return self.reinforcement_batches.loader()

    # ---- Two optimizers over one model ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: SophonConfig, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return the Trainer's optimizer, at the rate beta; `train` makes alpha's."""
        optimizer, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer, {**arguments, "lr": args.beta}

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create beta's optimizer, and note its parameters for `create_scheduler`."""
        optimizer = super().create_optimizer(model)
        self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create beta's schedule; of a sharded model, give the optimizer its parameters back first."""
        if is_sharded(self.model):
            # accelerate has looked the parameters up by their addresses, but all empty shards have the same one.
            for group, parameters in zip(self.optimizer.param_groups, self._parameter_groups, strict=True):
                group["params"] = parameters
        return super().create_scheduler(num_training_steps, optimizer)

    def _follow_guard(self, rolled_back: bool) -> None:
        """Let alpha have the guard's scale at once; after a roll-back, forget the path that was given up."""
        if rolled_back:
            for optimizer in (self.optimizer, self.suppression_optimizer):
                getattr(optimizer, "optimizer", optimizer).state.clear()
            self.adversaries.forget()
            if self.keep_norms is not None:
                self.keep_norms.set_norms()  # The state from before the first iteration has its own.
        self.suppression_optimizer.rescale()

    # ---- Measuring ----

    predict = get_eval_dataloader = get_test_dataloader = hyperparameter_search = checks.refuse_method

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure both domains, and change nothing; while protecting, the guard sees the result, and may roll back.

        Args:
            eval_dataset: {name: `Domain` or anything that a domain can be built from} in place of the trainer's own.
            ignore_keys: Not used.
            metric_key_prefix: First part of every name.

        Returns:
            `eval_original_*` and `eval_restricted_*`: metric and loss, which is NaN where the head lacks an output for
            a label; while training also `*_restricted_simulated_*`: what the stronger of two fixed adversaries with
            `simulated_examples` examples reaches, with the own head and a new one, and what it recovers.
        """
        args, task, domains = self.args, self.task, self.eval_dataset
        if eval_dataset is not None:
            needs = task.inputs(self.model)
            domains = as_domains(eval_dataset, self.domains, needs, self.processing_class, self._input_columns)
        found = evaluate_domains(task, self.model, domains, self.outputs, args, self.accelerator.autocast)
        if self.is_in_train and eval_dataset is None:
            starts, state = set(self.space.initializations), self.guard.state
            if state.scratch is None:
                state.scratch = self._simulated_metric({"scratch"})
                state.gap = domain_gap(self.task, self.model, self.structure, self.domains, args)
                if late := 2 * len(self.structure.blocks) // 3:
                    state.early = self._simulated_metric(starts & {"new_head"}, blocks=late)
            simulated = self._simulated_metric(starts)
            found[f"restricted_simulated_{task.metric}"] = simulated
            if (recovered := self.guard.recovered_transfer(simulated)) is not None:
                found["restricted_simulated_recovered_transfer"] = recovered
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.log(dict(metrics))
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log, and add what the loops since the last entry showed."""
        if "loss" in logs and self.step_log:
            logs |= self.step_log.collect() | {"dropped_suppression_gradients": self.guard.state.dropped}
            logs["alpha"] = self.suppression_optimizer.rate * (self.state.global_step <= self.args.suppressed_steps)
        super().log(logs, start_time)

    # ---- Running, saving and resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Protect the model; at the end it holds the best state inside the tolerance, which is saved to `output_dir`.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last complete one in `output_dir`.
            kwargs: As `Trainer.train` takes them.

        Raises:
            ValueError: The checkpoint or `output_dir` is another run's, or this trainer has protected already.
        """
        checkpoint = self.run.begin(self.model, resume_from_checkpoint)
        self.accelerator.wait_for_everyone()
        self.step_log, self._micro_step = StepLog(self.task), 0
        self.suppression_optimizer = SuppressionOptimizer(self.model, self.args, self.guard)
        self.guard.begin()
        self.adversaries.forget()
        try:
            output = super().train(checkpoint, **kwargs)
        finally:
            self.is_in_train = False  # The Trainer leaves it so where it is interrupted.
        restore_precision(self.model)
        starts = set(self.space.initializations)
        self.run.end(lambda: self._simulated_metric(starts, draw="for the chosen state"))
        if self.args.save_strategy != "no":
            self.save_model()
        return output

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save or is_sharded(self.model):
            self.run.save(output_dir, self.model, self.suppression_optimizer)
        if is_sharded(self.model):
            self.accelerator.wait_for_everyone()  # The checkpoint is complete when the main process says so.
        self.adversaries.forget()  # So that nothing of those that live on has to be in a checkpoint.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.run.restore(checkpoint, self.model, self.suppression_optimizer, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if hasattr(self.model, "save_pretrained") and not is_sharded(self.model):
            load_weights(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save what may be published, and no pickle beside it."""
        if not self.args.should_save:
            return
        model = with_state(self._skeleton, state_dict or {}) if is_sharded(self.model) else self.model
        saved, folder = (model, self.task, self.processing_class), Path(output_dir or self.args.output_dir)
        state = (self.state.global_step, self.is_in_train, is_sharded(self.model))
        save_protected(folder, *saved, lambda place: self.run.claim(model, place, *state), self.repository_name)

    # ---- Publishing ----

    @property
    def repository_name(self) -> str:
        """What the card says to load: the repository, where it is known already."""
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def init_hf_repo(self, token: None = None, private: bool | None = None) -> None:
        """Make the repository that `push_to_hub=True` pushes to; raises as `create_repository` does."""
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = create_repository(self.repository_name, private)

    def create_model_card(self, model_name: str | None = None) -> None:
        """Bring README.md in `output_dir` up to date with what is saved there, unless it was edited."""
        if self.is_world_process_zero():
            update_card(self.args.output_dir, Claim.read(self.args.output_dir), model_name or self.repository_name)

    def push_to_hub(self, repo_id: str | None = None, **options: Any) -> CommitInfo | None:
        """Save the model to `output_dir`, and publish what is needed to load and to audit it, in one commit.

        A trainer that has not trained publishes what is saved in `output_dir` already, after an attack on it, say.

        Args:
            repo_id: `user/name`; `hub_model_id`, or the name of `output_dir` in the own account, where left out.
            options: As `sophon_hf.publish` takes them, such as `report`; `private` and `revision` come from `args`
                where left out. It raises as that does.

        Returns:
            The commit, on the main process.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.state.global_step > 0 or not Path(self.args.output_dir, FILE_NAME).exists():
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        options = {"private": self.args.hub_private_repo, "revision": self.args.hub_revision, **options}
        return publish(self.args.output_dir, repo_id or self.repository_name, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish a checkpoint's model, without its states."""
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            publish_checkpoint(checkpoint_folder, self.repository_name, self.state.global_step, self.args.hub_revision)
