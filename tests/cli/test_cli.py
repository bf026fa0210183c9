"""The command line: it answers at once, and leads from a folder to a report."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from classifiers import CASES
from labelled_data import sentences, tokenizer
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification
from two_processes import forked

from sophon_hf import FineTuningStrategy, __version__, load_domain
from sophon_hf.cli import main as cli
from sophon_hf.cli.options import COMMANDS
from sophon_hf.cli.timing import TellTime, duration
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model

MODEL = ["--model", "m", "--original", "o", "--restricted", "r"]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=1200)


# Answers without libraries.


ANSWERS = [
    (["--help"], 0, "commands:"),
    ([], 0, "commands:"),
    (["--version"], 0, __version__),
    (["protct"], 2, "Did you mean 'protect'?"),
    (["protect", "--help"], 0, "--l_NTR"),
    (["attack", "--help"], 0, "--sweep"),
    (["protect", *MODEL, "--alhpa", "1"], 2, "Did you mean '--alpha'?"),
    (["protect", *MODEL, "--max_steps", "many"], 2, "invalid int value: 'many'"),
    (["protect", *MODEL, "--on_violation", "stpo"], 2, "invalid choice: 'stpo' (choose from 'halve_alpha', "),
    (["protect", *MODEL, "--suppression_loss", "ice"], 2, "(choose from 'inverse_cross_entropy', "),
    (["attack", *MODEL, "--sweep", "stron"], 2, "Did you mean 'strong'?"),
    (["audit", "missing.yaml"], 2, "There is no file 'missing.yaml'"),
    (["benchmark", "--help"], 0, "--budget"),
    (["benchmark"], 2, "the following are required, as flags or in a configuration file: --model"),
    (["benchmark", "paper", "--pair", "leters"], 2, "invalid choice: 'leters'"),
]
ANSWERING = """
import contextlib, io, json, sys
from sophon_hf.cli.main import main

answers = []
for arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    imported = sorted({"torch", "transformers", "datasets", "numpy", "matplotlib"} & set(sys.modules))
    answers.append([code, out.getvalue(), err.getvalue(), imported])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple]:
    """What one process answers to each: exit status, stdout, stderr, and which libraries it has imported by then."""
    asked = [arguments for arguments, _, _ in ANSWERS]
    process = run_python(ANSWERING, json.dumps(asked))
    assert process.returncode == 0, process.stderr
    return {" ".join(a): answer for a, answer in zip(asked, json.loads(process.stdout), strict=True)}


@pytest.mark.parametrize("arguments, code, told", ANSWERS)
def test_it_answers_without_importing_torch(answers, arguments, code, told):
    status, out, error, imported = answers[" ".join(arguments)]
    assert status == code, error
    assert told in out + error
    assert imported == []
    if code and arguments[0] in COMMANDS:
        assert len(error.splitlines()) == 1


def test_an_unknown_command_names_the_closest():
    with pytest.raises(SystemExit, match="no command 'atack'. Did you mean 'attack'"):
        cli.main(["atack"])
    with pytest.raises(SystemExit, match="(?s)no command 'zzzz'.*usage: sophon-hf"):
        cli.main(["zzzz"])


def test_the_usage_names_every_command():
    assert all(f"  {command} " in cli.USAGE for command in COMMANDS)


# Errors.


