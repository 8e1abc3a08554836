"""Held-out data from datasets, and what is wrong with it said in time."""

import pytest
import torch
from datasets import Dataset
from toy_evaluation import held_out, sharp_olmo2, token_rows
from toy_trl import rows, tokenizer

from hf_sam.evaluation import HeldOutData, held_out_loss


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
            "must hold text, but holds int",
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


def test_dataloaders_that_accelerate_prepared_are_refused():
    from accelerate import Accelerator

    loader = torch.utils.data.DataLoader(torch.arange(8).view(2, 4), batch_size=1)
    with pytest.raises(ValueError, match="repeats rows"):
        held_out_loss(sharp_olmo2(), Accelerator(cpu=True).prepare(loader))
