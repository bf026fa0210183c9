"""One source, any form: files and folders as people have them, with and without splits, readable or not."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from PIL import Image
from raw_data import (
    ALL,
    AUDIO,
    IMAGES,
    RATE,
    TEXT,
    UNET,
    labels,
    picture,
    pictures,
    points,
    sentences,
    sounds,
    tokenizer,
    write_images,
    write_sounds,
)
from transformers import Wav2Vec2FeatureExtractor

from sophon_hf.data.domain import build_domain
from sophon_hf.data.labels import select_classes
from sophon_hf.data.loading import hub_source, load_domain, remember_source
from sophon_hf.data.splits import load_part


def load_splits(*source, **settings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What is trained on, and what is reported on."""
    return load_part(*source, test=False, **settings), load_part(*source, test=True, **settings)


TEXTS = {"text": ["one two", "two", "one", "two two"], "label": ["yes", "no", "no", "yes"]}


def write_file(folder: Path, suffix: str) -> Path:
    table, path = datasets.Dataset.from_dict(TEXTS), folder / f"mine{suffix}"
    if suffix == ".csv":
        table.to_csv(path)
    elif suffix == ".tsv":
        table.to_csv(path, sep="\t")
    elif suffix == ".jsonl":
        table.to_json(path)
    elif suffix == ".json":
        path.write_text(json.dumps(table.to_list()))
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == ".arrow":
        table.save_to_disk(folder)
        return next(folder.glob("*.arrow"))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"])
def test_a_file_is_a_domain(tmp_path, suffix):
    loaded = load_domain(write_file(tmp_path, suffix))
    assert loaded.to_dict() == TEXTS
    assert build_domain(loaded, TEXT, tokenizer()).labels.tolist() == [1, 0, 0, 1]
    assert load_domain(str(tmp_path)).to_dict() == TEXTS, "the folder that holds it is one, too"


def test_what_save_to_disk_wrote_is_a_domain(tmp_path):
    datasets.DatasetDict(train=points(8), test=points(4)).save_to_disk(tmp_path)
    assert load_domain(tmp_path, "test").to_dict() == points(4).to_dict()


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"a.xlsx' is no file that a domain could be read from: .csv, .tsv, .json, "):
        load_domain(tmp_path / "a.xlsx")
    (tmp_path / "broken.json").write_text("{[")
    with pytest.raises(ValueError, match="broken.json' cannot be read as json: "):
        load_domain(tmp_path / "broken.json")
    with pytest.raises(FileNotFoundError, match="There is no file or folder 'nowhere.csv'"):
        load_domain("nowhere.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty' holds no data: put images .PNG, .*or CSV, JSON or Parquet"):
        load_domain(tmp_path / "empty")


def test_a_spreadsheet_may_write_semicolons_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('text;label\n"one, two";yes\n"two ""one""";no\n', encoding="utf-8-sig")
    assert load_domain(path).to_dict() == {"text": ["one, two", 'two "one"'], "label": ["yes", "no"]}
    path.write_text("text;label\n")
    with pytest.raises(ValueError, match="mine.csv' holds no examples"):
        load_domain(path)


def test_a_table_that_is_not_utf_8_is_told_how_to_save_it(tmp_path):
    (tmp_path / "mine.csv").write_bytes("text,label\nStraße,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine.csv' is no text in UTF-8: save it as 'CSV UTF-8'. \('utf-8' codec"):
        load_domain(tmp_path / "mine.csv")


def write_table(folder: Path, form: str, files: list[Path]) -> Path:
    """A table of files as libraries write it, without the features of `datasets`."""
    contents, number = [file.read_bytes() for file in files], list(range(len(files)))
    if form == "paths":
        rows = [f"{file.relative_to(folder)},{i % 3}" for i, file in enumerate(files)]
        (folder / "mine.csv").write_text("\n".join(["file,label", *rows]))
        return folder / "mine.csv"
    cells = contents if form == "bytes" else [{"bytes": content, "path": None} for content in contents]
    if form == "nested":
        cells = [{"file": cell, "note": "of today"} for cell in cells]
    columns = {"file": pyarrow.array(cells), "label": pyarrow.array([i % 3 for i in number])}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "mine.parquet")
    return folder / "mine.parquet"


