"""Models and data by name, and what is wrong with a name."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from toy_evaluation import held_out, sharp_olmo2
from toy_trl import rows, tokenizer

from hf_sam.evaluation.inputs import load_held_out, with_distinct_names
from hf_sam.instruments import HeldOutData, held_out_loss
from hf_sam.quantizers.loading import load_source_quantized
from hf_sam.runtime import models as sources
from hf_sam.runtime.fingerprint import fingerprint_of_folder
from hf_sam.runtime.models import check_same_tokens, find_model


def test_folders_are_models(shelf):
    source = find_model(str(shelf / "base"))
    assert (source.name, source.base) == ("base", None)
    assert find_model(f"AdamW={shelf / 'base'}").name == "AdamW"
    model = source.load(torch.float32)
    assert held_out_loss(model, held_out()).loss == held_out_loss(sharp_olmo2(initializer_range=0.1), held_out()).loss
    assert source.tokenizer().get_vocab() == tokenizer().get_vocab()


def test_adapters_are_merged_into_their_base(shelf):
    from peft import PeftModel

    source = find_model(str(shelf / "adapter"))
    assert source.base.folder == shelf / "base"
    merged = source.load(torch.float32)
    assert not hasattr(merged, "peft_config")
    plain = PeftModel.from_pretrained(find_model(str(shelf / "base")).load(torch.float32), shelf / "adapter")
    assert held_out_loss(merged, held_out()).loss == pytest.approx(held_out_loss(plain, held_out()).loss, rel=1e-6)
    assert held_out_loss(merged, held_out()).loss != held_out_loss(sharp_olmo2(), held_out()).loss
    assert source.tokenizer().get_vocab() == tokenizer().get_vocab()
    small, made_of = load_source_quantized(source, "nf4", torch.float32)
    assert made_of.layers == 14
    assert held_out_loss(small, held_out()).loss == pytest.approx(held_out_loss(merged, held_out()).loss, rel=0.05)


def test_fingerprint_is_of_the_weights(shelf, tmp_path):
    prints = {name: find_model(str(shelf / name)).fingerprint for name in ("base", "tuned1", "tuned2", "adapter")}
    assert len(set(prints.values())) == 4
    shutil.copytree(shelf / "base", tmp_path / "copy")
    assert find_model(str(tmp_path / "copy")).fingerprint == prints["base"]
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert find_model(str(tmp_path / "copy")).fingerprint != prints["base"]


def test_an_adapter_whose_base_is_gone_says_so(shelf, tmp_path):
    shutil.copytree(shelf / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/gone/away"}))
    with pytest.raises(ValueError, match="belongs to '/gone/away', which was not found"):
        find_model(str(tmp_path / "adapter"))


def test_names_are_distinguished(shelf, tmp_path):
    shutil.copytree(shelf / "tuned1", tmp_path / "base")
    first, second = find_model(str(shelf / "base")), find_model(str(tmp_path / "base"))
    assert [s.name for s in with_distinct_names([first, second])] == [str(shelf / "base"), str(tmp_path / "base")]
    with pytest.raises(ValueError, match="named twice"):
        with_distinct_names([first, first])


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_folders_that_are_not_there(spec):
    with pytest.raises(ValueError, match=f"There is no folder '{spec}'"):
        find_model(spec)


def test_folders_that_are_no_models(shelf, tmp_path):
    with pytest.raises(ValueError, match=r"neither config.json nor adapter_config.json"):
        find_model(str(shelf / "splits"))
    shutil.copytree(shelf / "base", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="no weights"):
        find_model(str(tmp_path / "empty"))


def test_offline_a_model_must_be_in_the_cache():
    with pytest.raises(ValueError, match=r"'some/model' at revision 'step1000' is not in the local cache"):
        find_model("some/model@step1000")


class Hub:
    """Stands in for the network: one repository with one revision, as files of a folder."""

    def __init__(self, folder, size=10):
        self.folder, self.size = folder, size
        self.asked = []

    def model_info(self, repo, revision=None, files_metadata=False):
        response = type("Response", (), {"headers": {}, "status_code": 404, "request": None, "url": ""})()
        if repo != "org/model":
            raise RepositoryNotFoundError("404", response=response)
        if revision not in (None, "step1", "refs/pr/1"):
            raise RevisionNotFoundError("404", response=response)
        lfs = type("Lfs", (), {"sha256": "0" * 64})()
        file = type("File", (), {"rfilename": "model.safetensors", "size": self.size, "lfs": lfs})()
        return type("Info", (), {"siblings": [file]})()

    def snapshot_download(self, repo, revision=None, allow_patterns=None, ignore_patterns=None):
        self.asked.append((repo, revision, "*.bin" in allow_patterns))
        return str(self.folder)


@pytest.fixture
def hub(shelf, monkeypatch):
    hub = Hub(shelf / "base")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hub


def test_hub_ids_are_downloaded_at_their_revision(hub):
    for spec in ("org/model@step1", "org/model", "org/model@refs/pr/1"):
        assert find_model(spec).folder == hub.folder
    assert hub.asked == [("org/model", "step1", False), ("org/model", None, False), ("org/model", "refs/pr/1", False)]


def test_what_the_hub_does_not_have_is_reported(hub):
    with pytest.raises(ValueError, match="'org/model' has no revision 'step2'"):
        find_model("org/model@step2")
    with pytest.raises(ValueError, match="no model 'org/other' on the Hub"):
        find_model("org/other")
    assert hub.asked == []


def test_a_download_that_does_not_fit_is_not_begun(hub):
    hub.size = 1 << 60
    with pytest.raises(OSError, match=r"No disk space: the download of 'org/model'.*HF_HOME"):
        find_model("org/model")
    assert hub.asked == []


def test_without_a_connection_the_cache_is_asked(hub, monkeypatch):
    def unreachable(*args, **kwargs):
        raise RuntimeError("no route to host")

    hub.model_info = unreachable
    assert find_model("org/model@step1").folder == hub.folder


@pytest.mark.parametrize("file", ["old.jsonl", "old.parquet", "old.txt", "saved"])
def test_data_of_all_forms_is_the_same(shelf, file):
    name, data = load_held_out(str(shelf / file), tokenizer())
    assert name == file.split(".")[0]
    assert data.fingerprint() == HeldOutData.from_dataset(rows("text"), tokenizer()).fingerprint()


def test_held_out_splits_come_first(shelf):
    assert load_held_out(str(shelf / "splits"), tokenizer())[1].documents == 8
    name, data = load_held_out(f"prose={shelf / 'splits'}", tokenizer(), split="train", max_documents=20)
    assert (name, data.documents) == ("prose", 20)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("old.jsonl", {"column": "body"}, "old.jsonl.*no column 'body'.*'text'"),
        ("splits", {"split": "dev"}, "no split 'dev', only .*train"),
        ("base", {}, "cannot be loaded"),
        ("gone.jsonl", {}, "gone.jsonl.*cannot be loaded"),
        ("broken.jsonl", {}, "cannot be loaded"),
        ("empty.jsonl", {}, "the file is empty"),
        ("blank.txt", {}, "empty|token to predict"),
        ("picture.png", {}, "files end in one of"),
    ],
)
def test_bad_data_is_a_clear_error(shelf, spec, options, message):
    (shelf / "broken.jsonl").write_text('{"text": ')
    (shelf / "empty.jsonl").write_text("")
    (shelf / "blank.txt").write_text("\n\n\n")
    (shelf / "picture.png").write_text("x")
    with pytest.raises(ValueError, match=message):
        load_held_out(str(shelf / spec), tokenizer(), **options)


def test_tokenizers_must_give_the_same_numbers():
    base, other = tokenizer(), tokenizer()
    other.add_tokens(["<think>"])
    check_same_tokens(base, other, "tuned")  # added ones do no harm
    with pytest.raises(ValueError, match=r"of 'base' differ: 1 of 65 tokens .*'<think>'"):
        check_same_tokens(other, base, "base")
    vocabulary = base.get_vocab()
    swapped = {**vocabulary, "w1": vocabulary["w2"], "w2": vocabulary["w1"]}
    with pytest.raises(ValueError, match="2 of 64 tokens"):
        check_same_tokens(base, type("T", (), {"get_vocab": lambda self: swapped})(), "tuned")


def test_rows_longer_than_the_model_are_refused(shelf):
    with pytest.raises(ValueError, match=r"takes 64 tokens at most.*--max_length 64"):
        find_model(str(shelf / "adapter")).check_length(65)
    find_model(str(shelf / "base")).check_length(64)


def test_hash_of_a_folder_is_of_its_content(tmp_path):
    (tmp_path / "a").write_text("1")
    first = fingerprint_of_folder(str(tmp_path))
    (tmp_path / "a").write_text("2")
    assert fingerprint_of_folder(str(tmp_path)) != first
    assert fingerprint_of_folder("") == ""
    assert sources.parse_spec("a b=x/y") == ("a b", "x/y")
