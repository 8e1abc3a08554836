"""Small tokenizers, datasets and models for TRL's trainers, and a reference that takes SAM steps with them."""

import copy
import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import olmo2
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_sam.step.reference import sam_gradient

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(58)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {% generation %}{{ m.content }} <eos>"
    "{% endgeneration %} {% else %}<user> {{ m.content }} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, as many as the toy models know."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def _text(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def rows(kind: str, count: int = 64) -> Dataset:
    """A dataset of the form that a trainer of `kind` expects."""
    generator = random.Random(4)

    def row(i):
        short = lambda: _text(generator, 2, 6)  # noqa: E731
        if kind == "text":
            return {"text": _text(generator, 4, 14)}
        if kind == "completion":
            return {"prompt": short(), "completion": " " + short()}
        if kind == "chat":
            turns = [{"role": "user", "content": short()}, {"role": "assistant", "content": short()}]
            return {"messages": turns}
        if kind == "preference":
            return {"prompt": short(), "chosen": " " + short(), "rejected": " " + short()}
        return {"prompt": short(), "completion": " " + short(), "label": i % 2 == 0}

    return Dataset.from_list([row(i) for i in range(count)])


def reward_model() -> LlamaForSequenceClassification:
    """A classifier with one output."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config)


HOSTS = {
    "sft": (SFTTrainer, SFTConfig, "text", olmo2),
    "dpo": (DPOTrainer, DPOConfig, "preference", olmo2),
    "reward": (RewardTrainer, RewardConfig, "preference", reward_model),
    "kto": (KTOTrainer, KTOConfig, "label", olmo2),
}


def build(
    kind: str,
    output_dir,
    wrap=lambda cls: cls,
    *,
    data=None,
    peft_config=None,
    model=None,
    processing_class=None,
    **overrides,
):
    """TRL's trainer of `kind`, or what `wrap` makes of it and of its config."""
    trainer_class, config_class, form, model_class = HOSTS[kind]
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        # With its usual epsilon, Adam makes steps of the whole learning rate out of gradients that are only rounding.
        "adam_epsilon": 1e-4,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 20,
        "train_sampling_strategy": "sequential",
        **overrides,
    }
    kwargs = {"peft_config": peft_config}
    if kind in ("dpo", "kto") and peft_config is None:
        # Another model than the policy, so that the losses do not start at a stationary point.
        kwargs["ref_model"] = model_class(seed=1)
    return wrap(trainer_class)(
        model=model_class() if model is None else model,
        args=wrap(config_class)(**settings),
        train_dataset=rows(form) if data is None else data,
        processing_class=processing_class or tokenizer(),
        **kwargs,
    )


def reference(host, rho: float, variant: str = "sam") -> list[dict]:
    """What SAM with `host`'s own training step should log: the plain step and AdamW.

    Also trains `host.model`. The metrics that TRL collects are those of the ascent passes.
    """
    args = host.args
    model = host.model.train()
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.0)
    batches = iter(host.get_train_dataloader())
    host.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    logs = []
    for _ in range(args.max_steps):
        window, items = host.get_batch_samples(batches, args.gradient_accumulation_steps, args.device)
        recorded = []

        def forward_backward(batch, items=items, recorded=recorded):
            loss = host.training_step(model, copy.copy(batch), items).item()
            recorded.append((copy.deepcopy(host._metrics["train"]), host._total_train_tokens))
            return loss

        step = sam_gradient(trainable, window, forward_backward, rho, variant)
        # After the last micro-batch of the ascent pass.
        metrics, host._total_train_tokens = recorded[len(window) - 1]
        host._metrics["train"].clear()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable.values(), args.max_grad_norm)
        optimizer.step()
        logs.append(
            {
                "loss": step.loss,
                "sam/perturbed_loss": step.perturbed_loss,
                "sam/ascent_grad_norm": step.ascent_grad_norm,
                "grad_norm": grad_norm.item(),
                **{name: sum(values) / len(values) for name, values in metrics.items()},
            }
        )
    return logs
