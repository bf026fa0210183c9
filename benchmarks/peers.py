"""The same suppression gradient through other libraries: `higher` and TorchOpt.

    pip install -e ".[bench]"
    python benchmarks/peers.py --K 200 --repeats 5

One adversary, SGD, first order, every step evaluated, the same batches from the same streams. Each library twice: as
its documentation has it (a loop that can be differentiated, with detached gradients, and one backward pass through the
sum of all losses), and *streamed*, the leanest way that we found to write it (each step's gradient is taken and added
at once, as we do). All must agree with our gradient, in float64, before anything is timed. Then all run in turn; ratios
are of rounds. Memory is how much a fresh process grows over the bare model. Prints a table and, as its last line, one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import torch
from loops import CASES, Environment, adversary, growth_mib, in_fresh_process, make, ours
from torch import Tensor, nn

from sophon_hf.models.loading import WithTensors
from sophon_hf.tasks.base import infer_task

try:
    import higher
    import torchopt
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed: run `pip install -e ".[bench]"`.')

RATE = 0.01
AGREEMENT = 1e-9


class Work:
    """What is to be done at each of K steps, whichever library does it."""

    def __init__(self, model: nn.Module, environment: Environment, steps: int):
        self.task, self.adversary, self.steps = infer_task(model), environment(steps), steps
        self.suppression_loss = next(iter(self.task.suppression_losses.values()))

    def batches(self) -> Iterator[tuple[dict, dict]]:
        """K batches of R_i and of T_i."""
        size = self.adversary.strategy.batch_size
        batches = self.adversary.R.batches(size)
        for step in range(self.steps):
            yield next(batches), self.adversary.T.distinct_batch(step, size)

    def fine_tuning_loss(self, module: nn.Module, call: Callable, batch: dict) -> Tensor:
        """What the adversary minimises."""
        module.train()
        return self.task.loss(self.task.predict(call, batch), self.task.target(batch))

    def evaluation_loss(self, module: nn.Module, call: Callable, batch: dict) -> Tensor:
        """Its share of L_FTS; batch norm takes the statistics of the batch."""
        module.eval()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.training = True
        return self.suppression_loss(self.task.predict(call, batch), self.task.target(batch)) / self.steps


def with_higher(model: nn.Module, environment: Environment, steps: int) -> list[Tensor]:
    """`higher.innerloop_ctx`, first order by detaching the gradients."""
    work, total = Work(model, environment, steps), 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, inner):
        for train, held_out in work.batches():
            loss = work.fine_tuning_loss(fast, fast, train)
            inner.step(loss, grad_callback=lambda gradients: [g.detach() for g in gradients])
            total = total + work.evaluation_loss(fast, fast, held_out)
        return list(torch.autograd.grad(total, list(model.parameters())))


def with_higher_streamed(model: nn.Module, environment: Environment, steps: int) -> list[Tensor]:
    """The same context without tracking: the fast weights are new leaves after every step."""
    work, sums = Work(model, environment, steps), [torch.zeros_like(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fast, inner):
        for train, held_out in work.batches():
            inner.step(work.fine_tuning_loss(fast, fast, train))
            loss = work.evaluation_loss(fast, fast, held_out)
            torch._foreach_add_(sums, torch.autograd.grad(loss, list(fast.parameters())))
    return sums


def with_torchopt(model: nn.Module, environment: Environment, steps: int) -> list[Tensor]:
    """`torchopt.MetaOptimizer`, first order by a transformation that detaches the gradients."""
    work, total, theta = Work(model, environment, steps), 0.0, list(model.parameters())
    start = torchopt.extract_state_dict(model)

    def detach(updates, state, *, params=None, inplace=True):
        return torchopt.pytree.tree_map(lambda g: g.detach(), updates), state

    first_order = torchopt.base.GradientTransformation(lambda params: torchopt.base.EmptyState(), detach)
    optimizer = torchopt.MetaOptimizer(
        model, torchopt.chain(first_order, torchopt.sgd(RATE, moment_requires_grad=False))
    )
    for train, held_out in work.batches():
        optimizer.step(work.fine_tuning_loss(model, model, train))
        total = total + work.evaluation_loss(model, model, held_out)
    gradient = list(torch.autograd.grad(total, theta))
    torchopt.recover_state_dict(model, start)
    return gradient


def with_torchopt_streamed(model: nn.Module, environment: Environment, steps: int) -> list[Tensor]:
    """TorchOpt's functional optimizer on a copy of the parameters, updated in place."""
    work, sums = Work(model, environment, steps), [torch.zeros_like(p) for p in model.parameters()]
    fast = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    call, optimizer = WithTensors(model, fast), torchopt.sgd(RATE)
    state = optimizer.init(fast)
    for train, held_out in work.batches():
        loss = work.fine_tuning_loss(model, call, train)
        gradients = dict(zip(fast, torch.autograd.grad(loss, list(fast.values())), strict=True))
        updates, state = optimizer.update(gradients, state, params=fast, inplace=True)
        torchopt.apply_updates(fast, updates, inplace=True)
        loss = work.evaluation_loss(model, call, held_out)
        torch._foreach_add_(sums, torch.autograd.grad(loss, list(fast.values())))
    return sums


