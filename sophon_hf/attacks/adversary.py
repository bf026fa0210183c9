"""An adversary's data: what it learns from and is measured on, and whether models and data may be compared at all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn

from sophon_hf.data.domain import CHUNK, Domain, build_domain
from sophon_hf.data.fingerprint import fingerprint_domain
from sophon_hf.data.labels import Classes, at_most, number_classes, split_domain
from sophon_hf.data.loading import Source, load_domain
from sophon_hf.data.preprocessing import InputColumn, ModelInputs
from sophon_hf.tasks.base import Task
from sophon_hf.tasks.evaluation import first_rows, join_scores, to_device
from sophon_hf.utils import derive_seed, finite_or_none

logger = logging.getLogger(__name__)

_VALIDATION_SHARE = 0.1
# A tenth that is smaller chooses by luck: then all of the adversary's examples choose, by cross-validation.
_FEWEST_HELD_OUT = 30
_FOLDS = 5


@dataclass(frozen=True)
class AdversaryDomains:
    """An adversary's data as tensors.

    Attributes:
        training: What it learns from.
        test: What the result is reported on.
        validation: What attacks are chosen by; the test split is never used for that.
        original: Data of the original domain, for strategies that warm up on it.
        original_test: The original domain's test split.
        folds: In place of `validation`: for each fold what an attack learns from, and what it is then judged on.
    """

    training: Domain
    test: Domain
    validation: Domain | None = None
    original: Domain | None = None
    original_test: Domain | None = None
    folds: tuple[tuple[Domain, Domain], ...] = ()

    @property
    def validation_examples(self) -> int:
        """Return how many examples attacks are chosen by."""
        if self.validation is not None:
            return len(self.validation)
        return sum(len(held_out) for _, held_out in self.folds)

    def given(self) -> dict[str, Domain]:
        """Return the domains that there are, by name."""
        return {name: domain for name, domain in vars(self).items() if isinstance(domain, Domain)}

    def facts(self, task: Task) -> dict[str, Any]:
        """Return what a report says of these data; it takes a while, since every example is read."""
        given = self.given()
        tested = {"restricted": self.test, "original": self.original_test}
        return {
            "training_examples": len(self.training),
            "validation_examples": self.validation_examples,
            "folds": len(self.folds),
            "chance": {name: chance_level(task, domain) for name, domain in tested.items() if domain is not None},
            "data": {name: given[name].fingerprint for name in ("training", "validation", "test") if name in given},
            "fingerprints": {name: asdict(fingerprint_domain(domain)) for name, domain in given.items()},
        }

    def check_disjoint(self) -> None:
        """Raise a ValueError where two splits share an example (before a random transform, where there is one)."""
        given = self.given()
        domains = {name: given[name] for name in ("training", "validation", "test") if name in given}
        raw = any(domain.transformed for domain in domains.values())
        hashes = {name: set(domain.example_hashes(raw)) for name, domain in domains.items()}
        for name, other in combinations(hashes, 2):
            if shared := len(hashes[name] & hashes[other]):
                raise ValueError(
                    f"{shared} of the adversary's {name} examples are in the {other} split too: an attack that has "
                    "seen the answers measures nothing. Remove them, or split with `split_domain`."
                )


@dataclass(frozen=True)
class AdversaryData:
    """What an adversary has and what it is measured on, as an attack suite and an audit are given it.

    Attributes:
        training: The adversary's data of the restricted domain; None in an audit without any.
        test: The restricted domain's test split; None where there is no `training`.
        validation: What attacks are chosen by. Where None, a tenth of `training`; where that would be less than 30
            examples, all of `training`, by cross-validation.
        original: Data of the original domain that it may warm up on.
        original_test: The original domain's test split.
        examples: How many of its training examples the adversary uses, stratified; all where None.
        input_columns: The raw input column by domain ("original", "restricted"), where it is not found by itself.
        label_columns: The same for the label column.
    """

    training: Source | None
    test: Source | None
    validation: Source | None = None
    original: Source | None = None
    original_test: Source | None = None
    examples: int | None = None
    input_columns: Mapping[str, InputColumn] = field(default_factory=dict)
    label_columns: Mapping[str, str | None] = field(default_factory=dict)

    def build(self, needs: ModelInputs, processor: Any | None) -> AdversaryDomains:
        """Load everything.

        Args:
            needs: What the model takes.
            processor: Image processor, tokenizer or feature extractor, for raw columns.

        Raises:
            ValueError: Missing labels, or validation examples that are all among the training examples.
        """
        if self.training is None or self.test is None:
            raise ValueError("An adversary needs training data and a test split of the restricted domain: give both.")
        dataset, test = load_domain(self.training), load_domain(self.test, "test")
        held_out = None if self.validation is None else load_domain(self.validation, "validation")
        parts = [part for part in (dataset, test, held_out) if part is not None]
        classes = number_classes("restricted", parts, needs, self.label_columns.get("restricted"))
        label = None if classes is None else classes.column
        cross = held_out is None and num_folds(len(dataset)) > 0
        carved = held_out is None and not cross
        if carved:
            held_out, dataset = split_domain(dataset, share=_VALIDATION_SHARE, column=label)
        if self.examples is not None and self.examples > len(dataset):
            logger.warning(
                "%d examples were asked for, but the adversary has %d%s: it uses them all.",
                self.examples,
                len(dataset),
                " beside those for validation" if carved else "",
            )
        elif self.examples is not None:
            dataset = at_most(dataset, self.examples, column=label)

        def restricted(part: Source) -> Domain:
            return self.domain(part, "restricted", needs, processor, classes)

        training, tested = restricted(dataset), restricted(test)
        training.refuse_constant()
        _refuse_untaught(training, tested)
        validated = None if held_out is None else restricted(held_out)
        if carved and held_out is not None and validated is not None:
            # Data that hold an example twice would otherwise have it on both sides.
            raw = training.transformed
            seen, hashes = set(training.example_hashes(raw)), validated.example_hashes(raw)
            kept = [i for i, digest in enumerate(hashes) if digest not in seen]
            if not kept:
                raise ValueError("Every validation example is a training example too: give a validation_dataset.")
            if len(kept) < len(hashes):
                validated = restricted(held_out.select(kept))
        rows = _fold_rows(training) if cross else []
        folds = [(restricted(dataset.select(kept)), restricted(dataset.select(out))) for kept, out in rows]
        original = original_test = None
        if self.original is not None:
            original = self.domain(self.original, "original", needs, processor)
        if self.original_test is not None:
            original_test = self.domain(load_domain(self.original_test, "test"), "original", needs, processor)
        return AdversaryDomains(training, tested, validated, original, original_test, tuple(folds))

    def domain(
        self, source: Source, name: str, needs: ModelInputs, processor: Any | None, classes: Classes | None = None
    ) -> Domain:
        """Load one source as the domain "original" or "restricted"; `classes` are those of all its splits."""
        return build_domain(
            load_domain(source),
            needs,
            processor,
            name=name,
            input_column=self.input_columns.get(name),
            label=self.label_columns.get(name),
            classes=classes,
        )


def _refuse_untaught(training: Domain, test: Domain) -> None:
    """Raise a ValueError where nothing that an adversary could learn is tested."""
    learned, asked = training.labels, test.labels
    if learned is None or asked is None or learned.ndim > 1 or training.classes is None:
        return
    if len({*learned.tolist(), *asked.tolist()}) == 1:
        raise ValueError("The restricted domain has one class only: there is nothing to learn, and nothing to measure.")
    if not set(learned.tolist()) & set(asked.tolist()):
        names = [[str(training.classes.names[i]) for i in labels.unique()[:3]] for labels in (learned, asked)]
        raise ValueError(
            f"The adversary's training data and the test split have no class in common: {', '.join(names[0])}, ... and "
            f"{', '.join(names[1])}, .... Give both the same names, or the same numbers, for their classes."
        )


def num_folds(examples: int) -> int:
    """Return in how many folds an adversary's examples choose attacks where nothing else does; 0: a tenth does."""
    return _FOLDS if round(_VALIDATION_SHARE * examples) < _FEWEST_HELD_OUT else 0


