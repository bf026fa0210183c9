"""What commands are told: one configuration file for all of them, and flags, which win."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from pipelines import captioned, save_pipeline
from transformers import TrainingArguments

from sophon_hf import SophonConfig
from sophon_hf.attacks.sweeps import SWEEPS, load_sweep
from sophon_hf.cli import attack
from sophon_hf.cli.fields import sophon_fields, training_fields
from sophon_hf.cli.loading import columns, load_metric, load_split
from sophon_hf.cli.options import COMMANDS, read_options
from sophon_hf.cli.protect import build_config
from sophon_hf.protection.presets import PRESETS
from sophon_hf.tasks.latents import encode_captions

MODEL = ["--model", "m", "--original", "o", "--restricted", "r"]


def write(folder: Path, **fields) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))
    return str(folder / "config.yaml")


# Fields of dataclasses, which are read without being imported.


@pytest.mark.parametrize("cls, read", [(TrainingArguments, training_fields), (SophonConfig, sophon_fields)])
def test_the_fields_that_are_read_are_those_of_the_class(cls, read):
    own = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name in cls.__annotations__}
    fields = read()
    assert fields.keys() == own.keys() and len(fields) > 20
    for name, field in fields.items():
        if field.default is not None:
            assert own[name].default == field.default, name
        assert field.nullable == ("None" in str(cls.__annotations__[name])), name
    assert training_fields()["save_strategy"].metadata["choices"] == ["no", "steps", "epoch", "best"]


def test_every_field_is_a_flag(tmp_path):
    fields = [f for f in dataclasses.fields(SophonConfig) if f.init and f.default is not dataclasses.MISSING]
    given = {f.name: getattr(f.default, "value", f.default) for f in fields}
    options = read_options("protect", [write(tmp_path, **given), *MODEL])
    assert {name: vars(options)[name] for name in given} == given and len(given) > 100


def test_values_have_the_types_of_the_fields():
    options = read_options(
        "protect",
        [*MODEL, "--max-steps", "9", "--alpha=1e-3", "--bf16", "--use_cpu", "yes", "--gamma", "[1, 0]", "--K=2"]
        + ["--strategy_space", '{"batch_sizes": [25]}', "--report_to", "none", "--original_classes", "cat", "7"]
        + ["--no_adversary_half", "--fsdp_config", "fsdp.json"],
    )
    assert (options.max_steps, options.alpha, options.bf16, options.use_cpu) == (9, 1e-3, True, True)
    assert (options.gamma, options.strategy_space) == ([1, 0], {"batch_sizes": [25]})
    assert (options.report_to, options.original_classes, options.fsdp_config) == ("none", ["cat", "7"], "fsdp.json")
    assert options.adversary_half is False and "beta" not in options


# One file for all commands.


def test_one_file_serves_all_commands(tmp_path):
    path = write(
        tmp_path,
        model="m",
        original="o",
        restricted="r",
        restricted_test_split="validation",
        original_label="fine",
        output_dir="x",
        adversary_half=False,
        alpha=1e-3,
        seeds=[4, 5],
        private=True,
        repo_id="user/name",
    )
    found = {command: read_options(command, [path]) for command in ("protect", "attack", "report", "publish", "audit")}
    assert {options.output_dir for options in found.values()} == {"x"}
    for command in ("protect", "attack", "audit"):
        options = found[command]
        assert (options.model, options.original, options.restricted) == ("m", "o", "r")
        assert options.original_label == ["fine"]
        assert options.adversary_half is False
    assert found["protect"].alpha == 1e-3 and "alpha" not in found["attack"]
    assert found["attack"].restricted_test_split == found["audit"].restricted_test_split == "validation"
    assert found["attack"].seeds == [4, 5] and "seeds" not in found["protect"]
    assert found["publish"].repo_id == "user/name" and found["publish"].private is True


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = write(tmp_path, model="from-file", original="o", restricted="r", preset="representation", max_steps=7, K=3)
    options = read_options("protect", [path, "--max_steps", "9", "--model=from-flag"])
    config = build_config(options)
    preset = PRESETS["representation"]["l_NTR"]
    assert (options.model, config.max_steps, config.K, config.l_NTR) == ("from-flag", 9, 3, preset)
    assert preset != SophonConfig(output_dir=str(tmp_path)).l_NTR


def test_null_means_none_and_wins_over_the_preset(tmp_path):
    path = write(
        tmp_path, model="m", original="o", restricted="r", preset="representation", strategy_space=None, epochs=None
    )
    options = read_options("protect", [path])
    assert options.strategy_space is None and build_config(options).strategy_space is None
    assert build_config(read_options("protect", [*MODEL, "--preset", "representation"])).strategy_space is not None
    assert read_options("attack", [path]).epochs is None


def test_words_without_flags_stand_for_the_names_in_the_usage(tmp_path):
    path = write(tmp_path, output_dir="x")
    assert read_options("report", ["here"]).output_dir == "here"
    options = read_options("publish", ["here", "user/name", "--private"])
    assert (options.output_dir, options.repo_id, options.private) == ("here", "user/name", True)
    options = read_options("publish", [path, "user/name"])
    assert (options.output_dir, options.repo_id) == ("x", "user/name")
    assert read_options("audit", ["user/name"]).protected == "user/name"
    assert read_options("audit", [path]).protected is None


def test_the_configuration_that_the_readme_shows_is_one(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "config.yaml"
    path.write_text(readme.split("```yaml\n")[1].split("```")[0])
    config = build_config(read_options("protect", [str(path)]))
    assert (config.probe_depths, config.output_dir) == (2, "protected")
    assert read_options("attack", [str(path)]).output_dir == "protected"


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_are_known_by_their_names(name):
    assert read_options("attack", [*MODEL, "--sweep", name]).sweep == name and load_sweep(name)


# A metric.


METRIC = """
import datasets
import evaluate

