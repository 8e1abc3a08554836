"""Held-out loss and forgetting: by the definition, and whatever the batches look like."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from toy import olmo2, token_dataset
from toy_evaluation import FailsAfter, busy, document_losses, held_out, moved, sharp_olmo2, token_rows, unchanged

from hf_sam.instruments import HeldOutData, held_out_loss
from hf_sam.statistics import HeldOutLoss, forgetting

# Sums of fp32 losses near 4 nats in another order.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def model():
    return sharp_olmo2()


@pytest.fixture(scope="module")
def expected(model):
    return document_losses(model, token_rows())


def test_loss_is_that_of_the_definition(model, expected):
    measured = held_out_loss(model, held_out())
    np.testing.assert_allclose(measured.document_losses, expected, rtol=TOLERANCE)
    assert measured.document_tokens.tolist() == [len(row["input_ids"]) - 1 for row in token_rows()]
    assert measured.loss == pytest.approx(expected.sum() / measured.tokens, rel=TOLERANCE)
    assert measured.perplexity == pytest.approx(np.exp(measured.loss))
    # The mean of the documents' means is something else.
    means = expected / measured.document_tokens
    assert abs(means.mean() - measured.loss) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_loss_does_not_depend_on_the_batch_size(model, expected, batch_size):
    measured = held_out_loss(model, held_out(), batch_size=batch_size)
    np.testing.assert_allclose(measured.document_losses, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("make", [sharp_olmo2, "gpt2"], ids=["rotary", "absolute positions"])
def test_loss_does_not_depend_on_the_side_of_the_padding(make):
    model = make() if callable(make) else gpt2()
    expected = document_losses(model, token_rows())
    for side in ("left", "right"):
        batches = held_out().batches(5, side)
        assert any((batch.inputs["attention_mask"][:, 0] == 0).any() for batch in batches) == (side == "left")
        measured = held_out_loss(model, batches)
        np.testing.assert_allclose(measured.document_losses, expected, rtol=TOLERANCE, err_msg=side)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def test_loss_of_a_dataloader_is_that_of_its_rows(model, expected):
    def pad(rows):
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([[0] * (length - len(row["input_ids"])) + row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    measured = held_out_loss(model, DataLoader(token_rows(), batch_size=5, collate_fn=pad))
    np.testing.assert_allclose(measured.document_losses, expected, rtol=TOLERANCE)


def test_loss_of_packed_batches_is_that_of_their_documents(model, expected):
    rows = token_rows()

    def pack(rows):
        ids = [token for row in rows for token in row["input_ids"]]
        positions = [position for row in rows for position in range(len(row["input_ids"]))]
        return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}

    measured = held_out_loss(model, DataLoader(rows, batch_size=4, collate_fn=pack))
    np.testing.assert_allclose(measured.document_losses, expected, rtol=TOLERANCE)


def test_only_labelled_tokens_count(model):
    rows = [{**row, "labels": [-100] * 2 + row["input_ids"][2:]} for row in token_rows()]
    measured = held_out_loss(model, rows)
    assert measured.document_tokens.tolist() == [len(row["input_ids"]) - 2 for row in rows]
    firsts = document_losses(model, [{"input_ids": row["input_ids"][:2]} for row in rows])
    np.testing.assert_allclose(measured.document_losses, document_losses(model, token_rows()) - firsts, rtol=1e-5)


def test_padding_of_given_rows_does_not_count(model):
    padded = token_dataset(rows=8)
    rows = [{"input_ids": row["input_ids"][row["attention_mask"].bool()].tolist()} for row in padded]
    np.testing.assert_array_equal(
        held_out_loss(model, padded).document_losses, held_out_loss(model, rows).document_losses
    )


def test_long_documents_are_cut_so_that_each_token_is_predicted_once():
    (document,) = token_rows(count=1, low=20, high=20)
    data = HeldOutData([document], max_length=7)
    assert data.tokens == 19
    predicted = [label for row in data.rows for label in row.labels if label != -100]
    assert predicted == document["input_ids"][1:]
    assert all(len(row.input_ids) <= 7 for row in data.rows)
    # Each is predicted from the tokens of its own row.
    model = olmo2()
    pieces = document_losses(model, [{"input_ids": row.input_ids} for row in data.rows])
    assert held_out_loss(model, data).document_losses[0] == pytest.approx(pieces.sum(), rel=TOLERANCE)


def test_forgetting_is_the_difference_and_pairs_documents(model):
    other = moved(model, 0.02)
    before, after = held_out_loss(model, held_out(200)), held_out_loss(other, held_out(200))
    lost = forgetting(before, after)
    assert lost.value == pytest.approx(after.loss - before.loss, abs=1e-9)
    assert lost.low < lost.value < lost.high
    # The two losses vary over documents far more than their difference does.
    assert lost.high - lost.low < 0.5 * (before.interval().high - before.interval().low)


def test_interval_agrees_with_the_delta_method():
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 150, 400)
    growth = generator.normal(0.3, 0.5, 400) * tokens
    before = HeldOutLoss(np.zeros(400), tokens)
    lost = forgetting(before, HeldOutLoss(growth, tokens))
    ratio = growth.sum() / tokens.sum()
    error = np.std(growth - ratio * tokens) / np.sqrt(400) / tokens.mean()
    assert lost.value == pytest.approx(ratio)
    # Student's t instead of the normal distribution, and residuals that are corrected for the fit.
    assert lost.high - lost.low == pytest.approx(2 * 1.96 * error, rel=0.02)


def test_forgetting_refuses_other_documents(model):
    with pytest.raises(ValueError, match="different tokens"):
        forgetting(held_out_loss(model, held_out(4)), held_out_loss(model, held_out(5)))


def test_record_survives_json(model):
    measured = held_out_loss(model, held_out())
    again = HeldOutLoss.from_dict(measured.to_dict())
    np.testing.assert_array_equal(again.document_losses, measured.document_losses)
    assert again.loss == measured.loss


def test_the_model_is_left_as_it_was():
    model = busy(sharp_olmo2())
    with unchanged(model):
        held_out_loss(model, held_out())
    failing = FailsAfter(model, calls=1)
    with unchanged(failing), pytest.raises(KeyboardInterrupt):
        held_out_loss(failing, held_out(), batch_size=4)


def test_dropout_is_off_during_the_measurement():
    model = olmo2(dropout=0.5).train()
    assert held_out_loss(model, held_out()).loss == held_out_loss(model.eval(), held_out()).loss


def test_logits_that_are_not_finite_are_an_error():
    model = sharp_olmo2()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="document 0"):
        held_out_loss(model, held_out())
