"""Settings that every test runs under."""

import os

# Before torch is imported: more threads than cores slow the small models here down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.hookimpl(optionalhook=True)  # also without xdist
def pytest_xdist_make_scheduler(config, log):
    """Tests of a file share what it sets up, those of distributed/ even their runs: they stay in one worker.

    Marks for `--dist loadgroup` would say the same, but under pytest 9.2 xdist 3.8 does not see them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            folder, _, file = nodeid.partition("::")[0].rpartition("/")
            return folder if folder.endswith("/distributed") else f"{folder}/{file}"

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps precision and plugins of the first accelerator in a process; tests must not share them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and datasets on disk, as the scripts load them."""
    from toy import olmo2
    from toy_trl import rows, tokenizer

    folder = tmp_path_factory.mktemp("files")
    olmo2().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, kind in (("corpus", "text"), ("chats", "chat")):
        (folder / name).mkdir()
        rows(kind).to_json(folder / name / "train.jsonl")
        rows(kind, count=8).to_json(folder / name / "test.jsonl")
    (folder / "corpus.txt").write_text("\n".join(row["text"] for row in rows("text")))
    return folder


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """Models and data on disk, as `hf-sam evaluate` names them."""
    from shelf import fill

    return fill(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Runs a command: `launch("pretrain", argv, ranks=2, strategy="fsdp2", kill_at=file)`."""
    from launching import Launcher

    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def training_files(tmp_path_factory):
    """A model with a tokenizer, text to train on, and examples to fine-tune on."""
    from toy import olmo2
    from toy_pretraining import write_documents
    from toy_trl import rows, tokenizer

    folder = tmp_path_factory.mktemp("training")
    olmo2().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_documents(folder / "text", files=4, documents=200)
    rows("completion", count=160).to_json(folder / "problems.jsonl")
    rows("text", count=40).to_json(folder / "old.jsonl")
    return folder