def test_errors_are_one_line_unless_a_traceback_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"sophon-hf report: {tmp_path}/attacks has no results.json")
    with pytest.raises(FileNotFoundError, match="has no results.json"):
        cli.main(["report", str(tmp_path), "--traceback"])


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("protect", ["--fsdp", "--fsdp_config", "{}"], "fsdp shards a model over several processes"),
        ("protect", ["--K", "0"], "K is 0, but must be a whole number"),
        # All of it before any data are read.
        ("protect", ["--model", "./m"], "There is no folder './m', and it is not the form of a Hub id"),
        ("protect", ["--resume"], "There is no complete checkpoint in 'sophon-output'"),
        ("protect", ["--metric", "acuracy"], "--metric is 'acuracy'"),
        ("protect", ["--output_dir", f"{__file__}/x"], "test_cli.py' is no folder: choose another one"),
        ("protect", ["--report_to", "wandbb"], "wandbb is not supported"),
        ("attack", ["--output_dir", "nowhere"], "There is no folder 'nowhere' with a protected model"),
    ],
)
def test_values_that_do_not_fit_end_in_one_line(command, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *MODEL, *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_a_torchvision_that_does_not_fit_torch_ends_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    commands = [["protect", *MODEL], ["doctor"]]
    process = run_python(ANSWERING, json.dumps(commands))
    assert process.returncode == 0, process.stderr
    (status, _, error, _), (of_doctor, told, _, _) = json.loads(process.stdout)
    message = rf"sophon-hf protect: torchvision 0.1 does not fit torch {torch.__version__}. .*: pip install .*\n"
    assert status == 2 and re.fullmatch(message.replace("+", r"\+"), error)
    assert of_doctor == 1 and "torchvision   BROKEN: torchvision 0.1 does not fit torch" in told


def test_the_doctor_finds_this_environment_healthy(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and lines[0].startswith(f"sophon_hf     {__version__}")
    assert lines[1].startswith(f"torch         {torch.__version__} on CPU")
    assert lines[-1] == "Hub           not asked: HF_HUB_OFFLINE is set"


def test_a_demo_makes_room_by_removing_an_earlier_demo_and_no_other_work(tmp_path, monkeypatch):
    from sophon_hf.cli import demo

    def stop(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(multiprocessing, "get_context", stop)  # Before it has started a process.
    mine, earlier = tmp_path / "mine" / "protected" / "model", tmp_path / "demo" / "protected" / "model"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(ValueError, match="holds 'protected', which no demo has made"):
        demo.run(tmp_path / "mine")
    assert mine.exists()
    with pytest.raises(RuntimeError, match="stop"):
        demo.run(tmp_path / "demo")
    earlier.parent.mkdir()
    earlier.touch()
    with pytest.raises(RuntimeError, match="stop"):
        demo.run(tmp_path / "demo")
    assert not earlier.exists()


# From a folder to a report.


def write_domain(folder: Path, places: tuple[int, int, int], seed: int) -> str:
    """Images with a bright bar at the place of their class, as parquet files of two splits."""
    generator = torch.Generator().manual_seed(seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    folder.mkdir()
    for split in ("train", "test"):
        labels = torch.arange(60) % 3
        pixels = torch.randint(0, 120, (60, 16, 16, 3), generator=generator, dtype=torch.uint8)
        for image, label in zip(pixels, labels):
            image[places[label] : places[label] + 4] += 100
        rows = {"image": [Image.fromarray(p.numpy()) for p in pixels], "label": labels.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture
def config(tmp_path) -> dict:
    """A model and two domains in folders, and a tiny protection of it."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=3, **sizes))
    model.save_pretrained(tmp_path / "model")
    return {
        "model": str(tmp_path / "model"),
        "original": write_domain(tmp_path / "original", (0, 4, 8), 0),
        "restricted": write_domain(tmp_path / "restricted", (2, 6, 10), 1),
        "output_dir": str(tmp_path / "protected"),
        "max_steps": 2,
        "K": 1,
        "N": 1,
        "l_NTR": 1,
        "simulated_examples": 3,
        "per_device_train_batch_size": 10,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "strategy_space": {"learning_rates": [1e-3], "batch_sizes": [10]},
    }


def test_from_a_folder_to_a_report(tmp_path, config, capsys):
    source, protected = config["model"], config["output_dir"]
    attacks = tmp_path / "protected" / "attacks"
    sweep = [{"initialization": start, "learning_rate": 0.01, "batch_size": 10} for start in ("direct", "new_head")]
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    budget = {"sweep": str(tmp_path / "sweep.json"), "epochs": 1, "seeds": [0]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, **budget, "original_classes": ["a", "b"]}))
    benign = write_domain(tmp_path / "benign", (1, 5, 9), 2)
    allowed = ["--benign", benign, "--benign_classes", "a", "c", "--measured_every", "2"]
    chain = [
        ["protect", str(path), "--max_steps", "1"],
        ["attack", str(path), "--dry-run"],
        ["attack", str(path), *allowed],
        ["report", str(path)],
    ]
    printed = []
    for arguments in chain:
        cli.main(arguments)
        printed.append(capsys.readouterr().out)
    protecting, plan, attacking, reporting = printed

    assert f"Protected model (not evaluated) saved in {protected}." in protecting
    model, loaded = (ResNetForImageClassification.from_pretrained(path) for path in (source, protected))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))

    # Half of 60 images is the adversary's; two models and scratch, and five folds beside each run.
    assert plan.splitlines()[0] == "5 runs, 90 optimizer steps, 900 images"
    assert plan.count("3 steps a run") == 2

    assert "**Recovered transfer**: " in attacking
    assert len(list((attacks / "runs").iterdir())) == 5
    results = json.loads((attacks / "results.json").read_text())
    assert set(results["original_metric"]) == {"original", "protected"}
    assert all(cell["error"] is None for cell in results["runs"])
    assert results["facts"]["training_examples"] == results["facts"]["validation_examples"] == 30
    assert all(cell["curve"]["step"] == [0, 2, 3] for cell in results["runs"])
    assert set(results["benign"]) == {"protected", "original", "scratch", "difference"}
    assert len(list((attacks / "benign" / "runs").iterdir())) == 5
    assert "Benign fine-tunability, protected minus original: " in attacking
    assert reporting and attacking.endswith(reporting), "the report tells again what was found"
    assert (attacks / "report" / "index.html").exists()


@pytest.mark.parametrize("command", ["protect", "attack"])
def test_a_model_that_cannot_be_read_is_told_before_data_are(command, tmp_path, config, capsys):
    def told(*named: str) -> str:
        with pytest.raises(SystemExit):
            cli.main([command, "--original", "./nowhere", "--restricted", "./nowhere", *named])
        return capsys.readouterr().err

    folder = Path(config["model"])
    named = ["--model", str(folder), *(["--protected", str(folder)] if command == "attack" else [])]
    assert "nowhere" in told(*named), "with a model that can be read, the data are what fails"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert f"The model '{folder}' cannot be read, as if a file were cut short" in told(*named)
    (folder / "model.safetensors").unlink()
    assert f"'{folder}' has a configuration, but no weights (safetensors or bin)." in told(*named)
    (folder / "config.json").write_text("{")
    assert str(folder) in (error := told(*named)) and "nowhere" not in error
    named[-1] = "user/nope"
    if command == "attack":
        (folder / "config.json").unlink()
        named[1] = "user/nope"
    assert "There is no folder 'user/nope', and the Hub cannot be reached" in told(*named)


@pytest.mark.parametrize(
    ("command", "flag", "domain"),
    [("protect", "original_split", "original"), ("attack", "restricted_test_split", "restricted")],
)
def test_a_wrong_split_names_its_flag_and_the_closest_one(command, flag, domain, tmp_path, config, capsys):
    Path(config["output_dir"]).mkdir()
    names = {name: config[name] for name in ("model", "original", "restricted", "output_dir")}
    names |= {"protected": config["model"]} if command == "attack" else {}
    with pytest.raises(SystemExit):
        cli.main(
            [command, *(word for name, value in names.items() for word in (f"--{name}", value)), f"--{flag}", "tset"]
        )
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"sophon-hf {command}: --{domain} {config[domain]}: The data set has no split 'tset'; it has "
        f"['test', 'train']. Did you mean 'test'? The flag is --{flag}."
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": []}', '{"runs": [{"model": "protected"}]}'])
def test_results_that_are_torn_or_something_else_are_named(content, tmp_path, capsys):
    path = tmp_path / "attacks" / "results.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert f"sophon-hf report: {path} is torn, or holds no results of an attack suite (" in capsys.readouterr().err


def test_the_time_of_attacks_on_sorted_texts_is_told(tmp_path, config, capsys):
    """Names of classes in a CSV, of which the first rows have but one."""
    torch.manual_seed(0)
    model = ResNetForImageClassification.from_pretrained(config["model"])
    for split, seed in (("train", 0), ("test", 1)):
        pixels = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).tolist()
        names = ["first"] * 280 + ["second"] * 20
        rows = datasets.Dataset.from_dict({"pixel_values": pixels, "label": names})
        (tmp_path / "sorted").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "sorted" / f"{split}.parquet")
    model.save_pretrained(tmp_path / "protected")
    attack = ["attack", "--model", config["model"], "--protected", str(tmp_path / "protected"), "--dry_run"]
    attack += ["--adversary_half", "false", "--restricted", str(tmp_path / "sorted"), "--seeds", "0", "--epochs", "1"]
    cli.main(attack)
    assert capsys.readouterr().out.splitlines()[-1].startswith("In all about ")


def test_a_dry_run_tells_the_cost_and_looks_for_the_models(tmp_path, config, capsys):
    (tmp_path / "sweep.json").write_text('[{"batch_size": 10}]')
    attack = ["attack", "--model", config["model"], "--restricted", config["restricted"], "--dry-run", "--epochs", "1"]
    attack += ["--sweep", str(tmp_path / "sweep.json"), "--seeds", "0", "--benign", config["original"]]
    cli.main([*attack, "--protected", "user/nope"])
    lines = capsys.readouterr().out.splitlines()
    # Thirty examples of the adversary's and sixty of the allowed task; two models and scratch on each, and five folds.
    assert lines[0] == f"6 runs, {6 * 3 * (3 + 6)} optimizer steps, {6 * 3 * (30 + 60):,} images"
    assert lines[2:4] == [
        "The same attacks run on the 60 examples of the allowed task, which are counted above.",
        "'user/nope' is no folder here, and was not looked up on the Hub.",
    ]
    assert re.fullmatch(r"In all about [\d.e+]+ (s|min); what is finished already is not computed again.", lines[4])
    for model, message in (("./nope", "There is no folder './nope'"), (str(tmp_path), "no model is saved there")):
        with pytest.raises(SystemExit, match=message):
            cli.main([*attack, "--protected", model])


def test_trials_are_those_of_a_search(config, capsys):
    def plan(sweep: str, trials: str) -> int:
        attack = ["attack", "--model", config["model"], "--restricted", config["restricted"], "--dry-run"]
        cli.main([*attack, "--protected", "user/nope", "--sweep", sweep, "--seeds", "0", "--trials", trials])
        return int(capsys.readouterr().out.split()[0].replace(",", ""))

    # Each trial more is a run on the protected model, the original one and from scratch.
    assert plan("search", "16") - plan("search", "10") == 6 * 3
    with pytest.raises(SystemExit, match='trials is 10, but only the sweep "search" has trials'):
        plan("strong", "10")


def test_a_dry_run_of_a_protection_tells_its_time_and_saves_nothing(tmp_path, config, capsys):
    changes = {"max_steps": 1000, "save_strategy": "steps", "eval_strategy": "steps", "eval_on_start": True}
    (tmp_path / "protect.yaml").write_text(yaml.safe_dump({**config, **changes}))
    before = sorted(tmp_path.rglob("*"))
    cli.main(["protect", str(tmp_path / "protect.yaml"), "--dry_run"])
    out = capsys.readouterr().out
    assert re.search(r"^Iterations to do: 1000, about \S+ (s|min|h) in all ", out)
    assert "Before protection, " in out, "what to expect"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (89, "89 s"), (100, "1.7 min"), (5.5e4, "15 h"), (1.1e7, "127 days")]
)
def test_times_are_said_in_two_digits_and_never_as_a_power_of_ten(seconds, said):
    assert duration(seconds) == f"about {said}"


@pytest.mark.parametrize(("seconds", "after"), [(30, 1), (3, 2)])
def test_a_long_first_iteration_tells_the_time_and_a_short_one_waits(seconds, after, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    args = SimpleNamespace(eval_strategy="no", world_size=1)
    teller = TellTime(dry_run=False)
    teller.on_train_begin(args, None, None)
    for step in (1, 2, 3):
        teller.on_step_begin(args, None, None)
        clock[0] += seconds
        teller.on_step_end(args, SimpleNamespace(max_steps=10, global_step=step, is_world_process_zero=True), None)
        assert capsys.readouterr().out.count("Iterations to do: 10, ") == (step == after)


def test_two_processes_protect_and_say_each_thing_once(tmp_path, config):
    (tmp_path / "protect.yaml").write_text(yaml.safe_dump({**config, "accelerate_config": "cpu_two_processes"}))

    def launch() -> tuple[int, str]:
        process = forked(lambda: cli.main(["protect", str(tmp_path / "protect.yaml")]), tmp_path / "printed", 1200)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return status, (tmp_path / "printed").read_text()

    status, printed = launch()
    assert status == 0, printed[-3000:]
    assert printed.count("Protected model (not evaluated) saved in ") == 1
    assert printed.count("No AutoImageProcessor is saved with") == 1
    assert "find_unused_parameters" not in printed and "NOT in distributed mode" not in printed
    assert ResNetForImageClassification.from_pretrained(config["output_dir"])

    status, printed = launch()
    message = rf"sophon-hf protect: '{config['output_dir']}' holds another run .*--resume on the command line, .*"
    assert status == 2
    assert [bool(re.fullmatch(message, line)) for line in printed.splitlines() if "sophon-hf" in line] == [True]
    assert "Traceback" not in printed


class Impatient(io.StringIO):
    """Somebody who presses Ctrl-C as soon as it is told how long it takes."""

    def write(self, text: str) -> int:
        if text.startswith("Iterations to do: 100000, about "):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_an_interrupted_protection_says_how_to_go_on(tmp_path, config, monkeypatch, capsys):
    config |= {"max_steps": 100_000, "save_strategy": "steps", "save_steps": 1}
    (tmp_path / "protect.yaml").write_text(yaml.safe_dump(config))
    # A shell in the background lets its children ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "stdout", Impatient())
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["protect", str(tmp_path / "protect.yaml")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    last = "sophon-hf protect: interrupted. The same command with --resume goes on from the last checkpoint."
    assert capsys.readouterr().err.splitlines()[-1] == last


def test_a_model_that_lost_the_original_domain_is_not_called_protected(tmp_path, config, capsys, caplog):
    model = ResNetForImageClassification.from_pretrained(config["model"])
    task = infer_task(model)
    domain = build_domain(load_domain(config["original"]), task.inputs(model), name="original")
    batch = domain.rows(torch.arange(60))
    strategy = FineTuningStrategy(learning_rate=0.01)
    list(FineTuning(model, task, strategy, [batch] * 30, 30, structure=task.structure(model, batch)))
    assert evaluate_model(task, model, domain, 60).metric > 0.9
    model.save_pretrained(config["model"])

    config |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "tolerance": 0.0, "alpha": 0.5}
    (tmp_path / "protect.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="there is no protected model in .*protected; the warning above says why"):
        cli.main(["protect", str(tmp_path / "protect.yaml"), "--max_steps", "1"])
    assert caplog.text.count("is NOT protected: no evaluated state kept the original domain") == 1
    kept = ["--tolerance", "1", "--output_dir", str(tmp_path / "kept")]
    cli.main(["protect", str(tmp_path / "protect.yaml"), "--max_steps", "1", *kept])
    assert f"Protected model (iteration 1) saved in {tmp_path / 'kept'}." in capsys.readouterr().out


def test_the_time_of_attacks_on_a_model_without_a_padding_token_is_told(tmp_path, capsys):
    model = next(case for case in CASES if case.family.startswith("GPT2")).build()
    model.config.pad_token_id = None
    for saved in (model, tokenizer()):
        saved.save_pretrained(tmp_path / "model")
    sentences(0).to_json(tmp_path / "texts.jsonl")
    told = {"model": "model", "protected": "model", "restricted": "texts.jsonl"}
    cli.main(["attack", *(word for name in told for word in (f"--{name}", str(tmp_path / told[name]))), "--dry_run"])
    assert "In all about " in capsys.readouterr().out