def _fold_rows(training: Domain) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the rows of each fold's two parts, stratified by label; copies of an example share their fold."""
    hashes = training.example_hashes(training.transformed)
    _, distinct, copies = np.unique(hashes, return_index=True, return_inverse=True)
    if len(distinct) < 2:
        raise ValueError("The adversary has only one distinct example: give it more, or a validation_dataset.")
    labels = np.zeros(len(distinct))
    if training.labels is not None and training.labels.ndim == 1:
        labels = training.labels.numpy()[distinct]
    shuffled = np.random.default_rng(derive_seed("folds")).random(len(distinct))
    fold = np.empty(len(distinct), dtype=np.int64)
    fold[np.lexsort((shuffled, labels))] = np.arange(len(distinct)) % _FOLDS
    of_row = fold[copies]
    return [
        (np.flatnonzero(of_row != number), np.flatnonzero(of_row == number)) for number in range(min(_FOLDS, len(fold)))
    ]


def shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of the parameters."""
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def check_same_architecture(models: dict[str, nn.Module]) -> None:
    """Raise a ValueError where a model has other parameters than the original one."""
    expected = shapes(models["original"])
    for name, model in models.items():
        different = [(a, b) for a, b in zip(expected, shapes(model), strict=False) if a != b]
        if different or len(expected) != len(shapes(model)):
            where = f": {different[0][0]} against {different[0][1]}" if different else ""
            raise ValueError(
                f"The {name} model differs in architecture or head from the original one{where}. Compare a model with "
                "its own unprotected version."
            )


def head_fits(task: Task, model: nn.Module, domain: Domain) -> bool:
    """Return whether the model's head has an output for every class and label."""
    if domain.labels is None:
        return True
    outputs = task.structure(model, first_rows(task, domain, next(model.parameters()).device)).outputs
    return task.fits(domain.labels, outputs) and domain.num_classes <= (outputs or domain.num_classes)


