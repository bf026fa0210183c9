"""Whatever does not fit is refused before any work, by a message that says what to do."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from points import TinyNet, make_points
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from sophon_hf import ClassificationTask, SophonConfig, SophonTrainer, split_domain
from sophon_hf.protection.checks import refuse_model

SPACE = {"learning_rates": [1e-2], "batch_sizes": [8]}


def config(tmp_path, **changes) -> SophonConfig:
    settings = {
        "max_steps": 1,
        "K": 2,
        "strategy_space": SPACE,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "tolerance": 1.0,
    }
    return SophonConfig(str(tmp_path / "output"), **{**settings, **changes})


@pytest.fixture
def build(tmp_path, model):
    """Builds a trainer of the tiny model, with some parts replaced."""

    def build(model=model, restricted=None, original=None, **kwargs) -> SophonTrainer:
        space = kwargs.pop("space", SPACE)
        return SophonTrainer(
            model,
            make_points(1) if restricted is None else restricted,
            make_points(2) if original is None else original,
            config(tmp_path, strategy_space=space),
            **kwargs,
        )

    return build


def unlabelled() -> datasets.Dataset:
    return make_points(1).remove_columns("label")


def with_value(row: int, value: float) -> datasets.Dataset:
    x = np.asarray(make_points(1)["x"])
    x[row, 2] = value
    return make_points(1).remove_columns("x").add_column("x", x.tolist())


def with_labels(labels: list) -> datasets.Dataset:
    points = make_points(1, examples=len(labels)).remove_columns("label")
    return datasets.Dataset.from_dict({"x": points["x"], "label": labels})


def mislabelled() -> datasets.Dataset:
    """Three classes of which the features name two."""
    features = datasets.Features(
        {"x": datasets.List(datasets.Value("float32")), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    table = with_labels([0, 1, 2, 2] * 10).with_format("arrow")[:]
    return datasets.Dataset(table.cast(features.arrow_schema), info=datasets.DatasetInfo(features=features))


def of_width(width: int) -> datasets.Dataset:
    """Points of another width than the six numbers that the model takes."""
    x = np.random.default_rng(0).normal(size=(60, width))
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": [i % 3 for i in range(60)]})


# ---- Data of either domain ----

BAD_DOMAINS = {
    "missing folder": (lambda: "./no/such/folder", FileNotFoundError, "no file or folder './no/such/folder'.*Hub id"),
    "no data set at all": (lambda: 7, TypeError, "Hub id, a file, a folder, or a Dataset.*not int"),
    "empty": (lambda: make_points(1).select([]), ValueError, "is empty: check its path, its split"),
    "no such split": (
        lambda: datasets.DatasetDict(dev=make_points(1)),
        ValueError,
        r"no split 'train'; it has \['dev'\]. Name one",
    ),
    "too few to hold some out": (
        lambda: make_points(1).select([0, 1]),
        ValueError,
        "has 2 examples: it takes at least 4",
    ),
    "no labels": (
        unlabelled,
        ValueError,
        r"{name} domain has no label column among \['x'\]: a classifier.*`--restricted_label`.*label_columns",
    ),
    "a missing label": (lambda: with_labels([0, 1, 2, None] * 10), ValueError, "10 examples have no label.*row 3"),
    "hidden labels": (
        lambda: with_labels([0, 1, 2, -1] * 10),
        ValueError,
        "the {name} domain holds -1 beside 0.*`select_classes`",
    ),
    "several labels each": (lambda: with_labels([["a"], ["b"]] * 20), ValueError, "at row 0, which is no class"),
    "NaN": (lambda: with_value(5, float("nan")), ValueError, "1 examples of the {name} domain hold NaN.*'x'.*drop or"),
    "infinity": (lambda: with_value(5, float("inf")), ValueError, "hold NaN or infinity in 'x'.*drop or repair"),
    "labels beyond their features": (
        mislabelled,
        ValueError,
        "{name} domain has label 2, but its features name 2 classes: repair the features or the labels",
    ),
    "nothing the model takes": (
        lambda: make_points(1).remove_columns("x").add_column("number", list(range(120))),
        ValueError,
        r"{name} domain has no column that the model could take.*the model takes \['x'\]",
    ),
    "text without a tokenizer": (
        lambda: make_points(1).remove_columns("x").add_column("text", ["word"] * 120),
        ValueError,
        "holds text: save the model's tokenizer with it",
    ),
    "one example again and again": (
        lambda: make_points(1).select([0, 1] + [2] * 118).map(lambda row: {"x": [1.0] * 6}),
        ValueError,
        "examples of the {name} domain are the same to the model: look at",
    ),
    "two columns to choose from": (
        lambda: make_points(1).rename_column("x", "a").add_column("b", make_points(2)["x"]),
        ValueError,
        r"{name} domain has several columns of tensors, \['a', 'b'\]: name one",
    ),
    "examples of different sizes": (
        lambda: datasets.Dataset.from_dict(
            {"x": [np.zeros((2, 3 + i % 2)).tolist() for i in range(40)], "label": [i % 3 for i in range(40)]}
        ),
        ValueError,
        "different sizes.*`processing_class`",
    ),
    # Sizes that the model cannot run are known as soon as it is run once on each domain.
    "another width": (lambda: of_width(7), ValueError, "{name} domain"),
}


@pytest.mark.parametrize("name", ["restricted", "original"])
@pytest.mark.parametrize("case", BAD_DOMAINS)
def test_a_domain_that_does_not_fit_is_refused(build, case, name):
    make, error, message = BAD_DOMAINS[case]
    with pytest.raises(error, match=message.replace("{name}", name)):
        build(**{name: make()})


@pytest.mark.parametrize("name", ["restricted", "original"])
def test_data_to_evaluate_on_is_looked_at_too(build, name):
    held_out = {"original": make_points(3), "restricted": make_points(4)}
    with pytest.raises(ValueError, match="no label column"):
        build(eval_dataset={**held_out, name: unlabelled()})
    with pytest.raises(ValueError, match=f"{name} domain"):
        build(eval_dataset={**held_out, name: of_width(7)})


@pytest.mark.parametrize(
    "columns", [{"input_columns": {"restricted": "pixels"}}, {"label_columns": {"restricted": "kind"}}]
)
def test_an_unknown_column_is_refused(build, columns):
    with pytest.raises(ValueError, match=r"no column '(pixels|kind)'.*has \['x', 'label'\]"):
        build(**columns)


@pytest.mark.parametrize("columns", [{"input_columns": {"restrict": "x"}}, {"label_columns": {"restrict": "label"}}])
def test_columns_of_an_unknown_domain_are_refused(build, columns):
    with pytest.raises(ValueError, match="original.*restricted"):
        build(**columns)


@pytest.mark.parametrize(
    "keys",
    [("original",), ("original", "restricted", "other"), ("test",), ()],
    ids=lambda keys: " ".join(keys) or "none",
)
def test_other_keys_of_eval_dataset_are_refused(build, keys):
    with pytest.raises(ValueError, match="eval_dataset has the keys.*'original' and 'restricted'"):
        build(eval_dataset={key: make_points(3) for key in keys})


def test_one_data_set_to_evaluate_on_is_refused(build):
    with pytest.raises((ValueError, TypeError), match="'original' and 'restricted'"):
        build(eval_dataset=make_points(3))
    with pytest.raises((ValueError, TypeError), match="'?original'?"):
        build().evaluate(make_points(3))


def test_a_hub_id_without_a_network_is_refused(build):
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(ConnectionError, match="Hub cannot be reached.*pass its folder"):
        build(restricted="nobody/no-such-data")
    with pytest.raises(OSError, match="Hub cannot be reached.*pass its folder"):
        build(model="nobody/no-such-model")


def test_a_missing_folder_of_a_model_is_refused(build):
    with pytest.raises(OSError, match="no/such/folder"):
        build(model="./no/such/folder")


def test_arguments_of_the_trainer_alone_are_refused(model, tmp_path):
    with pytest.raises(TypeError, match="args is a TrainingArguments: give a SophonConfig"):
        SophonTrainer(model, make_points(1), make_points(2), TrainingArguments(str(tmp_path), use_cpu=True))


# ---- Classes ----


def test_domains_and_held_out_data_are_apart(build):
    with pytest.raises(ValueError, match="are the same data"):
        build(restricted=make_points(2))
    for name in ("original", "restricted"):
        data = {"original": make_points(3), "restricted": make_points(4)}
        data[name] = make_points(2 if name == "original" else 1)
        with pytest.raises(ValueError, match=rf"eval_dataset\['{name}'\] is the data"):
            build(eval_dataset=data)


def test_a_part_of_the_original_domain_is_no_restricted_one(build, caplog):
    with pytest.raises(ValueError, match="are the same data"):
        build(restricted=split_domain(make_points(2))[0], original=make_points(2))
    mixed = datasets.concatenate_datasets([make_points(1), make_points(2).select(range(3))])
    build(restricted=mixed, original=make_points(2))
    assert "examples are in the original domain too, which is to be kept: drop them" in caplog.text


def test_domains_that_are_not_kept_in_memory_are_compared_by_a_part(build, caplog):
    def transformed(dataset: datasets.Dataset) -> datasets.Dataset:
        return dataset.with_transform(lambda rows: {**rows, "x": torch.randn(len(rows["x"]), 6)})

    original = make_points(2, examples=2600)
    with pytest.raises(ValueError, match="are the same data"):
        build(restricted=transformed(make_points(2)), original=transformed(make_points(2)))
    assert "looked at" not in caplog.text, "they were looked at as a whole"
    build(restricted=transformed(original.select(range(0, 2600, 40))), original=transformed(original))
    assert "only 2000 examples of each are looked at for what both hold" in caplog.text
    assert "examples are in the original domain too" in caplog.text


@pytest.mark.parametrize(
    ("value", "told"),
    [(float("nan"), "parameters hold NaN or infinity, head.weight"), (3e38, "prediction for the original domain is")],
)
def test_a_model_that_predicts_no_number_is_refused(build, model, value, told):
    with torch.no_grad():
        model.head.weight[0] = value
    with pytest.raises(ValueError, match=told):
        build()


def test_a_tolerance_in_points_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="tolerance is 5, but it is a share of accuracy: 0.05 means 5 points"):
        SophonTrainer(model, make_points(1), make_points(2), config(tmp_path, tolerance=5))


@pytest.mark.parametrize("held_out", [False, True])
def test_original_labels_outside_the_head_are_refused(build, held_out):
    more = make_points(2, num_classes=5)
    data = {"eval_dataset": {"original": more, "restricted": make_points(3)}} if held_out else {"original": more}
    with pytest.raises(ValueError, match="label 4, but the model's head has 3 outputs.*select_classes"):
        build(**data)


class WithHead(nn.Module):
    """A head of two layers, which only its name tells."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_labels_outside_a_head_of_several_layers_are_refused(build):
    """How many outputs there are is what the model returns, whatever its head is made of."""
    task = ClassificationTask(head="head")
    with pytest.raises(ValueError, match="label 4, but the model's head has 3 outputs"):
        build(WithHead(), original=make_points(2, num_classes=5), task=task)
    with pytest.raises(ValueError, match="5 classes and the model's head 3 outputs"):
        space = {**SPACE, "initializations": ["direct"]}
        build(WithHead(), restricted=make_points(1, num_classes=5), task=task, space=space)