@pytest.mark.parametrize("form", ["bytes", "fields", "nested", "paths"])
@pytest.mark.parametrize("kind", ["images", "sounds"])
def test_files_in_a_table_are_taken_for_what_they_are(tmp_path, kind, form):
    (tmp_path / "files").mkdir()
    if kind == "images":
        files = [tmp_path / "files" / f"{i}.png" for i in range(6)]
        for i, file in enumerate(files):
            picture("RGB", seed=i).save(file)
        needs, processor = IMAGES, None
    else:
        files = [tmp_path / "files" / f"{i}.wav" for i in range(6)]
        for i, file in enumerate(files):
            soundfile.write(file, np.random.default_rng(i).normal(0, 0.1, 400), RATE)
        needs, processor = AUDIO, Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    dataset = load_domain(write_table(tmp_path, form, files))
    domain = build_domain(dataset, needs, processor, name="restricted")
    table = {"file": [str(file) for file in files], "label": [i % 3 for i in range(6)]}
    feature = datasets.Image() if kind == "images" else datasets.Audio(decode=False)
    same = datasets.Dataset.from_dict(table).cast_column("file", feature)
    assert domain.fingerprint == build_domain(same, needs, processor).fingerprint


def test_files_at_several_depths_are_told_since_their_folders_are_no_classes(tmp_path, caplog):
    write_images(tmp_path)
    assert "label" in load_domain(tmp_path).column_names and not caplog.text
    picture("RGB").save(tmp_path / "train" / "cover.png")
    with pytest.raises(ValueError, match="no label column among .* put each class of pictures or sounds in a folder"):
        build_domain(load_domain(tmp_path), IMAGES)
    said = "no folder is a class, since files lie at several depths: train/dog/2.png and train/cover.png, for instance"
    assert said in caplog.text.replace("\\", "/")


def test_innermost_folders_of_one_name_are_told_to_be_one_class(tmp_path, caplog):
    for place in ("cat/2019", "cat/2020", "dog/2019", "dog/2020"):
        (tmp_path / place).mkdir(parents=True)
        picture("RGB", seed=len(place)).save(tmp_path / place / "0.png")
    assert load_domain(tmp_path).features["label"].names == ["2019", "2020"]
    assert "those of one name are one class: cat/2019 and dog/2019, for instance" in caplog.text.replace("\\", "/")


def test_examples_in_a_list_of_a_json_file_are_read(tmp_path):
    examples = datasets.Dataset.from_dict(TEXTS).to_list()
    (tmp_path / "mine.json").write_text(json.dumps({"version": 1, "by": [], "data": examples}))
    assert load_domain(tmp_path / "mine.json").to_list() == examples


def test_fields_of_a_column_have_names_and_are_no_input_beside_columns(tmp_path):
    rows = [{"text": f"one {'two ' * i}", "note": {"by": "me", "class": ["x", "y"][i % 2]}} for i in range(10)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_domain(path)
    assert dataset.column_names == ["text", "note.by", "note.class"]
    domain = build_domain(dataset, TEXT, tokenizer(), label="note.class")
    assert domain.num_classes == 2 and domain.preprocessor.columns == ("text",)
    named = build_domain(dataset, TEXT, tokenizer(), label="note.class", input_column="note.by")
    assert named.preprocessor.columns == ("note.by",)
    train, test = load_splits(path, column="note.class")
    assert (len(train), len(test)) == (8, 2), "what tells examples apart is not their notes"


def test_fields_beside_sounds_and_pictures_leave_them_and_their_source_alone():
    columns = {"note": [{"by": "me", "n": i} for i in range(4)], "row": list(range(4))}
    for media in (sounds([np.ones(9, np.float32)] * 4), pictures([picture("RGB", seed=i) for i in range(4)])):
        column = media.column_names[0]
        for name, values in columns.items():
            media = media.add_column(name, values)
        remember_source(media, "alice/mine", "0" * 40)
        flat = load_domain(media.select([2, 0]))
        assert set(flat.column_names) == {column, "label", "note.by", "note.n", "row"}
        assert flat.features[column] == media.features[column] and hub_source(flat) == ("alice/mine", "0" * 40)
        assert (flat["row"][:], flat["note.n"][:]) == ([2, 0], [2, 0])


def test_pictures_are_found_beside_their_texts(tmp_path):
    for name in ("train/a/0", "train/b/1", "test/a/2", "test/b/3"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True)
        picture("RGB", seed=int(path.stem)).save(path)
        path.with_suffix(".txt").write_text("a caption")
    training, test = load_splits(tmp_path)
    assert [part.features["label"].names for part in (training, test)] == [["a", "b"]] * 2 and len(training) == 2
    write_file(tmp_path / "test", ".csv")
    for split in ("train", "test"):
        for path in (tmp_path / split).rglob("*.txt"):
            path.unlink()
    assert load_domain(tmp_path).column_names == ["image", "label"]
    (tmp_path / "test").rename(tmp_path / "Test")
    with pytest.raises(ValueError, match=r"The folders \['Test'\] of .* are splits only in lower case"):
        load_domain(tmp_path)


def test_figures_beside_a_table_are_no_data(tmp_path):
    for number in range(3):
        picture("RGB", seed=number).save(tmp_path / f"figure {number}.png")
    (tmp_path / "data").mkdir()
    write_file(tmp_path, ".parquet").rename(tmp_path / "data" / "train.parquet")
    assert load_domain(tmp_path).column_names == ["text", "label"]


def test_folders_with_a_table_of_labels(tmp_path):
    for kind in ("images", "sounds"):
        (tmp_path / kind).mkdir()
        rows = ["file_name,label"]
        for i in range(4):
            name = f"{i}.png" if kind == "images" else f"{i}.flac"
            if kind == "images":
                picture("RGB", seed=i).save(tmp_path / kind / name)
            else:
                soundfile.write(tmp_path / kind / name, np.full(50, i / 10), RATE)
            rows.append(f"{name},{['low', 'high'][i % 2]}")
        (tmp_path / kind / "metadata.csv").write_text("\n".join(rows))
    domain = build_domain(load_domain(tmp_path / "images"), IMAGES)
    assert domain.labels.tolist() == [1, 0, 1, 0] and domain.classes.names == ("high", "low")
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False)
    heard = build_domain(load_domain(tmp_path / "sounds"), AUDIO, extractor)
    assert heard.labels.tolist() == [1, 0, 1, 0]
    assert heard.rows(ALL(4))["input_values"][:, 0].numpy() == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-4)


