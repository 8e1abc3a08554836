"""A model and text on disk, and what runs recipes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
for folder in (RECIPES, HERE.parent / "distributed"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@dataclass
class Ended:
    """A recipe that has run: exit status and output of each rank."""

    status: list[int]
    output: list[str]


class Launcher:
    """Runs recipes in processes of their own."""

    def __init__(self, folder: Path):
        self._folder, self._jobs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "zygote.log").open("w"),
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        )
        assert self._answer() == "ready"

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, (self._folder / "zygote.log").read_text()[-3000:]
        return json.loads(line)

    def __call__(self, recipe: str, argv: list[str], ranks: int = 1, strategy: str = "single", **job) -> Ended:
        self._jobs += 1
        log = str(self._folder / f"{self._jobs}-{recipe}.log")
        if strategy not in ("single", "ddp"):
            from strategies import strategy_arguments

            config = self._folder / f"{strategy}.yaml"
            config.write_text(yaml.safe_dump(strategy_arguments(strategy)))
            place = argv.index("--config") + 2
            argv = [*argv[:place], str(config), *argv[place:]]
        job |= {"recipe": recipe, "argv": list(map(str, argv)), "ranks": ranks, "strategy": strategy, "log": log}
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        status = self._answer()
        return Ended(status, [Path(f"{log}.{rank}").read_text() for rank in range(ranks)])

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Runs a recipe: `launch("olmo_mid_sam", argv, ranks=2, strategy="fsdp2", kill_at=file)`."""
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def shelf_of_recipes(tmp_path_factory):
    """A model with a tokenizer, and text to train on and to fine-tune on."""
    from toy import olmo2
    from toy_pretraining import write_documents
    from toy_trl import rows, tokenizer

    folder = tmp_path_factory.mktemp("recipes")
    olmo2().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    write_documents(folder / "text", files=4, documents=200)
    rows("completion", count=160).to_json(folder / "problems.jsonl")
    rows("text", count=40).to_json(folder / "old.jsonl")
    return folder
