"""A stream goes on where it was, to the token, whoever tokenizes and however far it had read ahead."""

import json

import datasets
import numpy as np
import pytest
import torch
from toy_pretraining import ids_of, read_documents, tokens_of, write_documents
from toy_trl import tokenizer

from hf_sam.pretraining import Mixture, PackedStream, TextSource, TokenStream


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("corpus") / "data", files=4, documents=200)


def token_stream(pattern, **options) -> TokenStream:
    return TokenStream(TextSource(pattern), tokenizer(), seed=5, **{"passes": 3, **options})


def stream(pattern, rows=300, block=32, workers=1, weights=(1.0,), **options) -> PackedStream:
    sources = [token_stream(pattern, workers=workers, passes=3) for _ in weights]
    return PackedStream(sources, Mixture(list(weights), block, seed=1), length=16, rows=rows, **options)


def ids(rows) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


def test_a_pass_holds_every_document_once_in_another_order_each_time(corpus):
    texts = [text for file in read_documents(corpus) for text in file]
    documents = sorted(tokens_of([text], tokenizer()) for text in texts if text)
    total = sum(map(len, documents))
    source, orders = token_stream(corpus), []
    for _ in range(3):
        tokens, starts = source.take(total)
        found = [part.tolist() for part in np.split(tokens, np.flatnonzero(starts)[1:])]
        assert sorted(found) == documents
        orders.append(found)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # There is no more.
    assert len(source.take(5)[0]) == 0
    assert "ended after 3 passes" in str(source.exhausted_error())


def test_files_are_read_side_by_side(tmp_path):
    """More of them than are open at once; each has one word of its own."""
    for number in range(12):
        lines = [json.dumps({"text": f"w{number} w{number}"})] * 200
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    source = TokenStream(TextSource(str(tmp_path / "*.jsonl")), tokenizer(), seed=1)
    tokens, _ = source.take(12 * 600)
    assert len({*tokens[: 8 * 64 * 3].tolist()}) == 9  # of eight files, and the end of text
    assert len({*tokens.tolist()}) == 13


@pytest.mark.parametrize("taken", [0, 1, 17, 3000, 5000])
def test_tokens_resume_where_the_state_was_taken(corpus, taken):
    source = token_stream(corpus)
    source.take(taken)
    state = json.loads(json.dumps(source.state()))
    expected = source.take(7000)  # across files, and into the next pass
    for workers in (1, 3):
        other = token_stream(corpus, workers=workers)
        other.load_state(state)
        got = other.take(7000)
        assert (got[0] == expected[0]).all()
        assert (got[1] == expected[1]).all()


def test_rows_hold_the_tokens_of_the_stream_and_are_shuffled_inside_of_blocks(corpus):
    rows = ids(stream(corpus, rows=288))
    tokens = token_stream(corpus).take(288 * 16)[0].tolist()
    plain = [tokens[16 * i : 16 * i + 16] for i in range(288)]
    for block in range(0, 288, 32):
        assert sorted(rows[block : block + 32]) == sorted(plain[block : block + 32])
    assert rows != plain
    assert ids(stream(corpus, rows=288, block=1)) == plain


def test_the_same_for_one_and_two_workers(corpus):
    assert ids(stream(corpus, workers=1)) == ids(stream(corpus, workers=2))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 3.0)])
@pytest.mark.parametrize("consumed", [0, 1, 31, 32, 33, 64, 150, 299])
def test_rows_resume_where_the_run_was_however_far_it_had_read(corpus, consumed, weights):
    whole = ids(stream(corpus, weights=weights))
    interrupted = stream(corpus, weights=weights)
    reader = iter(interrupted)
    for _ in range(min(300, consumed + 7)):  # what the dataloader fetched ahead
        next(reader)
    state = json.loads(json.dumps(interrupted.state(consumed)))
    reader.close()
    resumed = stream(corpus, weights=weights)
    resumed.load_state(state)
    assert ids(resumed) == whole[consumed:]
    # Twice interrupted.
    again = stream(corpus, weights=weights)
    again.load_state(state)
    reader = iter(again)
    for _ in range(min(40, 300 - consumed)):
        next(reader)
    later = min(300, consumed + 40)
    last = stream(corpus, weights=weights)
    last.load_state(again.state(later))
    assert ids(last) == whole[later:]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 3.0)])
def test_a_longer_stream_resumes_behind_a_shorter_one_also_from_the_middle_of_its_last_block(corpus, weights):
    whole = ids(stream(corpus, rows=300, weights=weights))
    short = stream(corpus, rows=110, weights=weights)
    assert ids(short) == whole[:110]
    for row in (104, 110):
        short = stream(corpus, rows=110, weights=weights)
        reader = iter(short)
        for _ in range(row):
            next(reader)
        longer = stream(corpus, rows=300, weights=weights)
        longer.load_state(short.state(row))
        assert ids(longer) == whole[row:]


