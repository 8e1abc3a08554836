"""EWC and L2-to-base: the penalty counts once in an optimizer step, in any company."""

import pytest
import torch
from toy import arguments, olmo2, step_logs, token_dataset, weights
from toy_evaluation import Quadratic
from transformers import Trainer

from hf_sam import SAMArguments, SAMMixin, SAMTrainer
from hf_sam.baselines import (
    EWCArguments,
    EWCMixin,
    EWCTrainer,
    EWCTrainingArguments,
    L2Arguments,
    L2Mixin,
    L2Trainer,
    L2TrainingArguments,
    save_fisher,
)
from hf_sam.step.reference import sam_gradient


def importance(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(param.shape, generator=generator) for name, param in model.named_parameters()}


@pytest.fixture
def fisher(tmp_path):
    save_fisher(importance(olmo2()), tmp_path / "fisher.safetensors")
    return str(tmp_path / "fisher.safetensors")


def host(cls, config, folder, **settings):
    args = arguments(folder, config, **{"max_steps": 4, "max_grad_norm": 0.0, **settings})
    return cls(model=olmo2(), args=args, train_dataset=token_dataset())


def by_hand(folder, strength, factors, **settings):
    """The host's own training with the penalty in the gradient of the optimizer step, by a hook of the optimizer."""
    trainer = host(Trainer, type(arguments(folder)), folder, **settings)
    base = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.create_optimizer()
    named = dict(trainer.model.named_parameters())

    def pull(optimizer, *_):
        with torch.no_grad():
            for name, param in named.items():
                param.grad += strength * factors[name] * (param - base[name])

    trainer.optimizer.register_step_pre_hook(pull)
    trainer.train()
    return weights(trainer.model)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_penalty_counts_once_a_step(tmp_path, fisher, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    factors = importance(olmo2())
    ewc = host(EWCTrainer, EWCTrainingArguments, tmp_path, ewc_lambda=50.0, ewc_fisher=fisher, **settings)
    ewc.train()
    expected = by_hand(tmp_path, 50.0, factors, **settings)
    plain = by_hand(tmp_path, 0.0, factors, **settings)
    for name, value in weights(ewc.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(expected[name], plain[name], atol=1e-3) for name in expected)


def test_l2_is_ewc_with_equal_importance(tmp_path):
    trainer = host(L2Trainer, L2TrainingArguments, tmp_path, l2_lambda=50.0)
    trainer.train()
    ones = {name: torch.ones_like(param) for name, param in olmo2().named_parameters()}
    expected = by_hand(tmp_path, 50.0, ones)
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_ewc_on_a_quadratic_ends_where_it_must(tmp_path):
    """Minimum of g.w + w.Aw / 2 + lambda / 2 sum F w^2 is -(A + lambda F)^-1 g."""
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    slope, factors, strength = torch.tensor([0.3, -0.2]), torch.tensor([1.0, 4.0]), 0.5
    save_fisher({"weight": factors}, tmp_path / "fisher.safetensors")

    class WithLoss(Quadratic):
        def forward(self, input_ids, labels=None):
            loss = 1 + self.slope @ self.weight + self.weight @ self.matrix @ self.weight / 2
            return {"loss": loss}

    args = arguments(
        tmp_path,
        EWCTrainingArguments,
        max_steps=300,
        optim="sgd",
        learning_rate=0.2,
        max_grad_norm=0.0,
        gradient_accumulation_steps=2,
        ewc_lambda=strength,
        ewc_fisher=str(tmp_path / "fisher.safetensors"),
        logging_steps=300,
    )
    rows = [{"input_ids": torch.zeros(2, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}] * 64
    trainer = EWCTrainer(model=WithLoss(matrix, slope), args=args, train_dataset=rows)
    trainer.train()
    expected = -torch.linalg.solve(matrix + strength * torch.diag(factors), slope)
    torch.testing.assert_close(trainer.model.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    (logged,) = [entry["ewc/penalty"] for entry in trainer.state.log_history if "ewc/penalty" in entry]
    assert logged == pytest.approx((strength / 2 * (factors * expected**2).sum()).item(), rel=1e-3)


def test_loss_in_the_logs_is_without_the_penalty(tmp_path):
    strong = host(L2Trainer, L2TrainingArguments, tmp_path, l2_lambda=1e3)
    plain = host(L2Trainer, L2TrainingArguments, tmp_path)
    for trainer in (strong, plain):
        trainer.train()
    assert step_logs(strong)[0]["loss"] == step_logs(plain)[0]["loss"]
    assert step_logs(strong)[0]["l2/penalty"] == 0
    assert step_logs(strong)[2]["l2/penalty"] > 0
    assert "l2/penalty" not in step_logs(plain)[2]


def test_without_strength_the_step_is_the_hosts_own(tmp_path):
    trainer = host(EWCTrainer, EWCTrainingArguments, tmp_path)
    trainer.train()
    expected = host(Trainer, type(arguments(tmp_path)), tmp_path)
    expected.train()
    assert all(torch.equal(value, weights(expected.model)[name]) for name, value in weights(trainer.model).items())


class Both(EWCMixin, L2Mixin, Trainer):
    """Two penalties."""


def both_arguments():
    from dataclasses import dataclass

    from transformers import TrainingArguments

    @dataclass
    class BothArguments(EWCArguments, L2Arguments, TrainingArguments):
        pass

    return BothArguments


def test_two_penalties_add_up(tmp_path, fisher):
    trainer = host(Both, both_arguments(), tmp_path, ewc_lambda=30.0, ewc_fisher=fisher, l2_lambda=20.0)
    trainer.train()
    factors = {name: 30 * value + 20 for name, value in importance(olmo2()).items()}
    expected = by_hand(tmp_path, 1.0, factors)
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert {"ewc/penalty", "l2/penalty"} <= set(step_logs(trainer)[1])


class InFront(L2Mixin, SAMTrainer):
    """The penalty is taken at w."""


class Behind(SAMMixin, L2Mixin, Trainer):
    """SAM climbs and descends the penalized loss."""


def sam_arguments():
    from dataclasses import dataclass

    from transformers import TrainingArguments

    @dataclass
    class Arguments(L2Arguments, SAMArguments, TrainingArguments):
        pass

    return Arguments


@pytest.mark.parametrize("cls", [InFront, Behind])
def test_with_sam_by_hand(tmp_path, cls):
    """One plain SGD step from a place away from the base, on a loss whose gradients are known."""
    rho, strength, rate = 0.1, 0.7, 0.05
    settings = {"sam_rho": rho, "l2_lambda": strength, "learning_rate": rate, "optim": "sgd", "max_steps": 2}
    trainer = host(cls, sam_arguments(), tmp_path, gradient_accumulation_steps=2, **settings)
    model = olmo2().train()
    base = [param.detach().clone() for param in model.parameters()]
    rows = list(trainer.get_train_dataloader())
    trainer.train()

    def add_penalty():
        for param, b in zip(model.parameters(), base, strict=True):
            param.grad += strength * (param - b).detach()

    def forward_backward(batches):
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        for batch in batches:
            model(**batch, num_items_in_batch=items).loss.backward()
        if cls is Behind:  # the penalty is part of what both passes see
            add_penalty()
        return 0.0

    for step in range(2):
        sam_gradient(dict(model.named_parameters()), [rows[2 * step : 2 * step + 2]], forward_backward, rho)
        if cls is not Behind:
            add_penalty()
        with torch.no_grad():
            for param in model.parameters():
                param -= rate * param.grad
    for (name, value), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)
    # The penalty that is logged is the one at w, where it began: nothing.
    assert step_logs(trainer)[0]["l2/penalty"] == 0


def test_fp16_scales_the_penalty_with_the_loss(tmp_path):
    """The optimizer sees gradients that are divided by the loss scale."""
    from hf_sam.baselines.penalties import _Penalty

    model = olmo2()
    penalty = _Penalty(model, 2.0, None)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1)
    value = penalty.add_gradient(model, scale=1024.0)
    for param in model.parameters():
        torch.testing.assert_close(param.grad, torch.full_like(param, 0.1 * 2 * 1024), rtol=1e-4, atol=0)
    assert value.item() == pytest.approx(0.01 * sum(param.numel() for param in model.parameters()), rel=1e-3)


def test_a_resumed_run_is_pulled_to_the_base(tmp_path):
    settings = {"l2_lambda": 50.0, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = host(L2Trainer, L2TrainingArguments, tmp_path / "whole", **settings)
    whole.train()
    resumed = host(L2Trainer, L2TrainingArguments, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(whole.model)[name])


def test_only_trainable_weights_are_pulled(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(olmo2(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer = L2Trainer(
        model=model,
        args=arguments(tmp_path, L2TrainingArguments, l2_lambda=1.0, max_steps=2),
        train_dataset=token_dataset(),
    )
    trainer.train()
    assert all("lora" in name for name in trainer._penalties["l2"].base)


def test_wrong_combinations_are_reported(tmp_path, fisher):
    with pytest.raises(ValueError, match="ewc_lambda needs ewc_fisher"):
        arguments(tmp_path, EWCTrainingArguments, ewc_lambda=1.0)
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="l2_lambda"):
            arguments(tmp_path, L2TrainingArguments, l2_lambda=value)
    with pytest.raises(ValueError, match=r"no field 'l2_lambda'.*L2Arguments"):
        host(L2Trainer, type(arguments(tmp_path)), tmp_path)
    save_fisher({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no entry for 'model.embed_tokens.weight'"):
        host(
            EWCTrainer,
            EWCTrainingArguments,
            tmp_path,
            ewc_lambda=1.0,
            ewc_fisher=str(tmp_path / "other.safetensors"),
        )
    with pytest.raises(TypeError, match="after a Trainer"):
        type("Wrong", (Trainer, L2Mixin), {})
    with pytest.raises(ValueError, match="List the penalty before SAM"):
        host(Behind, sam_arguments(), tmp_path, sam_rho=0.1, l2_lambda=1.0, sam_ascent_micro_batches=1)


def test_lora_learns_with_the_settings_of_the_paper():
    from peft import get_peft_model

    from hf_sam.baselines import lora_config

    config = lora_config(8, lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    model = get_peft_model(olmo2(), config)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