class Share(evaluate.Metric):
    def _info(self):
        columns = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(columns)
        )

    def _compute(self, predictions, references, of=1):
        return {"share": of * sum(p == r for p, r in zip(predictions, references)) / len(predictions)}
"""


def test_a_metric_is_a_name_or_a_module_with_its_arguments(tmp_path):
    module = tmp_path / "share" / "share.py"
    module.parent.mkdir()
    module.write_text(METRIC)
    options = read_options("protect", [*MODEL, "--metric", "mse"])
    assert load_metric(options) == "mse" and load_metric(read_options("audit", [])) is None
    metric = load_metric(read_options("attack", [write(tmp_path, metric={str(module): {"of": 100}}), *MODEL]))
    assert (metric.name, metric.greater_is_better) == ("share", True)
    assert metric.compute({"predictions": [0, 1], "references": [0, 0]}) == 50
    with pytest.raises(ValueError, match="--metric is .*: give a name, or one with arguments"):
        load_metric(read_options("attack", [*MODEL, "--metric", '{"a": {}, "b": {}}']))


def test_captions_are_encoded_by_the_pipeline_that_is_named(tmp_path, capsys):
    save_pipeline(tmp_path / "pipeline")
    data = captioned(1, 5).rename_columns({"image": "picture", "text": "words"})
    data.to_parquet(tmp_path / "pictures.parquet")
    told = {"restricted": str(tmp_path / "pictures.parquet"), "restricted_input": ["picture"]}
    configuration = write(tmp_path, model=str(tmp_path / "pipeline"), restricted_caption="words", **told)
    options = read_options("attack", [configuration])
    training, test = load_split(options, "restricted"), load_split(options, "restricted", test=True)
    assert set(training.column_names) == {"latents", "encoder_hidden_states"} and (len(training), len(test)) == (4, 1)
    expected = encode_captions(tmp_path / "pipeline", data, image_column="picture", caption_column="words")
    assert test["latents"][0] in expected["latents"][:]
    assert columns(options)["input_columns"]["restricted"] is None
    attack.run(read_options("attack", [configuration, "--protected", str(tmp_path / "pipeline"), "--dry_run"]))
    assert "In all about" in capsys.readouterr().out  # The column of the pictures is no longer looked for.
    options = read_options("audit", [write(tmp_path, restricted_caption="words", **told)])
    with pytest.raises(ValueError, match="restricted_caption is 'words': name by --model the pipeline"):
        load_split(options, "restricted")


# Mistakes.


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("protect", [*MODEL, "--alhpa", "1"], "There is no flag '--alhpa'. Did you mean '--alpha'?"),
        ("protect", [*MODEL, "--restricted_clases", "a"], "Did you mean '--restricted_classes'?"),
        ("protect", [*MODEL, "--max_step", "1"], "Did you mean '--max_steps'?"),
        ("protect", [*MODEL, "-x"], "There is no flag '-x'"),
        ("protect", [*MODEL, "stray"], "'stray' belongs to no flag"),
        ("protect", [*MODEL, "--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
        ("protect", [*MODEL, "--adversary_half", "perhaps"], "'perhaps' is neither true nor false"),
        ("protect", [*MODEL, "--save_strategy", "stpes"], "invalid choice: 'stpes'"),
        ("protect", [*MODEL, "--strategy_space", "{bad"], "'{bad' is not JSON"),
        ("protect", ["--model", "m"], "required, as flags or in a configuration file: --original, --restricted"),
        ("attack", ["--model", "m"], "--restricted"),
        ("attack", [*MODEL, "--sweep", "stron"], "There is no sweep 'stron'. Did you mean 'strong'?"),
        ("attack", [*MODEL, "--sweep", "none.yaml"], "there is no file 'none.yaml'"),
        ("attack", [*MODEL, "--accelerate_config", "two_gpu"], "Did you mean 'two_gpus'?"),
        ("publish", ["a", "b", "c"], "'c' belongs to no flag"),
        ("publish", ["--private"], "--repo_id"),
    ],
)
def test_bad_flags(command, arguments, message):
    with pytest.raises(ValueError) as told:
        read_options(command, arguments)
    assert message in str(told.value) and f"`sophon-hf {command} --help`" in str(told.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("l_NRT: 3", "l_NRT: no command has such a key. Did you mean 'l_NTR'?"),
        ("- model", "must hold fields (`model: ...`), not a list"),
        ("a: [", "is not YAML"),
        ("K: 1\nmax_steps: 2\nK: 3", "is not YAML: it has 'K' twice"),
        ("max_steps: many", "--max_steps: invalid int value: 'many'"),
        ("max_steps: null", "max_steps: it cannot be null"),
        ("original_split: null", "original_split: it cannot be null"),
        ("model: {a: 1}", "model: it takes one value"),
        ("restricted_classes: [yes, no]", "put it in quotes"),
        ("no_adversary_half: true", "Did you mean 'adversary_half'?"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError) as told:
        read_options("protect", [str(tmp_path / "config.yaml"), *MODEL])
    assert message in str(told.value) and str(tmp_path / "config.yaml") in str(told.value)


def test_a_missing_file_is_said_to_be_missing():
    with pytest.raises(FileNotFoundError, match=r"There is no file 'missing.yaml'"):
        read_options("protect", ["missing.yaml"])


def test_an_unquoted_no_is_a_strategy(tmp_path):
    (tmp_path / "config.yaml").write_text("save_strategy: no\nrestricted_classes: [1, b]\nbf16: yes\nfsdp: true")
    options = read_options("protect", [str(tmp_path / "config.yaml"), *MODEL])
    assert options.fsdp is True and read_options("protect", [*MODEL, "--fsdp", "--K", "1"]).fsdp is True
    assert (options.save_strategy, options.restricted_classes, options.bf16) == ("no", ["1", "b"], True)


# Help.


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        read_options(command, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and text.startswith(f"usage: sophon-hf {command} [CONFIG.yaml]")


def test_the_help_of_protect_explains_its_own_fields_and_not_the_trainers(capsys):
    with pytest.raises(SystemExit):
        read_options("protect", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("--restricted_classes", "--l_FTS", "--l_NTR", "--alpha", "--strategy_space", "--resume"):
        assert name in text
    assert "(default: 0.0003)" in text and "transformers.TrainingArguments" in text
    assert "--warmup_steps" not in text and "--no_adversary_half" not in text


def test_the_help_of_attacks_tells_the_defaults(capsys):
    for command in ("attack", "audit"):
        with pytest.raises(SystemExit):
            read_options(command, ["--help"])
        text = " ".join(capsys.readouterr().out.split())
        for default in ("strong", "[0, 1, 2]", "train"):
            assert f"(default: {default})" in text


def test_a_word_means_the_same_in_every_command(capsys):
    texts: dict[str, set[str]] = {}
    for command in ("protect", "attack", "report", "publish", "audit"):
        with pytest.raises(SystemExit):
            read_options(command, ["--help"])
        for entry in capsys.readouterr().out.split("options:")[1].split("\n  --")[1:]:
            texts.setdefault(entry.split()[0], set()).add("".join(entry.split("\n\n")[0].split()))
    assert {"model", "original", "restricted", "output_dir"} <= texts.keys()
    assert {name: found for name, found in texts.items() if len(found) > 1} == {}
