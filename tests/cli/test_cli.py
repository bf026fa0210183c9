"""The command line: it answers at once, merges files and flags, and leads from a folder to a report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from sophon_hf import FineTuningStrategy, __version__, load_domain
from sophon_hf.cli import main as cli
from sophon_hf.cli.protect import read_arguments
from sophon_hf.data.domain import build_domain
from sophon_hf.finetuning.loop import FineTuning
from sophon_hf.tasks.base import infer_task
from sophon_hf.tasks.evaluation import evaluate_model

MODEL = ["--model", "m", "--original", "o", "--restricted", "r"]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


# Answers without libraries.


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["protct"]])
def test_it_answers_without_importing_torch(arguments):
    code = """
import sys
from sophon_hf.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print(error)
print(sorted({"torch", "transformers", "datasets", "numpy", "matplotlib"} & set(sys.modules)))
"""
    process = run_python(code, *arguments)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "[]"
    assert {"--version": __version__, "protct": "Did you mean 'protect'?"}.get(
        (arguments or [""])[0], "commands:"
    ) in process.stdout


def test_an_unknown_command_names_the_closest():
    with pytest.raises(SystemExit, match="no command 'atack'. Did you mean 'attack'"):
        cli.main(["atack"])
    with pytest.raises(SystemExit, match="(?s)no command 'zzzz'.*usage: sophon-hf"):
        cli.main(["zzzz"])


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"sophon-hf {command}" in capsys.readouterr().out
    assert f"  {command} " in cli.USAGE


@pytest.mark.parametrize("command, own", [("attack", "attacks"), ("audit", "audit")])
def test_the_help_of_attacks_tells_the_defaults(command, own, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("strong", "[0, 1, 2]", "train", own):
        assert f"(default: {default})" in text


def test_the_help_of_protect_names_every_field(capsys):
    with pytest.raises(SystemExit):
        cli.main(["protect", "--help"])
    text = capsys.readouterr().out
    for name in ("--restricted_classes", "--l_FTS", "--l_NTR", "--alpha", "--strategy_space", "--resume"):
        assert name in text


def test_the_help_of_protect_leaves_the_trainers_fields_to_its_own_documentation(capsys):
    with pytest.raises(SystemExit):
        cli.main(["protect", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: sophon-hf protect [CONFIG.yaml] [--field value ...]")
    assert "a YAML file, which comes first" in text and "transformers.TrainingArguments" in text
    assert "--warmup_steps" not in text and "--no_adversary_half" not in text
    options, config = read_arguments([*MODEL, "--warmup_steps", "3", "--no_adversary_half"])
    assert config.warmup_steps == 3 and options.adversary_half is False


# Errors.


def test_errors_are_one_line_unless_a_traceback_is_asked_for(tmp_path):
    with pytest.raises(SystemExit, match="^sophon-hf report: .*results.json does not exist"):
        cli.main(["report", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="results.json does not exist"):
        cli.main(["report", str(tmp_path), "--traceback"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*MODEL, "--alhpa", "1"], "no field 'alhpa'. Did you mean 'alpha'"),
        ([*MODEL, "--restricted_clases", "a"], "Did you mean 'restricted_classes'"),
        ([*MODEL, "stray"], "'stray' belongs to no field"),
        ([*MODEL, "--max_steps", "many"], "--max_steps.*: invalid int value: 'many'.*--help"),
        ([*MODEL, "--adversary_half", "perhaps"], "adversary_half"),
        (["--model", "m"], "required: --original, --restricted"),
        (["missing.yaml"], "missing.yaml"),
        (["--max_steps", "2", "config.yaml"], "required: --model.*A YAML file comes first"),
        ([*MODEL, "--max_steps", "2", "config.yaml"], "'config.yaml' belongs to no field. A YAML file comes first"),
    ],
)
def test_bad_arguments_of_protect(arguments, message):
    with pytest.raises(SystemExit, match=f"(?s)^sophon-hf protect: .*{message}"):
        cli.main(["protect", *arguments])


@pytest.mark.parametrize(
    "text, message",
    [
        ("l_NRT: 3", "no field 'l_NRT'. Did you mean 'l_NTR'"),
        ("- model", "must hold fields"),
        ("max_steps: many", "invalid int value: 'many'"),
        (
            "fsdp: true\nfsdp_config: {transformer_layer_cls_to_wrap: [ViTLayer]}",
            "fsdp shards a model over several processes",
        ),
    ],
)
def test_bad_files_of_protect(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match=f"^sophon-hf protect: .*{message}"):
        cli.main(["protect", str(tmp_path / "config.yaml"), *MODEL])


def test_a_demo_makes_room_by_removing_an_earlier_demo_and_no_other_work(tmp_path, monkeypatch):
    from sophon_hf.cli import demo

    def stop():
        raise RuntimeError("stop")

    monkeypatch.setattr(demo, "printed_letters", stop)
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


# Files and flags.


def test_flags_win_over_the_file(tmp_path):
    config = {
        "model": "from-file",
        "original": "o",
        "restricted": "r",
        "restricted_classes": ["cat", "7"],
        "alpha": 1e-3,
        "max_steps": 7,
        "K": 3,
        "adversary_half": False,
        "resume": None,
        "learning_rate": "5e-4",
        "strategy_space": {"learning_rates": [1e-3], "batch_sizes": [25]},
        "output_dir": str(tmp_path),
    }
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    options, args = read_arguments([str(path), "--max_steps", "9", "--model=from-flag"])
    assert (options.model, options.original) == ("from-flag", "o")
    assert options.restricted_classes == ["cat", "7"]
    assert options.adversary_half is False and options.resume is False
    assert (args.max_steps, args.K, args.alpha, args.learning_rate) == (9, 3, 1e-3, 5e-4)
    assert args.strategy_space["learning_rates"] == [1e-3] and args.strategy_space["batch_sizes"] == [25]
    assert read_arguments([str(path), "--adversary_half", "true"])[0].adversary_half is True


def test_the_configuration_that_the_readme_shows_is_one(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "config.yaml"
    path.write_text(readme.split("```yaml\n")[1].split("```")[0])
    options, config = read_arguments([str(path)])
    assert options.preset == "representation" and (config.probe_depths, config.output_dir) == (2, "protected")


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
        "per_device_train_batch_size": 10,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "strategy_space": {"learning_rates": [1e-3], "batch_sizes": [10]},
    }


CHAIN = """
import json, sys
import torch
torch.set_num_threads(1)
from sophon_hf.cli.main import main