def test_train_and_test_folders_without_labels_are_for_diffusion(tmp_path):
    for split, count in (("train", 5), ("test", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            picture("RGB", seed=10 * count + i).save(tmp_path / split / f"{i}.png")
    training, test = load_splits(tmp_path)
    assert (len(training), len(test)) == (5, 3) and training.column_names == ["image"]
    assert build_domain(test, UNET).rows(ALL(3))["sample"].shape == (3, 3, 4, 6)
    with pytest.raises(ValueError, match=r"no label column among \['image'\]"):
        build_domain(training, IMAGES)


@pytest.mark.parametrize("source", ["stream", "object"])
def test_streams_of_every_kind_are_read(source):
    broken = pictures([picture("RGB", seed=i) for i in range(4)])
    for made in (broken, sounds([np.full(20, i / 10, dtype=np.float32) for i in range(4)]), sentences()):
        given = made.to_iterable_dataset() if source == "stream" else made
        assert select_classes(given, ["b" if made is broken else 1])["label"][:] == [0] * (len(made) // 2)
        training, test = load_splits(given, test_share=0.5)
        assert len(training) + len(test) == len(made)


# ---- A test split of one's own ----


def test_a_source_without_a_test_split_gets_one(caplog):
    source = labels([0] * 40 + [1] * 10, x=np.random.default_rng(0).normal(size=(50, 2)).tolist())
    training, test = load_splits(source, test_share=0.2)
    assert sorted(training["row"][:] + test["row"][:]) == list(range(50))
    assert [test["label"][:].count(c) for c in (0, 1)] == [8, 2], "stratified"
    assert "The data set has no split 'test': 10 of its 50 examples are kept for tests." in caplog.text
    again, other = load_splits(source), load_splits(source, seed=1)
    assert again[1]["row"][:] == test["row"][:] != other[1]["row"][:]
    in_splits = load_splits(datasets.DatasetDict(train=source))
    assert in_splits[1]["row"][:] == test["row"][:]


def test_a_test_split_that_is_there_is_taken():
    parts = datasets.DatasetDict(train=points(8), test=points(4))
    assert [len(part) for part in load_splits(parts)] == [8, 4]
    with pytest.raises(ValueError, match="no split 'training'; it has"):
        load_splits(parts, "training")
    # With several splits none is made: the one that is meant has another name.
    others = datasets.DatasetDict(train=points(8), dev=points(4))
    assert len(load_part(others, test=False)) == 8
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['dev', 'train'\]. Name one of them"):
        load_part(others, test=True)


def test_no_content_is_on_both_sides():
    texts = [f"Words  number {i // 2}" if i % 2 else f"words number {i // 2}" for i in range(40)]
    source = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(40)]})
    training, test = load_splits(source, test_share=0.5)
    sides = [{" ".join(text.lower().split()) for text in part["text"]} for part in (training, test)]
    assert not sides[0] & sides[1]
    assert len(training) == len(test) == 20, "copies do not change the share"
    with pytest.raises(ValueError, match="test_share is 0.5, which is no example of the 1 different ones"):
        load_splits(datasets.Dataset.from_dict({"text": ["same"] * 6, "label": [0, 1] * 3}), test_share=0.5)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"test_share is {share}, but must lie between 0 and 1"):
            load_splits(source, test_share=share)