def test_all_rows_of_the_data_can_be_had_and_no_more(tmp_path):
    spec = write_documents(tmp_path / "data", files=1, documents=50)
    full = len(tokens_of(read_documents(spec)[0], tokenizer())) // 16
    make = lambda rows: PackedStream(  # noqa: E731
        [TokenStream(TextSource(spec), tokenizer())], Mixture([1.0], 32, seed=1), length=16, rows=rows
    )
    assert len(ids(make(full))) == full
    with pytest.raises(ValueError, match=r"ended after 1 pass, before the token budget.*num_train_epochs"):
        ids(make(full + 1))


def test_shares_of_a_mixture_are_those_asked_for(tmp_path):
    specs = [write_documents(tmp_path / name, files=1, documents=300, seed=seed) for seed, name in enumerate("ab")]
    sources = [TokenStream(TextSource(spec), tokenizer()) for spec in specs]
    rows = ids(PackedStream(sources, Mixture([1, 3], 40, seed=1), length=8, rows=80))
    expected = [
        TokenStream(TextSource(spec), tokenizer()).take(count * 8)[0]
        for spec, count in zip(specs, (20, 60), strict=True)
    ]
    assert sorted(rows) == sorted(row for part in expected for row in part.reshape(-1, 8).tolist())


def test_a_mixture_ends_where_its_shares_cannot_be_kept(tmp_path):
    specs = [
        write_documents(tmp_path / name, files=1, documents=count, seed=seed)
        for seed, (name, count) in enumerate((("short", 12), ("long", 300)))
    ]
    make = lambda rows: PackedStream(  # noqa: E731
        [TokenStream(TextSource(spec), tokenizer()) for spec in specs], Mixture([1, 1], 40, seed=1), length=8, rows=rows
    )
    full = len(tokens_of(read_documents(specs[0])[0], tokenizer())) // 8
    assert 5 < full < 25
    with pytest.raises(ValueError, match=r"'.*short.*' ended after 1 pass"):
        ids(make(2 * full + 20))
    # As long as there are enough rows of it, the order is that of longer data.
    assert len(ids(make(full))) == full


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt", "disk"])
def test_every_form_of_data_resumes_where_it_was(tmp_path, kind):
    texts = [f"w{i % 50} w{i % 7} w{i % 11}" for i in range(300)]
    rows = datasets.Dataset.from_dict({"text": texts})
    if kind == "disk":
        rows.save_to_disk(tmp_path / "data")
        spec = str(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        for part in range(2):
            path = tmp_path / "data" / f"{part}.{kind}"
            piece = rows.shard(2, part)
            if kind == "txt":
                path.write_text("\n\n".join(piece["text"]))
            else:
                {"jsonl": piece.to_json, "csv": piece.to_csv, "parquet": piece.to_parquet}[kind](path)
        spec = str(tmp_path / "data" / f"*.{kind}")
    make = lambda: TokenStream(TextSource(spec), tokenizer(), seed=2, passes=2)  # noqa: E731
    whole = make().take(2400)[0].tolist()
    assert len(whole) == 2400
    for taken in (1, 300, 700, 1300):
        source = make()
        source.take(taken)
        other = make()
        other.load_state(json.loads(json.dumps(source.state())))
        assert other.take(2400)[0].tolist() == whole[taken:]


def test_documents_are_marked_where_asked(corpus):
    rows = list(stream(corpus, rows=20, document_mask=True))
    assert all((row["position_ids"] == 0).sum() >= 1 for row in rows)
    end = tokenizer().eos_token_id
    for row in rows:
        begins = torch.cat([torch.tensor([True]), row["input_ids"][:-1] == end])
        assert torch.equal(row["position_ids"] == 0, begins)


def test_what_is_no_text_is_reported(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": null}\n')
    with pytest.raises(ValueError, match="holds NoneType instead of text in the column 'text'"):
        TokenStream(TextSource(str(tmp_path / "bad.jsonl")), tokenizer()).take(9)


def test_rows_of_a_stream_are_those_of_packed_rows(tmp_path):
    from hf_sam.pretraining import PackedRows, tokenized

    spec = write_documents(tmp_path / "data", files=1, documents=100)
    packed = PackedRows(tokenized(TextSource(spec), tokenizer()), 16, padding=0)
    full = packed.tokens // 16
    sources = [TokenStream(TextSource(spec), tokenizer())]
    rows = PackedStream(sources, Mixture([1.0], block=1), length=16, rows=full)
    assert ids_of(rows) == ids_of(packed[i] for i in range(full))
