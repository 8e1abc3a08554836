"""Rehearsal: forget less by going on seeing some of the old data (arXiv 2406.04836, section 5)."""


def with_rehearsal(new, old, share: float, *, seed: int = 0):
    """Fine-tuning data of which a share is old data.

    Datasets of known length keep every row of `new` once; as many random rows of `old` as make up the share are
    added (without repetition), and all are shuffled. Streams are mixed at random in that proportion until one ends.

    Args:
        new (`datasets.Dataset` or `datasets.IterableDataset`): the fine-tuning data.
        old (`datasets.Dataset` or `datasets.IterableDataset`): data of the kind that the base model was trained on,
            with the columns of `new`; a stream if `new` is one.
        share (`float`): share of the examples that is old, from 0 to below 1.
        seed (`int`, defaults to 0): seed of the choice and of the order.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the mixture; `new` itself if the share is 0.

    Raises:
        ValueError: if the share is out of range, the columns differ, or there is not enough old data.
        TypeError: if one is a stream and the other is not.
    """
    from ..runtime.packages import require

    require("datasets", "Rehearsal")
    from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

    if not 0 <= share < 1:
        raise ValueError(f"share={share} must be from 0 to below 1: the share of old examples in the mixture.")
    if share == 0:
        return new
    if isinstance(new, Dataset) != isinstance(old, Dataset) or not isinstance(new, Dataset | IterableDataset):
        raise TypeError(
            f"Rehearsal mixes two Datasets or two IterableDatasets, not {type(new).__name__} and {type(old).__name__}. "
            "A Dataset becomes a stream by .to_iterable_dataset()."
        )
    columns = [set(data.column_names or ()) for data in (new, old)]
    if columns[0] != columns[1]:
        raise ValueError(
            f"The new data has the columns {sorted(columns[0])}, the old data {sorted(columns[1])}. Rename or remove "
            "columns until they agree."
        )
    if isinstance(new, IterableDataset):
        return interleave_datasets(
            [new, old], probabilities=[1 - share, share], seed=seed, stopping_strategy="first_exhausted"
        )
    count = round(len(new) * share / (1 - share))
    if count > len(old):
        raise ValueError(
            f"A share of {share:g} of old data beside {len(new)} new examples takes {count} old ones, but there are "
            f"only {len(old)}."
        )
    mixture = concatenate_datasets([new, old.shuffle(seed=seed).select(range(count))])
    return mixture.shuffle(seed=seed)
