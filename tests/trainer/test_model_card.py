"""The model card of a run, and what is pushed to the hub."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from toy import trainer
from toy_trl import build
from transformers import (
    Trainer,
)

from hf_sam import SAMTrainer, with_sam


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_model_card_tells_settings_sharpness_and_citation(tmp_path, kind):
    settings = {"sam_rho": 0.05, "sam_interval": 2, "anneal_steps": 2, "max_steps": 3}
    # The annealing replaces the constant schedule of the toys.
    settings["lr_scheduler_type"] = "linear"
    run = trainer(tmp_path, **settings) if kind == "trainer" else build("sft", tmp_path, with_sam, **settings)
    run.train()
    for _ in range(2):  # written anew at each save, so nothing may add up
        run.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"hf-sam", "sharpness-aware-minimization"} <= set(card.data.tags)
    assert ("sft" in card.data.tags) == (kind == "sft")
    assert card.text.count("## Sharpness-aware training") == 1
    assert "| `sam_rho` | 0.05 |" in card.text
    assert "| `anneal_steps` | 2.0 |" in card.text
    assert "sam_target_modules" not in card.text
    last = [entry for entry in run.state.log_history if "sam/sharpness" in entry][-1]
    assert f"{last['sam/sharpness']:.4g} (step {last['step']})" in card.text
    assert "2605.02105" in card.text
    assert "mine" in card.text


def test_model_card_of_a_run_with_adapters_keeps_what_peft_wrote(tmp_path):
    from peft import LoraConfig

    run = build("sft", tmp_path, with_sam, sam_rho=0.05, max_steps=1, peft_config=LoraConfig(target_modules=["q_proj"]))
    run.train()
    run.save_model()
    run.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("## Sharpness-aware training") == 1
    assert {"hf-sam", "sft"} <= set(card.data.tags)


def test_model_card_of_annealing_alone_does_not_speak_of_sam(tmp_path):
    run = trainer(tmp_path, anneal_steps=1, lr_scheduler_type="linear", max_steps=2)
    run.train()
    run.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("## Shortened annealing") == 1
    assert "Sharpness-aware training" not in card.text
    assert "| `anneal_steps` | 1.0 |" in card.text
    assert "sam_" not in card.text
    assert "foret" not in card.text
    assert "hf-sam" in card.data.tags
    assert "sharpness-aware-minimization" not in card.data.tags


def test_a_host_that_writes_no_card_gets_none(tmp_path):
    class WithoutCard(Trainer):
        def create_model_card(self, *args, **kwargs):
            pass

    run = trainer(tmp_path, trainer_class=with_sam(WithoutCard), sam_rho=0.05, max_steps=1)
    run.train()
    run.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_model_card_of_a_plain_run_is_the_hosts(tmp_path):
    texts = []
    for trainer_class in (SAMTrainer, Trainer):
        run = trainer(tmp_path, trainer_class=trainer_class, max_steps=1)
        run.train()
        run.create_model_card(model_name="mine")
        texts.append((tmp_path / "README.md").read_text())
    assert texts[0] == texts[1]


def test_push_to_hub_sends_the_card_and_the_unperturbed_weights(tmp_path, monkeypatch):
    sent = {}

    def upload(**kwargs):
        folder = Path(kwargs["folder_path"])
        sent.update(repo=kwargs["repo_id"], files={file.name for file in folder.iterdir()})
        sent["card"] = (folder / "README.md").read_text()
        sent["weights"] = load_file(folder / "model.safetensors")

    # The network begins here; everything before it is the host's.
    class Repo(str):
        repo_id = "someone/mine"

    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: Repo("https://hub/someone/mine"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: upload(**kwargs))
    run = trainer(tmp_path, sam_rho=0.05, max_steps=2, hub_model_id="someone/mine")
    run.train()
    run.push_to_hub(tags=["extra"])
    assert sent["repo"] == "someone/mine"
    assert {"model.safetensors", "training_args.bin", "README.md"} <= sent["files"]
    assert "hf-sam" in sent["card"]
    assert "extra" in sent["card"]
    for name, value in run.model.state_dict().items():
        assert torch.equal(sent["weights"][name], value), name