def test_files_of_one_sound_are_on_one_side(tmp_path):
    write_sounds(tmp_path)
    for path in list(tmp_path.rglob("*.flac")):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    parts = load_splits(tmp_path, test_share=0.5)
    sides = [{Path(cell["path"]).read_bytes() for cell in part["audio"]} for part in parts]
    assert not sides[0] & sides[1]


# ---- Pairs of texts ----


def test_two_columns_of_text_are_one_input():
    table = datasets.Dataset.from_dict({"premise": ["one", "two"], "hypothesis": ["two two", "one"], "label": [0, 1]})
    domain = build_domain(table, TEXT, tokenizer(), input_column=["premise", "hypothesis"])
    assert domain.rows(ALL(2))["input_ids"].tolist() == [[1, 2, 2], [2, 1, 3]]
    swapped = build_domain(table, TEXT, tokenizer(), input_column=("hypothesis", "premise"))
    assert swapped.rows(ALL(1))["input_ids"].tolist() == [[2, 2, 1]]
    with pytest.raises(ValueError, match=r"columns of text, \[.*\]: name one, or two texts that are one input"):
        build_domain(table, TEXT, tokenizer())
    with pytest.raises(ValueError, match="has no column 'conclusion'"):
        build_domain(table, TEXT, tokenizer(), input_column=["premise", "conclusion"])
    points_twice = points().add_column("y", points()["x"][:])
    with pytest.raises(ValueError, match="several columns of tensors"):
        build_domain(points_twice.rename_column("x", "z"), IMAGES, input_column=["z", "y"])


# ---- What cannot be read ----


def with_a_broken_file(folder: Path, kind: str) -> Path:
    if kind == "image":
        write_images(folder)
        (folder / "train" / "dog" / "1.png").write_bytes(b"no picture")
    else:
        write_sounds(folder)
        (folder / "train" / "low" / "1.flac").write_bytes(b"no sound")
    return folder


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_an_unreadable_file_is_named_or_left_out(tmp_path, kind, caplog):
    folder = with_a_broken_file(tmp_path, kind)
    needs, processor = (IMAGES, None) if kind == "image" else (AUDIO, Wav2Vec2FeatureExtractor(sampling_rate=RATE))
    message = f"Row 4 of the restricted domain cannot be read: column '{kind}': .*`skip_unreadable` leaves out"
    with pytest.raises(ValueError, match=message):
        build_domain(load_domain(folder), needs, processor, name="restricted")
    part, rows = load_domain(folder).select([4, 5]), np.array([4, 5])
    with pytest.raises(ValueError, match=message):
        build_domain(part, needs, processor, name="restricted", row_numbers=rows)
    domain = build_domain(load_domain(folder, skip_unreadable=True), needs, processor)
    assert len(domain) == 5 and domain.labels.tolist() == [0, 0, 0, 1, 1]
    assert f"1 of 6 examples of {folder} cannot be read and are left out, the first at row 4, column" in caplog.text
    training, test = load_splits(folder, test_share=0.4, skip_unreadable=True)
    assert len(training) + len(test) == 5


