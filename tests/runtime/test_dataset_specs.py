"""What names of data mean."""

import gzip
import json

import datasets
import pytest

from hf_sam.runtime.dataset_specs import data_files, open_split, parse_spec


def lines(count=3, column="text"):
    return "".join(json.dumps({column: f"line {i}"}) + "\n" for i in range(count))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_patterns_folders_and_compressed_files(tmp_path, streaming):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(lines())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.jsonl").write_text(lines(5))
    with gzip.open(tmp_path / "e.json.gz", "wt") as file:
        file.write(lines(2))
    (tmp_path / "f.txt").write_text("one\ntwo\n\nthree")
    for place, count in (("a.jsonl", 3), ("*.jsonl", 6), ("c", 5), ("e.json.gz", 2), ("f.txt", 2)):
        split = open_split(str(tmp_path / place), streaming=streaming)
        assert isinstance(split, datasets.IterableDataset if streaming else datasets.Dataset)
        assert len(list(split)) == count, place


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_and_splits(tmp_path, streaming):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert len(list(open_split(str(tmp_path / "one"), streaming=streaming))) == 2
    assert len(list(open_split(str(tmp_path / "two"), streaming=streaming))) == 1
    assert len(list(open_split(str(tmp_path / "two"), streaming=streaming, preferred=("train",)))) == 2
    with pytest.raises(ValueError, match="no split 'dev', only train, test"):
        open_split(str(tmp_path / "two"), "dev", streaming=streaming)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name:en@v1", ("org/name", "en", "v1", None)),
        ("org/name/python", ("org/name", None, None, "python")),
        ("org/name/a/b:en@v1", ("org/name", "en", "v1", "a/b")),
        ("name", ("name", None, None, None)),
    ],
)
def test_ids_of_the_hub(monkeypatch, place, expected):
    asked = []

    def load(path, config, *, streaming, revision=None, data_dir=None):
        asked.append((path, config, revision, data_dir))
        return {"train": "found"}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_split(place) == "found"
    assert asked == [expected]


def test_names_and_files(tmp_path):
    (tmp_path / "old.jsonl").write_text(lines())
    assert parse_spec(f"mine={tmp_path}/old.jsonl") == ("mine", f"{tmp_path}/old.jsonl")
    assert parse_spec(str(tmp_path / "old.jsonl"))[0] == "old"
    assert data_files(str(tmp_path / "*.jsonl")) == [str(tmp_path / "old.jsonl")]
    assert data_files("org/name") == []


@pytest.mark.parametrize(
    ("files", "place", "message"),
    [
        ({"a.jsonl": ""}, "a.jsonl", "the file is empty"),
        ({"a.jsonl": "", "b.jsonl": lines()}, "*.jsonl", "a.jsonl is empty"),
        ({"a.jsonl": lines(), "b.txt": "x"}, "*", "have different types: json, text"),
        ({"a.bin": "x"}, "a.bin", "files end in one of .jsonl"),
        ({}, "none.jsonl", "it cannot be loaded"),
    ],
)
def test_what_is_wrong_is_reported(tmp_path, files, place, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_split(str(tmp_path / place))
