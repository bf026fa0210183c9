"""Fine-tuning strategies phi = initialization x transfer x optimization (section 2.2), and the space Phi of them.

A strategy is data: the defender samples strategies while protecting, an attack suite lists them, and one engine
(`sophon_hf.finetuning.loop`) runs them for both.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sophon_hf.utils import check_choice, hint

_INITIALIZATIONS = ("direct", "new_head", "scratch")
_TRANSFERS = ("all", "head", "features", "norm", "pattern", "kernel")
_OPTIMIZERS = ("sgd", "momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw")
NO_ORIGINAL_DATA = "the attack needs data of the original domain, and none was given"
SCHEDULES = ("constant", "linear", "cosine")
ADAPTERS = ("lora", "rslora", "dora", "adalora", "ia3", "loha", "lokr", "oft")
USUAL_EPOCHS = 20.0
# The highest value of each field that is a number from 0 on.
_NUMBERS = {
    **{"weight_decay": math.inf, "warmup_ratio": 1, "max_grad_norm": math.inf},
    **{"original_weight": math.inf, "head_first": 1, "ema": 1},
}
PREPARATIONS = ("batch_norm", "rescale", "shrink_and_perturb", "warm_up", "distill")
_AUGMENTATIONS = ("flips_and_crops",)
# What a defender simulates, too. Statistics are those of the adversary's batches in every simulation, and kept norms
# leave nothing to re-scale, so batch_norm and rescale would change nothing; a distillation is far longer than a
# simulation.
SIMULATED_PREPARATIONS = (None, "shrink_and_perturb", "warm_up")


class NotApplicableError(ValueError):
    """A strategy that cannot be carried out on a model at all, which says nothing about the model's resistance."""


def _as_number(value: Any, name: str) -> float:
    # YAML reads 1e-3 as text.
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, but must be a number.") from error


