"""Small real models and data that the tests share."""

import itertools

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from hf_sam import SAMTrainer, SAMTrainingArguments

VOCABULARY = 64


def olmo2(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32, **overrides) -> Olmo2ForCausalLM:
    """A two-layer OLMo-2 of about 25,000 weights."""
    config = Olmo2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **overrides,
    )
    torch.manual_seed(seed)
    # Not `from_config`: its initialization would depend on the default dtype of the process.
    return Olmo2ForCausalLM(config).to(dtype)


class Branches(torch.nn.Module):
    """A small language model with two output layers, of which each forward pass uses the one it did not use last.

    So the ascent pass leaves one of them without gradient and the descent pass the other: what an expert that is
    routed to in only one of the passes looks like.
    """

    loss_type = "ForCausalLM"  # labels are shifted here, so the host must not count the first one of a row

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = torch.nn.Embedding(VOCABULARY, 16)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(16, VOCABULARY) for _ in range(2))
        calls = itertools.count()
        # Not a state of the module, which would be the same in both passes.
        self.next_branch = lambda: next(calls) % 2

    def forward(self, input_ids, labels=None, num_items_in_batch=None, attention_mask=None, **kwargs):
        logits = self.heads[self.next_branch()](torch.tanh(self.embedding(input_ids)))
        total = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return {"loss": total / num_items_in_batch, "logits": logits}


class Classifier(torch.nn.Module):
    """Not a language model: a small network with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.layers = torch.nn.Sequential(
            # A bias in front of BatchNorm has gradient 0 up to rounding, which Adam would blow up.
            torch.nn.Linear(10, 16, bias=False),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 4),
        )

    def forward(self, features, labels):
        logits = self.layers(features)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def classification_rows(count):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(count, 10, generator=generator)
    return [{"features": x, "labels": (x[:4].argmax())} for x in features]


def token_dataset(rows: int = 64, length: int = 16, seed: int = 1) -> list[dict]:
    """Rows of random tokens of which a varying share is padding, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(seed)
    dataset = []
    for _ in range(rows):
        real = int(torch.randint(length // 2, length + 1, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask = (torch.arange(length) < real).long()
        labels = torch.where(mask.bool(), ids, -100)
        dataset.append({"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask, "labels": labels})
    return dataset


def arguments(output_dir, config_class=SAMTrainingArguments, **overrides) -> SAMTrainingArguments:
    """Arguments of a short, deterministic, quiet run on the CPU."""
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **overrides,
    }
    return config_class(**settings)


def trainer(output_dir, model=None, dataset=None, trainer_class=SAMTrainer, **overrides):
    """A trainer on the toy model and data."""
    return trainer_class(
        model=olmo2() if model is None else model,
        args=arguments(output_dir, **overrides),
        train_dataset=token_dataset() if dataset is None else dataset,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def step_logs(trained) -> list[dict]:
    """The logs of the single training steps, without wall-clock entries."""
    return [entry for entry in trained.state.log_history if "loss" in entry]