def test_empty_cells_are_named_or_left_out():
    images = pictures([picture("RGB", seed=i) for i in range(3)] + [None])
    with pytest.raises(ValueError, match="Row 3 of the original domain cannot be read: column 'image': it is missing"):
        build_domain(images, IMAGES, name="original")
    assert len(load_domain(images, skip_unreadable=True)) == 3
    texts = datasets.Dataset.from_dict({"text": [None, "one", "two"], "label": [0, 1, 0]})
    with pytest.raises(ValueError, match="Row 0 of the restricted domain cannot be read: column 'text': it is missing"):
        build_domain(texts, TEXT, tokenizer(), name="restricted")
    with pytest.raises(ValueError, match="Row 2 of the restricted domain cannot be read: column 'text': it is missing"):
        build_domain(texts.select([1, 2, 0]), TEXT, tokenizer(), name="restricted")
    assert load_domain(texts, skip_unreadable=True)["text"][:] == ["one", "two"]
    noted = texts.add_column("score", [None, None, 1.0])
    assert load_domain(noted, skip_unreadable=True)["text"][:] == ["one", "two"], "a number is no text"
    noted = texts.add_column("note", [None, None, "hard"])
    assert load_domain(noted, skip_unreadable=True, inputs=["text"])["text"][:] == ["one", "two"]
    with pytest.raises(ValueError, match=r"There is no input column 'txt'; the data set has \['text', 'note'\] beside"):
        load_domain(noted, skip_unreadable=True, inputs=["txt"])
    noted = texts.add_column("note", ["a hard one", None, None])
    with pytest.raises(ValueError, match=r"'text': it is missing \(column 'note' of that row: 'a hard one'\)\. Repair"):
        build_domain(noted, TEXT, tokenizer(), input_column="text")


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([None, 1.0, float("nan"), 0.0], [1, 3]),
        (["", "cat", None, "dog"], [1, 3]),
        ([1, 0, 0, 1], [0, 1, 2, 3]),
        ([None] * 4, [0, 1, 2, 3]),  # No model that needs labels takes them, and others need none.
    ],
    ids=["numbers", "names", "complete", "none"],
)
def test_examples_without_a_label_are_left_out_with_those_that_cannot_be_read(values, kept, caplog):
    images = pictures([picture("RGB", seed=i) for i in range(4)]).remove_columns("label")
    images = images.add_column("kind", values).add_column("row", list(range(4)))
    assert load_domain(images, skip_unreadable=True, label="kind")["row"][:] == kept
    message = (
        "2 of 4 examples of the data set cannot be read and are left out, the first at row 0, column 'kind': it has"
    )
    assert (message in caplog.text) == (len(kept) == 2)
    assert len(load_domain(images, skip_unreadable=True)) == 4, "another column may be empty"


def test_data_for_another_kind_of_model_and_names_of_examples_are_refused():
    with pytest.raises(ValueError, match="Column 'image' holds images, but the model's .* prepares text: give such"):
        build_domain(pictures([picture("RGB")] * 2), TEXT, tokenizer())
    rows = {"text": ["one two"] * 30, "label": [f"id {i}" for i in range(30)]}
    with pytest.raises(ValueError, match="has 30 different values in 30 rows, which are names of examples"):
        build_domain(datasets.Dataset.from_dict(rows), TEXT, tokenizer(), name="restricted")
    declared = datasets.Dataset.from_dict(rows).class_encode_column("label")
    assert build_domain(declared, TEXT, tokenizer(), name="restricted").num_classes == 30, "classes by declaration"
    rows = {"text": ["one", " "], "label": ["a", "b"]}
    with pytest.raises(ValueError, match="Row 1 of the restricted domain cannot be read: column 'text': it "):
        build_domain(datasets.Dataset.from_dict(rows), TEXT, tokenizer(), name="restricted")


def test_a_class_label_of_minus_one_is_none(caplog):
    texts = datasets.Dataset.from_dict({"text": ["one", "two", None], "label": [1, -1, 0]})
    texts = texts.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    assert load_domain(texts, skip_unreadable=True)["text"][:] == ["one"]
    assert "2 of 3 examples of the data set cannot be read and are left out, the first at row 1" in caplog.text


def test_a_transform_that_fails_is_named_with_its_row():
    def fragile(rows: dict) -> dict:
        if 2 in rows["number"]:
            raise RuntimeError("cannot cut it")
        return rows

    dataset = points(4).add_column("number", list(range(4))).with_transform(fragile)
    with pytest.raises(ValueError, match="Row 2 of the restricted domain cannot be read: .*cannot cut it"):
        build_domain(dataset, IMAGES, name="restricted", input_column="x").rows(ALL(4))


def test_a_stream_with_a_broken_picture_is_read_up_to_its_examples(tmp_path):
    folder = with_a_broken_file(tmp_path, "image")
    stream = load_domain(folder).to_iterable_dataset()
    with pytest.raises(ValueError, match="Row 4 of the restricted domain cannot be read: column 'image'"):
        build_domain(load_domain(stream), IMAGES, name="restricted")


def test_pictures_are_pictures_whatever_their_file(tmp_path):
    pixels = np.asarray(picture("RGB"))
    for name in ("a.bmp", "b.webp"):
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
    loaded = load_domain(tmp_path)
    assert all(np.array_equal(np.asarray(image), pixels) for image in loaded["image"])
