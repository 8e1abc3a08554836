"""Budgets in tokens, batches in sequences, and what is wrong with them."""

import json

import pytest
import torch
from toy import olmo2, token_dataset

from hf_sam.planning import accumulation_for, parse_tokens, steps_for
from hf_sam.pretraining import DataArguments, PretrainingArguments
from hf_sam.pretraining.arguments import checkpoint_step


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("50B", 50 * 10**9),
        ("1.2M", 1_200_000),
        ("500k", 500_000),
        ("3e9", 3 * 10**9),
        ("2_000", 2000),
        (77, 77),
        ("1T", 10**12),
    ],
)
def test_tokens_are_read_as_people_write_them(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "many", "-5M", "0", "1.5", "0.0001k", "nan", "inf", "5X", "B"])
def test_what_is_no_number_of_tokens_is_reported(text):
    with pytest.raises(ValueError, match="is not a number of tokens: write 50B"):
        parse_tokens(text)


def test_steps_hold_the_whole_budget():
    assert steps_for(1000, 10, 10) == 10
    assert steps_for(1001, 10, 10) == 11
    with pytest.raises(ValueError, match="less than the 100 tokens of one optimizer step"):
        steps_for(99, 10, 10)


def test_a_batch_is_accumulated_or_refused():
    assert accumulation_for(1024, 4, 8) == 32
    for sequences, per_device, devices in ((10, 4, 1), (4, 4, 2)):
        with pytest.raises(ValueError, match="is not a multiple of per_device_train_batch_size"):
            accumulation_for(sequences, per_device, devices)


def arguments(tmp_path, **settings) -> PretrainingArguments:
    return PretrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_a_budget_and_a_batch_set_steps_and_accumulation(tmp_path):
    settings = {"train_tokens": "1M", "global_batch_size": 64, "per_device_train_batch_size": 4, "sequence_length": 128}
    args = arguments(tmp_path, **settings)
    assert (args.max_steps, args.gradient_accumulation_steps, args.sequences) == (123, 16, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Say how long to train"),
        ({"max_steps": 1, "sequence_length": 1}, "sequence_length=1 must be 2"),
        ({"max_steps": 1, "global_batch_size": 0}, "global_batch_size=0 must be 1"),
        ({"max_steps": 1, "z_loss": -1}, "z_loss=-1.0 must be 0"),
        ({"train_tokens": "10%"}, "percentage of the steps of anneal_from"),
        ({"train_tokens": "1M", "anneal_from": "nowhere"}, "is not a checkpoint of a training run"),
    ],
)
def test_wrong_settings_are_reported(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **settings)


def test_annealing_counts_from_its_checkpoint(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 200}))
    assert checkpoint_step(tmp_path) == 200
    shared = {"anneal_from": str(tmp_path), "sequence_length": 16, "per_device_train_batch_size": 2}
    args = arguments(tmp_path, train_tokens="5%", **shared)
    assert (args.max_steps, args.anneal_steps, args.first_step) == (210, 10, 200)
    args = arguments(tmp_path, train_tokens="320", **shared)
    assert (args.max_steps, args.anneal_steps) == (210, 10)
    with pytest.raises(ValueError, match="less than one"):
        arguments(tmp_path, train_tokens="0%", **shared)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Say what to train on"),
        ({"datasets": ["a"], "dataset_weights": [1, 2]}, "2 dataset_weights for 1 datasets"),
        ({"datasets": ["a"], "preprocessing_num_workers": 0}, "preprocessing_num_workers=0 must be 1"),
    ],
)
def test_wrong_data_settings_are_reported(settings, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**settings).check()


def test_the_z_loss_is_its_definition_under_accumulation(tmp_path):
    """Against the formula over all tokens of the step; its gradient through the trainer against one backward pass."""
    from hf_sam import SAMTrainer, SAMTrainingArguments
    from hf_sam.pretraining import ZLoss

    data = token_dataset(rows=8)
    batch = torch.utils.data.default_collate(list(data))
    model = olmo2()
    logits = model(input_ids=batch["input_ids"]).logits
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    cross = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    z = torch.log(torch.exp(logits[:, :-1].double()).sum(-1))[counted].square().mean()
    expected = cross + 0.01 * z.float()
    got = ZLoss(0.01)(model(input_ids=batch["input_ids"]), batch["labels"])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(ZLoss(0.01)(model(input_ids=batch["input_ids"]), batch["labels"]), cross)
    expected.backward()
    by_hand = {name: param.grad.clone() for name, param in model.named_parameters()}
    seen = {}

    class Recorded(SAMTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            step = optimizer.step

            def recorded(*a, **k):
                seen.update({n: p.grad.clone() for n, p in self.model.named_parameters()})
                return step(*a, **k)

            optimizer.step = recorded
            return optimizer

    args = SAMTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0,
    )
    trainer = Recorded(model=olmo2(), args=args, train_dataset=data, compute_loss_func=ZLoss(0.01))
    trainer.train()
    assert seen.keys() == by_hand.keys()
    for name, gradient in by_hand.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)
