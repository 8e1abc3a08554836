"""Arguments and training data of `hf-sam sft` and `hf-sam clm`, checked before the model is loaded."""

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

# Columns of the dataset formats that TRL's SFTTrainer accepts; one of them must be present.
SFT_COLUMNS = ("messages", "conversations", "prompt", "input_ids")


def parse_arguments(
    parser: ConfigParser, argv: Sequence[str]
) -> tuple[ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig]:
    """Parse TRL's arguments from flags and from the files of `--config`.

    Raises:
        ValueError: if a value is out of range, model or data is not set, the model does not exist, or weight files of
            the model or of the checkpoint to resume from are damaged.
        OSError: if the output folder is not writable.
    """
    # The config file may contain launcher flags, which `run_or_launch` has handled.
    script, args, model, mixture = parser.parse(argv, ignore_unknown=True)
    if model.model_name_or_path is None:
        raise ValueError("there is no model to train. Set --model_name_or_path to a folder or a Hub id.")
    if not mixture.datasets and script.dataset_name is None:
        raise ValueError(
            "there is no data to train on. Set --dataset_name to a file, a pattern of files, a folder or a Hub id, or "
            "`datasets` in the file of --config."
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
    """Load the training and evaluation data.

    `--dataset_name` is a file, a glob pattern, a folder or a Hub id. A file or a pattern becomes the split `train`.
    `--dataset_train_split` and `--dataset_test_split` may also be a file, a pattern or a folder.

    Args:
        script ([`~trl.ScriptArguments`]): name, configuration and splits of the dataset.
        args ([`~trl.SFTConfig`]): training arguments; `eval_strategy` decides whether `test` is loaded.
        mixture ([`~trl.DatasetMixtureConfig`]): several datasets, used instead of the one in `script`.
        columns (`Sequence[str]`): columns of which each split must have at least one.

    Returns:
        `dict[str, datasets.Dataset | datasets.IterableDataset]`: `train`, and `test` if the run evaluates.

    Raises:
        ValueError: if data, a split or a column does not exist; the message lists the alternatives.
    """
    wanted = {"train": script.dataset_train_split}
    if args.eval_strategy != "no":
        wanted["test"] = script.dataset_test_split
    streaming = script.dataset_streaming
    if mixture.datasets:
        place = "datasets"
        splits = dict(get_dataset(_resolve_paths(mixture)))
    else:
        place = script.dataset_name
        splits = _load_from(place, lambda: open_splits(place, config=script.dataset_config, streaming=streaming))
    found = {}
    for role, split in wanted.items():
        if split in splits:
            one = splits[split]
        elif _is_path(split):
            preferred = (role, "validation", "train")
            one = _load_from(split, functools.partial(open_split, split, streaming=streaming, preferred=preferred))
        else:
            flag = f"--dataset_{role}_split"
            raise ValueError(
                f"The training data {place!r} has no split {split!r}, only {', '.join(map(repr, splits))}. Set {flag} "
                f"to one of these splits, or to a file: {flag} FILE."
            )
        if one.column_names is not None and not set(columns) & set(one.column_names):  # None: unknown for some streams
            raise ValueError(
                f"The split {split!r} of {place!r} has no column {' or '.join(map(repr, columns))}, only "
                f"{', '.join(map(repr, one.column_names))}. Choose with --dataset_text_field."
            )
        found[role] = one
    return found


def _is_path(split: str) -> bool:
    """Whether a split is a path. A folder needs a separator, because a folder `test` may exist by chance."""
    return bool(data_files(split)) or (os.sep in split and os.path.isdir(split))


def _load_from(place: str, load: Callable):
    """Call `load`; its ValueErrors get the place as prefix."""
    try:
        return load()
    except ValueError as error:
        raise ValueError(f"Training data {place!r}: {error}") from error


def _resolve_paths(mixture: DatasetMixtureConfig) -> DatasetMixtureConfig:
    """Replace paths, patterns and saved folders in a mixture by loaders of `datasets` and their files."""
    return dataclasses.replace(
        mixture,
        datasets=[_load_from(one.path, lambda one=one: _resolve_path(one)) for one in mixture.datasets],
    )


def _resolve_path(one: DatasetConfig) -> DatasetConfig:
    if is_saved(one.path):
        # TRL calls `load_dataset`, which cannot load folders of `save_to_disk`, but can load their Arrow files.
        files = [table["filename"] for table in open_split(one.path, one.split).cache_files]
        return dataclasses.replace(one, path="arrow", data_files=files, split="train")
    if one.data_files is None and (files := data_files(one.path)):
        loader, options = loader_of(files, one.path)
        if loader == "text":
            raise ValueError("a mixture reads a text file line by line. Write its documents into a .jsonl file.")
        return dataclasses.replace(one, path=loader, **options)
    return one
