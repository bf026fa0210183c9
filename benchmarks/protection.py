"""Protect a domain pair with Algorithm 1, attack it, and record what was measured in benchmarks/results/.

    SOPHON_DATA=DIR python benchmarks/protection.py --pair animals --examples 500

DIR holds the data sets as folders (cifar10/, ...). Interrupted, it goes on where it was. Prints a table and, as its
last line, one JSON object; `python benchmarks/write_results.py` makes pages of all records.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pairs
import torch
from baselines import BASELINES
from condition_number import ConditionNumber

from sophon_hf import AttackSuite, SophonConfig, SophonTrainer
from sophon_hf.attacks.run import PAPER_EPOCHS
from sophon_hf.attacks.score import RecoveredTransfer
from sophon_hf.attacks.sweeps import load_sweep
from sophon_hf.benchmarking.benchmark import machine, to_record
from sophon_hf.data.domain import build_domain
from sophon_hf.hub.saving import load_weights
from sophon_hf.protection.config import PRESETS
from sophon_hf.protection.ntl import train_ntl
from sophon_hf.tasks.base import infer_task
from sophon_hf.utils import write_atomically

PAIRS = ("digits", "ages", "animals", "vehicles", "cifar100", "imagenet", "faces")
SETTINGS = {**PRESETS, **BASELINES}
MODELS = ("protected", "original", "ntl", "scratch", "untrained")
RESULTS = Path(__file__).parent / "results"


def protect(pair: pairs.Pair, folder: Path, options: argparse.Namespace) -> tuple[torch.nn.Module, dict]:
    """The protected model, from `folder` where it is there already."""
    model = copy.deepcopy(pair.model)
    done = folder / "protection.json"
    fields = json.loads(options.config)
    given = {"tolerance": options.tolerance, "max_steps": options.iterations}
    given = {name: value for name, value in given.items() if value is not None}
    config = SophonConfig(
        output_dir=str(folder),
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        **{**SETTINGS[options.preset], **given, **fields},
    )
    asked = {"config": fields, "tolerance": config.tolerance, "max_steps": config.max_steps, "seed": options.seed}
    if options.preset != "paper":
        asked["preset"] = options.preset
    if done.exists():
        from safetensors.torch import load_model

        record = json.loads(done.read_text())
        if record["asked"] != asked:
            raise ValueError(
                f"{folder} was protected with {record['asked']}, not {asked}: give this one another --name."
            )
        if (folder / "model_index.json").exists():
            load_weights(model, folder)
        else:
            load_model(model, folder / "model.safetensors")
        return model, record
    trainer = SophonTrainer(
        model,
        pair.defender,
        pair.original,
        config,
        eval_dataset={"original": pair.original_validation, "restricted": pair.defender_validation},
        reinforcement_loss=ConditionNumber(model, pair.defender) if options.preset == "condition-number-like" else None,
    )
    started = any(folder.glob("checkpoint-*")) if folder.exists() else False
    trainer.train(resume_from_checkpoint=started or None)
    record = {
        "seconds": round(trainer.run.seconds()),
        "asked": asked,
        "config": {
            **SETTINGS[options.preset],
            **fields,
            **{name: getattr(config, name) for name in ("tolerance", "max_steps", "K", "N")},
        },
        "guard": vars(trainer.guard.state),
    }
    write_atomically(done, json.dumps(record, indent=1))
    return model, record


def ntl(pair: pairs.Pair, cache: Path, options: argparse.Namespace) -> torch.nn.Module:
    """The NTL model (baseline B3), trained on the defender's data; from `cache` where it is there already."""
    model = copy.deepcopy(pair.model)
    weights = cache / f"{options.pair}-ntl-{options.ntl_steps}-{options.seed}.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model
    task = infer_task(model)
    needs = task.inputs(model)
    halves = (build_domain(d, needs, name=n) for d, n in ((pair.original, "original"), (pair.defender, "restricted")))
    train_ntl(model, task, *halves, steps=options.ntl_steps, seed=options.seed)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="animals", choices=PAIRS)
    parser.add_argument("--name", default="paper", help="what the record calls this protection")
    parser.add_argument("--config", default="{}", help="further fields of SophonConfig, as JSON")
    parser.add_argument("--preset", default="paper", choices=SETTINGS, help="of SophonConfig, or a baseline")
    parser.add_argument("--iterations", type=int, help="the preset's by default")
    parser.add_argument("--tolerance", type=float, help="the preset's by default")
    parser.add_argument("--sweep", default="strong", help="its name, or a file such as benchmarks/faces.yaml")
    parser.add_argument("--batch_size", type=int, help="of every attack; the sweep's by default")
    parser.add_argument("--examples", type=int, default=500, help="the adversary's; 0 for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the attacks")
    parser.add_argument("--bf16", action="store_true", help="attack in mixed precision")
    parser.add_argument("--measured_epochs", type=float, nargs="+", default=PAPER_EPOCHS, help="of the attacks")
    parser.add_argument("--seed", type=int, default=0, help="of the protection")
    parser.add_argument("--ntl_steps", type=int, default=1000, help="of the NTL baseline; 0 leaves it out")
    parser.add_argument(
        "--benign", action="store_true", help="fine-tune in the pair's allowed domain too, by the same sweep"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record goes")
    parser.add_argument("--work", type=Path, default=Path("runs/protection"))
    options = parser.parse_args()

    # Of the code that runs, not of what is checked out when it ends.
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    pair = getattr(pairs, options.pair)(options.work)
    if options.benign and pair.allowed is None:
        parser.error(f"--benign: the pair {options.pair} has no allowed domain; animals has one.")
    task = infer_task(pair.model)
    folder = options.work / f"{options.pair}-{options.name}-{options.seed}"
    protected, protection = protect(pair, folder, options)
    # NTL is a method for classifiers.
    with_ntl = task.greater_is_better and options.ntl_steps
    baselines = {"ntl": ntl(pair, options.work, options)} if with_ntl else {}
    adversary = pair.adversary_dataset(options.examples or None)
    allowed = {"benign_dataset": pair.allowed, "benign_eval_dataset": pair.allowed_test} if options.benign else {}
    strategies = load_sweep(options.sweep)
    if options.batch_size:
        strategies = [strategy.with_changes(batch_size=options.batch_size) for strategy in strategies]
    start = time.time()
    results = AttackSuite(
        strategies,
        options.work / "attacks",
        seeds=options.seeds,
        bf16=options.bf16,
        measured_epochs=options.measured_epochs,
    ).run(
        protected=protected,
        original=pair.model,
        restricted_dataset=adversary,
        eval_dataset=pair.restricted_test,
        validation_dataset=pair.validation,
        baselines=baselines,
        original_dataset=pair.original,
        original_eval_dataset=pair.original_test,
        **allowed,
    )
    record = {
        "pair": options.pair,
        "protection": options.name,
        "sweep": Path(options.sweep).stem,
        "examples": len(adversary),
        "seeds": options.seeds,
        **to_record(results),
        "ntl_steps": options.ntl_steps if baselines else None,
        "benign": results.benign,
        "protection_run": protection,
        "attack_seconds": round(time.time() - start),
        "command": "python benchmarks/protection.py " + " ".join(f"'{a}'" if "{" in a else a for a in sys.argv[1:]),
        "commit": commit,
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": results.facts["versions"],
    }
    name = f"{options.pair}-{options.name}-{options.seed}-{Path(options.sweep).stem}-{len(adversary)}.json"
    write_atomically(options.results / name, json.dumps(record, indent=1))
    intact = record[f"original_{task.metric}"]
    transfer, direct = (RecoveredTransfer(**record[f"recovered_transfer{which}"]) for which in ("", "_direct"))
    print(
        f"original {task.metric}: {', '.join(f'{n} {v:.3f}' for n, v in intact.items())}; "
        f"recovered transfer {transfer}; direct only {direct}"
    )
    for row in record["table"]:
        print(
            f"{row['attack']:60}",
            *(f"{m} {row[m][0]:.3f} ± {row[m][1]:.3f}" for m in MODELS if m in row),
        )
    print(
        json.dumps(
            {key: record[key] for key in ("pair", "protection", f"original_{task.metric}", "recovered_transfer")}
        )
    )


if __name__ == "__main__":
    main()
