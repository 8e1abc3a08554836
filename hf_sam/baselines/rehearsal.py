"""Rehearsal: mix old data into the fine-tuning data (arXiv 2406.04836, section 5)."""


def with_rehearsal(new, old, share: float, *, seed: int = 0):
    """Mix a share of old data into the fine-tuning data.

    Datasets keep every row of `new` once; random rows of `old` are added without repetition, and all rows are shuffled.
    Streams are interleaved randomly until one of them ends.

    Args:
        new (`datasets.Dataset` or `datasets.IterableDataset`): the fine-tuning data.
        old (`datasets.Dataset` or `datasets.IterableDataset`): data similar to the training data of the base model,
            with the columns of `new`; a stream if `new` is a stream.
        share (`float`): fraction of old examples in the mixture, at least 0 and below 1.
        seed (`int`, defaults to 0): seed of the selection and of the order.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the mixture; `new` itself if the share is 0.

    Raises:
        ValueError: if the share is out of range, the columns differ, or there is not enough old data.
        TypeError: if only one of them is a stream.
    """
    from ..runtime.packages import require

    require("datasets", "Rehearsal")
    from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

    if not 0 <= share < 1:
        raise ValueError(f"share={share}, the fraction of old examples in the mixture, must be at least 0 and below 1.")
    if share == 0:
        return new
    if isinstance(new, Dataset) != isinstance(old, Dataset) or not isinstance(new, Dataset | IterableDataset):
        raise TypeError(
            f"Rehearsal mixes two Datasets or two IterableDatasets, not {type(new).__name__} and {type(old).__name__}. "
            "Convert a Dataset with .to_iterable_dataset()."
        )
    columns = [set(data.column_names or ()) for data in (new, old)]
    if columns[0] != columns[1]:
        raise ValueError(
            f"The new data has the columns {sorted(columns[0])}, the old data {sorted(columns[1])}. Rename or remove "
            "columns so that they match."
        )
    if isinstance(new, IterableDataset):
        return interleave_datasets(
            [new, old], probabilities=[1 - share, share], seed=seed, stopping_strategy="first_exhausted"
        )
    count = round(len(new) * share / (1 - share))
    if count > len(old):
        raise ValueError(
            f"A share of {share:g} of old data with {len(new)} new examples takes {count} old ones, but there are only "
            f"{len(old)}. Lower the share, or add old data."
        )
    mixture = concatenate_datasets([new, old.shuffle(seed=seed).select(range(count))])
    return mixture.shuffle(seed=seed)
