"""Rehearsal: the share of old data, and nothing lost."""

import pytest
from datasets import Dataset

from hf_sam.baselines import with_rehearsal

NEW = Dataset.from_dict({"text": [f"new {i}" for i in range(80)]})
OLD = Dataset.from_dict({"text": [f"old {i}" for i in range(100)]})


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_each_new_row_once_and_the_share_of_old_ones(share):
    mixed = with_rehearsal(NEW, OLD, share)["text"]
    old = [text for text in mixed if text.startswith("old")]
    assert sorted(set(mixed) - set(old)) == sorted(NEW["text"])
    assert len(mixed) == 80 + len(old)
    assert len(old) == len(set(old)) == round(80 * share / (1 - share))
    assert len(old) / len(mixed) == pytest.approx(share, abs=0.006)


def test_order_is_mixed_and_reproducible():
    mixed = with_rehearsal(NEW, OLD, 0.5)["text"]
    assert mixed == with_rehearsal(NEW, OLD, 0.5)["text"]
    assert mixed != with_rehearsal(NEW, OLD, 0.5, seed=1)["text"]
    assert 20 < sum(text.startswith("old") for text in mixed[:80]) < 60


def test_streams_are_mixed_in_proportion():
    mixed = [row["text"] for row in with_rehearsal(NEW.to_iterable_dataset(), OLD.to_iterable_dataset(), 0.2)]
    new = [text for text in mixed if text.startswith("new")]
    assert new == NEW["text"][: len(new)]
    assert 0.1 < 1 - len(new) / len(mixed) < 0.3


def test_no_share_is_the_new_data():
    assert with_rehearsal(NEW, OLD, 0) is NEW


@pytest.mark.parametrize(
    ("new", "old", "share", "error", "message"),
    [
        (NEW, OLD, 1.0, ValueError, "share=1.0"),
        (NEW, OLD, -0.1, ValueError, "share=-0.1"),
        (NEW, OLD, 0.9, ValueError, "takes 720 old ones, but there are only 100"),
        (NEW, OLD.rename_column("text", "body"), 0.1, ValueError, r"\['text'\], the old data \['body'\]"),
        (NEW, OLD.to_iterable_dataset(), 0.1, TypeError, "to_iterable_dataset"),
        (NEW["text"], OLD["text"], 0.1, TypeError, "two Datasets"),
    ],
)
def test_what_cannot_be_mixed_is_refused(new, old, share, error, message):
    with pytest.raises(error, match=message):
        with_rehearsal(new, old, share)
