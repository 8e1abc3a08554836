"""What `hf-sam sft` and `hf-sam clm` train on, checked before it is loaded: TRL's arguments, and data by name."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from ..runtime.config import ConfigParser
from ..runtime.dataset_specs import data_files, is_saved, loader_of, open_split, open_splits
from ..runtime.disk import check_writable
from ..runtime.models import check_model
from ..runtime.weight_files import check_weights

# Columns each of which is a form of example that TRL's SFTTrainer reads.
SFT_COLUMNS = ("messages", "conversations", "prompt", "input_ids")


def parse_arguments(
    parser: ConfigParser, argv: Sequence[str]
) -> tuple[ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig]:
    """TRL's arguments from flags and from the files of `--config`.

    Raises:
        ValueError: if a value is out of range, there is no model or no data to train on, the model does not exist, or
            files of its weights or of the checkpoint to resume from are damaged.
        OSError: if the output folder cannot be written to.
    """
    # Flags of `accelerate launch` in a config file have done their work.
    script, args, model, mixture = parser.parse(argv, ignore_unknown=True)
    if model.model_name_or_path is None:
        raise ValueError("there is no model to train. Name one with --model_name_or_path: a folder or a hub id.")
    if not mixture.datasets and script.dataset_name is None:
        raise ValueError(
            "there is no data to train on. Name it with --dataset_name (a file, a pattern of files, a folder or a hub "
            "id), or with `datasets` in the file of --config."
        )
    check_writable(args.output_dir)
    revision = None if model.model_revision == "main" else model.model_revision  # TRL's default
    check_model(model.model_name_or_path, revision, weights=not getattr(args, "from_scratch", False))
    if args.resume_from_checkpoint is not None and Path(args.resume_from_checkpoint).is_dir():
        check_weights(Path(args.resume_from_checkpoint))
    return script, args, model, mixture


def load_training_data(
    script: ScriptArguments,
    args: SFTConfig,
    mixture: DatasetMixtureConfig,
    columns: Sequence[str],
) -> dict:
    """The data to train and to evaluate on.

    `--dataset_name` is a file, a pattern of files, a folder or a hub id; a file and a pattern are the split `train`.
    `--dataset_test_split` and `--dataset_train_split` may name a file, a pattern or a folder of their own.

    Args:
        script ([`~trl.ScriptArguments`]): name, configuration and splits of the data.
        args ([`~trl.SFTConfig`]): tells whether the run evaluates.
        mixture ([`~trl.DatasetMixtureConfig`]): several datasets, which are taken instead of the one of `script`.
        columns (`Sequence[str]`): one of these must be there.

    Returns:
        `dict[str, datasets.Dataset | datasets.IterableDataset]`: `train`, and `test` if the run evaluates.

    Raises:
        ValueError: if data, a split or a column is missing; the message names what there is.
    """
    wanted = {"train": script.dataset_train_split}
    if args.eval_strategy != "no":
        wanted["test"] = script.dataset_test_split
    streaming = script.dataset_streaming
    if mixture.datasets:
        place = "datasets"
        splits = dict(get_dataset(_with_loaders(mixture)))
    else:
        place = script.dataset_name
        splits = _told(place, lambda: open_splits(place, config=script.dataset_config, streaming=streaming))
    found = {}
    for role, split in wanted.items():
        if split in splits:
            one = splits[split]
        elif _is_path(split):
            preferred = (role, "validation", "train")
            one = _told(split, functools.partial(open_split, split, streaming=streaming, preferred=preferred))
        else:
            flag = f"--dataset_{role}_split"
            raise ValueError(
                f"The training data {place!r} has no split {split!r}, only {', '.join(map(repr, splits))}. Choose one "
                f"with {flag}, or give it a file of its own: {flag} FILE."
            )
        if one.column_names is not None and not set(columns) & set(one.column_names):  # a stream may not know them
            raise ValueError(
                f"The split {split!r} of {place!r} has no column {' or '.join(map(repr, columns))}, only "
                f"{', '.join(map(repr, one.column_names))}. Choose with --dataset_text_field."
            )
        found[role] = one
    return found


def _is_path(split: str) -> bool:
    """Whether the name of a split is that of data on disk; a folder `test` may be there by chance."""
    return bool(data_files(split)) or (os.sep in split and os.path.isdir(split))


def _told(place: str, load: Callable):
    """What `load` returns; its errors name the place."""
    try:
        return load()
    except ValueError as error:
        raise ValueError(f"Training data {place!r}: {error}") from error


def _with_loaders(mixture: DatasetMixtureConfig) -> DatasetMixtureConfig:
    """The mixture with the loader and the files of `datasets` in place of paths, patterns and saved folders."""
    return dataclasses.replace(
        mixture, datasets=[_told(one.path, lambda one=one: _with_loader(one)) for one in mixture.datasets]
    )


def _with_loader(one: DatasetConfig) -> DatasetConfig:
    if is_saved(one.path):
        # Its tables as they are: `load_dataset`, which TRL calls, does not read such folders itself.
        files = [table["filename"] for table in open_split(one.path, one.split).cache_files]
        return dataclasses.replace(one, path="arrow", data_files=files, split="train")
    if one.data_files is None and (files := data_files(one.path)):
        loader, options = loader_of(files, one.path)
        if loader == "text":
            raise ValueError("a mixture reads a text file line by line. Write its documents into a .jsonl file.")
        return dataclasses.replace(one, path=loader, **options)
    return one
