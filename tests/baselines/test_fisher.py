"""Fisher information: one gradient a sequence, squared, averaged."""

import pytest
import torch
from toy_evaluation import FailsAfter, busy, held_out, sharp_olmo2, token_rows, unchanged
from transformers.modeling_outputs import CausalLMOutput

from hf_sam.baselines import estimate_fisher, load_fisher, save_fisher
from hf_sam.instruments import HeldOutData


def by_hand(model, rows):
    """The definition, with one backward pass a sequence."""
    fisher = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        loss = torch.nn.functional.cross_entropy(model.eval()(ids).logits[0, :-1], ids[0, 1:])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for value, grad in zip(fisher.values(), grads, strict=True):
            value += grad**2 / len(rows)
    return fisher


def test_fisher_is_that_of_the_definition():
    model = sharp_olmo2()
    with unchanged(model):
        fisher = estimate_fisher(model, held_out(5))
    for name, value in by_hand(model, token_rows(5)).items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-4, atol=1e-9)


def test_it_is_not_the_square_of_the_mean_gradient():
    model = sharp_olmo2()
    fisher = estimate_fisher(model, held_out(5))["lm_head.weight"]
    losses = [
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        for ids in (torch.tensor([row["input_ids"]]) for row in token_rows(5))
    ]
    (grad,) = torch.autograd.grad(sum(losses) / 5, [model.lm_head.weight])
    assert fisher.sum() > 3 * (grad**2).sum()


def test_with_a_batch_it_is_the_square_of_the_gradient_of_the_batch():
    """Losses are means over the tokens of the batch, as in the training loss."""
    model = sharp_olmo2()
    fisher = estimate_fisher(model, held_out(5), batch_size=5)["lm_head.weight"]
    losses = [
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        for ids in (torch.tensor([row["input_ids"]]) for row in token_rows(5))
    ]
    tokens = sum(len(row["input_ids"]) - 1 for row in token_rows(5))
    (grad,) = torch.autograd.grad(sum(losses) / tokens, [model.lm_head.weight])
    torch.testing.assert_close(fisher, grad**2, rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="batch_size=0"):
        estimate_fisher(model, held_out(2), batch_size=0)


def test_only_the_first_sequences_count():
    model = sharp_olmo2()
    some, first = estimate_fisher(model, held_out(8), sequences=3), by_hand(model, token_rows(8)[:3])
    torch.testing.assert_close(some["lm_head.weight"], first["lm_head.weight"], rtol=1e-4, atol=1e-9)


class Unigram(torch.nn.Module):
    """Predicts the same distribution everywhere; its Fisher information is known: p (1 - p) on the diagonal."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, 3))


def test_labels_of_the_model_give_the_fisher_information_proper():
    model = Unigram()
    p = model.logits.detach().softmax(0)
    # Sequences of one prediction; the labels that are there are all token 0.
    draws = 1500
    data = HeldOutData([{"input_ids": [0, 0]}] * draws)
    proper = estimate_fisher(model, data, labels="model")["logits"]
    # A draw gives (1 - p)^2 with probability p, and p^2 otherwise; five standard errors hold for any stream of numbers.
    error = (p * (1 - p)).sqrt() * (1 - 2 * p).abs() / draws**0.5
    assert ((proper - p * (1 - p)).abs() < 5 * error).all()
    empirical = estimate_fisher(model, data, labels="data")["logits"]
    # Every addition in fp32 may lose 6e-8 of the sum.
    expected = (torch.tensor([1.0, 0, 0]) - p) ** 2
    torch.testing.assert_close(empirical, expected, rtol=draws * 6e-8, atol=1e-7)
    assert ((empirical - p * (1 - p)).abs() > 5 * error).any()
    assert torch.equal(estimate_fisher(model, data, labels="model")["logits"], proper)


def test_adapters_have_fisher_information_of_their_own():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(sharp_olmo2(), LoraConfig(r=2, target_modules=["q_proj"]))
    with unchanged(model):
        fisher = estimate_fisher(model, held_out(2))
    assert set(fisher) == {name for name, param in model.named_parameters() if param.requires_grad}


def test_it_is_saved_with_safetensors(tmp_path):
    fisher = estimate_fisher(sharp_olmo2(), held_out(2))
    save_fisher(fisher, tmp_path / "fisher.safetensors", model="toy")
    loaded = load_fisher(tmp_path / "fisher.safetensors")
    assert loaded.keys() == fisher.keys()
    assert all(torch.equal(loaded[name], value) for name, value in fisher.items())
    sharp_olmo2().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="not those that"):
        load_fisher(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="no Fisher information at"):
        load_fisher(tmp_path / "gone.safetensors")


def test_the_model_is_left_as_it_was():
    model = busy(sharp_olmo2())
    with unchanged(model):
        estimate_fisher(model, held_out(2), labels="model")
    failing = FailsAfter(model, calls=1)
    with unchanged(failing), pytest.raises(KeyboardInterrupt):
        estimate_fisher(failing, held_out(3))


def test_senseless_arguments_are_refused():
    with pytest.raises(ValueError, match="labels='both'"):
        estimate_fisher(sharp_olmo2(), held_out(2), labels="both")
    with pytest.raises(ValueError, match="single sequences"):
        estimate_fisher(sharp_olmo2(), torch.utils.data.DataLoader(token_rows(2)))
    with pytest.raises(ValueError, match="fp32 weights"):
        estimate_fisher(sharp_olmo2().half(), held_out(2))
