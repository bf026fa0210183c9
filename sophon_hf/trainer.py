"""`SophonTrainer`: Algorithm 1 as a Hugging Face Trainer. One step of the Trainer is one iteration."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sophon_hf.callbacks import EvaluateLastStep, KeepNorms, ProtectionProgress
from sophon_hf.checkpoints import (
    check_fresh_folder,
    check_same_run,
    last_complete_checkpoint,
    load_state,
    run_facts,
    save_state,
)
from sophon_hf.config import SophonConfig
from sophon_hf.data import Domain, Stream, build_domain, derive_seed, load_domain
from sophon_hf.data.domains import Source
from sophon_hf.finetuning import Environment, FineTuningStrategy, PersistentAdversary, sample_environment
from sophon_hf.guard import Guard
from sophon_hf.preflight import build_domains, check_labels, refuse_launcher_settings, try_domain, try_strategies
from sophon_hf.probes import Probes
from sophon_hf.step_log import StepLog
from sophon_hf.suppression import Suppression, average_and_clip
from sophon_hf.tasks import Task, evaluate_model, first_rows, infer_task, load_model, load_task

logger = logging.getLogger(__name__)

PROBE_RATE = 1e-3
PROBE_BATCH = 50


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
        processing_class: Image processor, tokenizer or feature extractor, for raw columns; saved with the model.
        task: What is learned, where it cannot be inferred, or to name the head or the noise scheduler.
        input_columns: {"original": ..., "restricted": ...}: the raw input column, where it is not found by itself.
        label_columns: The same for the label column.
        reinforcement_loss: L_beta, called with (model, batch) and returning a scalar; the task's loss by default.
        callbacks: Further callbacks of the Trainer.

    Raises:
        ValueError: Data that does not fit the model (labels outside the head, wrong image size, NaN, no labels),
            a frozen model, a head that cannot be found, or a strategy space that leaves no strategy.
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
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
            )
        if isinstance(model, (str, os.PathLike)):
            source, model = model, load_model(model)
            task = load_task(source, model) if task is None else task
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
        refuse_launcher_settings(self.accelerator)
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(ProtectionProgress(self.task.metric, visible=not args.disable_tqdm))
        self.add_callback(EvaluateLastStep())
        self.label_names = ["labels"]
        self._choose_strategies()
        self.suppression = Suppression(
            self.model,
            self.task,
            self.anatomy,
            self._suppression_loss(),
            num_classes=self.domains["restricted"].num_classes or None,
            autocast=self.accelerator.autocast,
            probes=self._probes(),
            second_order=args.second_order,
        )
        self.unprotected = copy.deepcopy(self.model).eval().requires_grad_(False) if args.distillation else None
        if args.keep_norms:
            sample = first_rows(self.task, self.domains["original"], args.device)
            self.add_callback(KeepNorms(self.model, lambda: self.task.predict(self.model, sample)))
        self.guard = Guard(self.model, args.tolerance, self.task.greater_is_better)
        self.suppression_optimizer: torch.optim.Optimizer | None = None
        self.suppression_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
        self.step_log = StepLog(self.task)
        self._micro_step = 0
        self._resumed_at: int | None = None

    # ---- Before any work: does everything fit? ----

    def _choose_strategies(self) -> None:
        """Run every domain once, find the head, check labels against it, and settle on Phi."""
        predictions = {name: try_domain(self.task, self.model, name, d) for name, d in self.domains.items()}
        self.anatomy = self.task.anatomy(self.model, first_rows(self.task, self.domains["original"], self.args.device))
        self.space = self.args.space
        outputs = None
        if self.domains["original"].labels is not None:
            outputs = predictions["original"].shape[1]
            check_labels(self.domains, outputs, self.model)
        elif self.args.strategy_space is None:
            # "The usual practice for fine-tuning generative models is to directly fine-tune the whole model" (table 2).
            self.space = replace(self.space, initializations=("direct",))
        self._direct_fits = outputs is None or self.domains["restricted"].num_classes <= outputs
        if not self._direct_fits and "direct" in self.space.initializations:
            classes = self.domains["restricted"].num_classes
            if "new_head" not in self.space.initializations:
                raise ValueError(
                    f"The restricted domain has {classes} classes and the model's head {outputs} outputs, so a direct "
                    "strategy has no output for some labels. Add initialization 'new_head' to the strategy space, or "
                    "select at most as many classes (`select_classes`)."
                )
            logger.warning(
                "The restricted domain has %d classes and the model's head %d outputs: direct strategies are left out, "
                "every simulated adversary brings a new head.", classes, outputs,
            )  # fmt: skip
            self.space = self.space.without_original_head()
        classes = self.domains["restricted"].num_classes or None
        try_strategies(self.task, self.model, self.anatomy, self.space, classes)

    def _suppression_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        losses = self.task.suppression_losses
        name = self.args.suppression_loss or next(iter(losses))
        if name not in losses:
            raise ValueError(f"suppression_loss {name!r} does not fit the task: choose one of {', '.join(losses)}.")
        return losses[name]

    def _probes(self) -> Probes | None:
        if not self.args.probes:
            return None
        classes = self.domains["restricted"].num_classes
        if self.domains["restricted"].labels is None:
            raise ValueError("A probe predicts labels, and this task has none: leave `probes` 0.")
        return Probes(self.model, self.anatomy, self.args.probes, classes, self._suppression_loss())

    # ---- The two loops of Algorithm 1 ----

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        """One iteration: all suppression loops, then the reinforcement loops; the Trainer applies the last of these."""
        if self._micro_step == 0:
            for loop in range(self.args.l_FTS):
                self._suppression_loop(loop)
            for loop in range(self.args.l_NTR - 1):
                self._reinforcement_loop(model, loop)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_log.add_reinforcement(loss, first_micro_batch=self._micro_step == 0)
        self._micro_step = (self._micro_step + 1) % self.args.gradient_accumulation_steps
        return loss

    def _suppression_loop(self, loop: int) -> None:
        """Lines 4 to 15: simulate N adversaries, update theta with Adam(alpha)."""
        args, step = self.args, self.state.global_step
        adversaries = [self._adversary(loop, number) for number in range(args.N)]
        result = self.suppression(adversaries, args.step_weights)
        norm, result.loss = average_and_clip(result.gradient, result.loss, self.accelerator, args.max_grad_norm)
        if torch.isfinite(norm):
            for name, parameter in self.model.named_parameters():
                parameter.grad = result.gradient.get(name)
            self.suppression_optimizer.step()
            self.suppression_optimizer.zero_grad()
        else:
            self.guard.state.dropped += 1
            logger.warning("Iteration %d: the suppression gradient is not finite and is dropped.", step)
        self.suppression_scheduler.step()
        self.step_log.add_suppression(result, norm)

    def _adversary(self, loop: int, number: int) -> Environment | PersistentAdversary:
        """One that starts anew, or the next one of those that live on, replaced where its horizon is reached."""
        args, step = self.args, self.state.global_step
        # Adversaries are numbered over all processes, so 2 processes with N simulate what 1 with 2 N does.
        seed = derive_seed(args.seed, "adversary", step, loop, args.process_index * args.N + number)
        slot = ((step * args.l_FTS + loop) * args.N + number) % max(args.persistent, 1)
        if args.persistent and slot in self.adversaries and not self.adversaries[slot].finished:
            return self.adversaries[slot]
        strategy = self.space.sample(derive_seed(seed, "strategy"))
        environment = sample_environment(self.domains["restricted"], self.task, strategy, seed)
        if not args.persistent:
            return environment
        # The first ones live shorter, so that young and old are always mixed.
        share = 1 if slot in self.adversaries else (slot + 1) / args.persistent
        self.adversaries[slot] = PersistentAdversary(environment, max(args.K, round(share * args.horizon)))
        return self.adversaries[slot]

    def _reinforcement_loop(self, model: nn.Module, loop: int) -> None:
        """Lines 17 to 21, for all loops but the last, which the Trainer itself closes."""
        args = self.args
        losses = []
        for micro_step in range(args.gradient_accumulation_steps):
            batch = self._reinforcement_batch(self.state.global_step, loop, micro_step)
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch))
        # The Trainer's first micro-batch may run without gradient averaging, so average by hand as for suppression.
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        average_and_clip(gradients, torch.stack(losses).sum(), self.accelerator, args.max_grad_norm)
        # The optimizer that accelerate wraps, since accelerate's own would wait for the Trainer's last micro-batch.
        getattr(self.optimizer, "optimizer", self.optimizer).step()
        model.zero_grad()

    def _reinforcement_batch(self, step: int, loop: int, micro_step: int) -> dict[str, Tensor]:
        args = self.args
        position = (step * args.l_NTR + loop) * args.gradient_accumulation_steps + micro_step
        size = args.per_device_train_batch_size
        return self._original_stream.batch((position * args.world_size + args.process_index) * size, size)

    @property
    def _original_stream(self) -> Stream:
        return Stream(self.domains["original"], self.task, derive_seed(self.args.seed, "original"))

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """mu * L_beta (eq. 6), the mean over the batch."""
        if self.reinforcement_loss is not None:
            loss, prediction = self.reinforcement_loss(model, inputs), None
        else:
            prediction = self.task.predict(model, inputs)
            loss = self.task.loss(prediction, self.task.target(inputs))
            if self.unprotected is not None:
                with torch.no_grad():
                    unprotected = self.task.predict(self.unprotected, inputs)
                loss = loss + self.args.distillation * self.task.distance(prediction, unprotected)
        loss = self.args.mu * loss
        return (loss, {"prediction": prediction}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """Batches of O for the last reinforcement loop of each iteration: a function of seed, step and rank."""
        return DataLoader(
            _LastLoopBatches(self),
            batch_size=1,
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Two Adams over one model: beta's is the Trainer's own, alpha's stands beside it."""
        optimizer = super().create_optimizer(model)
        if self.suppression_optimizer is None:
            self.suppression_optimizer = torch.optim.Adam(
                [p for p in self.model.parameters() if p.requires_grad],
                lr=self.args.alpha,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """One schedule for both rates."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.suppression_scheduler is None:
            loops = max(self.args.l_FTS, 1)
            self.suppression_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                self.suppression_optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps) * loops,
                num_training_steps=num_training_steps * loops,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
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
            adversaries (Adam 1e-3, K steps, own head and new head) reach.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(chosen, dict):
            raise ValueError(
                f"eval_dataset is a {type(chosen).__name__}: give a dict of name and data set, such as "
                "{'original': ..., 'restricted': ...}."
            )
        self._share_buffers()
        metrics: dict[str, float] = {}
        for name, source in chosen.items():
            domain = source if isinstance(source, Domain) else self._build_domain(source, name)
            result = evaluate_model(
                self.task,
                self.model,
                domain,
                self.args.per_device_eval_batch_size,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                autocast=self.accelerator.autocast,
                with_loss=self._labels_fit(domain),
            )
            metrics[f"{metric_key_prefix}_{name}_{self.task.metric}"] = result.metric
            metrics[f"{metric_key_prefix}_{name}_loss"] = result.loss
        if self.is_in_train and eval_dataset is None:
            simulated = self._probe()
            metrics[f"{metric_key_prefix}_restricted_simulated_{self.task.metric}"] = simulated
            # A resumed run measures its start again, which the guard saw before the checkpoint or not at all.
            if self.state.global_step != self._resumed_at:
                self._guard(metrics[f"{metric_key_prefix}_original_{self.task.metric}"], simulated)
            metrics["rollbacks"] = float(self.guard.state.rollbacks)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _labels_fit(self, domain: Domain) -> bool:
        return domain.labels is None or self._direct_fits or domain.num_classes <= self.domains["original"].num_classes

    def _share_buffers(self) -> None:
        """DDP sends batch-norm statistics along only before a forward pass: all processes must measure one model."""
        if self.args.world_size > 1:
            for buffer in self.model.buffers():
                broadcast(buffer)

    def _build_domain(self, source: Source, name: str) -> Domain:
        known = self.domains[name if name in self.domains else "restricted"]
        dataset, column = load_domain(source, "test"), self.input_columns.get(name)
        return build_domain(
            dataset, self.task.inputs(self.model), self.processing_class, name=name,
            label=known.preparation.label_column, input_column=column if column in dataset.column_names else None,
        )  # fmt: skip

    def _probe(self) -> float:
        """What fixed adversaries, trained on the restricted domain, reach on held-out data: states compare by it."""
        scores: dict[str, list] = {}
        for number, start in enumerate(self.space.initializations):
            strategy = FineTuningStrategy(initialization=start, learning_rate=PROBE_RATE, batch_size=PROBE_BATCH)
            seed = derive_seed(self.args.seed, "probe", number)
            environment = sample_environment(self.domains["restricted"], self.task, strategy, seed)
            held_out = Stream(self.domains["eval_restricted"], self.task, seed)
            for name, values in self.suppression.measure(
                replace(environment, evaluation=held_out), self.args.K
            ).items():
                scores.setdefault(name, []).extend(values.tolist())
        # One process decides for all: a kernel that is not deterministic must not make them choose differently.
        return broadcast_object_list([self.task.compute_metric(scores)])[0]

    def _guard(self, original: float, simulated: float) -> None:
        step, start = self.state.global_step, self.guard.state.start
        if self.guard.observe(step, original, simulated):
            return
        self.guard.roll_back()
        self.adversaries.clear()
        for optimizer in (self.optimizer, self.suppression_optimizer):
            getattr(optimizer, "optimizer", optimizer).state.clear()
        choice = self.args.after_rollback
        if choice == "halve_alpha":
            for group in self.suppression_optimizer.param_groups:
                group["lr"] /= 2
            self.suppression_scheduler.base_lrs = [rate / 2 for rate in self.suppression_scheduler.base_lrs]
        if choice == "stop":
            self.control.should_training_stop = True
        logger.warning(
            "Iteration %d: the original %s is %.4f, beyond the tolerance of %g from its start %.4f. The state of iteration "
            "%d is put back; then: %s.", step, self.task.metric, original, self.args.tolerance, start,
            self.guard.state.good_step, choice,
        )  # fmt: skip

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
            ValueError: `output_dir` holds another run, or there is no complete checkpoint to go on from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            check_same_run(os.fspath(resume_from_checkpoint), self._run_facts())
        else:
            check_fresh_folder(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        self._micro_step, self.step_log, self._resumed_at = 0, StepLog(self.task), None
        self.adversaries: dict[int, PersistentAdversary] = {}
        self.suppression_optimizer = self.suppression_scheduler = None
        self.guard = Guard(self.model, self.args.tolerance, self.task.greater_is_better)
        output = super().train(resume_from_checkpoint or None, **kwargs)
        self._finish()
        return output

    def _finish(self) -> None:
        state, metric = self.guard.state, self.task.metric
        if self.guard.restore_best():
            logger.info(
                "The protected model is the state of iteration %d: original %s %.4f (start %.4f).",
                state.best_step, metric, state.best_original, state.start,
            )  # fmt: skip
        elif state.start is None:
            logger.warning(
                "eval_strategy is 'no', so the guard has seen nothing: whether the model still works in the original "
                "domain, and is protected, has not been measured. It is the state of the last iteration."
            )
        else:
            self.guard.restore_good()
            logger.warning(
                "No state that was evaluated kept the original %s within the tolerance of %g: the model is put back to "
                "iteration %d and is NOT protected. Lower alpha, raise beta or l_NTR, or allow more tolerance.",
                metric, self.args.tolerance, state.good_step,
            )  # fmt: skip
        if self.args.save_strategy != "no":
            self.save_model()

    def _run_facts(self) -> dict[str, Any]:
        loss = getattr(self.reinforcement_loss, "__qualname__", None)
        precision = self.accelerator.mixed_precision
        return run_facts(
            self.args, self.task, self.model, self.domains, mixed_precision=precision, reinforcement_loss=loss
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            schedule = {k: v for k, v in self.suppression_scheduler.state_dict().items() if k != "lr_lambdas"}
            state = {"optimizer": self.suppression_optimizer.state_dict(), "scheduler": schedule}
            save_state(output_dir, {**state, "facts": self._run_facts(), "guard": self.guard.state_dict()})
        self.adversaries.clear()  # They start anew after a checkpoint, so that nothing of them has to be in it.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_state(checkpoint)
            self.suppression_optimizer.load_state_dict(state["optimizer"])
            self.suppression_scheduler.__dict__.update(state["scheduler"])
            self.guard.load_state_dict(state["guard"])
            self._resumed_at = self.state.global_step

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as the model's own library does, so that its stock `from_pretrained` loads it."""
        output_dir = output_dir or self.args.output_dir
        if hasattr(self.model, "save_pretrained") and not hasattr(self.model, "main_input_name"):
            if self.args.should_save:
                self.model.save_pretrained(output_dir)
                self._save_processing_class(output_dir)
        elif hasattr(self.model, "save_pretrained"):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            from safetensors.torch import save_model

            os.makedirs(output_dir, exist_ok=True)
            save_model(self.model, os.path.join(output_dir, "model.safetensors"))
            self._save_processing_class(output_dir)

    def _save_processing_class(self, output_dir: str) -> None:
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        path = os.path.join(resume_from_checkpoint, "diffusion_pytorch_model.safetensors")
        if os.path.exists(path):
            from safetensors.torch import load_model as load_weights

            load_weights(model, path)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _LastLoopBatches(torch.utils.data.Dataset):
    """Item i is the i-th micro-batch that the Trainer itself takes a step with."""

    def __init__(self, trainer: SophonTrainer):
        self.batch = trainer._reinforcement_batch
        self.args = trainer.args

    def __len__(self) -> int:
        return self.args.max_steps * self.args.gradient_accumulation_steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, micro_step = divmod(index, self.args.gradient_accumulation_steps)
        return self.batch(step, self.args.l_NTR - 1, micro_step)
