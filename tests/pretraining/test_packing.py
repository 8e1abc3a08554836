"""Packing loses no token and makes none, for whatever documents, and however many workers tokenize."""

import pickle
import random

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from toy import olmo2
from toy_pretraining import ids_of, tokens_of, write_documents
from toy_trl import WORDS, tokenizer

from hf_sam.pretraining import MixedRows, Mixture, PackedRows, TextSource, tokenized

IGNORED = -100


def random_texts(generator: random.Random) -> list[str]:
    longest = generator.choice([1, 5, 60])
    return [
        " ".join(generator.choices(WORDS, k=generator.randint(0, longest))) for _ in range(generator.randint(1, 30))
    ]


def as_tokens(texts: list[str], chunks: int = 1) -> Dataset:
    tok = tokenizer()
    documents = [[*tok(text)["input_ids"], tok.eos_token_id] if text else [] for text in texts]
    parts = np.array_split(np.arange(len(documents)), chunks)
    features = Features({"input_ids": List(Value("int32"))})
    return concatenate_datasets(
        [Dataset.from_dict({"input_ids": [documents[i] for i in part]}, features) for part in parts if len(part)]
    )


@pytest.mark.parametrize("case", range(40))
def test_every_token_is_in_one_row_and_in_order(case):
    generator = random.Random(case)
    texts = random_texts(generator)
    length = generator.choice([2, 3, 7, 16, 200])
    rows = PackedRows(as_tokens(texts, chunks=generator.randint(1, 4)), length, padding=0)
    expected = tokens_of(texts, tokenizer())
    assert rows.tokens == len(expected)
    got = [rows[index] for index in range(len(rows))]
    assert ids_of(got) == expected
    assert all(len(row["input_ids"]) == length for row in got)
    # All rows are full but the last one, and what fills that up is not predicted.
    labels = [label for row in got for label in row["labels"].tolist()]
    assert labels[: len(expected)] == expected
    assert set(labels[len(expected) :]) <= {IGNORED}
    assert len(labels) - len(expected) < length
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("case", range(15))
def test_positions_restart_at_each_document_and_nowhere_else(case):
    generator = random.Random(100 + case)
    texts = random_texts(generator)
    length = generator.choice([3, 8, 50])
    rows = PackedRows(as_tokens(texts, chunks=generator.randint(1, 3)), length, padding=0, document_mask=True)
    end = tokenizer().eos_token_id
    for row in (rows[index] for index in range(len(rows))):
        ids, positions, labels = (row[name].tolist() for name in ("input_ids", "position_ids", "labels"))
        place = 0
        for index, token in enumerate(ids):
            begins = index > 0 and ids[index - 1] == end
            place = 0 if begins else place
            assert positions[index] == place
            if begins:
                assert labels[index] == IGNORED
            elif token and index:  # the first of a row is never predicted
                assert labels[index] == token
            place += 1


def test_attention_stays_inside_of_documents_where_asked():
    texts = ["w1 w2 w3 w4", "w5 w6 w7", "w8 w9 w1 w2 w3"]
    tok, model = tokenizer(), olmo2().eval()
    (row,) = list(map(PackedRows(as_tokens(texts), 15, padding=0, document_mask=True).__getitem__, range(1)))
    packed = model(**{name: value[None] for name, value in row.items() if name != "labels"}, use_cache=False).logits[0]
    begin = 0
    for text in texts:
        ids = torch.tensor([[*tok(text)["input_ids"], tok.eos_token_id]])
        alone = model(input_ids=ids).logits[0]
        torch.testing.assert_close(packed[begin : begin + ids.shape[1]], alone, atol=1e-5, rtol=0)
        begin += ids.shape[1]
    # Without the mask, a document sees those in front of it.
    (row,) = list(map(PackedRows(as_tokens(texts), 15, padding=0).__getitem__, range(1)))
    through = model(input_ids=row["input_ids"][None]).logits[0]
    assert (through[6] - packed[6]).abs().max() > 1e-3


def test_the_same_for_one_and_two_workers(tmp_path):
    source = TextSource(write_documents(tmp_path / "data"))
    one, two = (PackedRows(tokenized(source, tokenizer(), workers), 16, padding=0) for workers in (1, 2))
    assert len(one) == len(two) > 50
    for index in range(len(one)):
        assert torch.equal(one[index]["input_ids"], two[index]["input_ids"])