def test_a_head_that_cannot_be_replaced_is_refused(build):
    """Only new heads fit five classes, and a head of several layers cannot be made anew for them."""
    with pytest.raises(ValueError, match="[Hh]ead"):
        build(WithHead(), restricted=make_points(1, num_classes=5), task=ClassificationTask(head="head"))


def test_more_restricted_classes_than_outputs_are_refused_where_every_strategy_is_direct(build):
    space = {**SPACE, "initializations": ["direct"]}
    with pytest.raises(ValueError, match="5 classes and the model's head 3 outputs.*Add initialization 'new_head'"):
        build(restricted=make_points(1, num_classes=5), space=space)


def test_a_single_restricted_class_is_refused(build):
    with pytest.raises(ValueError, match="one class only"):
        build(restricted=make_points(1).filter(lambda row: row["label"] == 1))


# ---- The model ----


def test_a_frozen_model_is_refused(build, model):
    with pytest.raises(ValueError, match="frozen.*Set requires_grad"):
        build(model.requires_grad_(False))


class WithoutHead(nn.Module):
    """Three logits out of six numbers by two layers that have other widths."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 4)

    def forward(self, x):
        return self.body(x)[:, :3]


class WithoutLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x):
        return {"scores": self.body(x)}


def test_a_head_that_cannot_be_found_is_refused(build):
    with pytest.raises(ValueError, match=r"head cannot be found. Pass its name.*\['body'\]"):
        build(WithoutHead())
    with pytest.raises(ValueError, match="no module 'classifier' that could be its head; it has .*'head'"):
        build(task=ClassificationTask(head="classifier"))


def test_a_model_without_logits_is_refused(build):
    with pytest.raises(ValueError, match="returned dict without logits.*`.logits`"):
        build(WithoutLogits())


def test_more_new_blocks_than_the_model_has_are_refused(build):
    with pytest.raises(
        ValueError, match=r"re-initialises 3 blocks, but the model has 0.*reinitialized_blocks to at most 0.*\[0\]"
    ):
        build(space={**SPACE, "initializations": ["new_head"], "reinitialized_blocks": [3]})


def test_a_model_without_normalisation_is_refused_where_that_is_all_to_transfer(build):
    with pytest.raises(ValueError, match="no parameter of TinyNet to update"):
        build(TinyNet(batch_norm=False), space={**SPACE, "initializations": ["direct"], "transfers": ["norm"]})


def test_a_suppression_loss_of_another_task_is_refused(tmp_path, model):
    args = config(tmp_path, suppression_loss="denial_of_service")
    with pytest.raises(ValueError, match="does not fit the task: choose one of inverse_cross_entropy, kl_from_uniform"):
        SophonTrainer(model, make_points(1), make_points(2), args)


# ---- Images ----


def unet(channels: int = 3) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )


def tensors(*shape: int, examples: int = 24) -> datasets.Dataset:
    values = np.random.default_rng(0).normal(size=(examples, *shape)).astype(np.float32)
    return datasets.Dataset.from_dict({"sample": values.tolist()})


def images(size: int, mode: str = "RGB") -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 255, (24, size, size, 3), dtype=np.uint8)
    return datasets.Dataset.from_dict({"image": [Image.fromarray(p).convert(mode) for p in pixels]})


@pytest.mark.parametrize("name", ["restricted", "original"])
@pytest.mark.parametrize("shape", [(3, 12, 12), (3, 7, 7), (1, 8, 8), (8, 8)], ids=str)
def test_ready_tensors_of_another_size_than_the_unets_are_refused(build, shape, name):
    data = {"restricted": tensors(3, 8, 8), "original": tensors(3, 8, 8), name: tensors(*shape)}
    with pytest.raises(ValueError, match=rf"{name} domain.*8"):
        build(unet(), **data)


@pytest.mark.parametrize(("size", "mode", "channels"), [(12, "RGB", 3), (8, "L", 3), (12, "RGB", 1)])
def test_images_are_brought_to_the_size_and_channels_of_the_unet(build, size, mode, channels):
    trainer = build(unet(channels), restricted=images(size, mode), original=images(size, mode).select(range(20)))
    for domain in trainer.domains.values():
        pixels = domain.rows(torch.arange(2))["sample"]
        assert pixels.shape == (2, channels, 8, 8)
        assert -1 <= pixels.min() < 0 < pixels.max() <= 1


def test_images_for_a_unet_of_other_channels_than_images_have_are_refused(build):
    with pytest.raises(ValueError, match="takes 2 channels, images have 1, 3 or 4: pass ready tensors"):
        build(unet(2), restricted=images(8), original=images(8))


def test_one_restricted_image_is_refused(build):
    """R_i and T_i are disjoint, so there must be one for each."""
    held_out = {name: tensors(3, 8, 8) for name in ("original", "restricted")}
    with pytest.raises(ValueError, match="restricted domain.*(1|one) example"):
        build(unet(), restricted=tensors(3, 8, 8, examples=1), original=tensors(3, 8, 8), eval_dataset=held_out)


# ---- The model, as it is loaded ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"weights are {dtype}: call its `float..` first.*bf16=True"):
        SophonTrainer(TinyNet().to(dtype), make_points(1), make_points(2), config(tmp_path))


def test_batch_norm_that_is_synchronised_over_processes_is_refused(tmp_path):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet())
    processes = SimpleNamespace(gradient_checkpointing=False, process_index=0, world_size=2)
    with pytest.raises(ValueError, match="SyncBatchNorm.*leave it with BatchNorm"):
        refuse_model(model, processes)
    refuse_model(TinyNet(), processes)


# ---- The output folder ----


class NoWork(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise AssertionError("work has begun")


@pytest.mark.parametrize("held", ["checkpoint-20/trainer_state.json", "model.safetensors"])
def test_an_output_folder_that_holds_another_run_is_refused(build, tmp_path, held):
    path = tmp_path / "output" / held
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ValueError, match=f"holds another run .{held.split('/')[0]}.*choose another output_dir"):
        build(callbacks=[NoWork()]).train()
    assert path.exists()


def test_an_output_folder_with_other_things_is_taken(build, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "notes.txt").write_text("mine")
    build().train()
    assert (tmp_path / "output" / "notes.txt").read_text() == "mine"


def test_probes_need_two_held_out_examples_of_the_restricted_domain(tmp_path):
    """A probe that is fitted on none of them has no finite gradient."""
    model, args = TinyNet(batch_norm=False), config(tmp_path, probe_depths=1)
    domains = {"eval_dataset": {"original": make_points(3), "restricted": make_points(4)}}
    with pytest.raises(ValueError, match="has 14 examples to protect with.*Give at least 15"):
        SophonTrainer(model, make_points(1, examples=14), make_points(2), args, **domains)
    trainer = SophonTrainer(model, make_points(1, examples=15), make_points(2), args, **domains)
    trainer.train()
    assert trainer.guard.state.dropped == 0
