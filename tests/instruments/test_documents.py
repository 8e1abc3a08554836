"""Held-out data from datasets, and what is wrong with it said in time."""

import pytest
import torch
from datasets import Dataset
from toy_evaluation import held_out, sharp_olmo2, token_rows
from toy_trl import rows, tokenizer

from hf_sam.instruments import HeldOutData, held_out_loss
from hf_sam.instruments.batches import batches_of


def test_text_is_tokenized_one_document_a_row():
    data = HeldOutData.from_dataset(rows("text"), tokenizer())
    assert data.documents == 64
    assert data.rows[0].input_ids == tokenizer()(rows("text")[0]["text"])["input_ids"]
    assert HeldOutData.from_dataset(rows("text")["text"], tokenizer()).fingerprint() == data.fingerprint()


def test_only_the_completion_of_a_prompt_counts():
    data = HeldOutData.from_dataset(rows("completion"), tokenizer(), column="completion")
    first = rows("completion")[0]
    counted = [label for label in data.rows[0].labels if label != -100]
    assert counted == [*tokenizer()(first["completion"])["input_ids"], tokenizer().eos_token_id]
    assert data.rows[0].input_ids[: -len(counted)] == tokenizer()(first["prompt"])["input_ids"]


def test_messages_go_through_the_chat_template():
    data = HeldOutData.from_dataset(rows("chat"), tokenizer(), column="messages")
    text = tokenizer().decode(data.rows[0].input_ids)
    assert text.startswith("<user>")
    assert "<assistant>" in text


def test_a_stream_is_read_as_far_as_asked():
    stream = rows("text").to_iterable_dataset()
    data = HeldOutData.from_dataset(stream, tokenizer(), max_documents=5)
    assert data.fingerprint() == HeldOutData.from_dataset(rows("text"), tokenizer(), max_documents=5).fingerprint()
    with pytest.raises(ValueError, match="max_documents"):
        HeldOutData.from_dataset(stream, tokenizer())


def test_the_first_documents_keep_their_numbers():
    data = HeldOutData(token_rows(), max_length=5)
    part = data.first(3)
    assert part.documents == 3
    assert {row.document for row in part.rows} == {0, 1, 2}
    assert part.tokens == sum(len(row["input_ids"]) - 1 for row in token_rows()[:3])


def test_fingerprint_tells_data_apart():
    prints = {held_out().fingerprint(), held_out(seed=1).fingerprint(), held_out(11).fingerprint()}
    prints.add(HeldOutData(token_rows(), max_length=5).fingerprint())
    assert len(prints) == 4
    assert held_out().fingerprint() in prints


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeldOutData.from_dataset(rows("text"), tokenizer(), column="body"), "no column 'body'.*'text'"),
        (lambda: HeldOutData.from_dataset(rows("chat"), tokenizer(), column="text"), "no column 'text'.*'messages'"),
        (lambda: HeldOutData.from_dataset(Dataset.from_dict({"text": []}), tokenizer()), "empty"),
        (
            lambda: HeldOutData.from_dataset(Dataset.from_dict({"text": [1]}), tokenizer()),
            "Row 1 .* a value of type int in the column 'text', which must hold text",
        ),
        (
            lambda: HeldOutData.from_dataset([{"text": "w1 w2"}, {"text": None}], tokenizer()),
            r"Row 2 of the held-out data has nothing \(null\) in the column 'text'",
        ),
        (
            lambda: HeldOutData.from_dataset([{"prompt": None, "completion": "w1"}], tokenizer(), column="completion"),
            r"Row 1 .*nothing \(null\) in the column 'prompt'",
        ),
        (
            lambda: HeldOutData.from_dataset([{"messages": "w1"}], tokenizer(), column="messages"),
            "Row 1 .*type str in the column 'messages', which must hold a list of messages",
        ),
        (lambda: HeldOutData([]), "empty"),
        (lambda: HeldOutData([{"input_ids": [5]}]), "has a token to predict"),
        (lambda: HeldOutData([{"input_ids": [5, 6], "labels": [-100, -100]}]), "has a token to predict"),
        (lambda: HeldOutData([{"input_ids": [5, 6], "labels": [5]}]), "2 input_ids, but 1 labels"),
        (lambda: HeldOutData([{"text": "w1"}]), "from_dataset"),
        (lambda: HeldOutData(token_rows(), max_length=1), "max_length=1"),
    ],
)
def test_bad_data_is_a_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", ["shuffle", "distributed"])
def test_dataloaders_with_an_order_of_their_own_are_refused(sampler):
    rows = [{"input_ids": torch.tensor([3, 4, 5])}] * 8
    if sampler == "shuffle":
        loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    else:
        part = torch.utils.data.DistributedSampler(rows, num_replicas=2, rank=0, shuffle=False)
        loader = torch.utils.data.DataLoader(rows, batch_size=2, sampler=part)
    with pytest.raises(ValueError, match="shuffle=False and no sampler"):
        held_out_loss(sharp_olmo2(), loader)


def test_a_dataloader_draws_nothing_from_the_random_streams():
    loader = torch.utils.data.DataLoader([{"input_ids": torch.tensor([3, 4, 5])}] * 4, batch_size=2)
    before = torch.get_rng_state()
    list(batches_of(loader, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", ["seq_lengths", "position_ids"])
def test_packed_rows_are_taken_apart(how):
    pieces = token_rows(6)
    packed = []
    for start in (0, 3):
        row = {"input_ids": [token for piece in pieces[start : start + 3] for token in piece["input_ids"]]}
        lengths = [len(piece["input_ids"]) for piece in pieces[start : start + 3]]
        if how == "seq_lengths":
            row["seq_lengths"] = lengths
        else:
            row["position_ids"] = [position for length in lengths for position in range(length)]
        packed.append(row)
    assert HeldOutData(packed).fingerprint() == HeldOutData(pieces).fingerprint()


def test_a_packed_batch_with_a_mask_of_ones_is_packed_all_the_same():
    """transformers would let the documents see each other where a mask is given."""
    rows = token_rows(4)
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    positions = torch.tensor([[position for row in rows for position in range(len(row["input_ids"]))]])
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    model = sharp_olmo2()
    expected = held_out_loss(model, rows).document_losses
    assert held_out_loss(model, loader).document_losses == pytest.approx(expected, rel=2e-6)


def test_only_the_assistant_counts_where_the_template_says_who_speaks():
    data = HeldOutData.from_dataset(rows("chat"), tokenizer(), column="messages")
    said = tokenizer().decode([label for label in data.rows[0].labels if label != -100])
    assert said.split() == [*rows("chat")[0]["messages"][1]["content"].split(), "<eos>"]
    plain = tokenizer()
    plain.chat_template = plain.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert HeldOutData.from_dataset(rows("chat"), plain, column="messages").tokens > data.tokens
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        HeldOutData.from_dataset(rows("chat"), plain, column="messages")


def test_dataloaders_that_accelerate_prepared_are_refused():
    from accelerate import Accelerator

    loader = torch.utils.data.DataLoader(torch.arange(8).view(2, 4), batch_size=1)
    with pytest.raises(ValueError, match="repeats rows"):
        held_out_loss(sharp_olmo2(), Accelerator(cpu=True).prepare(loader))
