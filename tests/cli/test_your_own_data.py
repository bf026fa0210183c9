"""The examples of the page "Your own data": each from a folder to a published, audited model, by its file alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from classifiers import CASES
from diffusers import DDPMPipeline, DDPMScheduler
from labelled_data import PIXELS, RATE, WORDS, tokenizer, wave_features
from PIL import Image
from published import unet
from transformers import ViTImageProcessor

from sophon_hf.cli.loading import columns, load_split
from sophon_hf.cli.main import main
from sophon_hf.cli.options import read_options

PAGE = (Path(__file__).parents[2] / "docs" / "your-own-data.md").read_text(encoding="utf-8")
EXAMPLES = {
    title.strip(): yaml.safe_load(block)
    for title, block in re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```yaml\n(.*?)```", PAGE, flags=re.S | re.M)
}
# Two iterations and a short attack: what is tried is that everything fits together.
SHORT = {
    "preset": "paper",
    "max_steps": 2,
    "K": 1,
    "N": 1,
    "l_NTR": 1,
    "simulated_examples": 3,
    "strategy_space": {"initializations": ["direct"], "learning_rates": [1e-3], "batch_sizes": [8]},
    "per_device_train_batch_size": 8,
    "eval_steps": 2,
    "tolerance": 1.0,
    "use_cpu": True,
    "disable_tqdm": True,
    "sweep": "sweep.json",
    "seeds": [0],
    "epochs": 1,
}


def picture(kind: int, draw: np.random.Generator, deep: bool = False) -> Image.Image:
    """Noise with a bright bar at the place of its kind."""
    pixels = draw.integers(0, 100, (PIXELS, PIXELS, 3))
    pixels[4 * kind : 4 * kind + 4] += 120
    return Image.fromarray((pixels[..., 0] * 16).astype(np.int32) if deep else pixels.astype(np.uint8))


def write_pictures(folder: str, kinds: list[str], count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    for number, kind in enumerate(kinds):
        Path(folder, kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(number, draw).save(Path(folder, kind, f"{i}.png"))


def save_model(family: str, folder: str, names: list[str]) -> None:
    model = next(case for case in CASES if case.family == family).build()
    config = {**model.config.to_dict(), "id2label": dict(enumerate(names)), "label2id": None}
    torch.manual_seed(0)
    type(model)(type(model.config).from_dict(config)).save_pretrained(folder)


def make_photos() -> None:
    """The model numbers its classes otherwise than folders are read."""
    save_model("ResNetForImageClassification", "my-classifier", ["dog", "cat", "fish"])
    ViTImageProcessor(size={"height": PIXELS, "width": PIXELS}).save_pretrained("my-classifier")
    for split, seed in (("train", 0), ("test", 1)):
        write_pictures(f"photos/{split}", ["cat", "dog"], 20, seed)


def make_people() -> None:
    make_photos()
    write_pictures("people", ["anna", "ben", "cleo"], 25, 2)


def make_texts() -> None:
    save_model("BertForSequenceClassification", "my-text-classifier", ["sport", "art", "law"])
    tokenizer().save_pretrained("my-text-classifier")
    draw = np.random.default_rng(0)

    def texts(number: int) -> str:
        return " ".join([WORDS[number], *draw.choice(WORDS, 5)])

    topics = ["art", "law", "sport"]
    rows = {"text": [texts(i % 3) for i in range(90)], "topic": [topics[i % 3] for i in range(90)]}
    datasets.Dataset.from_dict(rows).to_csv("claims.csv")
    answers = [texts(i % 2) for i in range(90)]
    rows = {"question": [texts(0) for _ in range(90)], "answer": answers, "verdict": [i % 2 == 0 for i in range(90)]}
    datasets.Dataset.from_dict(rows).to_csv("answers.csv")


def make_sounds() -> None:
    save_model("Wav2Vec2ForSequenceClassification", "my-audio-classifier", ["stop", "go"])
    wave_features().save_pretrained("my-audio-classifier")
    time, draw = np.arange(RATE // 5) / RATE, np.random.default_rng(0)

    def write(path: Path, pitch: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(2 * np.pi * (100 + 150 * pitch) * time) / 2 + draw.normal(0, 0.1, len(time))
        soundfile.write(path, np.stack([tone, tone], axis=1), RATE)

    for split in ("train", "test"):
        for pitch, word in enumerate(("stop", "go")):
            for i in range(12):
                write(Path("commands", split, word, f"{i}.wav"), pitch)
    names = ["file_name,label"]
    for i in range(50):
        write(Path("voices", f"{i}.wav"), i % 2)
        names.append(f"{i}.wav,{['high', 'low'][i % 2]}")
    Path("voices", "49.wav").write_bytes(b"no sound")
    Path("voices", "metadata.csv").write_text("\n".join(names))


def make_scans() -> None:
    make_photos()
    draw = np.random.default_rng(3)
    rows = {
        "scan": [picture(i % 3, draw, deep=True) for i in range(75)],
        "finding": [(3, 7, 12)[i % 3] for i in range(75)],
        "patient": [f"patient {i}" for i in range(75)],
    }
    features = {"scan": datasets.Image(), "finding": datasets.Value("int64"), "patient": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet("scans.parquet")


def make_faces() -> None:
    DDPMPipeline(unet(), DDPMScheduler(num_train_timesteps=20)).save_pretrained("my-pipeline")
    for split in ("train", "test"):
        write_pictures(f"landscapes/{split}", [""], 16, len(split))
    write_pictures("faces", [""], 40, 9)


MADE = {
    "Images in folders": (make_people, "people has no split 'test': 15 of its 75 examples are kept for tests"),
    "Texts in CSV files": (make_texts, "classes are numbered in sorted order: 0 = 'False', 1 = 'True'"),
    "Sounds in folders": (
        make_sounds,
        "1 of 50 examples of voices cannot be read and are left out, the first at row 49",
    ),
    "A Parquet file": (make_scans, "classes are numbered in sorted order: 0 = '3', 1 = '7', 2 = '12'"),
    "A diffusion model": (make_faces, "faces has no split 'test': 8 of its 40 examples are kept for tests"),
}


def test_every_example_of_the_page_is_tried():
    assert list(EXAMPLES) == list(MADE)


@pytest.mark.parametrize("title", MADE)
def test_from_a_folder_to_a_published_and_audited_model(hub, tmp_path, monkeypatch, capsys, caplog, title):
    monkeypatch.chdir(tmp_path)
    make, said = MADE[title]
    make()
    start = "direct" if "diffusion" in title else "new_head"
    Path("sweep.json").write_text(json.dumps([{"initialization": start, "learning_rate": 0.01, "batch_size": 8}]))
    Path("config.yaml").write_text(yaml.safe_dump({**EXAMPLES[title], **SHORT}))
    main(["protect", "config.yaml"])
    assert "saved in sophon-output" in capsys.readouterr().out
    assert said in caplog.text
    main(["attack", "config.yaml"])
    results = json.loads(Path("sophon-output/attacks/results.json").read_text())
    assert not [run["error"] for run in results["runs"] if run["error"]]
    attacked = capsys.readouterr().out
    main(["report", "config.yaml"])
    assert attacked.endswith(capsys.readouterr().out)
    main(["publish", "config.yaml", "alice/model"])
    assert "model.safetensors" in " ".join(hub.repositories["alice/model"].files)
    with pytest.raises(SystemExit) as ended:
        main(["audit", "config.yaml", "alice/model"])
    audited = capsys.readouterr().out
    assert ended.value.code == 0, audited
    # Labels, test share and pictures came out the same for who audits.
    assert "The attacks ran on the claim's own data" in audited
    verdicts = json.loads(Path("sophon-output/audit/audit.json").read_text())["verdicts"]
    intact = next(v for v in verdicts if v["claim"] == f"original {results['metric']} after protection")
    assert intact["claimed"] == intact["measured"]


def test_flags_rename_classes_and_give_a_range(tmp_path):
    path = tmp_path / "mine.csv"
    datasets.Dataset.from_dict({"text": list("abcdefghijkl"), "label": ["n1", "n2", "n3"] * 4}).to_csv(path)
    told = ["--model", "m", "--original", str(path), "--restricted", str(path)]
    options = read_options("attack", [*told, "--original_classes", "n3=cat", "n1"])
    kept = [load_split(options, "original", test=test) for test in (False, True)]
    assert all(part.features["label"].names == ["cat", "n1"] for part in kept)
    assert [len(part) for part in kept] == [7, 1]
    options = read_options("attack", [*told, "--restricted_pixel_range", "0"])
    with pytest.raises(ValueError, match=r"restricted_pixel_range is \[0.0\], but takes two numbers: what is black"):
        load_split(options, "restricted")


def test_several_label_columns_are_the_labels_of_an_example(tmp_path):
    path, marks = tmp_path / "mine.csv", ["1,0", "0,0", "1,1", "0,1"]
    path.write_text("\n".join(["text,toxic,threat", *(f"{WORDS[i % 8]} {i},{marks[i % 4]}" for i in range(40))]))
    told = ["--model", "m", "--original", str(path), "--restricted", str(path)]
    options = read_options("attack", [*told, "--restricted_label", "toxic", "threat"])
    part = load_split(options, "restricted", test=True)
    assert part.column_names == ["text", "labels"] and part.features["labels"].feature.names == ["toxic", "threat"]
    rows = [int(text.split()[1]) for text in part["text"]]
    assert part["labels"][:] == [[[0], [], [0, 1], [1]][row % 4] for row in rows]
    assert sorted(row % 4 for row in rows) == [0, 0, 1, 1, 2, 2, 3, 3], "stratified by the sets of labels"
    assert columns(options)["label_columns"]["restricted"] is None
    for other, said in (("rude", "There is no column 'rude'"), ("text", "'text' holds 'red 0' at row 0: of several")):
        options = read_options("attack", [*told, "--restricted_label", "toxic", other])
        with pytest.raises(ValueError, match=said):
            load_split(options, "restricted")