def with_ours(model: nn.Module, environment: Environment, steps: int) -> list[Tensor]:
    """This package."""
    return list(ours(model, environment, steps).values())


WAYS = {
    "ours": with_ours,
    "higher": with_higher,
    "TorchOpt": with_torchopt,
    "higher, streamed": with_higher_streamed,
    "TorchOpt, streamed": with_torchopt_streamed,
}
DOCUMENTED = ("higher", "TorchOpt")


def prepare(case: str) -> tuple[nn.Module, Environment]:
    """A model, and its adversary with SGD."""
    model, domain = make(case)
    return model, adversary(model, domain, CASES[case][2], "sgd", RATE)


def check_agreement(case: str, steps: int) -> dict[str, float]:
    """Distance of each way's gradient from ours, as a share of its norm; ends the run where it is too large."""
    # In float32 rounding flips a ReLU now and then, and the paths then part.
    torch.set_default_dtype(torch.float64)
    model, environment = prepare(case)
    gradients = {name: way(model, environment, steps) for name, way in WAYS.items()}
    torch.set_default_dtype(torch.float32)
    own = torch.cat([g.flatten() for g in gradients["ours"]])
    distances = {}
    for name, parts in gradients.items():
        distances[name] = float((torch.cat([g.flatten() for g in parts]) - own).norm() / own.norm())
        if not distances[name] <= AGREEMENT:
            sys.exit(f"{name} computes another gradient than ours: {distances[name]:.2g} of its norm away.")
    return distances


def measure_memory(case: str, way: str, steps: int) -> dict[str, float]:
    """Of this process, which must be a fresh one."""
    model, environment = prepare(case)
    WAYS[way](model, environment, 2)  # Kernels are loaded.
    return growth_mib(lambda: WAYS[way](model, environment, steps))


def measure_time(case: str, steps: int, repeats: int) -> list[dict[str, float]]:
    """Seconds of every way in each round; the order turns from round to round."""
    model, environment = prepare(case)
    names, rounds = list(WAYS), []
    for repeat in range(repeats):
        seconds = {}
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start = time.perf_counter()
            WAYS[name](model, environment, steps)
            seconds[name] = time.perf_counter() - start
        rounds.append(seconds)
    return rounds


def compare(case: str, steps: int, repeats: int) -> dict[str, object]:
    """Agreement, time and memory of every way on one model."""
    distances = check_agreement(case, min(steps, 10))
    memory = {name: in_fresh_process(f"run.measure_memory({case!r}, {name!r}, {steps})")["growth"] for name in WAYS}
    rounds = measure_time(case, steps, repeats)
    time_ratio = {name: statistics.median(r[name] / r["ours"] for r in rounds) for name in WAYS}
    result: dict[str, object] = {}
    for name in WAYS:
        seconds = statistics.median(r[name] for r in rounds)
        result[name] = {
            "seconds": round(seconds, 3),
            "time_over_ours": round(time_ratio[name], 3),
            "growth_mib": round(memory[name], 1),
            "distance": float(f"{distances[name]:.1e}"),
        }
        print(
            f"{case:14}{name:20}{seconds:9.3f}{time_ratio[name]:9.3f}{memory[name]:12.1f}{distances[name]:10.1e}",
            flush=True,
        )
    for kind, names in (("documented", DOCUMENTED), ("all", [name for name in WAYS if name != "ours"])):
        result[f"our_time_over_fastest_{kind}"] = round(1 / min(time_ratio[name] for name in names), 3)
        result[f"our_growth_over_leanest_{kind}"] = round(memory["ours"] / min(memory[name] for name in names), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # BERT has dropout, whose masks would differ; `higher` cannot slice the module lists of the UNet.
    parser.add_argument(
        "--models", nargs="+", choices=("resnet-small", "resnet-18", "vit-tiny"), default=["resnet-small"]
    )
    parser.add_argument("--K", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':34}{'seconds':>9}{'to ours':>9}{'growth MiB':>12}{'distance':>10}", flush=True)
    results = {case: compare(case, options.K, options.repeats) for case in options.models}
    versions = {name: version(name) for name in ("torch", "higher", "torchopt")}
    print(json.dumps({"models": results, "K": options.K, "repeats": options.repeats, "versions": versions}))


if __name__ == "__main__":
    main()