def chance_level(task: Task, domain: Domain) -> float | None:
    """Return the metric of the best answer that looks at no input; None where it cannot be computed.

    That answer is the commonest class, the commoner side of every label, or a prediction of zeros.
    """
    labels = domain.labels
    try:
        if labels is None:
            batches = (
                task.collate(domain.rows(rows), rows.tolist()) for rows in torch.arange(len(domain)).split(CHUNK)
            )
            scores = [task.scores(torch.zeros_like(task.target(batch)), task.target(batch)) for batch in batches]
        elif labels.ndim == 1:
            answer = torch.zeros(len(domain), int(labels.max()) + 1)
            answer[:, labels.mode().values] = 1
            scores = [task.scores(answer, labels)]
        else:
            scores = [task.scores((labels.float().mean(dim=0) - 0.5).expand(labels.shape), labels)]
        parts = {name: [part[name] for part in scores] for name in scores[0]}
        return finite_or_none(task.compute_metric(join_scores(parts)))
    except Exception as error:  # A metric of the user's may raise anything.
        logger.warning("The metric of a guess cannot be computed: %s: %s", type(error).__name__, error)
        return None


def flops_per_example(task: Task, model: nn.Module, domain: Domain) -> float | None:
    """Return the operations of a forward and backward pass for one example; None where they cannot be counted.

    A count that fails (batch norm refuses a batch of one, say) must not cost the results that it stands beside.
    """
    from torch.utils.flop_counter import FlopCounterMode

    count = min(8, len(domain))
    try:
        model = copy.deepcopy(model).train().requires_grad_(True)
        rows = task.collate(domain.rows(torch.arange(count)), list(range(count)))
        batch = to_device(rows, next(model.parameters()).device)
        with FlopCounterMode(display=False) as counter:
            task.predict(model, batch).float().square().mean().backward()
    except Exception as error:  # A model's own code may raise anything.
        logger.warning("The operations of an example cannot be counted: %s: %s", type(error).__name__, error)
        return None
    return counter.get_total_flops() / count
