"""Where the time of a whole protection goes, from building the trainer to the saved model.

    python benchmarks/profile_protect.py --preset paper --max_steps 20

Timers stand around public functions; time inside one belongs to the innermost, and all of an evaluation (its simulated
adversaries too) to the second column. For CPUs: on a GPU the calls return before the work is done. Random data and a
model that was not pre-trained, since only time counts. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from loops import CASES, make
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sophon_hf import SophonConfig, SophonTrainer
from sophon_hf.data.batches import Stream
from sophon_hf.data.domain import Domain
from sophon_hf.finetuning.initialization import Stored
from sophon_hf.protection.probes import Probes
from sophon_hf.protection.simulation import SimulatedAdversary
from sophon_hf.tasks.classification import ClassificationTask
from sophon_hf.tasks.diffusion import DiffusionTask

PASSES = "forward and backward"


class Clock:
    """Charges time to the innermost section that is open."""

    def __init__(self):
        self.open, self.last = ["the rest"], time.perf_counter()
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)

    def enter(self, section: str) -> None:
        """Open a section inside the one that is open now."""
        self._charge()
        self.open.append(section)

    def leave(self) -> None:
        """Close it."""
        self._charge()
        self.open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        when = "evaluating" if "evaluation" in self.open else "protecting"
        self.seconds[self.open[-1], when] += now - self.last
        self.last = now

    def around(self, section: str, function: Callable) -> Callable:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            self.enter(section)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed

    def watch(self, section: str, owner: object, *names: str) -> None:
        """Time functions of a class or module wherever they are called."""
        for name in names:
            setattr(owner, name, self.around(section, getattr(owner, name)))


def watch_everything(clock: Clock) -> None:
    """Timers around what a protection is made of."""
    for task in (ClassificationTask, DiffusionTask):
        clock.watch(PASSES, task, "predict", "loss", "distance")
        task.suppression_losses = {name: clock.around(PASSES, loss) for name, loss in task.suppression_losses.items()}
        clock.watch("scores and metric", task, "scores", "compute_metric")
    clock.watch(PASSES, Probes, "loss")
    clock.watch(PASSES, torch.autograd, "grad")
    clock.watch(PASSES, torch.Tensor, "backward")
    clock.watch("data", Stream, "batch")
    clock.watch("storing and putting back", Stored, "__init__", "restore")
    clock.watch("storing and putting back", SimulatedAdversary, "suspend", "resume")
    clock.watch("evaluation", SophonTrainer, "evaluate")
    clock.watch("logging", SophonTrainer, "log")
    clock.watch("saving", SophonTrainer, "save_model", "_save_checkpoint")
    clock.watch("preparation", SophonTrainer, "__init__")
    register_optimizer_step_pre_hook(lambda *_: clock.enter("optimizer"))
    register_optimizer_step_post_hook(lambda *_: clock.leave())


def protect(model: torch.nn.Module, restricted: Domain, original: Domain, settings: dict) -> None:
    """A protection as a user would run it: guard, evaluations, logs and a saved model."""
    with tempfile.TemporaryDirectory() as folder:
        config = SophonConfig.preset(**settings, output_dir=folder, report_to="none", disable_tqdm=True, use_cpu=True)
        SophonTrainer(model, restricted.dataset, original.dataset, config).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="resnet-small")
    parser.add_argument("--preset", choices=("paper", "representation"), default="paper")
    parser.add_argument("--examples", type=int, default=2000, help="Of each domain.")
    parser.add_argument("--max_steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    (model, restricted), (_, original) = (make(options.model, seed, options.examples) for seed in (0, 1))
    settings = {"name": options.preset, "max_steps": options.max_steps}
    clock = Clock()
    watch_everything(clock)
    protect(model, restricted, original, settings)
    clock.leave()
    total = sum(clock.seconds.values())
    sections = {section for section, _ in clock.seconds}
    shares = {
        section: {when: clock.seconds[section, when] / total for when in ("protecting", "evaluating")}
        for section in sorted(sections, key=lambda s: -sum(clock.seconds[s, w] for w in ("protecting", "evaluating")))
    }
    print(f"{options.model}, {options.preset}, {options.max_steps} iterations: {total:.1f} s")
    print(f"{'share of it':28}{'protecting':>12}{'evaluating':>12}{'together':>12}")
    for section, share in shares.items():
        print(f"{section:28}{share['protecting']:12.1%}{share['evaluating']:12.1%}{sum(share.values()):12.1%}")
    evaluation = sum(share["evaluating"] for share in shares.values())
    rounded = {section: {w: round(v, 4) for w, v in share.items()} for section, share in shares.items()}
    result = {
        "model": options.model,
        **settings,
        "examples": options.examples,
        "seconds": round(total, 2),
        "evaluation": round(evaluation, 4),
        "forward_and_backward": round(sum(shares[PASSES].values()), 4),
        "shares": rounded,
        "torch": torch.__version__,
    }
    print(f"{'evaluation':28}{evaluation:12.1%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