for arguments in json.loads(sys.argv[1]):
    main(arguments)
    print("-" * 20, flush=True)
"""


def test_from_a_folder_to_a_report(tmp_path, config):
    source, original, restricted, protected = (config[n] for n in ("model", "original", "restricted", "output_dir"))
    attacks = tmp_path / "attacks"
    (tmp_path / "protect.yaml").write_text(yaml.safe_dump({**config, "original_classes": ["a", "b"]}))
    sweep = [{"initialization": start, "learning_rate": 0.01, "batch_size": 10} for start in ("direct", "new_head")]
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    attack = [
        "attack",
        "--protected",
        protected,
        "--original",
        source,
        "--restricted",
        restricted,
        "--original_data",
        original,
        "--original_classes",
        "a",
        "b",
        "--sweep",
        str(tmp_path / "sweep.json"),
        "--epochs",
        "1",
        "--seeds",
        "0",
        "1",
        "--output_dir",
        str(attacks),
    ]
    benign = write_domain(tmp_path / "benign", (1, 5, 9), 2)
    chain = [["protect", str(tmp_path / "protect.yaml"), "--max_steps", "1"], [*attack, "--dry-run"]]
    chain.append([*attack, "--benign", benign, "--benign_classes", "a", "c", "--measured_every", "2"])
    process = run_python(CHAIN, json.dumps([*chain, ["report", str(attacks)]]))
    assert process.returncode == 0, process.stderr[-3000:]
    protecting, plan, attacking, reporting = process.stdout.split("-" * 20 + "\n")[:4]

    assert f"Protected model (not evaluated) saved in {protected}." in protecting
    model, loaded = (ResNetForImageClassification.from_pretrained(path) for path in (source, protected))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters()))

    # Half of 60 images is the adversary's; two models and scratch, two seeds, and five folds beside each run.
    assert plan.splitlines()[0] == "10 runs, 180 optimizer steps, 1,800 images:"
    assert plan.count("3 steps a run") == 2

    assert "# Recovered transfer: " in attacking
    assert len(list((attacks / "runs").iterdir())) == 10
    results = json.loads((attacks / "results.json").read_text())
    assert set(results["original_metric"]) == {"original", "protected"}
    assert all(cell["error"] is None for cell in results["runs"])
    assert results["facts"]["training_examples"] == results["facts"]["validation_examples"] == 30
    assert all(cell["curve"]["step"] == [0, 2, 3] for cell in results["runs"])
    assert set(results["benign"]) == {"protected", "original", "scratch", "difference"}
    assert len(list((attacks / "benign" / "runs").iterdir())) == 10
    assert "Benign fine-tunability, protected minus original: " in attacking
    assert reporting == attacking, "the report tells again what was found"
    assert (attacks / "report" / "index.html").exists()


def test_a_dry_run_counts_the_allowed_task_and_looks_for_the_models(tmp_path, config, capsys):
    (tmp_path / "sweep.json").write_text('[{"batch_size": 10}]')
    attack = [
        "attack",
        "--original",
        config["model"],
        "--restricted",
        config["restricted"],
        "--dry-run",
        "--epochs",
        "1",
    ]
    attack += ["--sweep", str(tmp_path / "sweep.json"), "--seeds", "0", "--benign", config["original"]]
    cli.main([*attack, "--protected", "user/nope"])
    lines = capsys.readouterr().out.splitlines()
    # Thirty examples of the adversary's and sixty of the allowed task; two models and scratch on each.
    assert lines[0] == f"6 runs, {3 * (3 + 6)} optimizer steps, {3 * (30 + 60)} images:"
    assert lines[2:] == [
        "The same attacks run on the 60 examples of the allowed task, which are counted above.",
        "'user/nope' is no folder here, and was not looked up on the Hub.",
    ]
    for model, message in (("./nope", "There is no folder './nope'"), (str(tmp_path), "no model is saved there")):
        with pytest.raises(SystemExit, match=message):
            cli.main([*attack, "--protected", model])


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
