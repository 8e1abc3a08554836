"""PEFT adapters: exactly the trainable weights are perturbed, the base never, quantized or not."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, prepare_model_for_kbit_training
from toy import arguments, olmo2, step_logs, token_dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from hf_sam import SAMTrainer
from hf_sam.step.reference import sam_step

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
METHODS = {
    "lora": LoraConfig(**LORA),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "dora": LoraConfig(**LORA, use_dora=True),
    "lora-embeddings": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def adapted(method: str, base=None):
    torch.manual_seed(5)
    return get_peft_model(olmo2() if base is None else base, METHODS[method])


class WatchesSecondPass(TrainerCallback):
    """Which parameters differ from their values at the start of the step, during the second forward pass."""

    def __init__(self, model):
        self.moved, self.model, self.start = set(), model, None
        model.register_forward_pre_hook(self.look)

    def on_step_begin(self, *args, **kwargs):
        self.start = {name: param.detach().clone() for name, param in self.model.named_parameters()}

    def look(self, *args):
        if self.start is not None:
            self.moved |= {n for n, p in self.model.named_parameters() if not torch.equal(p, self.start[n])}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_follow_sam_by_hand_and_nothing_else_moves(tmp_path, method):
    model, other = adapted(method), adapted(method)
    watcher = WatchesSecondPass(model)
    # With its usual epsilon, Adam makes steps of the whole learning rate out of gradients that are only rounding.
    adam = {"learning_rate": 1e-3, "adam_epsilon": 1e-4}
    run = SAMTrainer(
        model=model,
        args=arguments(tmp_path, sam_rho=0.2, max_steps=3, train_sampling_strategy="sequential", **adam),
        train_dataset=token_dataset(rows=12),
        callbacks=[watcher],
    )
    run.train()
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert watcher.moved == trainable

    # The plain step and AdamW, on the trainable parameters.
    params = [param for param in other.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=adam["learning_rate"], eps=adam["adam_epsilon"], weight_decay=0.0)
    rows = token_dataset(rows=12)
    other.train()
    for step, entry in enumerate(step_logs(run)):
        batch = {key: torch.stack([row[key] for row in rows[4 * step : 4 * step + 4]]) for key in rows[0]}
        tokens = (batch["labels"][:, 1:] != -100).sum()
        expected = sam_step(other, [batch], lambda m, b, tokens=tokens: m(**b, num_items_in_batch=tokens).loss, rho=0.2)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        assert entry["loss"] == pytest.approx(expected.loss, abs=1e-5)
        assert entry["sam/perturbed_loss"] == pytest.approx(expected.perturbed_loss, abs=1e-5)
        assert entry["sam/ascent_grad_norm"] == pytest.approx(expected.ascent_grad_norm, rel=1e-4)
    mine = torch.cat([param.detach().flatten() for param in model.parameters() if param.requires_grad])
    theirs = torch.cat([param.detach().flatten() for param in params])
    # Rounding makes 2e-8. The weights of IA3 stay near 1, so that a radius that is wrong by a tenth makes only 7e-6.
    assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def quantized(tmp_path, **config):
    """The toy model in 4 or 8 bits, loaded as a user would."""
    olmo2().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**config), dtype=torch.float32, device_map="cpu"
    )


def raw_weights(model) -> dict[str, torch.Tensor]:
    """All stored numbers of the frozen part, quantization constants included."""
    stored = {name: param.detach().clone() for name, param in model.named_parameters() if not param.requires_grad}
    for name, param in model.named_parameters():
        for key in ("absmax", "code"):
            state = getattr(param, "quant_state", None)
            if state is not None and getattr(state, key, None) is not None:
                stored[f"{name}.{key}"] = getattr(state, key).clone()
    return stored


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "Linear4bit"),
        ({"load_in_8bit": True}, "Linear8bitLt"),
    ],
    ids=["nf4", "int8"],
)
def test_quantized_base_is_bitwise_unchanged_after_training(tmp_path, config, layer):
    pytest.importorskip("bitsandbytes")
    base = prepare_model_for_kbit_training(quantized(tmp_path, **config), use_gradient_checkpointing=False)
    model = adapted("lora", base)
    assert sum(type(module).__name__ == layer for module in model.modules()) > 0
    before = raw_weights(model)
    adapters = {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
    watcher = WatchesSecondPass(model)
    run = SAMTrainer(
        model=model,
        args=arguments(tmp_path, sam_rho=0.2, max_steps=3, gradient_accumulation_steps=2),
        train_dataset=token_dataset(),
        callbacks=[watcher],
    )
    run.train()
    assert all(entry["sam/sharpness"] > 0 for entry in step_logs(run))
    assert all(entry["sam/perturbation_kept"] == pytest.approx(1.0, abs=1e-3) for entry in step_logs(run))
    assert watcher.moved == set(adapters)
    after = raw_weights(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert all(not torch.equal(value, dict(model.named_parameters())[name]) for name, value in adapters.items())


def test_full_fine_tune_of_a_quantized_model_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantized(tmp_path, load_in_4bit=True)
    with pytest.raises(ValueError, match="adapters"):
        SAMTrainer(model=model, args=arguments(tmp_path, sam_rho=0.05), train_dataset=token_dataset(rows=4))