def test_rows_survive_the_way_to_a_worker(tmp_path):
    source = TextSource(write_documents(tmp_path / "data"))
    rows = PackedRows(tokenized(source, tokenizer()), 16, padding=0)
    assert ids_of(rows[i] for i in range(9)) == ids_of(pickle.loads(pickle.dumps(rows))[i] for i in range(9))


def mixed(parts, weights=None, block=16, seed=3, **options):
    return MixedRows(parts, Mixture(weights or [1.0] * len(parts), block, seed), **options)


def part(number: int, rows: int) -> PackedRows:
    """Rows of two tokens: the number of the part, and that of the row."""
    tokens = Dataset.from_dict({"input_ids": [[number, row] for row in range(rows)]})
    return PackedRows(tokens, 2, padding=0)


def test_one_pass_visits_every_row_once_in_another_order_each_pass():
    rows = mixed([part(0, 50)], rows=100, passes=2)
    seen = [rows[i]["input_ids"][1].item() for i in range(100)]
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))
    assert seen[:50] != seen[50:] != list(range(50))


def test_shares_of_a_mixture_are_those_asked_for_and_no_row_comes_twice_in_a_pass():
    rows = mixed([part(0, 100), part(1, 300)], weights=[1, 3], rows=400)
    seen = [tuple(rows[i]["input_ids"].tolist()) for i in range(400)]
    assert len(set(seen)) == 400
    for block in range(25):
        sources = [source for source, _ in seen[16 * block : 16 * block + 16]]
        assert sources.count(0) == 4
        assert sources != sorted(sources)


def test_no_row_comes_twice_where_shares_do_not_divide_blocks():
    """A third of blocks of 16 rows is 5 or 6 rows, and the same in all of them."""
    rows = mixed([part(0, 500), part(1, 1100)], weights=[1, 2], rows=1600)
    assert len({tuple(rows[i]["input_ids"].tolist()) for i in range(1600)}) == 1600
    with pytest.raises(ValueError, match="passes"):
        mixed([part(0, 500), part(1, 1099)], weights=[1, 2], rows=1600)
    with pytest.raises(ValueError, match="passes"):
        mixed([part(0, 100)], rows=101)


def test_the_order_does_not_depend_on_where_it_is_entered_or_how_long_it_is():
    parts = [part(0, 100), part(1, 300)]
    whole = mixed(parts, [1, 3], rows=200)
    later = mixed(parts, [1, 3], first=70, rows=90)
    assert [later[i]["input_ids"].tolist() for i in range(90)] == [
        whole[70 + i]["input_ids"].tolist() for i in range(90)
    ]


def test_too_few_rows_are_reported_with_the_passes_that_it_would_take():
    with pytest.raises(
        ValueError, match=r"'small' has 200 tokens, but the run takes 500.*2\.5 passes.*num_train_epochs"
    ):
        mixed([part(0, 100)], rows=250, names=["small"])
    with pytest.raises(ValueError, match="only empty documents"):
        mixed([PackedRows(as_tokens(["", ""]), 2, padding=0)], rows=1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1, 0], "must be positive"), ([1, float("nan")], "must be positive"), ([1, 1e-4], "less than one")],
)
def test_wrong_weights_are_reported(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(weights)


def test_missing_columns_and_what_is_no_text_are_reported(tmp_path):
    pattern = write_documents(tmp_path / "data")
    with pytest.raises(ValueError, match=r"no column 'body', only 'text'"):
        tokenized(TextSource(pattern, column="body"), tokenizer())
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": null}\n')
    with pytest.raises(ValueError, match="holds NoneType instead of text in the column 'text'"):
        tokenized(TextSource(str(tmp_path / "bad.jsonl")), tokenizer())
    with pytest.raises(ValueError, match=r"Training data '.*none.jsonl'.*cannot be loaded"):
        TextSource(str(tmp_path / "none.jsonl")).open(streaming=True)
    with pytest.raises(ValueError, match="no split 'nope', only train"):
        TextSource(pattern, split="nope").open(streaming=True)