def _check_fields(cls: type, values: dict[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            choices = f" It has {', '.join(known)}."
            raise ValueError(f"{cls.__name__} has no field {name!r}.{hint(name, known, choices)}")


@dataclass(frozen=True)
class FineTuningStrategy:
    """One way to fine-tune a model.

    Attributes:
        initialization: "direct" starts from the whole pre-trained model, "new_head" re-initialises its final layer
            (the paper's initFC), "scratch" all of it.
        reinitialized_blocks: With "new_head": how many of the last blocks are re-initialised too.
        transfer: What is updated: "all" parameters, the "head" only (the paper's FC), all but the head ("features"),
            the normalisation layers ("norm") or those whose name `pattern` finds ("pattern"). A new head is always
            updated. With "kernel" the new head is a kernel regression on the features of all depths, solved without a
            step.
        pattern: Regular expression searched in parameter names, with transfer "pattern"; with an adapter, in the names
            of the layers that get one.
        adapter: Update an adapter of the peft library (lora, rslora, dora, adalora, ia3, loha, lokr, oft) beside the
            frozen layers in place of `transfer`; a new head trains beside it. For attacks only.
        rank: Rank of the adapter (block size of oft).
        preparation: What an informed adversary does to the model first: "batch_norm" (re-estimate its statistics),
            "rescale" (put normalised layers back to the norm of an initialisation), "shrink_and_perturb",
            "warm_up" (train on original data), "distill" (teach a newly initialised model, on original data, to
            predict what the given one does, and go on with it). For attacks only, but for "warm_up", which can be
            simulated too.
        optimizer: One of torch.optim's: sgd, momentum (0.9), nesterov (0.9), adagrad, adadelta, adam, adamw.
        learning_rate: Its rate.
        weight_decay: Its weight decay.
        schedule: "constant", "linear" or "cosine" decay to zero over all steps.
        warmup_ratio: Share of all steps during which the rate rises from zero.
        max_grad_norm: Gradients are clipped to this norm; 0 for never.
        batch_size: Examples a step.
        epochs: Length of an attack; not used where `steps` is set. A defender's simulation has K steps instead.
        steps: Length of an attack in optimizer steps.
        original_weight: lambda of L_R + lambda L_O: every step also learns a batch of the original domain, through the
            model's own head. For attacks only, as are the following.
        head_first: Share of all steps in which only the head (and what else is new) is updated, before all is: linear
            probing, then fine-tuning (Kumar et al., 2022).
        layer_decay: What the rate is multiplied by at each block from the head down.
        augmentation: "flips_and_crops" mirrors half of the images, and moves all by up to an eighth of their side.
        labelled: Whether the adversary knows its examples' labels. One who does not adapts the model's features to
            them by information maximization, as SHOT does (Liang et al., 2020), and keeps its head.
        ema: Decay of an exponential moving average of the weights, which is what the attack ends with; 0 for none.
    """

    initialization: str = "direct"
    reinitialized_blocks: int = 0
    transfer: str = "all"
    pattern: str | None = None
    adapter: str | None = None
    rank: int = 8
    preparation: str | None = None
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_ratio: float = 0.0
    max_grad_norm: float = 0.0
    batch_size: int = 50
    epochs: float = USUAL_EPOCHS
    steps: int | None = None
    original_weight: float = 0.0
    head_first: float = 0.0
    layer_decay: float = 1.0
    augmentation: str | None = None
    labelled: bool = True
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in (*_NUMBERS, "learning_rate", "layer_decay", "epochs"):
            object.__setattr__(self, name, _as_number(getattr(self, name), name))
        check_choice(self.initialization, _INITIALIZATIONS, "initialization")
        check_choice(self.transfer, _TRANSFERS, "transfer")
        check_choice(self.optimizer, _OPTIMIZERS, "optimizer")
        check_choice(self.schedule, SCHEDULES, "schedule")
        if self.adapter is not None:
            check_choice(self.adapter, ADAPTERS, "adapter")
            if self.transfer != "all" or self.initialization == "scratch":
                raise ValueError("An adapter takes the place of `transfer`, on a pre-trained model: leave 'all'.")
        if self.preparation is not None:
            check_choice(self.preparation, PREPARATIONS, "preparation")
        if self.transfer == "kernel" and (self.initialization == "direct" or self.reinitialized_blocks):
            raise ValueError(
                "transfer 'kernel' is a new head on a model as it is, or on one that was never trained: set "
                "initialization 'new_head' or 'scratch', and reinitialized_blocks 0."
            )
        if self.augmentation is not None:
            check_choice(self.augmentation, _AUGMENTATIONS, "augmentation")
        if not self.labelled and (self.initialization != "direct" or self.transfer in ("head", "kernel")):
            raise ValueError("Without labels no head can be trained: set initialization 'direct' and another transfer.")
        if (self.head_first or self.layer_decay != 1) and (self.transfer != "all" or self.adapter is not None):
            raise ValueError("head_first and layer_decay go with transfer 'all' and no adapter.")
        if self.adapter is None and (self.transfer == "pattern") != (self.pattern is not None):
            raise ValueError("The field `pattern` goes with transfer 'pattern' or an adapter: set both or neither.")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}.") from error
        for name, least in (("reinitialized_blocks", 0), ("batch_size", 1), ("rank", 1), ("steps", 1)):
            value = getattr(self, name)
            if (name, value) != ("steps", None) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is {value!r}, but must be a whole number of at least {least}.")
        for name, highest in _NUMBERS.items():
            value = getattr(self, name)
            if not 0 <= value <= highest or value == math.inf:
                raise ValueError(f"{name} is {value}, but must be finite and lie between 0 and {highest}.")
        if self.reinitialized_blocks and self.initialization != "new_head":
            raise ValueError(f"reinitialized_blocks = {self.reinitialized_blocks} goes with initialization 'new_head'.")
        for name in ("learning_rate", "layer_decay", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive.")

    @property
    def needs_original_head(self) -> bool:
        """Return whether the model's own head makes the predictions, so that labels must fit it."""
        return self.initialization == "direct"

    @property
    def needs_original_data(self) -> bool:
        """Return whether the adversary learns from data of the original domain, too."""
        return self.preparation in ("warm_up", "distill") or self.original_weight > 0

    @property
    def warm_up(self) -> FineTuningStrategy:
        """Return how a preparation trains on original data: the whole model, same optimizer and rate."""
        return FineTuningStrategy(optimizer=self.optimizer, learning_rate=self.learning_rate)

    @property
    def name(self) -> str:
        """Return a short, readable name: "new head + 1 block, all, adam 0.001"."""
        start = self.initialization.replace("_", " ")
        if self.reinitialized_blocks:
            start += f" + {self.reinitialized_blocks} block" + "s" * (self.reinitialized_blocks > 1)
        if self.preparation:
            start = f"{self.preparation.replace('_', ' ')}, then {start}"
        if self.transfer == "kernel":
            return f"{start}, kernel regression"
        part = f"pattern {self.pattern}" if self.transfer == "pattern" else self.transfer
        if self.adapter:
            part = self.adapter + ("" if self.adapter == "ia3" else f" {self.rank}")
            part += f" on {self.pattern}" if self.pattern else ""
        extras = "".join(
            f", {text}"
            for present, text in (
                (self.weight_decay, f"decay {self.weight_decay:g}"),
                (self.schedule != "constant", self.schedule),
                (self.warmup_ratio, f"warm-up {self.warmup_ratio:g}"),
                (self.max_grad_norm, f"clip {self.max_grad_norm:g}"),
                (self.original_weight, f"original data {self.original_weight:g}"),
                (self.head_first, f"head first {self.head_first:g}"),
                (self.layer_decay != 1, f"layer decay {self.layer_decay:g}"),
                (not self.labelled, "no labels"),
                (self.augmentation, (self.augmentation or "").replace("_", " ")),
                (self.ema, f"ema {self.ema:g}"),
                (self.steps is None and self.epochs != USUAL_EPOCHS, f"{self.epochs:g} epochs"),
            )
            if present
        )
        return f"{start}, {part}, {self.optimizer} {self.learning_rate:g}{extras}, batch {self.batch_size}"

    def total_steps(self, examples: int) -> int:
        """Return the optimizer steps of an attack on a data set of `examples`."""
        if self.transfer == "kernel":
            return 0
        return self.steps if self.steps is not None else self.step_of_epoch(self.epochs, examples)

    def step_of_epoch(self, epoch: float, examples: int) -> int:
        """Return the step at which `epoch` passes over `examples` are complete; batches run on across their borders."""
        # Rounded first, since 1.1 epochs of 10 steps are 11.000000000000002 steps in floating point.
        return math.ceil(round(epoch * examples / min(self.batch_size, examples), 9))

    def epoch_of_step(self, step: int, examples: int) -> float:
        """Return how many passes over `examples` a step completes: the inverse of `step_of_epoch`."""
        return step * (min(self.batch_size, examples) / examples)

    def with_changes(self, **changes: Any) -> FineTuningStrategy:
        """Return a copy with some fields changed."""
        _check_fields(type(self), changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FineTuningStrategy:
        """Return the strategy that `to_dict` wrote.

        Raises:
            ValueError: An unknown field (the closest one is named) or a value out of range.
        """
        _check_fields(cls, values)
        return cls(**values)


@dataclass(frozen=True)
class StrategySpace:
    """Phi: each field lists what is drawn from, uniformly and independently; the default is the paper's (5.1.1).

    What is listed twice is drawn twice as often.

    Attributes:
        initializations: Of "direct" and "new_head"; nothing of theta is left in "scratch", so it cannot be simulated.
        reinitialized_blocks: Drawn for new heads only.
        transfers: Of "all", "head", "norm".
        optimizers: Names as in `FineTuningStrategy`.
        learning_rates: Rates.
        batch_sizes: Examples a step, of R_i and of T_i.
        weight_decays: Weight decays.
        schedules: Over an adversary's updates: K, or the horizon of one that lives on, from a warm-up's end on.
        preparations: Of None, "shrink_and_perturb", and "warm_up", with which an adversary makes the first half of its
            updates on original data.
        examples: How many examples an adversary has, stratified; None for all of the defender's.
    """

    initializations: tuple[str, ...] = ("direct", "new_head")
    reinitialized_blocks: tuple[int, ...] = (0,)
    transfers: tuple[str, ...] = ("all",)
    optimizers: tuple[str, ...] = ("adam",)
    learning_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    batch_sizes: tuple[int, ...] = (50, 100, 150, 200, 250)
    weight_decays: tuple[float, ...] = (0.0,)
    schedules: tuple[str, ...] = ("constant",)
    preparations: tuple[str | None, ...] = (None,)
    examples: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None or isinstance(values, (str, int, float)) or not len(values):
                raise ValueError(f"{field.name} is {values!r}: give a non-empty list to draw from.")
            numeric = field.name in ("learning_rates", "weight_decays")
            values = tuple(_as_number(v, field.name) for v in values) if numeric else tuple(values)
            object.__setattr__(self, field.name, values)
        if "scratch" in self.initializations:
            raise ValueError("A strategy space cannot hold 'scratch': nothing of the protected model is left in it.")
        if "pattern" in self.transfers:
            raise ValueError("A strategy space cannot draw transfer 'pattern', which needs a pattern of its own.")
        for preparation in self.preparations:
            if preparation not in SIMULATED_PREPARATIONS:
                raise ValueError(
                    f"preparations has {preparation!r}, but only 'shrink_and_perturb' and 'warm_up' (or null, for "
                    "none) can be simulated."
                )
        rates_and_sizes = ("learning_rates", "batch_sizes", "weight_decays")
        for name in ("initializations", "transfers", "optimizers", *rates_and_sizes, "schedules"):
            for value in getattr(self, name):
                FineTuningStrategy(**{name.removesuffix("s"): value})
        for count in self.examples:
            if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
                raise ValueError(f"examples has {count!r}, but must hold whole numbers of at least 1, or null for all.")
        for blocks in self.reinitialized_blocks:
            FineTuningStrategy(initialization="new_head", reinitialized_blocks=blocks)

    def sample(self, seed: int) -> FineTuningStrategy:
        """Draw one strategy; the same seed gives the same one."""
        draw = random.Random(seed).choice
        initialization = draw(self.initializations)
        blocks = draw(self.reinitialized_blocks)
        return FineTuningStrategy(
            initialization=initialization,
            reinitialized_blocks=blocks if initialization == "new_head" else 0,
            transfer=draw(self.transfers),
            optimizer=draw(self.optimizers),
            learning_rate=draw(self.learning_rates),
            batch_size=draw(self.batch_sizes),
            weight_decay=draw(self.weight_decays),
            schedule=draw(self.schedules),
            preparation=draw(self.preparations),
        )

    def sample_examples(self, seed: int) -> int | None:
        """Draw how many examples an adversary has; None is all."""
        return random.Random(seed).choice(self.examples)

    def without_original_head(self) -> StrategySpace:
        """Return the strategies that bring their own head, for labels that the model's head has no outputs for.

        Raises:
            ValueError: There are none.
        """
        kept = tuple(i for i in self.initializations if i != "direct")
        if not kept:
            raise ValueError("Every strategy of the space is 'direct': add initialization 'new_head'.")
        return replace(self, initializations=kept)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any] | str) -> StrategySpace:
        """Return the space that `to_dict` wrote; a string is read as JSON.

        Raises:
            ValueError: An unknown field (the closest one is named), or values out of range.
        """
        read: dict[str, Any] = json.loads(values) if isinstance(values, str) else values
        _check_fields(cls, read)
        return cls(**read)
